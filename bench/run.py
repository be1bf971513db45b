"""`make bench`: every benchmark, one after the other, with a table for people and one JSON file for programs.

    make bench                                              # all that needs no data of one's own
    make bench BRAIN_MRI=<folder> HEART_DISEASE=<folder>    # with the accuracy of federated training on real data
    python bench/run.py --quick                             # small settings: whether it works, not how fast

Each benchmark is a program of its own in this folder, which can be started alone; a goal that is missed does not stop the
others, but makes this program exit with 1.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
DEADLINE_S = 4 * 3600  # three seeds of federated and pooled training on two cores take two hours
TAIL_LINES = 15


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figure, the goal, whether it was met (None: there is no goal)."""

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None


Report = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A program to start, and how its report becomes rows."""

    name: str
    command: tuple[str, ...]
    rows: Callable[[Report], Iterator[Row]]


def startup_rows(report: Report) -> Iterator[Row]:
    """Of `startup.py`."""
    for item in report["help"]:
        goal = f"< {item['goal_s']} s" if item["goal_s"] else ""
        yield Row(f"{item['program']} --help", f"{item['median_s']:.2f} s", goal, item["met"] if goal else None)
    demo = report["demo"]
    if demo:
        yield Row("make demo on made data", f"{demo['wall_s']:.0f} s", f"≤ {demo['goal_s']:.0f} s", demo["met"])


def aggregation_rows(report: Report) -> Iterator[Row]:
    """Of `aggregation.py`."""
    for item in report["rows"]:
        what = f"{report['strategy']}, {item['sites']} sites, {item['model_bytes'] / 1e6:.0f} MB: peak above idle"
        peak = item["peak_models_above_idle"]
        yield Row(what, f"{peak:.2f} models, {item['gb_per_s']} GB/s", "≤ 2.2 models", peak <= 2.2)
    yield Row(f"{report['strategy']}: flat over the number of sites", "", "flat", report["flat"])


def overhead_rows(report: Report) -> Iterator[Row]:
    """Of `overhead.py`."""
    for item in report["rows"]:
        ours, theirs = item["medhive"], item["stock_flower"]
        size = f"{item['megabytes']:.1f} MB in {item['tensors']} tensors, {ours['sites']} sites"
        spread = ours["overhead_s"]
        figure = f"{spread['median']:.2f} s ({spread['least']:.2f} to {spread['most']:.2f}, {ours['rounds']} rounds)"
        yield Row(f"round overhead, {size}", figure, f"≤ {item['goal_s']} s", item["met"])
        if theirs:
            other = theirs["round_s"]
            yield Row(
                "  the same on stock Flower",
                f"{other['median']:.1f} s ({theirs['rounds']} rounds), {item['stock_over_medhive']} times as long",
            )
        if ours["serverapp_peak_bytes"]:
            yield Row(
                f"  ServerApp's peak memory, {report['strategy']}", f"{ours['serverapp_peak_bytes'] / 1e6:.0f} MB"
            )


def sealed_rows(report: Report) -> Iterator[Row]:
    """Of `sealed.py`."""
    for item in report["rows"]:
        for way in ("down", "up"):
            took = item[way]
            figure = f"{took['sealed_s']:.2f} s, plain {took['plain_s']:.2f} s: {took['times_as_long']} times as long"
            yield Row(f"{item['megabytes']:.0f} MB {way}, sealed", figure)


def simulation_rows(report: Report) -> Iterator[Row]:
    """Of `simulation.py`."""
    for item in report["rounds"]:
        figure = f"{item['round_s']:.2f} s, bare loop {item['bare_loop_s']:.2f} s: {item['ratio']:.2f} times as long"
        what = f"simulated round of 50 clients, {item['local_epochs']} local epochs"
        yield Row(what, figure, f"≤ {item['goal']} times", item["reached"])
        beside = {"ten clients together": "together_s", "backend ray": "ray_s", "Flower's own simulation": "flower_s"}
        for name, key in beside.items():
            if item[key] is not None:
                yield Row(f"  {name}", f"{item[key]:.2f} s, {item[key] / item['bare_loop_s']:.2f} times the bare loop")
    if "memory" in report:
        peaks = ", ".join(f"{peak:.0f} MB with {clients}" for clients, peak in report["memory"]["peak_mb"].items())
        yield Row("  a simulation's peak memory by clients", peaks)


def container_rows(report: Report) -> Iterator[Row]:
    """Of `containers.py`."""
    if report["skipped"]:
        yield Row("containers", f"left out: {report['skipped']}")
        return
    healthy, held = report["healthy_s"], report["memory_total_gb"]
    yield Row("containers: from up to healthy", f"{healthy:.1f} s", *_at_most(healthy, report["healthy_goal_s"], "s"))
    yield Row("containers: memory when idle", f"{held:.2f} GB", *_at_most(held, report["memory_goal_gb"], "GB"))


def _at_most(value: float, goal: float, unit: str) -> tuple[str, bool]:
    return f"≤ {goal:g} {unit}", value <= goal


def image_rows(report: Report) -> Iterator[Row]:
    """Of `accuracy.py` on images."""
    options = report["options"]
    for partition, ours in report["federated"].items():
        goal = partition == "iid"  # that is what the goal is for
        what = f"unseen images, {options['sites']} sites, {partition}, {options['seeds']} seeds: accuracy"
        yield Row(what, f"{ours['accuracy']:.4f}", "≥ 0.95" if goal else "", ours["reached"] if goal else None)
        between, enough = ours["difference"], ours["not_significantly_below"]
        gap = f"{between['value']:+.4f} ({between['low']:+.4f} to {between['high']:+.4f})"
        beside = f"{gap} of {report['pooled']['accuracy']:.4f}"
        yield Row("  less that of pooled training", beside, "not below -0.01" if goal else "", enough if goal else None)


def table_rows(report: Report) -> Iterator[Row]:
    """Of `accuracy.py` on tables."""
    mean = report["mean"]
    what = f"heart disease, four hospitals, {report['options']['seeds']} seeds: accuracy"
    yield Row(what, f"{mean['federated']:.4f}", "≥ 0.785", mean["federated"] >= 0.785)
    best = report["best_single_hospital"]
    yield Row("  the best single hospital's own model", f"{best:.4f}", "not above", mean["federated"] >= best)
    yield Row("  pooled training", f"{mean['pooled']:.4f}")


def benchmarks(chosen: argparse.Namespace) -> list[Benchmark]:
    """What to do, the short ones first."""
    quick = chosen.quick
    sites = ("2", "8")
    size = "20" if quick else "100"
    demo = ("--no-demo",) if quick else ()
    rounds = ("--rounds", "2", "--no-stock", "--models", "resnet-gn") if quick else ()
    found = [Benchmark("startup", ("startup.py", *demo), startup_rows)]
    found += [
        Benchmark(name, ("aggregation.py", "--strategy", name, "--model-mb", size, "--sites", *sites), aggregation_rows)
        for name in ("fedavg", "fedprox")
    ]
    found.append(Benchmark("overhead", ("overhead.py", *rounds), overhead_rows))
    some = ("--mb", "5", "--repeats", "2") if quick else ()
    found.append(Benchmark("sealed", ("sealed.py", *some), sealed_rows))
    little = ("--rounds", "1", "--repeats", "1", "--no-memory") if quick else ()
    found.append(Benchmark("simulation", ("simulation.py", *little), simulation_rows))
    found.append(Benchmark("containers", ("containers.py", "--or-skip"), container_rows))
    return found + _accuracy(chosen)


def _accuracy(chosen: argparse.Namespace) -> list[Benchmark]:
    found = []
    if chosen.heart_disease:
        command = ("accuracy.py", "--task", "tabular", "--data", str(chosen.heart_disease))
        found.append(Benchmark("tables", (*command, "--seeds", "1" if chosen.quick else "5"), table_rows))
    if chosen.brain_mri:
        seeds = ("--seeds", "1", "--rounds", "1") if chosen.quick else ("--seeds", "3")
        command = ("accuracy.py", "--data", str(chosen.brain_mri), *seeds)
        found.append(Benchmark("images", (*command, "--partition", "iid", "dirichlet:0.5", "--jobs", "2"), image_rows))
    return found


def measure(benchmark: Benchmark) -> dict[str, Any]:
    """Start one program and read its report; what it says while it works goes to this program's standard error."""
    command = [sys.executable, str(HERE / benchmark.command[0]), *benchmark.command[1:]]
    shown = " ".join(("python", f"bench/{benchmark.command[0]}", *benchmark.command[1:]))
    print(f"── {benchmark.name}: {shown}", file=sys.stderr, flush=True)
    before, began = machine.load(), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate(timeout=DEADLINE_S)
        except BaseException:
            # SIGTERM and not SIGKILL: the program ends what it started.
            process.terminate()
            raise
    facts = {"command": shown, "seconds": round(time.monotonic() - began, 1), "load_before": before}
    return {**facts, "load_after": machine.load(), "exit_code": process.returncode, "report": _parsed(out)}


