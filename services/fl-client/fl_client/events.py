"""What happens at a running node, as values: the command line prints them, a console may show them, tests wait for them.

They stay at the hospital; they may name its files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class NodeEvent:
    """Base of everything that a node tells its listener."""


@dataclass(frozen=True)
class Serving(NodeEvent):
    """The node has started: who it is, where its things lie, what it may do."""

    site: str
    coordinator: str
    addresses: tuple[str, ...]
    fleet_address: str
    state_dir: Path
    studies: Mapping[str, Path]
    champions: Mapping[str, int]
    newest: Mapping[str, int]


@dataclass(frozen=True)
class Connected(NodeEvent):
    """`to` ("gateway" or "fleet") answers, for the first time or again after `away_s` seconds."""

    to: str
    away_s: float = 0.0


@dataclass(frozen=True)
class Disconnected(NodeEvent):
    """`to` has not answered for the first time; the node keeps trying."""

    to: str
    reason: str


@dataclass(frozen=True)
class ConsentWanted(NodeEvent):
    """A person must answer: `medhive-site consent` or `decline`. `note` says why nothing answered by itself."""

    run_id: str
    study: str
    rounds: int
    requested_by: str
    note: str = ""


@dataclass(frozen=True)
class QueueConsentWanted(NodeEvent):
    """A person must answer an open queue, as a run. `note` says why the policy did not."""

    queue_id: str
    study: str
    capacity: int
    note: str = ""


@dataclass(frozen=True)
class ConsentGiven(NodeEvent):
    """A consent to a run or a queue was signed by itself, as `given_by` (an own request or a policy) allows."""

    run_id: str
    study: str
    given_by: str
    person: str


@dataclass(frozen=True)
class ConsentFailed(NodeEvent):
    """A consent that could have been signed by itself was not: the data do not allow it, or the coordinator refused."""

    run_id: str
    reason: str


@dataclass(frozen=True)
class RunStarted(NodeEvent):
    """The first task of a run is in work; examples per class, and per part and class."""

    run_id: str
    study: str
    rounds: int
    classes: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class RoundStarted(NodeEvent):
    """A task of this round has begun; `kind` is the task's type."""

    run_id: str
    round: int
    rounds: int
    kind: str


@dataclass(frozen=True)
class EpochDone(NodeEvent):
    """One local epoch."""

    run_id: str
    round: int
    rounds: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class RoundDone(NodeEvent):
    """The answer to a task was sent: own metrics by name, minutes of work."""

    run_id: str
    round: int
    rounds: int
    kind: str
    metrics: Mapping[str, float]
    minutes: float

    @property
    def loss(self) -> float | None:
        """Of the own training, or of the evaluated weights."""
        return self.metrics.get("train_loss", self.metrics.get("val_loss"))

    @property
    def accuracy(self) -> float | None:
        """Of the own training, or of the evaluated weights."""
        return self.metrics.get("train_accuracy", self.metrics.get("val_accuracy"))


@dataclass(frozen=True)
class RoundFailed(NodeEvent):
    """A task could not be done; the coordinator was told `code`, `message` is for the people here."""

    run_id: str
    round: int
    code: str
    message: str


@dataclass(frozen=True)
class TaskRefused(NodeEvent):
    """A task was refused: no consent covers it, or it is not what it claims to be."""

    run_id: str
    round: int
    code: str
    message: str


@dataclass(frozen=True)
class RunFinished(NodeEvent):
    """A run that this site took part in is over. `file` and `version` when it made a model."""

    run_id: str
    study: str
    state: str
    rounds: int
    reason: str = ""
    accuracy: float | None = None
    loss: float | None = None
    version: int | None = None
    file: Path | None = None


@dataclass(frozen=True)
class VersionArrived(NodeEvent):
    """A version's file lies in the models folder; `candidate` when it waits for a decision."""

    study: str
    version: int
    file: Path
    candidate: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionJudged(NodeEvent):
    """The candidate was evaluated on the own held-out data; accuracies by name ("candidate", "champion")."""

    study: str
    version: int
    accuracies: Mapping[str, float]


@dataclass(frozen=True)
class LogRewritten(NodeEvent):
    """The coordinator's event log does not continue what this site has seen of it."""

    message: str


@dataclass(frozen=True)
class Problem(NodeEvent):
    """Something did not work and will be tried again."""

    what: str
    message: str


@dataclass(frozen=True)
class PauseChanged(NodeEvent):
    """Training is held, or goes on."""

    paused: bool


@dataclass(frozen=True)
class Revoked(NodeEvent):
    """The coordinator no longer works with this site; the node stops."""

    message: str


@dataclass(frozen=True)
class Stopped(NodeEvent):
    """The node has stopped."""


Listener = Callable[[NodeEvent], None]
