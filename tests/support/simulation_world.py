"""Simulations that take a moment: a made table whose label follows its columns, and tiny made images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simulator.command import simulation_of
from simulator.run import Listener, simulate

TABLE = {
    "columns": [{"name": "a"}, {"name": "b"}, {"name": "ill"}],
    "label": {"name": "ill"},
}


class Crash(BaseException):
    """The process is killed: nothing may catch it."""


def make_table(folder: Path, rows: int = 240, seed: int = 1) -> Path:
    """A CSV with two columns and a label that depends on them, and beside it the study that describes it."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, 2)).round(6)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "ill"])
        writer.writerows([a, b, "yes" if a + 0.5 * b + rng.normal() / 4 > 0 else "no"] for a, b in values)
    study = {"task": "tabular", "data": {"classes": ["no", "yes"], "table": TABLE}}
    (folder / "study.json").write_text(json.dumps(study))
    return folder / "data.csv"


def table_flags(folder: Path, **changes: Any) -> dict[str, Any]:
    """The flags of a simulation on `make_table`'s data."""
    flags = {
        "task": "tabular",
        "data": folder / "data.csv",
        "study_file": folder / "study.json",
        "clients": 12,
        "fraction": 0.5,
        "rounds": 3,
        "seed": 7,
    }
    return {**flags, **changes}


def run(
    out: Path,
    flags: dict[str, Any],
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
    mlflow_uri: str | None = None,
    on_line: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """One life of a simulation, in this process."""
    listener = Listener(lambda _done, _all: None, on_line, on_progress)
    return simulate(simulation_of(flags), out, listener, mlflow_uri)


def arguments(flags: dict[str, Any], out: Path) -> list[str]:
    """The same as words of a command line."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, "--out", str(out)]
