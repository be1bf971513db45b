"""The seam between the hospital's machinery and one kind of data: what every task offers to node, trainer and commands.

Nothing here imports a heavy library: the registry loads a task's module only when the task is asked for, so that the
command line answers at once. Weights cross the seam as `dict[str, float32 array]`, which is what is packed and sent.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from fl_client.tasks.errors import UnknownTask, WrongOption
from medhive.errors import MedHiveError
from medhive.spec import StudyData

if TYPE_CHECKING:
    from fl_client.tasks.evaluation import Comparison, Evaluation

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, FloatArray]

Part = Literal["train", "validation", "heldout"]
PARTS: tuple[Part, ...] = ("train", "validation", "heldout")
ENTRY_POINTS = "medhive.tasks"
# Known without asking the installation's metadata, so that a source tree without installed entry points works too.
BUILT_IN = {
    "ct-volume": "fl_client.tasks.ct_volume:CtVolumeTask",
    "image-folder": "fl_client.tasks.image_folder:ImageFolderTask",
    "tabular": "fl_client.tasks.tabular:TabularTask",
}
# Separates the keyed hash that sorts examples into parts from the one that fingerprints the data set.
SPLIT_DOMAIN = b"medhive-split-v1\0"
FINGERPRINT_DOMAIN = b"medhive-dataset-v1\0"

Result = TypeVar("Result")
Options = TypeVar("Options")

OnProgress = Callable[[int, int], None]
"""Called with (done, total) while data are read."""


@dataclass(frozen=True)
class LocalOptions:
    """What a site sets for itself; none of it leaves the site.

    Attributes:
        class_map: local folder name or label value → the study's class name.
        groups_csv: a CSV of two columns, file (relative to the data folder) and patient group; overrides a pattern.
        weights_file: local safetensors file that the first weights start from; all sites of a study need the same one,
            since version 0 is the same everywhere.
        labels_csv: a CSV that says the label of each example, for tasks that can take labels from one.
        cache_dir: where a task may keep what it made of the data; a temporary folder where there is none.
        cache_bytes: how much it may keep there; None is the task's own limit.
        subset: what to take where a publisher set a test set apart; `judge` is just that, or all where none was.
    """

    class_map: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups_csv: Path | None = None
    weights_file: Path | None = None
    labels_csv: Path | None = None
    cache_dir: Path | None = None
    cache_bytes: int | None = None
    subset: Literal["train", "test", "judge"] = "train"


@dataclass(frozen=True)
class Skipped:
    """One file or row that is not used: its name, which stays at the site, and the reason, a word that is counted."""

    name: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What `check-data` found.

    Attributes:
        classes: the study's class → usable examples.
        parts: part → class → usable examples.
        skipped: what is not used, by name and reason.
        duplicates: (name, name of its first like) of identical examples. They are on one side of the split; they count
            once, but for rows of a table without patients' keys, which may well be two patients who agree.
        groups: number of patient groups, or None where the study tells none.
        fingerprint: HMAC-SHA256 under the site's secret over the sorted content hashes, in hexadecimal.
        remarks: what a person here should know about data that are used all the same, and how often: for the screen of
            the site alone, and without a name or a value.
    """

    task: str
    examples: int
    classes: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]
    skipped: tuple[Skipped, ...]
    duplicates: tuple[tuple[str, str], ...]
    groups: int | None
    fingerprint: str
    remarks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls,
        task: str,
        study: StudyData,
        secret: bytes,
        examples: Sequence[tuple[int, Part, str]],
        *,
        skipped: Sequence[Skipped],
        duplicates: Sequence[tuple[str, str]],
        groups: int | None,
        remarks: Mapping[str, int] = MappingProxyType({}),
    ) -> Self:
        """Count examples, each given by the index of its class, its part and the SHA-256 of its content."""

        def count(wanted: Part | None) -> dict[str, int]:
            found = Counter(label for label, part, _digest in examples if wanted in {None, part})
            return {name: found[label] for label, name in enumerate(study.classes)}

        return cls(
            task=task,
            examples=len(examples),
            classes=count(None),
            parts={part: count(part) for part in PARTS},
            skipped=tuple(skipped),
            duplicates=tuple(duplicates),
            groups=groups,
            fingerprint=fingerprint(secret, [(study.classes[label], digest) for label, _part, digest in examples]),
            remarks=dict(remarks),
        )

    def counts_by_reason(self) -> dict[str, int]:
        """Reason → number of examples; without names, so that it may stand in a consent."""
        counts = Counter(item.reason for item in self.skipped)
        if self.duplicates:
            counts["duplicate"] += len(self.duplicates)
        return dict(sorted(counts.items()))

    def to_json(self) -> dict[str, Any]:
        """Everything, names included: for the screen of the site alone."""
        return {**asdict(replace(self, remarks=dict(self.remarks))), "reasons": self.counts_by_reason()}


