"""What a round costs beside training: the figures behind docs/benchmarks.md.

The real processes run on this machine (gateway, MLflow, aggregator, hospitals, all over TLS) and train real models on a
dozen tiny images a class, so that nearly all of a round is overhead. Overhead is the round's seconds less the seconds that
the slowest hospital's trainer had the task: reading the weights, judging them, training, writing the update. Beside it,
stock Flower sends the same tensors to as many nodes, whose training only hands them back.

    python bench/overhead.py                                    # all models, MedHive and stock Flower
    python bench/overhead.py --models resnet-gn --rounds 8 --no-stock

Prints one JSON document; exits 1 when a median is above its goal.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import stock

from fl_client.tasks.models import build_model
from fl_client.tasks.phantoms import CLASSES, make_phantoms

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy" / "demo"))
from stack import Program, Stack, StackError, wait_until

IMAGES_PER_CLASS = 12
IMAGE_SIZE = 32
LEFT_OUT = 1  # rounds at the beginning: the first reads the data and imports torch
RUN_DEADLINE_S = 900.0
SEED = 42


@dataclass(frozen=True)
class Size:
    """One model to measure: MedHive's name of it, the goal for a round's overhead, rounds of stock Flower."""

    model: str
    goal_s: float
    stock_rounds: int


SIZES = (
    Size("resnet-gn", 1.0, 3),
    # Stock Flower moves every tensor by itself: one round of 727 tensors takes minutes.
    Size("densenet121", 1.5, 1),
    Size("resnet-gn-wide", 2.0, 3),
)


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some seconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Rounded to milliseconds."""
        return cls(round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3))


