"""The command line of `medhive-simulate`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import structlog

from medhive import __version__
from medhive.errors import InvalidInput
from medhive.terminal import (
    FAILED,
    Advance,
    Command,
    Terminal,
    chosen_options,
    duration,
    pass_terminal,
    run_options,
    share,
    values,
)

if TYPE_CHECKING:
    from simulator.compare import Cell
    from simulator.partition import Partition
    from simulator.run import Listener
    from simulator.study import Simulation

INLINE, RAY = "inline", "ray"
BACKENDS: Final = (INLINE, RAY)
DEFAULT_CLIENTS: Final = 10
DEFAULTS: Final[Mapping[str, Any]] = {
    "task": "image-folder",
    "partition": "iid",
    "test_every": 1,
    "together": 1,
    "backend": INLINE,
    "device": "auto",
}
DEFAULT_SEED: Final = 42
METRICS: Final = {"macro_f1": "macro F1", "ece": "calibration error"}  # as `medhive-site updates --evaluate` names them
LOG, PAGE = "log.jsonl", "report.html"
ADDRESS: Final = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")
OWN_FLAGS: Final = (
    "task",
    "data",
    "study_file",
    "options",
    "clients",
    "partition",
    "validation_share",
    "test",
    "test_every",
    "dropout",
    "slow",
    "patience",
    "poison",
    "forget",
    "together",
    "backend",
    "workers",
    "ray_address",
    "device",
)
NOT_SIMULATED: Final = ("deadline_s", "consent_deadline_s")  # nobody waits for anybody here


@click.command("medhive-simulate", cls=Command)
@click.option(
    "--task", default=DEFAULTS["task"], show_default=True, help="image-folder, ct-volume, tabular, or one of your own."
)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The data's folder or file.")
@click.option(
    "--study-file", type=click.Path(path_type=Path), help="JSON with the study's task and data; tables need it."
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the task, such as image_size=96."
)
@click.option(
    "--clients", type=int, help="How many, 1 to 100,000 [10]; left out with `sites` and a file, which say it."
)
@click.option(
    "--partition",
    default=DEFAULTS["partition"],
    show_default=True,
    help="iid, dirichlet:ALPHA, shards:COUNT, sites (a client each folder or file), or a CSV of example and client.",
)
@click.option(
    "--validation-share", type=float, help="Share of each client's data for validation [0.2; with --test none]."
)
@click.option(
    "--test", type=click.Path(path_type=Path), help="Data of their own that judge the model after each round."
)
@click.option(
    "--test-every",
    type=click.IntRange(1),
    default=DEFAULTS["test_every"],
    show_default=True,
    help="Judge after every so many rounds.",
)
@click.option("--dropout", type=float, help="Chance that a client that is asked does not answer.")
@click.option("--slow", metavar="SHARE[:FACTOR]", help="Share of clients that need so many times the work [10].")
@click.option("--patience", type=float, help="How many times a normal client's work a round waits for [2].")
@click.option("--poison", metavar="SHARE:KIND", help="Share of clients that send nan, boost, flip, noise or labels.")
@click.option(
    "--compare", metavar="STRATEGIES", help="Compare all, or those named, under each fault; alone: the usual faults."
)
@click.option("--forget", is_flag=True, help="Clients keep no optimiser's state from round to round.")
@click.option(
    "--together",
    type=click.IntRange(1),
    default=DEFAULTS["together"],
    show_default=True,
    help="Train so many clients as one computation: small models, recipe=plain.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=DEFAULTS["backend"],
    show_default=True,
    help="Where clients run: in this process, or in several, by Flower's simulation engine on Ray.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes of the backend ray [one a core].")
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="A Ray cluster that runs already, for the backend ray on several machines.",
)
@click.option(
    "--device", default=DEFAULTS["device"], show_default=True, help="cpu, cuda, cuda:0, or auto for the best there is."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Result folder; the same command goes on there."
)
@click.option(
    "--mlflow", "mlflow_uri", envvar="MLFLOW_TRACKING_URI", help="Where MLflow keeps runs [MLFLOW_TRACKING_URI]."
)
@run_options
@click.version_option(__version__, message="%(prog)s %(version)s")
@pass_terminal
def simulate_command(terminal: Terminal, /, **given: Any) -> None:
    """Simulate a federated study on this machine: the deployment's own rounds, strategies, checks and tasks, no service.

    The result folder gets the curves, tables, a summary, the weights and a page to open. A simulation that was stopped goes
    on when the same command is given again, and ends with the same bits.
    """
    from simulator.run import UNTOLD  # noqa: PLC0415 - seconds of imports that --help need not pay

    strategies = given.pop("compare")
    if strategies is not None:
        _compare(terminal, given, strategies)
        return
    summary = _run(terminal, given)
    terminal.result(summary, lambda: _show(terminal, summary))
    for problem in (summary["reason"] if summary["state"] != "completed" else "", summary.get(UNTOLD)):
        if problem:
            terminal.note(f"error: {problem}")
            click.get_current_context().exit(FAILED)


def _run(terminal: Terminal, given: dict[str, Any]) -> dict[str, Any]:
    from simulator.run import simulate  # noqa: PLC0415 - seconds of imports that --help need not pay

    out, mlflow_uri = given.pop("out"), given.pop("mlflow_uri")
    simulation = simulation_of(given)
    with _watching(terminal, out) as listener:
        return simulate(simulation, out, listener, mlflow_uri)


def _compare(terminal: Terminal, given: dict[str, Any], text: str) -> None:
    from simulator.compare import compare, strategies_of  # noqa: PLC0415

    out, mlflow_uri = given.pop("out"), given.pop("mlflow_uri")
    strategies = strategies_of(text)
    simulation = simulation_of(given)
    with _watching(terminal, out) as listener:
        cells = compare(simulation, strategies, out, listener, mlflow_uri)
    terminal.result([asdict(cell) for cell in cells], lambda: _show_comparison(terminal, cells, out))


def _show_comparison(terminal: Terminal, cells: "Sequence[Cell]", out: Path) -> None:
    from simulator.compare import failures_of, rows_of  # noqa: PLC0415

    terminal.table(*rows_of(cells))
    for failure in failures_of(cells):
        terminal.line(failure)
    terminal.fields([("results", str(out / PAGE))])


@contextmanager
def _watching(terminal: Terminal, out: Path) -> Iterator["Listener"]:
    """The log in the folder, lines and a bar on the terminal."""
    from simulator.run import Listener  # noqa: PLC0415

    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file; --out names the folder for the results.")
    out.mkdir(parents=True, exist_ok=True)
    with _logging_to(out / LOG), ExitStack() as shown:
        bar = _Bar(terminal, shown)
        yield Listener(partial(bar.show, "reading the data"), terminal.note, partial(bar.show, "clients"))


class _Bar:
    """One bar at a time: what is shown last takes the place of what was shown before."""

    def __init__(self, terminal: Terminal, shown: ExitStack) -> None:
        self._terminal, self._shown = terminal, shown
        self._what = ""
        self._advance: Advance = lambda _done, _total: None

    def show(self, what: str, done: int, total: int) -> None:
        """Show how far `what` is."""
        if what != self._what:
            self._shown.close()
            self._advance = self._shown.enter_context(self._terminal.progress(what))
            self._what = what
        self._advance(done, total)


def simulation_of(flags: Mapping[str, Any]) -> "Simulation":
    """What the flags ask for; what is left out is as the command has it.

    Raises:
        InvalidInput: they do not fit; the text names what.
    """
    from simulator.faults import Faults  # noqa: PLC0415
    from simulator.partition import Partition  # noqa: PLC0415
    from simulator.study import Simulation, run_spec, study_data  # noqa: PLC0415

    own = {name: flags.get(name, DEFAULTS.get(name)) for name in OWN_FLAGS}
    given = {name: value for name, value in flags.items() if name not in OWN_FLAGS}
    chosen = {name: value for name, value in chosen_options(given).items() if name not in NOT_SIMULATED}
    partition = Partition.parse(own["partition"])
    named = _named_clients(partition, own["data"], own["clients"])
    dealt = DEFAULT_CLIENTS if own["clients"] is None else own["clients"]
    clients = dealt if named is None else None
    if own["test_every"] > 1 and own["test"] is None:
        raise InvalidInput("--test-every is of --test, the data that judge the model.")
    fields: dict[str, Any] = {"initial_seed": chosen.get("seed", DEFAULT_SEED)}
    if own["options"]:
        fields["options"] = values(own["options"], "--option")
    if own["validation_share"] is not None:
        fields["validation_share"] = own["validation_share"]
    study = study_data(own["task"], own["data"], partition, own["study_file"], fields)
    return Simulation(
        spec=run_spec(own["task"], study, chosen, dealt if named is None else named),
        data=own["data"],
        test=own["test"],
        test_every=own["test_every"],
        clients=clients,
        partition=partition,
        faults=Faults.parse(own["dropout"], own["slow"], own["poison"], own["patience"]),
        trained=_trained(own["test"], own["validation_share"]),
        forget=bool(own["forget"]),
        device=own["device"],
        together=own["together"],
        workers=_workers(own["backend"], own["workers"], own["together"]),
        ray_address=_ray_address(own["backend"], own["ray_address"]),
    )


def _named_clients(partition: "Partition", data: Path, given: int | None) -> int | None:
    """How many clients the partition itself names, which `given` must not contradict; None where it names none."""
    from simulator.federation import site_paths  # noqa: PLC0415 - seconds of imports that --help need not pay
    from simulator.partition import SITES, WrongPartition, names_of  # noqa: PLC0415

    if partition.kind not in (SITES, "file"):
        return None
    named = len(names_of(partition.path) if partition.path is not None else site_paths(data))
    if given is not None and given != named:
        where = partition.path or data
        raise WrongPartition(f"{where} has {named} clients, and --clients says {given}; leave out --clients.")
    return named


class RayMissing(InvalidInput):
    """The backend ray is asked for without its packages."""

    code = "ray-missing"


def _workers(backend: str, workers: int | None, together: int) -> int | None:
    """How many processes the clients are spread over; 0: none."""
    if backend == INLINE:
        if workers is not None:
            raise InvalidInput("--workers is of --backend ray.")
        return 0
    if together > 1:
        raise InvalidInput("--together is of --backend inline; leave out one of the two.")
    if find_spec("ray") is None:
        raise RayMissing(
            "The backend ray needs Ray, which is not here: pip install 'medhive-simulator[ray]', or leave out --backend."
        )
    return workers


def _ray_address(backend: str, address: str | None) -> str | None:
    if address is None:
        return None
    if backend == INLINE:
        raise InvalidInput("--ray-address is of --backend ray.")
    if not ADDRESS.fullmatch(address):
        raise InvalidInput(f"{address} is no address of a Ray cluster; give HOST:PORT, as `ray start --head` names it.")
    return address


def _trained(test: Path | None, validation_share: float | None) -> frozenset[str]:
    """The parts that are trained on too: a test set makes the held-out part needless, and unless asked for validation."""
    if test is None:
        return frozenset()
    return frozenset({"heldout"} if validation_share is not None else {"heldout", "validation"})


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Have the log of the round loop in the result folder: on the terminal stand its lines for people."""
    before = structlog.get_config()
    with path.open("a", encoding="utf-8") as file:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.WriteLoggerFactory(file),
            cache_logger_on_first_use=False,
        )
        try:
            yield
        finally:
            structlog.configure(**before)


def _show(terminal: Terminal, summary: dict[str, Any]) -> None:
    figures = {f"test {METRICS.get(name, name)}": value for name, value in summary["test"].items()}
    figures |= {f"held-out {METRICS.get(name, name)}": value for name, value in summary["heldout"].items()}
    figures |= {"validation accuracy": summary["validation"].get("val_accuracy")}
    terminal.fields(
        [
            ("simulation", summary["state"]),
            ("clients", f"{summary['clients']} ({summary['partition']}), {summary['strategy']}"),
            ("rounds", f"{summary['rounds']} in {duration(summary['seconds'])}"),
            ("answers", f"{summary['clients_answered']} of {summary['clients_asked']}, {summary['refusals']} refused"),
            *((name, share(value)) for name, value in figures.items()),
            (
                "best",
                summary["best_round"] and f"{share(summary['best_test_accuracy'])} after round {summary['best_round']}",
            ),
            ("weights", summary["weights_digest"]),
            ("results", str(Path(summary["out"]) / PAGE)),
        ]
    )
