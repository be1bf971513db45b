"""The run specification: data, never code, that says everything about one run.

A request is turned into a specification at approval; hospitals consent to its hash; the aggregator and every trainer read
the same canonical bytes. The privacy fields are part of it from its first version, so that a later version of the software
that can honour them needs no other format; a value that this version cannot honour is refused, never ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from medhive.errors import InvalidInput
from medhive.signing import digest_of

# A name goes into file names, URLs and logs: letters, digits and three separators, and no surprises.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# What a class, a column or a category may be called: printable, one line, not long enough to hide a report in.
Label = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/\\]{1,80}$")]

MAX_ROUNDS = 5000  # published figures took 2,000; a typo of three digits more is refused
MAX_LOCAL_EPOCHS = 100
MAX_BATCH_SIZE = 4096
MAX_DEADLINE_S = 7 * 24 * 3600
DEFAULT_DEADLINE_S = 3600
MAX_CLASSES = 1000
MAX_COLUMNS = 10_000


class Frozen(BaseModel):
    """Base of wire values: unknown fields are errors, so that a misspelt option cannot be silently dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(Frozen):
    """One column of a table study."""

    name: Label
    type: Literal["numeric", "categorical"] = "numeric"
    categories: tuple[Label, ...] = ()


class LabelColumn(Frozen):
    """The column to predict; `positive_above` turns a grade into two classes (grade > bound is the second class)."""

    name: Label
    positive_above: float | None = None


class TableFormat(Frozen):
    """How every hospital's CSV of a study is laid out."""

    columns: tuple[Column, ...] = Field(min_length=1, max_length=MAX_COLUMNS)
    label: LabelColumn
    has_header: bool = True
    delimiter: str = Field(",", min_length=1, max_length=1)
    missing: tuple[str, ...] = ("", "?")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("two columns have the same name")
        if self.label.name not in names:
            raise ValueError(f"the label column {self.label.name!r} is not among the columns")
        return self


class StudyData(Frozen):
    """What a study's data are, the same for every hospital: classes, options of the task, for tables the format."""

    classes: tuple[Label, ...] = Field(min_length=2, max_length=MAX_CLASSES)
    options: dict[Name, str | int | float | bool] = Field(default_factory=dict, max_length=100)
    table: TableFormat | None = None
    validation_share: float = Field(0.2, gt=0, lt=0.9)
    heldout_share: float = Field(0.1, gt=0, lt=0.9)
    # The seed of version 0, the study's initial weights, which every member can make and check.
    initial_seed: int = Field(42, ge=0, lt=2**32)

    def as_test_set(self) -> Self:
        """The same where every example is for validation: how an evaluate-only site reads its data."""
        # Shares that no study may have, so they are set without being checked.
        return self.model_copy(update={"validation_share": 1.0, "heldout_share": 0.0})

    @property
    def needed_parts(self) -> tuple[Literal["train", "validation"], ...]:
        """The parts that must not be empty: a test set has nothing to train on."""
        return ("validation",) if self.validation_share == 1 else ("train", "validation")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have the same name")
        if self.validation_share + self.heldout_share >= 0.9:
            raise ValueError("validation and held-out shares leave less than a tenth for training")
        return self


class Privacy(Frozen):
    """Privacy demands of a run. This version can honour none of them and refuses a run that asks for one."""

    dp_epsilon: float | None = Field(None, gt=0)
    dp_delta: float | None = Field(None, gt=0, lt=1)
    dp_clip: float | None = Field(None, gt=0)
    secagg: bool = False

    def require_supported(self) -> None:
        """Refuse what this version would have to ignore.

        Raises:
            InvalidInput: differential privacy or secure aggregation is asked for.
        """
        if self.secagg or self.dp_epsilon is not None or self.dp_clip is not None or self.dp_delta is not None:
            raise InvalidInput(
                "This version has neither differential privacy nor secure aggregation; leave out the --dp-* and "
                "--secagg options."
            )


class RunOptions(Frozen):
    """What a request may choose; whatever it leaves out comes from the study's defaults, then from these."""

    rounds: int = Field(10, ge=1, le=MAX_ROUNDS)
    local_epochs: int = Field(5, ge=1, le=MAX_LOCAL_EPOCHS)
    batch_size: int = Field(32, ge=1, le=MAX_BATCH_SIZE)
    lr: float | None = Field(None, gt=0, le=100)
    strategy: Name = "fedprox"
    strategy_params: dict[Name, float] = Field(default_factory=dict, max_length=20)
    mu: float = Field(0.1, ge=0, le=1000)
    min_sites: int = Field(2, ge=1, le=10_000)
    fraction: float = Field(1.0, gt=0, le=1)
    seed: int = Field(42, ge=0, lt=2**32)
    deadline_s: float = Field(DEFAULT_DEADLINE_S, gt=0, le=MAX_DEADLINE_S)
    consent_deadline_s: float = Field(7 * 24 * 3600, gt=0, le=90 * 24 * 3600)
    penalty: Literal["l2", "none"] = "l2"
    C: float = Field(1.0, gt=0, le=1e6)
    compress: Literal["none"] = "none"
    privacy: Privacy = Privacy()

    @field_validator("strategy")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()

    @property
    def local_mu(self) -> float:
        """The pull to the global weights that sites train with: only FedProx has one."""
        return self.mu if self.strategy == "fedprox" else 0.0

    @property
    def keeps_own_layers(self) -> bool:
        """Whether sites keep the batch normalisation of their own from round to round: only with FedBN."""
        return self.strategy == "fedbn"


class RunSpec(Frozen):
    """The canonical description of a run; its SHA-256 is what hospitals consent to."""

    format: Literal[1] = 1
    study: Name
    task: Name
    data: StudyData
    base_version: int = Field(0, ge=0)
    options: RunOptions

    @property
    def spec_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return digest_of(self.model_dump(mode="json"))


TASK_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "tabular": {"rounds": 5, "strategy": "fedavg", "mu": 0.0},
    # A hospital has hundreds of scans, not thousands of images: batches of 32 would leave a few steps an epoch.
    "ct-volume": {"batch_size": 4},
}


def build_options(task: str, study_defaults: dict[str, Any], chosen: dict[str, Any]) -> RunOptions:
    """Lay a request's choices over the study's defaults over MedHive's own.

    Args:
        task: name of the task; tables and scans have other defaults than images.
        study_defaults: fields of `RunOptions` that the study sets.
        chosen: fields of `RunOptions` that the request sets.

    Raises:
        InvalidInput: a value is out of range or no such option exists; the text names it.
    """
    base = TASK_DEFAULTS.get(task, {})
    try:
        return RunOptions.model_validate({**base, **study_defaults, **chosen})
    except ValueError as error:
        raise InvalidInput(f"The run's options do not fit: {explain(error)}.") from error


def explain(error: ValueError) -> str:
    """Put a pydantic error into words: each wrong field with what is wrong about it, without echoing the input."""
    if not hasattr(error, "errors"):
        return str(error)
    parts = (f"{'.'.join(str(p) for p in item['loc']) or 'value'}: {item['msg']}" for item in error.errors())
    return "; ".join(parts)
