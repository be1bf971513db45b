"""The comparison: every strategy under every fault, on the same data and seed, one table."""

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fl_server.checkpoint import write_durably
from fl_server.figures import Curve, draw_curves
from fl_server.locking import FolderLock
from medhive.errors import InvalidInput
from medhive.strategies import STRATEGIES, make_strategy, strategy_parameters
from simulator import page
from simulator.desk import Record, ended
from simulator.faults import Faults
from simulator.results import CURVES, PAGE, panels_with_test
from simulator.run import UNTOLD, Listener, Prepared, claim, partition_text, prepare, require_possible, simulate
from simulator.study import Simulation

if TYPE_CHECKING:
    from simulator.flower import Engine

ALL: Final = "all"
NONE: Final = "none"
COMPARISON_CSV, COMPARISON_JSON = "comparison.csv", "comparison.json"
USUAL: Final[Mapping[str, Faults]] = {
    "dropout 0.2": Faults(dropout=0.2),
    "slow 0.2": Faults(slow_share=0.2),
    "boost 0.2": Faults(poison_share=0.2, poison="boost"),
    "flip 0.2": Faults(poison_share=0.2, poison="flip"),
    "labels 0.2": Faults(poison_share=0.2, poison="labels"),
}
"""The faults that are compared where none is asked for."""


@dataclass(frozen=True)
class Cell:
    """One simulation of the table: final figures on the test set, else on the held-out parts; `reason` where it failed."""

    strategy: str
    fault: str
    state: str
    reason: str
    accuracy: float | None
    macro_f1: float | None
    refusals: int
    answered: int
    asked: int
    seconds: float


def strategies_of(text: str) -> tuple[str, ...]:
    """`all`, or names separated by commas. Raises `UnknownStrategy`."""
    names = tuple(STRATEGIES) if text == ALL else tuple(name.strip().lower() for name in text.split(","))
    return tuple(dict.fromkeys(make_strategy(name).name for name in names))


def scenarios_of(faults: Faults) -> dict[str, Faults]:
    """No fault, and each that was asked for by itself; the usual ones where none was."""
    asked: dict[str, Faults] = {}
    if faults.dropout:
        asked[f"dropout {faults.dropout:g}"] = Faults(dropout=faults.dropout)
    if faults.slow_share:
        factor, patience = faults.slow_factor, faults.patience
        asked[f"slow {faults.slow_share:g}"] = Faults(0.0, faults.slow_share, factor, patience=patience)
    if faults.poison_share:
        name = f"{faults.poison} {faults.poison_share:g}"
        asked[name] = Faults(poison_share=faults.poison_share, poison=faults.poison)
    return {NONE: Faults(), **(asked or USUAL)}


def compare(
    simulation: Simulation, strategies: Sequence[str], out: Path, listener: Listener, mlflow_uri: str | None = None
) -> list[Cell]:
    """Run them all, each in a folder of its own below `out`, and write table and page; goes on where it was stopped.

    With `mlflow_uri` each of them is a run there.

    Raises:
        FolderInUse: another process works there.
        OtherSimulation: the folder, or one in it, holds something else.
        MedHiveError: the data or the choices do not fit, by cause; a run that fails is a cell of the table.
    """
    out.mkdir(parents=True, exist_ok=True)
    with FolderLock(out, "medhive-simulate", "choose another --out"):
        possible = _possible(simulation, strategies, listener)
        prepared = prepare(simulation, listener)
        claim(out, {"comparison": True, "digest": "a folder for each strategy and fault"})
        with _engine(simulation, out, len(prepared.federation.names)) as engine:
            shared = replace(prepared, engine=engine)
            cells = _cells(possible, out, listener, mlflow_uri, shared)
        _write(out, cells)
        panels = panels_by_fault(out, cells)
        if panels:
            draw_curves(panels, out / CURVES, "accuracy after each round")
        write_durably(out / PAGE, page_of(_title(prepared, simulation), cells, panels).encode())
    return cells


def _engine(simulation: Simulation, out: Path, clients: int) -> "AbstractContextManager[Engine | None]":
    """The processes that all simulations of the table share; none where clients work in this one."""
    if simulation.workers == 0:
        return nullcontext()
    from simulator.flower import engine_of  # noqa: PLC0415 - Ray is an extra, and slow to import

    return engine_of(simulation, out, clients)


def _cells(
    simulations: Sequence[Simulation], out: Path, listener: Listener, mlflow_uri: str | None, prepared: Prepared
) -> list[Cell]:
    """Each of them under each fault, one after the other."""
    cells = []
    for one in simulations:
        strategy = one.spec.options.strategy
        for fault, faults in scenarios_of(one.faults).items():
            listener.on_line(f"{strategy}, {fault}")
            folder = folder_of(strategy, fault)
            told = simulate(replace(one, faults=faults), out / folder, listener, mlflow_uri, prepared)
            if UNTOLD in told:
                listener.on_line(told[UNTOLD])
            cells.append(_cell(strategy, fault, told))
    return cells


def _possible(simulation: Simulation, strategies: Sequence[str], listener: Listener) -> list[Simulation]:
    """One with each strategy; which cannot be simulated so is said, and keeps nobody from seeing the others.

    Raises:
        InvalidInput: none can.
    """
    found = []
    for strategy in strategies:
        one = _with_strategy(simulation, strategy)
        try:
            require_possible(one)
        except InvalidInput as error:
            if len(strategies) == 1:
                raise
            listener.on_line(f"{strategy} is left out: {error}")
        else:
            found.append(one)
    return found


