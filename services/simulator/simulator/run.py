"""One simulation from its data to its results: the deployment's round loop over simulated clients."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_client.local_round import scored, with_own
from fl_client.tasks import PARTS, Judged, Together, Workspace, completed
from fl_client.tasks.errors import NotEnoughExamples
from fl_server.checkpoint import write_durably
from fl_server.cohort import sample
from fl_server.collect import SystemClock, Watch
from fl_server.locking import FolderLock
from fl_server.rounds import RunLoop
from medhive.errors import Conflict, InvalidInput
from medhive.leftovers import remove_leftovers
from medhive.packing import Flat, read_weights
from medhive.wire import RunEnd
from simulator.clients import MAX_JUDGES, ClientStates, InlineSites
from simulator.desk import MODEL, Record, RecordedRound, ResultDesk, ended
from simulator.faults import Fates
from simulator.federation import Federation, Source, secret_of
from simulator.results import (
    SUMMARY,
    Tracking,
    TrackingFailed,
    final_values,
    own_values,
    summary_of,
    title_of,
    write_results,
)
from simulator.study import Simulation

if TYPE_CHECKING:
    from simulator.flower import Engine

IDENTITY, WORK, STATES, ROOM = "simulation.json", "work", "clients", "updates"
UNTOLD = "untold"
"""In an answer, not in the folder: why MLflow has not heard of it."""
TRACKING_PAUSE_S = 60.0
"""Between two tries to reach an MLflow that is away: one may take as long as its time-out."""


class OtherSimulation(Conflict):
    """The result folder holds another simulation, or this one on other data."""

    code = "other-simulation"


@dataclass(frozen=True)
class Listener:
    """Who watches: told of reading (done, total), of a line worth saying, and of progress (clients done, of all rounds)."""

    on_reading: Callable[[int, int], None]
    on_line: Callable[[str], None]
    on_progress: Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Data that were read: the clients with theirs, and what judges the model. Strategy and faults may still be any.

    engine: where the clients work in several processes, and these serve more than one simulation.
    """

    federation: Federation
    tester: "_Tester"
    engine: "Engine | None" = None


def prepare(simulation: Simulation, listener: Listener) -> Prepared:
    """Read the data and deal them out.

    Raises:
        MedHiveError: the data or the partition do not fit, by cause.
    """
    federation = simulation.read_clients(listener.on_reading)
    if simulation.together > 1:
        _require_together(federation.first())
    return Prepared(federation, _Tester(simulation, simulation.source, listener))


def _require_together(workspace: Workspace) -> None:
    if not isinstance(workspace, Together):
        raise InvalidInput("This task cannot train clients together; leave out --together.")
    workspace.require_together()


def require_possible(simulation: Simulation) -> None:
    """Refuse a strategy that the ways to save time or room do not go with. Raises `InvalidInput`."""
    options = simulation.spec.options
    if simulation.forget and options.keeps_own_layers:
        raise InvalidInput("FedBN's clients keep layers from round to round; leave out --forget.")


