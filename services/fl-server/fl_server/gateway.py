"""What a run asks of the gateway, in typed calls that outlast a gateway's restart.

A round may take an hour; a gateway that is restarted meanwhile must not cost it. So every call that matters is repeated
until it is answered, and only the answer that the lease is somebody else's ends the work.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from medhive.client import GatewayClient
from medhive.errors import Conflict, IllegalTransition, IncompatibleVersion, MedHiveError, NotFound, Unreachable
from medhive.introduction import known_key_ids
from medhive.signing import VerifyKey
from medhive.states import RoundState
from medhive.version import require_compatible
from medhive.wire import (
    API,
    CoordinatorAnswer,
    Fenced,
    NodeAnswer,
    RoundAnswer,
    RoundReport,
    RunAnswer,
    RunEnd,
    VersionZero,
)

MAX_WEIGHTS_BYTES = 2 * 1024**3
"""The blob store takes no larger one."""

PATIENCE_S = 24 * 3600.0
"""How long a gateway may be away before a run is given up: a night and a morning."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
"""Back within a moment of a quick restart, without filling the log during a long outage."""

SERVER_ERROR = 500
STALE_FENCE = "stale-fence"
"""The gateway's word for a report under a lease that has passed to another."""

Result = TypeVar("Result")

log = structlog.get_logger()


class LeaseLost(Conflict):
    """Another aggregator holds this run now; nothing that this process reports counts any more."""

    code = "lease-lost"


class RunOver(MedHiveError):
    """The gateway says that this run has ended; there is nothing left to report."""

    code = "run-over"


@contextmanager
def lease_loss_named() -> Iterator[None]:
    """Tell a lease that has passed on, and a run that has ended meanwhile, from other conflicts.

    Raises:
        LeaseLost, RunOver: these; other errors pass as they are.
    """
    try:
        yield
    except IllegalTransition as error:
        raise RunOver(f"The run is over: {error}") from error
    except Conflict as error:
        if error.data.get("cause") == STALE_FENCE:
            raise LeaseLost(f"The lease on this run has passed on: {error}") from error
        raise


class Desk(Protocol):
    """What the round loop needs of the gateway, for one run under one lease."""

    def look(self) -> RunAnswer:
        """The run as it stands, with consents and activity; keeps the lease alive. Raises `Unreachable`, `LeaseLost`."""

    def start(self) -> RunAnswer:
        """Take the run from ready to running."""

    def rounds(self) -> list[RoundAnswer]:
        """The rounds reported so far."""

    def report_round(self, number: int, report: RoundReport) -> None:
        """Report a round, again with the same content if need be."""

    def version_zero(self, digest: str, statistics: Mapping[str, list[float]]) -> None:
        """Name the study's initial weights; the first to do so wins."""

    def version_statistics(self, study: str, version: int) -> dict[str, list[float]]:
        """The statistics that an existing version was trained with; empty when it has none or does not exist."""

    def end(self, end: RunEnd) -> None:
        """Report the end of the run."""

    def fetch(self, digest: str, destination: Path, max_bytes: int) -> int:
        """Bring a blob of the run here; returns the bytes that travelled."""

    def store(self, source: Path, digest: str, site: str = "") -> int:
        """Bring a file into the run's blobs, for all its sites or for one alone; returns the bytes that travelled."""

    @property
    def fence(self) -> int:
        """The lease's number, which stands in every report."""


def key_ids(client: GatewayClient, present: VerifyKey) -> tuple[str, ...]:
    """The ids of the coordinator's present key and of those that it has followed, which a consent may name."""
    answer = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator"))
    return known_key_ids(present, answer.successions)


class NodeDesk(Desk, Protocol):
    """What there is to know of the hospitals' nodes beside it."""

    def key_ids(self, present: VerifyKey) -> tuple[str, ...]:
        """The ids of the coordinator's keys that a consent may name: the present one, and those that it has followed."""

    def nodes(self) -> Mapping[str, int]:
        """Each site's registered node."""

    def online(self) -> frozenset[str]:
        """The sites whose node the SuperLink heard of lately. Raises `Unreachable`."""

    def outdated(self) -> Mapping[str, str]:
        """Why a site cannot be asked: its version of the exchange is not understood here, nor this one there."""


def unfit_versions(nodes: Iterable[NodeAnswer]) -> dict[str, str]:
    """Site to the sentence that names both versions and the side to upgrade, where the protocols do not fit."""
    unfit: dict[str, str] = {}
    for node in nodes:
        try:
            if node.protocol is not None:
                require_compatible(node.protocol, "the coordinator", "the hospital", node.software or "")
        except IncompatibleVersion as error:
            unfit[node.site] = f"its version does not fit: {error}"
    return unfit