def _with_strategy(simulation: Simulation, strategy: str) -> Simulation:
    """The same with another strategy, and those of the given parameters that it knows."""
    options = simulation.spec.options
    known = strategy_parameters(strategy)
    params = {name: value for name, value in options.strategy_params.items() if name in known}
    changed = options.model_copy(update={"strategy": strategy, "strategy_params": params})
    return replace(simulation, spec=simulation.spec.model_copy(update={"options": changed}))


def _cell(strategy: str, fault: str, summary: Mapping[str, Any]) -> Cell:
    judged = summary["test"] or summary["heldout"] if summary["state"] == "completed" else {}
    return Cell(
        strategy=strategy,
        fault=fault,
        state=summary["state"],
        reason=summary["reason"],
        accuracy=judged.get("accuracy"),
        macro_f1=judged.get("macro_f1"),
        refusals=summary["refusals"],
        answered=summary["clients_answered"],
        asked=summary["clients_asked"],
        seconds=summary["seconds"],
    )


def rows_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of accuracies, a strategy a row and a fault a column."""
    faults = list(dict.fromkeys(cell.fault for cell in cells))
    found = {(cell.strategy, cell.fault): cell for cell in cells}
    rows = [
        [strategy, *(_shown(found[strategy, fault]) for fault in faults)]
        for strategy in dict.fromkeys(cell.strategy for cell in cells)
    ]
    return ["strategy", *(f"{fault}>" for fault in faults)], rows


def failures_of(cells: Sequence[Cell]) -> list[str]:
    """A line for each reason for which a strategy has no figure, with the faults where it was so."""
    faults: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.reason:
            faults.setdefault((cell.strategy, cell.reason), []).append(_fault_text(cell.fault))
    return [f"{strategy} ({', '.join(named)}): {reason}" for (strategy, reason), named in faults.items()]


def _shown(cell: Cell) -> str:
    return cell.state if cell.accuracy is None else f"{cell.accuracy:.4f}"


def folder_of(strategy: str, fault: str) -> Path:
    """Where one simulation of the table has its results, below the comparison's folder."""
    return Path(strategy) / fault.replace(" ", "-")


def panels_by_fault(out: Path, cells: Sequence[Cell]) -> dict[str, dict[str, Curve]]:
    """One panel a fault with a curve for each strategy: the accuracy on the test set, else on the validation parts."""
    panels: dict[str, dict[str, Curve]] = {}
    for cell in cells:
        folder = out / folder_of(cell.strategy, cell.fault)
        curves = panels_with_test(Record(folder).rounds, ended(folder)).get("accuracy", {})
        curve = curves.get("test_accuracy") or curves.get("val_accuracy")
        if curve:
            panels.setdefault(f"accuracy, {_fault_text(cell.fault)}", {})[cell.strategy] = curve
    return panels


def _fault_text(fault: str) -> str:
    return "no fault" if fault == NONE else fault


def _title(prepared: Prepared, simulation: Simulation) -> str:
    rounds = simulation.spec.options.rounds
    return f"Comparison: {len(prepared.federation.names)} clients, {partition_text(simulation)}, {rounds} rounds"


def page_of(title: str, cells: Sequence[Cell], panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """The page of a comparison: the table, whose cells lead to the single results, the curves, and what each cost."""
    faults = list(dict.fromkeys(cell.fault for cell in cells))
    linked = [[name, *map(_figure, cells_of)] for name, cells_of in _by_strategy(cells).items()]
    parts = [
        page.heading("Final accuracy"),
        page.table(["strategy", *map(_fault_text, faults)], linked),
        page.paragraph("On the test set, else on the clients' held-out parts. Each figure leads to its simulation."),
        page.heading("Accuracy after each round"),
        page.curves(panels),
        page.heading("Every simulation"),
        page.table(
            ["simulation", "accuracy", "macro F1", "answered", "refused", "seconds", "state"],
            [_page_row(cell) for cell in cells],
        ),
        *(page.paragraph(failure, failed=True) for failure in failures_of(cells)),
        page.heading("Files"),
        page.paragraph(page.Link(COMPARISON_CSV, COMPARISON_CSV), ", ", page.Link(COMPARISON_JSON, COMPARISON_JSON)),
    ]
    return page.document(title, parts)


def _by_strategy(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {
        name: [cell for cell in cells if cell.strategy == name] for name in dict.fromkeys(c.strategy for c in cells)
    }


def _figure(cell: Cell) -> page.Link:
    return page.Link(_shown(cell), f"{folder_of(cell.strategy, cell.fault)}/{PAGE}")


def _page_row(cell: Cell) -> list[object]:
    link = replace(_figure(cell), text=f"{cell.strategy}, {_fault_text(cell.fault)}")
    figures = ["" if value is None else value for value in (cell.accuracy, cell.macro_f1)]
    answered = f"{cell.answered} of {cell.asked}"
    return [link, *figures, answered, cell.refusals, cell.seconds, cell.state]


def _write(out: Path, cells: Sequence[Cell]) -> None:
    rows = [asdict(cell) for cell in cells]
    with (out / COMPARISON_CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_durably(out / COMPARISON_JSON, (json.dumps(rows, indent=2) + "\n").encode())
