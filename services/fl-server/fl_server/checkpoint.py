"""The state of a run between two rounds, on disk before the round is reported to anybody.

The folder of a run holds the global weights of the last round, the strategy's state, the updates of the round that is
open, and one small file that names them, which is replaced in one step: whatever moment the power goes, the folder tells of
one whole round, and the run goes on from there to the same bits.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from medhive.errors import MedHiveError, NoSpace
from medhive.leftovers import sync_folder
from medhive.packing import sha256_file
from medhive.spec import Digest
from medhive.strategies import StrategyState
from medhive.wire import RoundReport

CHECKPOINT_FILE = "checkpoint.json"
STRATEGY_FOLDER, CORRECTIONS_FOLDER = "strategy", "corrections"
MAX_CHECKPOINT_BYTES = 256 * 1024 * 1024
"""A thousand sites with a thousand classes' metrics each stay below."""


class BadCheckpoint(MedHiveError):
    """The checkpoint of a run is unreadable, or its files are not those it names."""

    code = "bad-checkpoint"


class _Stored(BaseModel):
    """The file's content; a later version of the software adds a format number, never another meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = 1
    run_id: str
    spec_hash: str
    seed: int
    round: int
    weights_file: str
    weights_digest: Digest
    strategy: dict[str, Any]
    statistics: dict[str, list[float]]
    report: RoundReport | None


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round starts from.

    round: the last one that is whole, 0 before the first; weights: the global weights after it; report: what was, or is
    still to be, reported of it.
    """

    run_id: str
    spec_hash: str
    seed: int
    round: int
    weights: Path
    weights_digest: str
    strategy: StrategyState
    statistics: dict[str, list[float]]
    report: RoundReport | None = None


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with no_space_named(path):
            (path / STRATEGY_FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def strategy_folder(self) -> Path:
        """Where the strategy keeps its vectors."""
        return self.path / STRATEGY_FOLDER

    def weights_path(self, round_number: int) -> Path:
        """The global weights after a round."""
        return self.path / f"global-{round_number}.safetensors"

    def round_folder(self, round_number: int) -> Path:
        """The updates of a round, until it closes."""
        folder = self.path / f"round-{round_number}"
        with no_space_named(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def correction_path(self, round_number: int, site: str) -> Path:
        """What a site shall correct its steps by in a round, until it closes."""
        folder = self.round_folder(round_number) / CORRECTIONS_FOLDER
        with no_space_named(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{site}.safetensors"

    def save(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint the one to resume from, then delete what only the one before needed.

        The weights and the strategy's vectors are on disk already.

        Raises:
            NoSpace: the disk is full; the checkpoint before is untouched.
        """
        stored = _Stored(
            run_id=checkpoint.run_id,
            spec_hash=checkpoint.spec_hash,
            seed=checkpoint.seed,
            round=checkpoint.round,
            weights_file=checkpoint.weights.name,
            weights_digest=checkpoint.weights_digest,
            strategy=checkpoint.strategy.to_dict(),
            statistics=checkpoint.statistics,
            report=checkpoint.report,
        )
        write_durably(self.path / CHECKPOINT_FILE, stored.model_dump_json().encode())
        self._remove_superseded(checkpoint)

    def load(self, run_id: str, spec_hash: str) -> Checkpoint | None:
        """The checkpoint to resume from; None when the run has none.

        Raises:
            BadCheckpoint: it is unreadable, of another run, or its weights are not the ones it names.
            WrongStrategyState: the strategy's files are not.
        """
        path = self.path / CHECKPOINT_FILE
        if not path.exists():
            return None
        stored = _parse(path)
        weights = self.path / stored.weights_file
        if (stored.run_id, stored.spec_hash) != (run_id, spec_hash):
            raise BadCheckpoint(
                f"The checkpoint in {self.path} belongs to {stored.run_id}, or to another specification."
            )
        if weights.parent != self.path or not weights.is_file() or sha256_file(weights) != stored.weights_digest:
            raise BadCheckpoint(f"The weights that the checkpoint in {self.path} names are missing or changed.")
        return Checkpoint(
            run_id=run_id,
            spec_hash=spec_hash,
            seed=stored.seed,
            round=stored.round,
            weights=weights,
            weights_digest=stored.weights_digest,
            strategy=StrategyState.from_dict(self.strategy_folder, stored.strategy),
            statistics=stored.statistics,
            report=stored.report,
        )

    def remove(self) -> None:
        """Delete the folder: the run is over and its weights are in the blob store."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _remove_superseded(self, checkpoint: Checkpoint) -> None:
        checkpoint.strategy.remove_superseded()
        for path in self.path.glob("global-*.safetensors"):
            if path != checkpoint.weights:
                path.unlink(missing_ok=True)
        for folder in self.path.glob("round-*"):
            if folder.name != f"round-{checkpoint.round + 1}":
                shutil.rmtree(folder, ignore_errors=True)


def _parse(path: Path) -> _Stored:
    try:
        if path.stat().st_size > MAX_CHECKPOINT_BYTES:
            raise BadCheckpoint(f"{path} is larger than any checkpoint.")
        stored = _Stored.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadCheckpoint(f"The checkpoint {path} cannot be read; the run must be started anew.") from error
    if stored.format != 1:
        raise BadCheckpoint(f"The checkpoint {path} was written by a newer MedHive; upgrade this one.")
    return stored


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file in one step; it is on disk when this returns.

    Raises:
        NoSpace: the disk is full; the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with no_space_named(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def no_space_named(path: Path) -> Iterator[None]:
    """Turn a full disk into `NoSpace`; other failures of the operating system pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"The aggregator's disk is full: {path.name} could not be written. Free some space in {path.parent} and "
                "ask for the run again.",
                path=str(path),
            ) from error
        raise
