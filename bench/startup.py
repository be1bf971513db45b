"""How soon the programs answer, and how long the demonstration takes: the figures behind docs/benchmarks.md.

    python bench/startup.py              # --help of every program, then `make demo` on made data
    python bench/startup.py --no-demo

Prints one JSON document; exits 1 when a figure is above its goal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parents[1]
HELP_GOAL_S = 0.5
DEMO_GOAL_S = 180.0
DEMO_DEADLINE_S = 900
PROGRAMS = ("medhive-site", "medhive-admin", "medhive-gateway", "medhive-server")
WITH_GOAL = ("medhive-site",)
REPEATS = 7
HELP_DEADLINE_S = 60


def help_seconds(program: str, repeats: int) -> dict[str, Any]:
    """Seconds from the start of `program --help` to its end, after one start that only warms the disk's cache."""
    command = [str(Path(sys.executable).parent / program), "--help"]
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, timeout=HELP_DEADLINE_S)
        seconds.append(time.perf_counter() - began)
    counted = seconds[1:]
    middle = statistics.median(counted)
    return {
        "program": program,
        "median_s": round(middle, 3),
        "least_s": round(min(counted), 3),
        "most_s": round(max(counted), 3),
        "goal_s": HELP_GOAL_S if program in WITH_GOAL else None,
        "met": middle < HELP_GOAL_S or program not in WITH_GOAL,
    }


def demo_seconds() -> dict[str, Any]:
    """`make demo` on made data: the seconds that its report tells, and the whole command's."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        began = time.perf_counter()
        subprocess.run(
            ["make", "demo", f"REPORT={report}"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=DEMO_DEADLINE_S,
            env={**os.environ, "PYTHON": sys.executable},
        )  # fmt: skip
        whole = time.perf_counter() - began
        told = json.loads(report.read_text())
    return {
        "wall_s": told["wall_seconds"],
        "whole_command_s": round(whole, 1),
        "rounds_s": [round(item["seconds"], 1) for item in told["rounds"]],
        "test_accuracy": told["test"]["accuracy"],
        "goal_s": DEMO_GOAL_S,
        "met": told["wall_seconds"] <= DEMO_GOAL_S,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--no-demo", action="store_true", help="leave `make demo` out")
    return parser.parse_args(arguments)


def main() -> int:
    """Exit 1 when a figure is above its goal."""
    chosen = parse()
    helps = [help_seconds(program, chosen.repeats) for program in PROGRAMS]
    demo = None if chosen.no_demo else demo_seconds()
    print(json.dumps({"machine": machine.describe(), "help": helps, "demo": demo}, indent=2))
    return 0 if all(item["met"] for item in [*helps, demo] if item) else 1


if __name__ == "__main__":
    sys.exit(main())
