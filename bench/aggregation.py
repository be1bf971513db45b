"""How fast the strategies combine updates, and how much memory that takes: the figures behind docs/benchmarks.md.

Each measurement runs in a process of its own, because peak memory is a process's highest mark and never falls.

    python bench/aggregation.py                      # FedAvg with a 100 MB model, 2, 4 and 8 sites
    python bench/aggregation.py --strategy fedadam --model-mb 50 --sites 3

Prints one JSON document: per number of sites the peak memory in models above the idle process, and GB/s of updates.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from medhive.packing import Layout, write_flat
from medhive.strategies import STRATEGIES, Update, make_strategy

MEMORY_LIMIT_MODELS = 2.2
"""Peak memory of an aggregation above the idle process, as the project promises it for FedAvg and FedProx."""
FLATNESS_LIMIT_MODELS = 0.1
"""Peaks of different numbers of sites that lie this close together count as flat."""
TENSORS = 100
REPEATS = 5
TIMEOUT_S = 600


def make_files(folder: Path, model_bytes: int, sites: int) -> None:
    """A base and one update a site, of random numbers, as packed files."""
    side = model_bytes // 4 // TENSORS
    layout = Layout.of({f"layer.{place:03d}.weight": (side,) for place in range(TENSORS)})
    for place in range(sites + 1):
        rng = np.random.default_rng(place)
        blocks = (rng.standard_normal(side, dtype=np.float32) for _ in range(TENSORS))
        write_flat(folder / f"weights-{place}", layout, blocks)


def peak_bytes() -> int:
    """The highest resident memory of this process so far.

    Linux hands the mark of `getrusage` on from the process that started this one; VmHWM begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, folder: Path, sites: int) -> dict[str, Any]:
    """Aggregate `REPEATS` times in this process; seconds are the median's."""
    strategy = make_strategy(name)
    updates = [Update(f"site_{place}", folder / f"weights-{place}", 100 + place) for place in range(1, sites + 1)]
    base = folder / "weights-0"
    model_bytes = base.stat().st_size
    idle = peak_bytes()
    seconds = []
    for _ in range(REPEATS):
        _, stats = strategy.aggregate(base, updates, strategy.initial_state(folder), folder / "out")
        seconds.append(stats.seconds)
    middle = statistics.median(seconds)
    return {
        "sites": sites,
        "model_bytes": model_bytes,
        "idle_bytes": idle,
        "peak_bytes": peak_bytes(),
        "peak_models_above_idle": round((peak_bytes() - idle) / model_bytes, 3),
        "seconds": round(middle, 4),
        "gb_per_s": round(sites * model_bytes / middle / 1e9, 2),
        "sum_gb_per_s": round(sum_rate(updates, base), 2),
    }


def sum_rate(updates: list[Update], base: Path) -> float:
    """GB/s of the running sum alone: reading and adding, without the norm, the hash, the writing and the syncing."""
    strategy = make_strategy("fedavg")
    members = strategy._cohort(Layout.from_header(base), updates)
    plan, size = strategy._plan(members), members[0].file.layout.size
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for start in range(0, size, plan.window):
            plan.reduce(slice(start, min(start + plan.window, size)))
        seconds.append(time.perf_counter() - began)
    return len(updates) * size * 4 / statistics.median(seconds) / 1e9


def measure_apart(name: str, model_bytes: int, sites: int) -> dict[str, Any]:
    """Make the files here, measure in a fresh process, and remove them."""
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), model_bytes, sites)
        command = [sys.executable, __file__, "--measure", folder, "--strategy", name, "--sites", str(sites)]
        done = subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="fedavg")
    parser.add_argument("--model-mb", type=float, default=100.0, help="size of the model in MB")
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Exit 1 when FedAvg or FedProx take more memory than promised, or more with more sites."""
    chosen = parse()
    if chosen.measure:
        print(json.dumps(measure(chosen.strategy, chosen.measure, chosen.sites[0])))
        return 0
    rows = [measure_apart(chosen.strategy, int(chosen.model_mb * 1e6), sites) for sites in chosen.sites]
    peaks = [row["peak_models_above_idle"] for row in rows]
    flat = max(peaks) - min(peaks) <= FLATNESS_LIMIT_MODELS
    small = max(peaks) <= MEMORY_LIMIT_MODELS
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    report = {"strategy": chosen.strategy, "machine": machine, "rows": rows, "flat": flat, "within_limit": small}
    print(json.dumps(report, indent=2))
    return 0 if (flat and small) or chosen.strategy not in ("fedavg", "fedprox") else 1


if __name__ == "__main__":
    sys.exit(main())
