"""Whether CT scans are learned from, the whole way: the demonstration on made chests, and again with labels dealt by chance.

Both are `make demo TASK=ct-volume` with all its processes. Prints one JSON document.

    python bench/ct.py
    python bench/ct.py --scan <folder>   # with copies of a real chest CT, a folder of DICOM files
    python bench/ct.py --only labels     # without the shuffled ones
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "deploy" / "demo" / "demo.py"
AUC_GOAL = 0.95
CHANCE = 0.5
MOST_BY_CHANCE = 0.15  # two standard errors of an AUC of 0.5 on 60 and 60 scans are 0.105; three are 0.16
SECONDS_GOAL = 600.0
DEADLINE_S = 3600.0


def demonstration(*words: str, rounds: int) -> dict[str, Any]:
    """One demonstration's report; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        argv = [
            sys.executable,
            str(DEMO),
            "--task",
            "ct-volume",
            "--rounds",
            str(rounds),
            "--report",
            str(report),
            *words,
        ]
        subprocess.run(argv, check=True, timeout=DEADLINE_S, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(report.read_text())
    return {
        "auc": found["test"]["auc"],
        "test": found["test"],
        "seconds": found["wall_seconds"],
        "sites": found["sites"],
    }


def reached(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether right labels are learned, in time, and shuffled ones are not."""
    labels, shuffled = found["labels"], found.get("shuffled")
    learned = labels["auc"] >= AUC_GOAL and labels["seconds"] <= SECONDS_GOAL
    return learned and (shuffled is None or abs(shuffled["auc"] - CHANCE) <= MOST_BY_CHANCE)


def main() -> int:
    """Exit 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scan", type=Path, help="put the balls into copies of this chest CT")
    parser.add_argument("--only", choices=["labels"], help="leave out the shuffled labels")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    scan = ["--scan", str(given.scan)] if given.scan is not None else []
    found = {"labels": demonstration(*scan, rounds=given.rounds)}
    if given.only is None:
        found["shuffled"] = demonstration(*scan, "--shuffled", rounds=given.rounds)
    text = json.dumps({"cores": os.cpu_count(), "reached": reached(found), **found}, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return 0 if reached(found) else 1


if __name__ == "__main__":
    sys.exit(main())
