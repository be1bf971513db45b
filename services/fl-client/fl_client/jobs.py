"""What node and trainer say to each other over the pipe between them: one JSON object a line, weights by file.

Both ends are this hospital's own processes. Paths and names may stand in these messages; none of them goes further.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from medhive.errors import Conflict, MedHiveError
from medhive.spec import Frozen, StudyData

# A thousand classes' evaluation, or a folder's skipped files, fit; a runaway writer does not fill the memory.
MAX_LINE_BYTES = 64 * 1024 * 1024
EXIT_OUT_OF_MEMORY = 75  # the trainer has said so itself and wants to be started afresh


class JobKind(StrEnum):
    """What the trainer is asked for."""

    CHECK = "check"
    INITIALISE = "initialise"
    STATISTICS = "statistics"
    TRAIN = "train"
    EVALUATE = "evaluate"
    JUDGE = "judge"
    LOCAL_ONLY = "local-only"
    PREDICT = "predict"


# These wait while the hospital has paused training or its hours are over; people's own questions do not.
PAUSABLE = frozenset({JobKind.TRAIN, JobKind.LOCAL_ONLY})


class Source(Frozen):
    """Which data, read how."""

    task: str
    data: StudyData
    data_dir: Path
    secret_file: Path
    class_map: dict[str, str] = Field(default_factory=dict)
    groups_csv: Path | None = None
    weights_file: Path | None = None
    labels_csv: Path | None = None
    cache_dir: Path | None = None
    cache_bytes: int | None = None
    evaluates_only: bool = False
    # Sums of all sites' training parts, where the task needs them.
    statistics: dict[str, list[float]] = Field(default_factory=dict)

    @property
    def read_as(self) -> StudyData:
        """The study's description by which the data are read: an evaluate-only site's are a test set as a whole."""
        return self.data.as_test_set() if self.evaluates_only else self.data


class Plan(Frozen):
    """One round of local training; see `fl_client.tasks.base.RoundPlan`. Corrections and optimiser states are files.

    `own_out` takes the layers that the site keeps to itself; without it there are none.
    """

    round: int = Field(ge=1)
    rounds: int = Field(ge=1)
    local_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float | None = None
    mu: float = 0.0
    seed: int = 42
    penalty: Literal["l2", "none"] = "l2"
    C: float = 1.0
    deadline_s: float | None = None
    state_in: Path | None = None
    state_out: Path | None = None
    own_out: Path | None = None
    correction: Path | None = None


class Job(Frozen):
    """One thing to do. Which fields count depends on the kind.

    `fingerprint` is that of the data which a person consented to; other data are refused. `weights` are the models to
    work on by name: `base` for train, evaluate and predict; any names for judge, which
    compares the first one with each other. `own` are the site's own layers, which take their places, by the same names.
    """

    id: str
    kind: JobKind
    source: Source
    device: str = "auto"
    fingerprint: str = ""
    weights: dict[str, Path] = Field(default_factory=dict)
    own: dict[str, Path] = Field(default_factory=dict)
    plan: Plan | None = None
    out: Path | None = None
    paths: tuple[Path, ...] = ()
    part: Literal["train", "validation", "heldout"] = "heldout"


class Start(Frozen):
    """Do this."""

    say: Literal["start"] = "start"
    job: Job


class Cancel(Frozen):
    """Stop doing that."""

    say: Literal["cancel"] = "cancel"
    id: str


class Pause(Frozen):
    """Hold training, or go on with it."""

    say: Literal["pause"] = "pause"
    paused: bool


Command = Annotated[Start | Cancel | Pause, Field(discriminator="say")]
COMMAND: TypeAdapter[Start | Cancel | Pause] = TypeAdapter(Command)


class JobEvent(BaseModel):
    """Base of what the trainer says about a job."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str


class Ready(JobEvent):
    """The trainer itself has come up; this is about no job, so the id is empty."""

    say: Literal["ready"] = "ready"
    id: str = ""


class Loading(JobEvent):
    """The libraries that it needs are being loaded: until that has ended, the trainer can do nothing else."""

    say: Literal["loading"] = "loading"


class Started(JobEvent):
    """Work on it has begun; the clock of a deadline runs."""

    say: Literal["started"] = "started"


class Reading(JobEvent):
    """The data are being read."""

    say: Literal["reading"] = "reading"
    done: int
    total: int


class Opened(JobEvent):
    """The data are read: examples per class, and per part and class."""

    say: Literal["opened"] = "opened"
    classes: dict[str, int]
    parts: dict[str, dict[str, int]]


class Epoch(JobEvent):
    """One local epoch is done."""

    say: Literal["epoch"] = "epoch"
    round: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    examples: int
    seconds: float


class Finished(JobEvent):
    """It is done; the form of `result` belongs to the kind."""

    say: Literal["finished"] = "finished"
    result: dict[str, Any]


class Failed(JobEvent):
    """It could not be done; `message` may name files and is for the people at this site alone."""

    say: Literal["failed"] = "failed"
    code: str
    message: str


Event = Annotated[Ready | Loading | Started | Reading | Opened | Epoch | Finished | Failed, Field(discriminator="say")]
EVENT: TypeAdapter[Ready | Loading | Started | Reading | Opened | Epoch | Finished | Failed] = TypeAdapter(Event)


class DataChanged(Conflict):
    """The data are not those that were consented to."""

    code = "data-changed"


class OutOfMemory(MedHiveError):
    """The trainer needed more memory than there is, or than it may have."""

    code = "out-of-memory"


class TrainerCrashed(MedHiveError):
    """The trainer ended by itself."""

    code = "trainer-crashed"


class TrainerStuck(MedHiveError):
    """The trainer, or the libraries that it loads, did not come up in time."""

    code = "trainer-stuck"


class Cancelled(MedHiveError):
    """The job was cancelled."""

    code = "cancelled"


class JobFailed(MedHiveError):
    """A job failed for the reason that `cause_code` names."""

    code = "job-failed"

    def __init__(self, cause_code: str, message: str) -> None:
        super().__init__(message, cause=cause_code)
        self.cause_code = cause_code
