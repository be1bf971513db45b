"""Whether the gateway lives, whether it can work, and figures for the monitoring. Outside the versioned API."""

import threading
import time

import httpx
import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api_gateway import events
from api_gateway.http import came_through_proxy, gateway_of
from api_gateway.renewal import endings
from api_gateway.work import Gateway
from medhive import __version__
from medhive.errors import MedHiveError, NotFound

router = APIRouter(tags=["health"])
MLFLOW_TIMEOUT_S = 2.0  # it is only asked whether it lives
MLFLOW_ASKED_EVERY_S = 5.0
MLFLOW_WAITED_FOR_S = 0.5

log = structlog.get_logger(__name__)


class MlflowHealth:
    """The tracking server's last known health: looked up beside, since even its name may take long to find.

    Args:
        url: where it answers; None when there is none.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._asked_at = float("-inf")
        self._state = "unreachable" if url else "not configured"
        self._looking = threading.Lock()

    def ask(self) -> str:
        """`ok`, `unreachable` or `not configured`; waits at most `MLFLOW_WAITED_FOR_S` for a look."""
        if self._url and time.monotonic() - self._asked_at > MLFLOW_ASKED_EVERY_S and self._looking.acquire(False):
            look = threading.Thread(target=self._look, args=(self._url,), name="mlflow-health", daemon=True)
            look.start()
            look.join(MLFLOW_WAITED_FOR_S)
        return self._state

    def _look(self, url: str) -> None:
        try:
            self._state = self._probe(url)
            self._asked_at = time.monotonic()
        finally:
            self._looking.release()

    def _probe(self, url: str) -> str:
        try:
            # Only its life is asked for, and nothing told: its certificate need not be known here.
            answer = httpx.get(url.rstrip("/") + "/health", timeout=MLFLOW_TIMEOUT_S, verify=False)  # noqa: S501
        except httpx.HTTPError:
            return "unreachable"
        return "ok" if answer.is_success else "unreachable"


@router.get("/health")
def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "alive", "version": __version__}


@router.get("/ready", responses={503: {"description": "The database does not answer."}})
def ready(request: Request) -> JSONResponse:
    """The database answers; a missing tracking server, or a certificate that ends soon, only degrades."""
    gateway = gateway_of(request)
    database = _database_state(gateway)
    mlflow = request.app.state.mlflow_health.ask()
    good = database == "ok"
    ending = [{"certificate": each.certificate, "ends_at": each.ends_at.isoformat()} for each in endings(gateway)]
    status = "unavailable" if not good else "degraded" if mlflow == "unreachable" or ending else "ready"
    answer = {"status": status, "database": database, "mlflow": mlflow, "certificates_ending": ending}
    return JSONResponse(answer, status_code=200 if good else 503)


def _database_state(gateway: Gateway) -> str:
    try:
        with gateway.database.read() as session:
            events.head_number(session)
    except MedHiveError as error:
        log.warning("database.unreachable", cause=error.code)
        return "unreachable"
    return "ok"


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """Figures for Prometheus; not for the outside, where the proxy does not pass it on.

    Raises:
        NotFound: it was passed on after all, by a proxy that is set up wrongly.
    """
    if came_through_proxy(request, gateway_of(request)):
        raise NotFound("There is nothing here for the outside.")
    page = generate_latest(request.app.state.metrics).decode()
    return PlainTextResponse(page, media_type=CONTENT_TYPE_PLAIN_0_0_4)
