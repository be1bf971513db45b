"""Where the round loop reports a simulated run: a result folder in place of a gateway.

`rounds.jsonl` is the record: a line a round, on disk before the next one begins, and never ahead of the checkpoint, so that
a simulation that was killed at any moment goes on with the same command, to the same bits. What single clients did stays in
the file: memory holds the rounds' own figures alone.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from fl_server.checkpoint import no_space_named, write_durably
from medhive.errors import Conflict, MedHiveError
from medhive.packing import read_weights, write_weights
from medhive.spec import RunSpec
from medhive.states import RoundState, RunState
from medhive.wire import RoundAnswer, RoundReport, RunAnswer, RunEnd
from simulator.federation import Federation

RECORD, END, MODEL, INITIAL = "rounds.jsonl", "end.json", "model.safetensors", "initial.safetensors"
RUN_ID, REQUEST_ID = "SIM_1", "REQ_1"

Judge = Callable[[Path, int], dict[str, float]]
"""Figures of the global model in a file after a round, on the test set, by metric; empty where it is not to be judged."""


class BadRecord(MedHiveError):
    """The record of a result folder cannot be read."""

    code = "bad-record"


class RecordedRound(BaseModel):
    """One line of the record. `test` is of the weights after the round; empty where they were not judged."""

    model_config = ConfigDict(frozen=True)
    number: int
    report: RoundReport
    test: dict[str, float] = Field(default_factory=dict)
    asked: int = 0
    answered: int = 0
    training_s: float = 0.0

    @classmethod
    def of(cls, number: int, report: RoundReport, test: dict[str, float]) -> "RecordedRound":
        """Count who answered, and what their training took together, one after the other."""
        answered = [site for site in report.sites if site.answered]
        training_s = sum(site.training_s for site in answered)
        counts = {"asked": len(report.sites), "answered": len(answered)}
        return cls(number=number, report=report, test=test, training_s=training_s, **counts)

    def as_answer(self) -> RoundAnswer:
        """As a gateway would tell of it."""
        return RoundAnswer(number=self.number, **self.report.model_dump(exclude={"fence"}))

    def without_clients(self) -> "RecordedRound":
        """The round's own figures."""
        return self.model_copy(update={"report": self.report.model_copy(update={"sites": ()})})


class Record:
    """The rounds of a result folder; `rounds` holds them without their clients."""

    def __init__(self, folder: Path) -> None:
        """Read it; a line that was cut when a process was killed is taken away.

        Raises:
            BadRecord: another line cannot be read.
        """
        self.path = folder / RECORD
        self.rounds: list[RecordedRound] = []
        if self.path.exists():
            self._cut_torn_line()
            self.rounds = [item.without_clients() for item in self.lines()]

    def lines(self) -> Iterator[RecordedRound]:
        """Every round with its clients, one at a time. Raises `BadRecord`."""
        try:
            with self.path.open(encoding="utf-8") as file:
                for line in file:
                    yield RecordedRound.model_validate_json(line)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise BadRecord(f"{self.path} cannot be read; choose another --out.") from error

    def add(self, recorded: RecordedRound) -> bool:
        """Write a round down, durably; False where it was told before. Raises `NoSpace`."""
        if any(item.number == recorded.number for item in self.rounds):
            return False
        with no_space_named(self.path), self.path.open("ab") as file:
            file.write(recorded.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rounds.append(recorded.without_clients())
        return True

    def _cut_torn_line(self) -> None:
        with self.path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


class ResultDesk:
    """`fl_server.gateway.Desk` over a result folder.

    Args:
        folder: the result folder.
        spec: of the run.
        federation: makes the initial weights.
        judge: of the weights after each round.
        on_open, on_closed: told of a round that begins, with the number of clients asked, and of one that is recorded.
    """

    fence = 0

    def __init__(
        self,
        folder: Path,
        spec: RunSpec,
        federation: Federation,
        *,
        judge: Judge,
        on_open: Callable[[int, int], None],
        on_closed: Callable[[RecordedRound], None],
    ) -> None:
        self._folder = folder
        self._judge = judge
        self._on_open = on_open
        self._on_closed = on_closed
        self.record = Record(folder)
        self._newest = folder / INITIAL
        digest = write_weights(self._newest, federation.first().initial_weights(spec.data.initial_seed))
        now = datetime.now(UTC)
        self._run = RunAnswer(
            id=RUN_ID,
            request_id=REQUEST_ID,
            study=spec.study,
            state=RunState.READY,
            spec=spec,
            spec_hash=spec.spec_hash,
            rounds=spec.options.rounds,
            created_at=now,
            consent_deadline=now,
            updated_at=now,
            base_digest=digest,
        )

    def look(self) -> RunAnswer:
        """The run; nobody changes it but this process."""
        return self._run

    def start(self) -> RunAnswer:
        """Take it to running."""
        self._run = self._run.model_copy(update={"state": RunState.RUNNING})
        return self._run

    def rounds(self) -> list[RoundAnswer]:
        """The rounds on record."""
        return [item.as_answer() for item in self.record.rounds]

    def report_round(self, number: int, report: RoundReport) -> None:
        """Judge the weights after a closed round, and write it down."""
        if report.state == RoundState.OPEN:
            self._on_open(number, len(report.sites))
            return
        test = self._judge(self._newest, number) if report.state == RoundState.CLOSED and number else {}
        recorded = RecordedRound.of(number, report, test)
        if self.record.add(recorded):
            self._on_closed(recorded)

    def version_zero(self, digest: str, statistics: Mapping[str, list[float]]) -> None:
        """Never asked for: the initial weights are there from the beginning."""
        raise Conflict("A simulation has its initial weights already.", digest=digest, statistics=len(statistics))

    def version_statistics(self, _study: str, _version: int) -> dict[str, list[float]]:
        """None: there is no earlier version."""
        return {}

    def end(self, end: RunEnd) -> None:
        """Keep the final weights and what is said of them, in this order: a folder with an end is complete."""
        if end.state == "completed":
            read = read_weights(self._newest)
            write_weights(self._folder / MODEL, read)
        write_durably(self._folder / END, end.model_dump_json().encode())

    def fetch(self, digest: str, destination: Path, max_bytes: int) -> int:
        """Bring the initial weights to the run's folder."""
        del digest, max_bytes  # the one file there is, made by this process
        with no_space_named(destination):
            shutil.copyfile(self._newest, destination)
        return destination.stat().st_size

    def store(self, source: Path, digest: str, site: str = "") -> int:
        """The weights after the last round, where the round loop keeps them; what is for one client, it finds there."""
        del digest
        if not site:
            self._newest = source
        return 0


def ended(folder: Path) -> RunEnd | None:
    """How the simulation in a folder ended; None while it has not. Raises `BadRecord`."""
    path = folder / END
    if not path.exists():
        return None
    try:
        return RunEnd.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path} cannot be read; choose another --out.") from error