class GatewayDesk:
    """The real desk, over HTTP. Its transfers may be called from several threads."""

    def __init__(self, client: GatewayClient, run_id: str, fence: int) -> None:
        self._client = client
        self._run = f"{API}/runs/{run_id}"
        self._server = f"{API}/server/runs/{run_id}"
        self._fence = fence
        self._closed = threading.Event()

    @property
    def fence(self) -> int:
        return self._fence

    def close(self) -> None:
        """End every patient call, so that the process can end."""
        self._closed.set()
        self._client.close()

    def look(self) -> RunAnswer:
        with lease_loss_named():
            return RunAnswer.model_validate(self._client.post(f"{self._server}/heartbeat", Fenced(fence=self._fence)))

    def start(self) -> RunAnswer:
        return RunAnswer.model_validate(self._leased("POST", "start", Fenced(fence=self._fence)))

    def _leased(self, method: str, what: str, body: Any) -> Any:
        """Report under the lease until the gateway has heard it."""
        with lease_loss_named():
            return self._patiently(lambda: self._client.request(method, f"{self._server}/{what}", body=body))

    def key_ids(self, present: VerifyKey) -> tuple[str, ...]:
        return self._patiently(lambda: key_ids(self._client, present))

    def nodes(self) -> Mapping[str, int]:
        answers = self._patiently(self._nodes)
        return {node.site: int(node.node_id) for node in answers if node.wanted and node.node_id is not None}

    def online(self) -> frozenset[str]:
        return frozenset(node.site for node in self._nodes() if node.wanted and node.online)

    def outdated(self) -> Mapping[str, str]:
        return unfit_versions(self._patiently(self._nodes))

    def _nodes(self) -> list[NodeAnswer]:
        return [NodeAnswer.model_validate(row) for row in self._client.get(f"{API}/server/nodes")]

    def rounds(self) -> list[RoundAnswer]:
        rows = self._patiently(lambda: self._client.get(f"{self._run}/rounds"))
        return [RoundAnswer.model_validate(row) for row in rows]

    def report_round(self, number: int, report: RoundReport) -> None:
        self._leased("PUT", f"rounds/{number}", report)

    def version_zero(self, digest: str, statistics: Mapping[str, list[float]]) -> None:
        body = VersionZero(fence=self._fence, digest=digest, statistics=dict(statistics))
        self._leased("POST", "version-zero", body)

    def version_statistics(self, study: str, version: int) -> dict[str, list[float]]:
        try:
            row = self._patiently(lambda: self._client.get(f"{API}/studies/{study}/versions/{version}"))
        except NotFound:
            return {}
        return {name: [float(x) for x in values] for name, values in row["manifest"]["body"]["statistics"].items()}

    def end(self, end: RunEnd) -> None:
        self._leased("POST", "end", end)

    def fetch(self, digest: str, destination: Path, max_bytes: int) -> int:
        path = f"{self._run}/blobs/{digest}"
        return int(self._patiently(lambda: self._client.download(path, destination, digest, max_bytes=max_bytes)))

    def store(self, source: Path, digest: str, site: str = "") -> int:
        path = f"{self._run}/blobs/{digest}{f'?site={site}' if site else ''}"
        return int(self._patiently(lambda: self._client.upload(path, source)))

    def _patiently(self, call: Callable[[], Result]) -> Result:
        return patiently(call, closed=self._closed)


def patiently(
    call: Callable[[], Result],
    *,
    closed: threading.Event,
    patience_s: float = PATIENCE_S,
    on_wait: Callable[[MedHiveError], None] | None = None,
) -> Result:
    """Repeat a call until the gateway answers it.

    Args:
        call: may be repeated without harm.
        closed: set to give up at once.
        patience_s: how long to go on.
        on_wait: told once, at the first failure.

    Raises:
        MedHiveError: the gateway's refusal; `Unreachable` after `patience_s` seconds or when `closed`.
    """
    deadline = time.monotonic() + patience_s
    wait = FIRST_WAIT_S
    while True:
        try:
            return call()
        except MedHiveError as error:
            if not is_passing(error) or time.monotonic() > deadline:
                raise
            if wait == FIRST_WAIT_S:
                log.warning("gateway.away", reason=str(error))
                if on_wait:
                    on_wait(error)
            if closed.wait(wait):
                raise
            wait = min(wait * 2, LONGEST_WAIT_S)


def is_passing(error: MedHiveError) -> bool:
    """Whether the same call may succeed later: nobody answers, or the gateway is in trouble."""
    status = error.data.get("status", 0)
    return isinstance(error, Unreachable) or (isinstance(status, int) and status >= SERVER_ERROR)


def closed_rounds(rounds: list[RoundAnswer]) -> list[RoundAnswer]:
    """The closed ones, oldest first."""
    return sorted((item for item in rounds if item.state == RoundState.CLOSED), key=lambda item: item.number)
