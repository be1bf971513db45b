"""What the gateway tells Prometheus: the state of runs, sites and rounds as its database has it, and its own exchanges.

A scrape comes every few seconds for years, so it costs a handful of counting queries and reads no report.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime

from cryptography import x509
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Select, func, or_, select

from api_gateway import blobs, events, runs
from api_gateway.models import Round, Run, Site, TrainingRequest, Version
from api_gateway.state import LEAVES, own_certificate
from api_gateway.work import Caller, Gateway, Work
from medhive.errors import InvalidInput
from medhive.monitoring import new_registry
from medhive.spec import RunSpec
from medhive.states import RequestState, Role, RoundState, RunState, SiteState
from medhive.wire import API

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})
STREAM = f"{API}/events"  # lasts as long as somebody listens
SECONDS = (0.01, 0.05, 0.25, 1.0, 5.0, 30.0)  # from a look at a row to a part of a blob over a slow line


class Exchanges:
    """Counts what was asked and how it ended, and the seconds, but for the event stream, which has a figure of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the two figures."""
        self._ended = Counter(
            "medhive_gateway_exchanges",
            "Exchanges by method and by the first digit of their status.",
            ["method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "medhive_gateway_exchange_seconds",
            "From the head of a request to the end of its answer, by method.",
            ["method"],
            buckets=SECONDS,
            registry=registry,
        )

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """One exchange has ended; `status` is 0 where nobody waited for the answer."""
        method = method if method in METHODS else "other"
        self._ended.labels(method, f"{status // 100}xx" if status else "none").inc()
        if path != STREAM:
            self._seconds.labels(method).observe(seconds)


class Figures(Collector):
    """The figures that are looked up when somebody asks.

    Args:
        gateway: the process's parts.
        mlflow: how the tracking server is, as `/ready` tells it.
    """

    def __init__(self, gateway: Gateway, mlflow: Callable[[], str]) -> None:
        self._gateway = gateway
        self._mlflow = mlflow

    def collect(self) -> Iterator[Metric]:
        """Look now."""
        with self._gateway.unit(self._gateway.database.read, Caller(Role.ANALYST, "monitoring"), "") as work:
            found = [*_runs(work), *_sites(work), *_rounds(work), *_store(work)]
        yield from found
        yield _gauge("event_streams", "Event streams that are open.", self._gateway.hub.streams)
        yield _gauge(
            "mlflow_up", "1 when the tracking server answers; 0 also where none is set.", self._mlflow() == "ok"
        )
        yield _certificates(self._gateway)


def registry_of(gateway: Gateway, mlflow: Callable[[], str]) -> CollectorRegistry:
    """The gateway's registry, without its exchanges."""
    registry = new_registry({"state": gateway.state.folder, "blobs": gateway.state.blobs})
    registry.register(Figures(gateway, mlflow))
    return registry


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"medhive_{name}", text, value=value)


def _by_state(name: str, text: str, states: type[RunState | SiteState], found: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"medhive_{name}", text, labels=["state"])
    for state in states:
        family.add_metric([state], found.get(state, 0))
    return family


def _count(work: Work, query: Select[int]) -> int:
    return work.session.execute(query).scalar_one()


def _runs(work: Work) -> Iterator[Metric]:
    pending = select(func.count()).select_from(TrainingRequest).where(TrainingRequest.state == RequestState.PENDING)
    free = or_(Run.lease_expires_at.is_(None), Run.lease_expires_at <= work.now)
    open_states = (RunState.READY, RunState.RUNNING)
    waiting = select(func.count()).select_from(Run).where(Run.state.in_(open_states), free)
    yield _gauge("requests_pending", "Requests that wait for an admin.", _count(work, pending))
    yield _by_state("runs", "Runs by state.", RunState, runs.counts(work))
    yield _gauge(
        "runs_without_aggregator", "Runs that could go on and that no aggregator holds.", _count(work, waiting)
    )
    yield _gauge("versions", "Model versions.", _count(work, select(func.count()).select_from(Version)))


def _sites(work: Work) -> Iterator[Metric]:
    states = dict(work.session.execute(select(Site.state, func.count()).group_by(Site.state)).all())
    yield _by_state("sites", "Sites by state.", SiteState, states)
    seen = GaugeMetricFamily(
        "medhive_site_last_seen_timestamp_seconds", "When an active site last spoke to the gateway.", labels=["site"]
    )
    online = GaugeMetricFamily(
        "medhive_site_node_online", "1 when the SuperLink hears an active site's node.", labels=["site"]
    )
    query = select(Site.name, Site.last_seen_at, Site.node_online).where(Site.state == SiteState.ACTIVE)
    for name, last_seen, is_online in work.session.execute(query.order_by(Site.name)):
        if last_seen is not None:
            seen.add_metric([name], last_seen.timestamp())
        online.add_metric([name], is_online)
    yield seen
    yield online


def _rounds(work: Work) -> Iterator[Metric]:
    """Of each study's open rounds the one that is open longest."""
    oldest: dict[str, tuple[float, float]] = {}
    query = select(Run.study, Run.spec, Round.opened_at).join(Round, Round.run_id == Run.id)
    query = query.where(Run.state == RunState.RUNNING, Round.state == RoundState.OPEN)
    for study, spec, opened_at in work.session.execute(query):
        deadline_s = float(RunSpec.model_validate(spec).options.deadline_s)
        oldest[study] = max(oldest.get(study, (0.0, 0.0)), ((work.now - opened_at).total_seconds(), deadline_s))
    seconds = GaugeMetricFamily(
        "medhive_round_open_seconds", "How long a study's oldest open round is open.", labels=["study"]
    )
    deadline = GaugeMetricFamily(
        "medhive_round_deadline_seconds",
        "The deadline of that round; it counts from the start of a site's training, so a round may be open longer.",
        labels=["study"],
    )
    for study, (open_s, deadline_s) in sorted(oldest.items()):
        seconds.add_metric([study], open_s)
        deadline.add_metric([study], deadline_s)
    yield seconds
    yield deadline


def _store(work: Work) -> Iterator[Metric]:
    down, up = work.session.execute(
        select(func.coalesce(func.sum(Round.bytes_down), 0), func.coalesce(func.sum(Round.bytes_up), 0))
    ).one()
    travelled = CounterMetricFamily(
        "medhive_rounds_bytes",
        "Weights that rounds have moved, to sites (down) and from them (up).",
        labels=["direction"],
    )
    travelled.add_metric(["down"], int(down))
    travelled.add_metric(["up"], int(up))
    yield travelled
    yield _gauge("blob_bytes", "What the blob store holds.", blobs.total_bytes(work))
    yield _gauge("events", "Number of the newest event.", events.head_number(work.session))


def _certificates(gateway: Gateway) -> Metric:
    ends = GaugeMetricFamily(
        "medhive_certificate_expiry_timestamp_seconds", "When a certificate ends.", labels=["certificate"]
    )
    ends.add_metric(["ca"], gateway.state.authority.certificate.not_valid_after_utc.timestamp())
    for leaf in LEAVES:
        # Read each time: what is renewed lies there anew.
        ends.add_metric([leaf], _end_of((gateway.state.folder / "tls" / f"{leaf}.crt").read_bytes()).timestamp())
    # An operator is just replacing it, or has laid down what cannot be read: all other figures are shown as always.
    with contextlib.suppress(InvalidInput):
        own = own_certificate(gateway.settings)
        if own is not None:
            ends.add_metric(["own"], own.not_valid_after_utc.timestamp())
    return ends


def _end_of(pem: bytes) -> datetime:
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc
