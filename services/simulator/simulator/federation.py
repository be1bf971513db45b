"""The data of a simulated study, read once and resident, and each client's part of them, made when its turn comes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from fl_client.tasks import Divisible, Examples, LocalOptions, Workspace, load_task
from fl_client.tasks.base import OnProgress
from medhive.errors import InvalidInput, NotFound
from medhive.spec import StudyData
from simulator.faults import wrong_labels
from simulator.partition import MAX_CLIENTS, Division, Partition, WrongPartition, divide, fits

TRAIN = "train"


class NotDivisible(InvalidInput):
    """The task reads its data in a way that cannot be dealt out; only the partition `sites` works."""

    code = "not-divisible"


@dataclass(frozen=True)
class Source:
    """Where data are, and how they are read: `secret` divides them into parts as a hospital's own does."""

    task: str
    path: Path
    study: StudyData
    device: str = "cpu"

    def open(
        self,
        path: Path,
        secret: bytes,
        on_progress: OnProgress | None = None,
        subset: Literal["train", "judge"] = "train",
    ) -> Workspace:
        """Read one folder or file; of packed images the subset that its publisher set apart.

        Raises:
            MedHiveError: the data do not fit the study, by cause.
        """
        if not path.exists():
            raise NotFound(f"There is nothing at {path}; give the data's folder or file.", folder=str(path))
        task, local = load_task(self.task), LocalOptions(subset=subset)
        return task.open(path, self.study, secret, device=self.device, on_progress=on_progress, local=local)


class Federation(Protocol):
    """Clients with data."""

    @property
    def names(self) -> Sequence[str]:
        """The clients, in the order of their names."""

    @property
    def fingerprint(self) -> str:
        """Of all data and who has which."""

    def workspace(self, client: int, *, wrong: bool = False) -> Workspace:
        """One client's data; with other labels than they have where `wrong`."""

    def class_counts(self) -> npt.NDArray[np.int64]:
        """(clients, classes) examples."""

    def first(self) -> Workspace:
        """Any workspace, for what is the same at all."""

    def heldout(self) -> Sequence[Workspace]:
        """Workspaces whose held-out parts together are that of all clients."""


class DealtFederation:
    """One data set, dealt out."""

    def __init__(self, whole: Divisible, division: Division, trained: frozenset[str]) -> None:
        self._whole = whole
        self._division = division
        self._parts = _parts(whole.examples, trained)

    @property
    def names(self) -> Sequence[str]:
        return self._division.names

    @property
    def fingerprint(self) -> str:
        dealt = hashlib.sha256(self._division.places.tobytes() + self._division.bounds.tobytes())
        dealt.update(self._whole.report.fingerprint.encode() + "|".join(self._parts.tolist()).encode())
        return dealt.hexdigest()

    @property
    def _examples(self) -> Examples:
        return self._whole.examples

    def workspace(self, client: int, *, wrong: bool = False) -> Workspace:
        places = self._division.of(client)
        labels = wrong_labels(self._examples.labels[places], len(self._whole.report.classes)) if wrong else None
        return self._whole.share(places, self._parts[places], labels)

    def class_counts(self) -> npt.NDArray[np.int64]:
        classes = len(self._whole.report.classes)
        owners = np.repeat(np.arange(len(self.names)), np.diff(self._division.bounds))
        flat = owners * classes + self._examples.labels[self._division.places]
        return np.bincount(flat, minlength=len(self.names) * classes).reshape(-1, classes)

    def first(self) -> Workspace:
        return self._whole

    def heldout(self) -> Sequence[Workspace]:
        places = np.sort(self._division.places)  # a file may leave examples to nobody
        return [self._whole.share(places, self._parts[places])]


