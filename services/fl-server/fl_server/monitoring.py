"""What the aggregator tells Prometheus: its leases as they are, and what its processes report in their log.

Each run is a process of its own, which says what happens in it in its log's events; the service passes these on and counts
them. So no process needs another channel, and counts begin anew with the service, as Prometheus expects of counters.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medhive.monitoring import new_registry

ROUND_CLOSED, ROUND_FAILED = "round.closed", "round.failed"
BACKLOG = "tracking.backlog"
CONTRIBUTIONS = {"contribution.accepted": "accepted", "contribution.refused": "refused"}
SITE_DROPPED = "site.dropped"


class Leases(Collector):
    """The runs under this service's leases.

    Args:
        ages: for each run that is held, the seconds since its lease was last confirmed by the gateway.
    """

    def __init__(self, ages: Callable[[], tuple[float, ...]]) -> None:
        self._ages = ages

    def collect(self) -> Iterator[Metric]:
        """Look now."""
        ages = self._ages()
        yield GaugeMetricFamily("medhive_server_runs_active", "Runs under a lease of this service.", value=len(ages))
        yield GaugeMetricFamily(
            "medhive_server_lease_age_seconds",
            "Since the gateway last confirmed the lease that waits longest for it; 0 without a run.",
            value=max(ages, default=0.0),
        )


class Figures:
    """The aggregator's figures.

    Args:
        state_dir: its disk is told of too.
    """

    def __init__(self, state_dir: Path) -> None:
        self.registry: CollectorRegistry = new_registry({"state": state_dir})
        self._rounds = self._counter("rounds", "Rounds that ended, by how.", "result")
        self._contributions = self._counter("contributions", "Answers of sites, by what became of them.", "result")
        self._dropped = self._counter("sites_dropped", "Times that a site was left out of a round it was asked for.")
        self._starts = self._counter("process_starts", "Starts of the processes beside the dispatcher.", "service")
        self._seconds = self._gauge(
            "last_round_seconds", "The last round that closed, from its first question to its end."
        )
        self._overhead = self._gauge("last_round_overhead_seconds", "The same without the slowest site's training.")
        self._backlog = self._gauge("tracking_backlog_runs", "Runs with something that MLflow has not been told yet.")
        for result in ("closed", "failed"):
            self._rounds.labels(result)
        for result in CONTRIBUTIONS.values():
            self._contributions.labels(result)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"medhive_server_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"medhive_server_{name}", text, registry=self.registry)

    def started(self, service: str) -> None:
        """A process beside the dispatcher was started."""
        self._starts.labels(service).inc()

    def observe(self, event: Mapping[str, Any]) -> None:
        """Count one event of a process's log; most say nothing that is counted."""
        name = event["event"]
        if name == ROUND_CLOSED:
            self._rounds.labels("closed").inc()
            self._seconds.set(float(event["seconds"]))
            self._overhead.set(float(event["overhead_s"]))
        elif name == ROUND_FAILED:
            self._rounds.labels("failed").inc()
        elif name == SITE_DROPPED:
            self._dropped.inc()
        elif name == BACKLOG:
            self._backlog.set(int(event["runs"]))
        elif name in CONTRIBUTIONS:
            self._contributions.labels(CONTRIBUTIONS[name]).inc()
