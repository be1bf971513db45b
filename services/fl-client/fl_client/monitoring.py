"""What a hospital's node tells the hospital's own Prometheus: numbers, and of names only those of its studies.

Off unless a port is set. Nothing here goes to the coordinator; no name of a file, a folder or a person is in it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fl_client.events import (
    Connected,
    Disconnected,
    Listener,
    NodeEvent,
    PauseChanged,
    RoundDone,
    RoundFailed,
    TaskRefused,
)
from fl_client.node import Node
from fl_client.settings import PREFIX, Settings
from fl_client.store import Store
from medhive.envelope import TaskType
from medhive.monitoring import LOOPBACK, new_registry, served

VARIABLE = PREFIX + "METRICS_PORT"
DONE, FAILED, REFUSED = "done", "failed", "refused"


class Figures:
    """Listens to a node beside another listener, and counts.

    Args:
        settings: whether and where figures are shown.
        listener: told every event too.
    """

    def __init__(self, settings: Settings, listener: Listener) -> None:
        self._settings = settings
        self._listener = listener
        self.registry = new_registry({"state": settings.state_dir})
        self._connected = Gauge(
            "medhive_site_connected", "1 while gateway or fleet answer.", ["to"], registry=self.registry
        )
        self._tasks = Counter("medhive_site_tasks", "Tasks by how they ended.", ["result"], registry=self.registry)
        self._rounds = Counter("medhive_site_rounds_trained", "Rounds trained.", registry=self.registry)
        self._seconds = Counter("medhive_site_work_seconds", "Spent on tasks that were done.", registry=self.registry)
        self._last = Gauge(
            "medhive_site_last_task_timestamp_seconds",
            "When the last task ended; 0 before one.",
            registry=self.registry,
        )
        self._paused = Gauge("medhive_site_paused", "1 while training is held.", registry=self.registry)
        for to in ("gateway", "fleet"):
            self._connected.labels(to)
        for result in (DONE, FAILED, REFUSED):
            self._tasks.labels(result)

    def __call__(self, event: NodeEvent) -> None:
        """Count one event, and pass it on."""
        if isinstance(event, Connected | Disconnected):
            self._connected.labels(event.to).set(isinstance(event, Connected))
        elif isinstance(event, PauseChanged):
            self._paused.set(event.paused)
        elif isinstance(event, RoundDone | RoundFailed | TaskRefused):
            self._count(event)
        self._listener(event)

    def _count(self, event: RoundDone | RoundFailed | TaskRefused) -> None:
        self._last.set(time.time())
        if isinstance(event, RoundDone):
            self._tasks.labels(DONE).inc()
            self._seconds.inc(60 * event.minutes)
            if event.kind == TaskType.TRAIN.value:
                self._rounds.inc()
        else:
            self._tasks.labels(FAILED if isinstance(event, RoundFailed) else REFUSED).inc()

    @contextmanager
    def served_for(self, node: Node, store: Store, host: str = LOOPBACK) -> Iterator[None]:
        """Serve the figures of this node and its site's database while the block runs, where a port for them is set.

        Raises:
            InvalidInput: it is taken.
        """
        port = self._settings.metrics_port
        if port is None:
            yield
            return
        self.registry.register(Looked(store, lambda: node.trainer_restarts))
        with served(self.registry, host, port, VARIABLE):
            yield


class Looked(Collector):
    """What is looked up when somebody asks.

    Args:
        store: with the site's consents.
        restarts: of the trainer.
    """

    def __init__(self, store: Store, restarts: Callable[[], int]) -> None:
        self._store = store
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """Look now."""
        restarts = CounterMetricFamily("medhive_site_trainer_restarts", "Trainers started again after one had ended.")
        restarts.add_metric([], self._restarts())
        yield restarts
        skipped = GaugeMetricFamily(
            "medhive_site_skipped_examples", "Left out when a study's data were last consented to.", labels=["study"]
        )
        given = reversed(self._store.consents())
        newest = {each.study: each.signed.body for each in given if each.signed.body.dataset_fingerprint}
        for study, body in sorted(newest.items()):
            skipped.add_metric([study], sum(body.skipped.values()))
        yield skipped