class FolderFederation:
    """One client a sub-folder or file, each read as its hospital would read it."""

    def __init__(self, workspaces: Mapping[str, Workspace]) -> None:
        self._workspaces = dict(sorted(workspaces.items()))
        self._names = list(self._workspaces)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    @property
    def fingerprint(self) -> str:
        parts = [f"{name} {item.report.fingerprint}" for name, item in self._workspaces.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def workspace(self, client: int, *, wrong: bool = False) -> Workspace:
        own = self._workspaces[self._names[client]]
        if not wrong:
            return own
        if not isinstance(own, Divisible):
            raise NotDivisible("This task cannot train on wrong labels; choose another poison.")
        examples = own.examples
        labels = wrong_labels(examples.labels, len(own.report.classes))
        return own.share(np.arange(len(labels)), examples.parts, labels)

    def class_counts(self) -> npt.NDArray[np.int64]:
        return np.array([list(item.report.classes.values()) for item in self._workspaces.values()], dtype=np.int64)

    def first(self) -> Workspace:
        return self._workspaces[self._names[0]]

    def heldout(self) -> Sequence[Workspace]:
        return list(self._workspaces.values())


def read_federation(
    source: Source,
    partition: Partition,
    clients: int | None,
    seed: int,
    *,
    trained: frozenset[str],
    on_progress: OnProgress | None = None,
) -> Federation:
    """Read the data and deal them out.

    Args:
        source: the data.
        partition: how.
        clients: how many; `sites` and a file say that themselves.
        seed: of the draw, and of which example is in which part.
        trained: parts that are trained on beside the training part, since something else judges the model.
        on_progress: told of reading.

    Raises:
        WrongPartition, NotDivisible: these data cannot be dealt out so.
        MedHiveError: the data do not fit the study, by cause.
    """
    secret = secret_of(seed)
    if partition.kind == "sites":
        paths = site_paths(source.path)
        opened = ((name, source.open(path, secret + name.encode())) for name, path in paths.items())
        return FolderFederation({name: _retrained(workspace, trained) for name, workspace in opened})
    whole = source.open(source.path, secret, on_progress)
    if not isinstance(whole, Divisible):
        raise NotDivisible(
            f"The task {source.task} cannot deal out one data set; put each client's data in a folder, and give "
            "--partition sites."
        )
    examples = whole.examples
    division = divide(partition, examples.labels, examples.names, clients or 0, seed)
    return DealtFederation(whole, division, trained)


def _parts(examples: Examples, trained: frozenset[str]) -> npt.NDArray[np.str_]:
    return np.where(np.isin(examples.parts, list(trained)), TRAIN, examples.parts)


def _retrained(workspace: Workspace, trained: frozenset[str]) -> Workspace:
    if not trained or not isinstance(workspace, Divisible):
        return workspace
    return workspace.share(np.arange(len(workspace.examples.labels)), _parts(workspace.examples, trained))


def secret_of(seed: int) -> bytes:
    """What stands for a hospital's secret: it only divides the examples into parts, and must be the same next time."""
    return hashlib.sha256(f"medhive simulation {seed}".encode()).digest()


def site_paths(data: Path) -> dict[str, Path]:
    """The clients of a folder, by name: its sub-folders, or its files where it has none.

    Raises:
        NotFound: there are none, or more than are taken.
        WrongPartition: their names cannot be clients' names.
    """
    if not data.is_dir():
        raise NotFound(f"{data} is no folder; give the one that holds a folder or a file for each client.")
    seen = sorted(path for path in data.iterdir() if not path.name.startswith("."))
    folders = [path for path in seen if path.is_dir()]
    found = folders or [path for path in seen if path.is_file()]
    if not 1 <= len(found) <= MAX_CLIENTS:
        raise NotFound(f"{data} holds {len(found)} clients; give a folder with 1 to {MAX_CLIENTS} folders or files.")
    named = {path.name if path.is_dir() else path.stem: path for path in found}
    unfit = next((name for name in named if not fits(name)), None)
    if unfit is not None or len(named) != len(found):
        raise WrongPartition(
            f"The folders or files of {data} are the clients' names: each its own, of letters, digits and . _ - "
            f"({unfit[:80]!r} is none)."
            if unfit
            else f"Two files of {data} give one client's name; keep one of them."
        )
    return named