def simulate(
    simulation: Simulation,
    out: Path,
    listener: Listener,
    mlflow_uri: str | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Run a simulation, or go on with it, and return its summary, which is in the folder too.

    Args:
        simulation: what to run.
        out: the result folder.
        listener: who watches.
        mlflow_uri: where the MLflow run goes, if anywhere.
        prepared: its data, where they were read already.

    Raises:
        OtherSimulation: `out` holds another one.
        FolderInUse: another process works there.
        MedHiveError: the data or the choices do not fit, by cause.
    """
    require_possible(simulation)
    out.mkdir(parents=True, exist_ok=True)
    with FolderLock(out, "medhive-simulate", "choose another --out"):
        remove_leftovers(out, age_s=0)
        prepared = prepared or prepare(simulation, listener)
        identity = simulation.identity(f"{prepared.federation.fingerprint} {prepared.tester.fingerprint}")
        claim(out, identity)
        return _Work(simulation, out, prepared, identity=identity, listener=listener, mlflow_uri=mlflow_uri).run()


def claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Write down whose folder this is, or find that it is ours.

    Args:
        out: the result folder, whose lock is held.
        identity: of what works there: its `digest`, and what that is of; `comparison` where it is no single simulation.

    Raises:
        OtherSimulation: it is another's.
    """
    path = out / IDENTITY
    if path.exists():
        try:
            kept = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            kept = {}
        if ("comparison" in kept) != ("comparison" in identity):
            what = "a comparison" if "comparison" in kept else "a single simulation"
            raise OtherSimulation(f"{out} holds {what}; choose another --out.")
        if kept.get("digest") != identity["digest"]:
            wrong = sorted(name for name in identity if kept.get(name) != identity[name] and name != "digest")
            raise OtherSimulation(
                f"{out} holds another simulation ({', '.join(wrong)} differ); choose another --out.", differ=wrong
            )
        return
    write_durably(path, (json.dumps(dict(identity), indent=2) + "\n").encode())


class _Tester:
    """Judges weights on the test set."""

    def __init__(self, simulation: Simulation, source: Source, listener: Listener) -> None:
        self._every = simulation.test_every
        self._rounds = simulation.spec.options.rounds
        self._workspace: Workspace | None = None
        if simulation.test is not None:
            secret = secret_of(simulation.spec.options.seed)
            self._workspace = source.open(simulation.test, secret, listener.on_reading, "judge")

    @property
    def fingerprint(self) -> str:
        return self._workspace.report.fingerprint if self._workspace else ""

    def judge(self, path: Path) -> dict[str, float]:
        """Figures of the weights in a file; empty without a test set."""
        return judged_on(self._workspace, read_weights(path)) if self._workspace else {}

    def due(self, round_number: int) -> bool:
        return round_number % self._every == 0 or round_number == self._rounds


def judged_on(workspace: Workspace, weights: dict[str, Flat], parts: Sequence[Any] = PARTS) -> dict[str, float]:
    """Accuracy, loss, macro F1 and calibration error on these parts of a data set together."""
    found = [judged for part in parts if (judged := _judged(workspace, weights, part)) is not None]
    if not found:
        return {}
    whole = Judged(
        np.concatenate([item.labels for item in found]), np.concatenate([item.probabilities for item in found])
    )
    return scored(whole).metrics()


def _judged(workspace: Workspace, weights: dict[str, Flat], part: Any) -> Judged | None:
    try:
        return completed(workspace.judge(weights, part))
    except NotEnoughExamples:
        return None


class _Work:
    """One life of a simulation."""

    def __init__(
        self,
        simulation: Simulation,
        out: Path,
        prepared: Prepared,
        *,
        identity: dict[str, Any],
        listener: Listener,
        mlflow_uri: str | None,
    ) -> None:
        self._simulation = simulation
        self._options = simulation.spec.options
        self._out = out
        self._federation = prepared.federation
        self._tester = prepared.tester
        self._engine = prepared.engine
        self._identity = identity
        self._listener = listener
        self._facts = {
            "clients": len(prepared.federation.names),
            "partition": partition_text(simulation),
            "strategy": self._options.strategy,
        }
        title = title_of({"simulation": identity, **self._facts})
        self._tracking = Tracking(mlflow_uri, out, identity, title) if mlflow_uri else None
        self._open = 0
        self._tell_again_at = 0.0

    def run(self) -> dict[str, Any]:
        if (self._out / SUMMARY).exists():
            self._listener.on_line(f"{self._out} holds it complete")
        else:
            self._complete()
        for folder in (WORK, STATES, ROOM):
            shutil.rmtree(self._out / folder, ignore_errors=True)
        summary = dict(json.loads((self._out / SUMMARY).read_text("utf-8")))
        untold = self._tell_all()
        return {**summary, UNTOLD: untold} if untold else summary

    def _complete(self) -> None:
        """Do what is left of the rounds, and write the results."""
        desk = self._desk()
        end = ended(self._out) or self._rounds(desk)
        extra = {**self._facts, "heldout": self._heldout(end), "out": str(self._out)}
        summary = summary_of(self._identity, end, desk.record.rounds, extra)
        classes = self._simulation.spec.data.classes
        counts = self._federation.class_counts()
        names = self._federation.names
        write_results(self._out, summary, end, desk.record, clients=names, counts=counts, classes=classes)

    def _tell_all(self) -> str:
        """Tell MLflow all once more, for it may have been away; why it has not heard it, else nothing."""
        end = ended(self._out)
        if self._tracking is None or end is None:
            return ""
        rounds = Record(self._out).rounds
        try:
            self._tracking.tell([*(value for item in rounds for value in own_values(item)), *final_values(end, rounds)])
            self._tracking.finish(end.state)
        except TrackingFailed as error:
            return str(error)
        return ""

    def _desk(self) -> ResultDesk:
        def judge(path: Path, number: int) -> dict[str, float]:
            return self._tester.judge(path) if self._tester.due(number) else {}

        return ResultDesk(
            self._out,
            self._simulation.spec,
            self._federation,
            judge=judge,
            on_open=self._on_open,
            on_closed=self._on_closed,
        )

    def _rounds(self, desk: ResultDesk) -> RunEnd:
        if desk.record.rounds:
            self._listener.on_line(f"goes on after {step_text(desk.record.rounds[-1].number, self._options.rounds)}")
        clock = SystemClock()
        watch = Watch(desk.look, clock)
        with self._sites() as sites:
            return RunLoop(desk=desk, sites=sites, watch=watch, folder=self._out / WORK, clock=clock).run()

    @contextmanager
    def _sites(self) -> Iterator[InlineSites]:
        """The clients, in this process or in those of Flower's simulation engine."""
        simulation = self._simulation
        states = None if simulation.forget else self._out / STATES
        if simulation.workers != 0:
            from simulator.flower import engine_of, flower_sites  # noqa: PLC0415 - Ray is an extra, and slow to import

            clients = len(self._federation.names)
            with nullcontext(self._engine) if self._engine else engine_of(simulation, self._out, clients) as engine:
                if not engine.has_begun:
                    self._listener.on_line("starting Ray's processes, which takes some seconds")
                yield flower_sites(engine, simulation, self._federation, states, self._on_client)
            return
        yield InlineSites(
            self._federation,
            self._options,
            Fates(simulation.faults, len(self._federation.names), self._options.seed),
            ClientStates(states) if states else None,
            on_client=self._on_client,
            room=self._out / ROOM,
            together=simulation.together,
        )

    def _heldout(self, end: RunEnd) -> dict[str, float]:
        """The final weights on what no client trained on or chose by: where there is no test set, the held-out parts."""
        if self._simulation.test is not None or end.state != "completed":
            return {}
        found = [
            judged
            for workspace, weights in self._models(read_weights(self._out / MODEL))
            if (judged := _judged(workspace, weights, "heldout")) is not None
        ]
        if not found:
            return {}
        whole = Judged(
            np.concatenate([item.labels for item in found]), np.concatenate([item.probabilities for item in found])
        )
        return scored(whole).metrics()

    def _models(self, weights: dict[str, Flat]) -> Iterator[tuple[Workspace, dict[str, Flat]]]:
        """The model that is used at each client, with its data: where layers stay at the clients, one's own."""
        if not self._options.keeps_own_layers:
            for workspace in self._federation.heldout():
                yield workspace, weights
            return
        names, states = self._federation.names, ClientStates(self._out / STATES)
        chosen = sample(names, MAX_JUDGES / max(MAX_JUDGES, len(names)), 1, self._options.seed, 0)
        for place, name in enumerate(names):
            if name in chosen:
                own = states.own(name, self._options.rounds + 1)
                yield self._federation.workspace(place), dict(with_own(weights, own))

    def _on_open(self, number: int, _asked: int) -> None:
        self._open = number

    def _on_client(self, done: int, asked: int) -> None:
        if self._open:
            self._listener.on_progress((self._open - 1) * asked + done, self._options.rounds * asked)
        else:  # what comes before the first round, and after the last one
            self._listener.on_progress(done, asked)

    def _on_closed(self, recorded: RecordedRound) -> None:
        self._open = 0
        self._listener.on_line(round_text(recorded, self._options.rounds))
        if self._tracking is not None and time.monotonic() >= self._tell_again_at:
            self._tell(self._tracking, recorded)

    def _tell(self, tracking: Tracking, recorded: RecordedRound) -> None:
        """Have MLflow hear of a round; one that is away holds up a round now and then, and is complained of once."""
        try:
            tracking.tell(own_values(recorded))
            self._tell_again_at = 0.0
        except TrackingFailed as error:
            if not self._tell_again_at:
                self._listener.on_line(f"{error} The rounds go on, and it is told all at the end.")
            self._tell_again_at = time.monotonic() + TRACKING_PAUSE_S


def round_text(recorded: RecordedRound, rounds: int) -> str:
    """`round 3/10: 10 of 10 clients answered, test accuracy 0.5512, validation 0.5203 before it, loss 1.234, 2.1 s`."""
    step = step_text(recorded.number, rounds)
    parts = [f"{step}: {recorded.answered} of {recorded.asked} clients answered"]
    metrics = recorded.report.metrics
    if "accuracy" in recorded.test:
        parts.append(f"test accuracy {recorded.test['accuracy']:.4f}")
    if "val_accuracy" in metrics:
        parts.append(f"validation accuracy {metrics['val_accuracy']:.4f} before it")
    if "train_loss" in metrics:
        parts.append(f"training loss {metrics['train_loss']:.4f}")
    if recorded.report.refusals:
        parts.append(f"{len(recorded.report.refusals)} refused")
    return ", ".join([*parts, f"{recorded.report.seconds:.1f} s"])


def step_text(number: int, rounds: int) -> str:
    """How a round is called on the terminal; number 0 is what comes before the first one."""
    return f"round {number}/{rounds}" if number else "preparation"


def partition_text(simulation: Simulation) -> str:
    """As it is written on the command line; of a file its name."""
    partition = simulation.partition
    if partition.path is not None:
        return partition.path.name
    return f"{partition.kind}:{partition.value:g}" if partition.value else partition.kind