def tensors_of(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, as hospitals send them."""
    state = build_model(model, channels=1, classes=len(CLASSES), seed=SEED).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def serverapp_pids(server: int) -> list[int]:
    """The processes below `server` that run a ServerApp; none where /proc does not exist."""
    found, children = [], [server]
    while children:
        pid = children.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                children += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
        if b"\0serverapp\0" in _command_line(pid):
            found.append(pid)
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def peak_bytes(pid: int) -> int:
    """The highest resident memory of a process so far; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class Hospitals:
    """A running coordinator with hospitals that answer every request at once."""

    def __init__(self, folder: Path, sites: int, *, mlflow: bool) -> None:
        self.stack = Stack(folder, mlflow=mlflow)
        self.sites = [f"hospital-{number}" for number in range(1, sites + 1)]

    def start(self) -> None:
        """Start everything and let the hospitals join."""
        password = self.stack.start()
        if password is None:
            raise StackError("the gateway did not print the first admin's password")
        self.stack.login(password)
        for number, site in enumerate(self.sites):
            self.stack.join(site)
            make_phantoms(self.stack.site_folder(site) / "data", IMAGES_PER_CLASS, SEED + number)
            self.stack.start_site(site)
        for site in self.sites:
            self.stack.programs[site].wait_for(r"[Cc]onnected")

    def measure(self, model: str, rounds: int, strategy: str) -> dict[str, Any]:
        """Make a study of this model, do one run of it, and return its rounds with the ServerApp's peak memory."""
        study = f"{model}-{strategy}"
        members = [word for site in self.sites for word in ("--member", site)]
        self.stack.admin(
            "studies", "create", study, "--task", "image-folder", "--classes", ",".join(CLASSES), *members,
            "--option", f"model={model}", "--option", f"image_size={IMAGE_SIZE}",
        )  # fmt: skip
        run_id = self._agree(study, rounds, strategy)
        run, peak = self._follow(run_id)
        if run["state"] != "completed":
            raise StackError(f"{run_id} is {run['state']}: {run['reason']}")
        done = [item for item in run["rounds_done"] if item["number"] > LEFT_OUT]
        return {
            "overhead_s": asdict(Spread.of([item["overhead_s"] for item in done])),
            "round_s": asdict(Spread.of([item["seconds"] for item in done])),
            "each_overhead_s": [round(item["overhead_s"], 3) for item in done],
            "rounds": len(done),
            "sites": len(self.sites),
            "serverapp_peak_bytes": peak,
        }

    def _agree(self, study: str, rounds: int, strategy: str) -> str:
        sent = self.stack.site_json(
            self.sites[0], "request", study, "--rounds", str(rounds), "--local-epochs", "1", "--strategy", strategy,
            "--min-sites", str(len(self.sites)), "--person", "Dr. Bench",
        )  # fmt: skip
        self.stack.admin("approve", sent["id"])
        run_id = str(self.stack.admin_json("show", sent["id"])["run_id"])
        for site in self.sites[1:]:
            self.stack.site(site, "consent", run_id, "--person", "Dr. Bench", "--yes")
        return run_id

    def _follow(self, run_id: str) -> tuple[dict[str, Any], int]:
        """Wait for the end of a run without keeping the cores busy; the log tells it, and /proc the memory."""
        server, peak = self.stack.programs["server"], 0
        ended = rf"(?m)^{run_id} (completed|failed|cancelled)"

        def over() -> bool:
            nonlocal peak
            peak = max([peak, *(peak_bytes(pid) for pid in serverapp_pids(server.pid))])
            return _says(server, ended)

        wait_until(over, f"the end of {run_id}", RUN_DEADLINE_S, server.require_running)
        return self.stack.admin_json("show", run_id), peak


def _says(program: Program, pattern: str) -> bool:
    try:
        program.wait_for(pattern, deadline_s=0.0)
    except StackError:
        return False
    return True


def medhive(chosen: argparse.Namespace, sizes: Sequence[Size], folder: Path) -> dict[str, dict[str, Any]]:
    """MedHive's figures, by model."""
    hospitals = Hospitals(folder, chosen.sites, mlflow=not chosen.no_mlflow)
    with hospitals.stack:
        hospitals.start()
        return {size.model: _measured(hospitals, size, chosen) for size in sizes}


def _measured(hospitals: Hospitals, size: Size, chosen: argparse.Namespace) -> dict[str, Any]:
    before = machine.load()
    figures = hospitals.measure(size.model, chosen.rounds + LEFT_OUT, chosen.strategy)
    progress(f"{size.model}: overhead {figures['overhead_s']}, round {figures['round_s']}")
    return {**figures, "load_before": before, "load_after": machine.load()}


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def beside_stock(chosen: argparse.Namespace, sizes: Sequence[Size], folder: Path) -> dict[str, dict[str, Any]]:
    """Stock Flower's seconds a round with the same tensors, by model."""
    figures = {}
    with stock.Federation(folder, chosen.sites) as federation:
        for size in sizes:
            seconds = federation.measure(tensors_of(size.model), min(size.stock_rounds, chosen.rounds))
            figures[size.model] = {"round_s": asdict(Spread.of(seconds)), "rounds": len(seconds)}
            progress(f"{size.model} on stock Flower: {figures[size.model]}")
    return figures


def row(size: Size, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """One model's figures together."""
    shapes = tensors_of(size.model)
    elements = sum(_product(shape) for shape in shapes.values())
    overhead = ours["overhead_s"]["median"]
    return {
        "model": size.model,
        "megabytes": round(elements * 4 / 1e6, 2),
        "tensors": len(shapes),
        "goal_s": size.goal_s,
        "met": overhead <= size.goal_s,
        "medhive": dict(ours),
        "stock_flower": dict(theirs) if theirs else None,
        "stock_over_medhive": round(theirs["round_s"]["median"] / overhead, 1) if theirs else None,
    }


def _product(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[size.model for size in SIZES])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6, help="counted rounds; the first one is done beside them")
    parser.add_argument("--strategy", default="fedprox")
    parser.add_argument("--no-mlflow", action="store_true", help="leave the tracking server out")
    parser.add_argument("--no-stock", action="store_true", help="leave stock Flower out")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave the logs there")
    return parser.parse_args(arguments)


def main() -> int:
    """Exit 1 when a median is above its goal."""
    chosen = parse()
    machine.end_cleanly_on_signals()
    sizes = [size for size in SIZES if not chosen.models or size.model in chosen.models]
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="medhive-bench-"))
    try:
        ours = medhive(chosen, sizes, folder / "medhive")
        theirs = {} if chosen.no_stock else beside_stock(chosen, sizes, folder / "stock")
    finally:
        if not chosen.keep:
            shutil.rmtree(folder, ignore_errors=True)
    rows = [row(size, ours[size.model], theirs.get(size.model)) for size in sizes]
    print(json.dumps({"machine": machine.describe(), "strategy": chosen.strategy, "rows": rows}, indent=2))
    return 0 if all(item["met"] for item in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
