"""The application: endpoints, errors, the frame around them, and the tasks that go on beside them."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import structlog
from fastapi import FastAPI
from sqlalchemy import delete

from api_gateway import blobs, errors, events, runs
from api_gateway.http import Frame
from api_gateway.models import Attempt, Token, UsedNonce
from api_gateway.monitoring import Exchanges, registry_of
from api_gateway.patience import Pace
from api_gateway.renewal import Renewal
from api_gateway.routes import blobs as blob_routes
from api_gateway.routes import events as event_routes
from api_gateway.routes import health, identity, queues, sites, studies, tracking, versions
from api_gateway.routes import runs as run_routes
from api_gateway.work import Gateway
from medhive import __version__
from medhive.wire import API, Problem

SETTLE_EVERY_S = 5.0  # how late a consent deadline may be noticed when nobody looks
SWEEP_EVERY_S = 600.0
FOLLOW_EVERY_S = 1.0  # a look at three small files
RUN_BLOBS_KEPT = timedelta(hours=24)  # after a run's end, for whoever wants to look; a clean-up by hand does not wait
TOKENS_KEPT = timedelta(days=7)  # after their expiry

log = structlog.get_logger(__name__)


def create_app(gateway: Gateway) -> FastAPI:
    """Build the application around the process's parts."""
    app = FastAPI(
        title="MedHive gateway",
        version=__version__,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        responses={"4XX": {"model": Problem, "description": "Refused; the problem document says why."}},
    )
    app.state.gateway = gateway
    app.state.mlflow_health = health.MlflowHealth(gateway.settings.mlflow_url)
    app.state.metrics = registry_of(gateway, app.state.mlflow_health.ask)
    app.state.renewal = Renewal(gateway)
    app.state.mlflow_logins = tracking.Remembered()
    errors.install(app)
    for module in (identity, sites, studies, run_routes, blob_routes, versions, queues, event_routes):
        app.include_router(module.router, prefix=API)
    app.include_router(queues.root)
    app.include_router(health.router)
    app.include_router(tracking.router)
    pace = Pace(gateway.settings.body_window_s, gateway.settings.body_window_bytes)
    app.add_middleware(Frame, pace=pace, count=Exchanges(app.state.metrics).count)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    gateway.hub.attach()
    tasks = [
        asyncio.create_task(_repeat(SETTLE_EVERY_S, "settle", lambda: runs.settle_due(gateway))),
        asyncio.create_task(_repeat(SWEEP_EVERY_S, "sweep", lambda: sweep(gateway), at_once=True)),
        asyncio.create_task(_repeat(gateway.settings.renewal_look_s, "renewal", app.state.renewal.look, at_once=True)),
        asyncio.create_task(_repeat(FOLLOW_EVERY_S, "follow", app.state.renewal.follow)),
        asyncio.create_task(_watch(gateway)),
    ]
    yield
    gateway.hub.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gateway.database.close()


async def _watch(gateway: Gateway) -> None:
    def head() -> int:
        with gateway.database.read() as session:
            return events.head_number(session)

    await _forever("watch", lambda: gateway.hub.watch(head))


async def _repeat(every_s: float, name: str, step: Callable[[], object], *, at_once: bool = False) -> None:
    """Do a step again and again; `at_once` also at the start, after which a short life may never come to the first time."""
    pauses = itertools.chain([0.0] if at_once else [], itertools.repeat(every_s))

    async def once() -> None:
        await asyncio.sleep(next(pauses))
        await asyncio.to_thread(step)

    await _forever(name, once)


async def _forever(name: str, step: Callable[[], Awaitable[None]]) -> None:
    """The outermost loop of a background task: a database that is away for a while must not end it."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("background.failed", task=name)
            await asyncio.sleep(1.0)


def sweep(gateway: Gateway) -> None:
    """Forget what has run out, and delete the bytes that nothing needs."""
    with gateway.system_write() as work:
        session = work.session
        session.execute(delete(Token).where(Token.expires_at <= work.now - TOKENS_KEPT))
        session.execute(delete(UsedNonce).where(UsedNonce.expires_at <= work.now))
        session.execute(delete(Attempt).where(Attempt.window_ends_at <= work.now))
        blobs.release_finished_runs(work, work.now - RUN_BLOBS_KEPT)
    blobs.sweep(gateway)