def _parsed(out: str) -> Any:
    """The report; None when the program failed before it had one."""
    try:
        return json.loads(out)
    except ValueError:
        print("\n".join(out.splitlines()[-TAIL_LINES:]), file=sys.stderr)
        return None


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    words = {True: "met", False: "MISSED", None: ""}
    cells = [(row.what, row.figure, row.goal, words[row.met]) for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in cells
    )


def rows_of(benchmark: Benchmark, done: Report) -> list[Row]:
    """A program's rows, or one that says that it failed."""
    if done["report"] is None:
        return [Row(benchmark.name, f"failed with exit code {done['exit_code']}", "", False)]
    return list(benchmark.rows(done["report"]))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; make hands its variables over through the environment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small settings, no demonstration, no stock Flower")
    parser.add_argument("--only", nargs="+", help="names of the benchmarks to do")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench.json"), help="where the JSON goes [build/bench.json]"
    )
    for name in ("brain_mri", "heart_disease"):
        given = os.environ.get(name.upper())
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, default=Path(given) if given else None)
    return parser.parse_args(arguments)


def main() -> int:
    """Exit 1 when a goal was missed or a benchmark failed."""
    chosen = parse()
    machine.end_cleanly_on_signals()
    described = machine.describe()
    print(f"{described['processor']}, {described['cores']} cores, {described['memory_gb']} GB, {described['system']}, "
          f"Python {described['python']}, load {described['load_1min']}")  # fmt: skip
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    rows: list[Row] = []
    for benchmark in benchmarks(chosen):
        if chosen.only and benchmark.name not in chosen.only:
            continue
        results[benchmark.name] = measure(benchmark)
        rows += rows_of(benchmark, results[benchmark.name])
        chosen.out.write_text(json.dumps({"machine": described, "results": results}, indent=2) + "\n")
    print(table(rows) if rows else "Nothing was measured.")
    if not chosen.brain_mri or not chosen.heart_disease:
        print(
            "Accuracy on real data was left out where no folder was given: BRAIN_MRI=<folder> HEART_DISEASE=<folder>."
        )
    print(f"All figures: {chosen.out}")
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