@dataclass(frozen=True)
class RoundPlan:
    """What one round of local training shall do. The same plan on the same data gives the same bits (CPU, same threads).

    Attributes:
        round: number of this round, from 1.
        rounds: rounds of the run; the learning rate follows one schedule over all of them.
        lr: peak learning rate; None is the task's own.
        mu: weight of FedProx' proximal term (Li et al. 2020, arXiv:1812.06127); 0 is FedAvg.
        correction: c - c_i of SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378), one array a tensor: each step also
            takes the learning rate times this off the parameters. None where there is nothing to correct.
        seed: seed of the run; the task derives its own streams from it, the round and nothing else.
        optimiser_state: what the site's own last round of this run returned, or None.
        deadline: Unix time after which training is pointless, or None.
        penalty, C: of the tabular task's logistic regression.
    """

    round: int
    rounds: int
    local_epochs: int
    batch_size: int = 32
    lr: float | None = None
    mu: float = 0.0
    correction: Weights | None = None
    seed: int = 42
    optimiser_state: bytes | None = None
    deadline: float | None = None
    penalty: Literal["l2", "none"] = "l2"
    C: float = 1.0


@dataclass(frozen=True)
class EpochProgress:
    """One finished local epoch: mean loss, share of right answers in training, examples seen, seconds it took."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    examples: int
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What a round of local training made: new weights, on how many examples, metrics, and the optimiser's state.

    `rate_sum` is the sum of the learning rates of all steps; a task that trains in another way leaves it out, and cannot
    take part in SCAFFOLD, which it has to honour `RoundPlan.correction` for.
    """

    weights: dict[str, FloatArray]
    examples: int
    metrics: dict[str, float]
    optimiser_state: bytes | None
    rate_sum: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """One example's class probabilities; `name` is what the caller knows the example by."""

    name: str
    probabilities: Mapping[str, float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


Training = Generator[EpochProgress | None, None, TrainResult]
"""Yields None after a step (a place to switch to another run) and an `EpochProgress` after each epoch."""


@dataclass(frozen=True)
class Judged:
    """A model's word on one part of the data: (n,) indices of the true classes, (n, k) class probabilities.

    `metrics` are figures of the task's own, beside those that follow from the probabilities.
    """

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


Judging = Generator[None, None, Judged]
"""Yields after a step, as training does: a place to switch to another run."""


class Predictor(Protocol):
    """A study's model without any data of the site's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The study's classes, in the order of the model's outputs."""

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each file with its examples' class probabilities, in the order of `paths`, computed some files at a time.

        What cannot be read comes back as `Skipped`.

        Raises:
            WrongArchitecture: the weights are another model's.
        """

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """The same in one go and in one list."""


class Workspace(Predictor, Protocol):
    """A site's data of one study, read and ready; serves several runs at once."""

    @property
    def report(self) -> DataReport:
        """What was found while reading."""

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """The study's seeded first weights: the same seed gives the same bits at every site."""

    def statistics(self) -> dict[str, npt.NDArray[np.float64]] | None:
        """Sums over the training part that sites may pool before the first round; None where the task needs none."""

    def use_statistics(self, pooled: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Take the sums of all sites, added up; replaces those that came with the weights."""

    def train(self, weights: Weights, plan: RoundPlan) -> Training:
        """Train from `weights` as `plan` says.

        Raises:
            WrongArchitecture: the weights are another model's.
            DeadlinePassed: `plan.deadline` came first.
            TrainingDiverged: the loss is not finite.
        """

    def judge(self, weights: Weights, part: Part) -> Judging:
        """Have a model of `weights` look at one part of the data, step by step; several may be under way at once.

        Raises:
            WrongArchitecture: the weights are another model's.
            NotEnoughExamples: the part is empty.
        """

    def evaluate(self, weights: Weights, part: Part) -> "Evaluation":
        """Judge `weights` on one part of the data in one go; raises as `judge`."""

    def compare(self, first: Weights, second: Weights, part: Part) -> "Comparison":
        """Judge two models on the same examples in one go; raises as `judge`."""


@dataclass(frozen=True)
class Examples:
    """A workspace's examples, by place: (n,) class indices, (n,) parts, and what each is called in its data."""

    labels: npt.NDArray[np.int64]
    parts: npt.NDArray[np.str_]
    names: Sequence[str]


@runtime_checkable
class Divisible(Workspace, Protocol):
    """A workspace that can be dealt out to many sites without a copy of what was read: what a simulation needs."""

    @property
    def examples(self) -> Examples:
        """All examples."""

    def share(
        self,
        places: npt.NDArray[np.int64],
        parts: npt.NDArray[np.str_],
        labels: npt.NDArray[np.int64] | None = None,
    ) -> Workspace:
        """The workspace of a site that has the examples at these places alone.

        Args:
            places: (m,) of the examples.
            parts: (m,) the part that each is in.
            labels: (m,) other classes than they were read with; None leaves them.
        """


@runtime_checkable
class Personal(Workspace, Protocol):
    """A workspace whose model has layers that a site may keep to itself, as FedBN's do."""

    @property
    def own_layers(self) -> frozenset[str]:
        """The names of the tensors of all batch normalisation, running statistics included."""


@runtime_checkable
class Together(Workspace, Protocol):
    """A workspace whose round can be trained together with those of other sites of the study, as one computation."""

    def require_together(self) -> None:
        """Raise `WrongOption` where sites of this study cannot be."""

    def train_together(
        self, others: Sequence[Self], weights: Weights, plans: Sequence[RoundPlan]
    ) -> Sequence[TrainResult | MedHiveError]:
        """The rounds of this site and of others, each with examples to train on; an error in the place of who failed.

        The plans, one for each site, differ in nothing but their corrections.
        """


class Task(Protocol):
    """One kind of data."""

    name: str

    def load(self) -> None:
        """Import the libraries that all but `check` need, so that one that does not load is told from bad data."""

    def predictor(self, study: StudyData, *, device: str = "cpu") -> Predictor:
        """The study's model; opens no data.

        Raises:
            MedHiveError: the study's options or the device cannot be used.
        """

    def check(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        on_progress: OnProgress | None = None,
        local: LocalOptions = ...,
    ) -> DataReport:
        """Read everything once and report; raises as `open` does."""

    def open(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        device: str = "cpu",
        on_progress: OnProgress | None = None,
        local: LocalOptions = ...,
    ) -> Workspace:
        """Read the data into memory.

        Raises:
            MedHiveError: any of `fl_client.tasks.errors`, by cause.
        """


def task_names() -> tuple[str, ...]:
    """Names of all installed tasks."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))}))


def load_task(name: str) -> Task:
    """The installed task of that name; its heavy libraries are imported by its own `open`.

    Raises:
        UnknownTask: no such task is installed.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return cast(Task, point.load()())
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return cast(Task, getattr(import_module(module), attribute)())
    raise UnknownTask(
        f"No task {name!r} is installed here; installed are {', '.join(task_names())}. Install the package that has it.",
        task=name,
    )


def completed(steps: Generator[Any, None, Result]) -> Result:
    """What a generator returns once it has been run to its end in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(Result, end.value)


def finish(training: Training, on_epoch: Callable[[EpochProgress], None] | None = None) -> TrainResult:
    """Run a training to its end in one go."""
    while True:
        try:
            progress = next(training)
        except StopIteration as end:
            return cast(TrainResult, end.value)
        if progress is not None and on_epoch is not None:
            on_epoch(progress)


def read_options(kind: type[Options], study: StudyData) -> Options:
    """A study's options as the dataclass that a task describes them with, each field with a default of its type.

    Raises:
        WrongOption: an option is unknown or of another type.
    """
    known = {item.name: type(item.default) for item in fields(cast(Any, kind))}
    given: dict[str, Any] = {}
    for name, value in study.options.items():
        if name not in known:
            raise WrongOption(f"The task has no option {name!r}; it has {', '.join(known)}.", option=name)
        given[name] = float(value) if known[name] is float and type(value) is int else value
        if type(given[name]) is not known[name]:
            raise WrongOption(f"Option {name!r} must be of type {known[name].__name__}.", option=name)
    return kind(**given)


def part_of(secret: bytes, key: bytes, validation_share: float, heldout_share: float) -> Part:
    """The part that an example belongs to, for ever: a keyed hash of its patient group or its content.

    Neither the order nor the presence of other examples moves it, and who lacks `secret` cannot tell the part.
    """
    digest = hmac.new(secret, SPLIT_DOMAIN + key, hashlib.sha256).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < heldout_share:
        return "heldout"
    return "validation" if position < heldout_share + validation_share else "train"


def fingerprint(secret: bytes, contents: Sequence[tuple[str, str]]) -> str:
    """HMAC-SHA256 over the sorted (class, SHA-256 of content) pairs: the same data set gives the same, in any order."""
    mac = hmac.new(secret, FINGERPRINT_DOMAIN, hashlib.sha256)
    for label, digest in sorted(contents):
        mac.update(f"{label}\0{digest}\n".encode())
    return mac.hexdigest()
