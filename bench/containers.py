"""What the coordinator's containers take: seconds from `docker compose up` to all healthy, and memory when nothing goes on.

    python bench/containers.py              # --or-skip: only say why where no engine answers, or no images are built

The images must be built (`make images`). It starts a coordinator of its own beside any other, from nothing, and deletes it
again. Prints one JSON document; exits 1 when a figure is above its goal.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parents[1]
HEALTHY_GOAL_S = 60.0
MEMORY_GOAL_GB = 1.5
DEADLINE_S = 600
SETTLE_S = 30  # after the start's own work
UNITS = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "B": 1}


def compose(name: str, *words: str) -> str:
    """`docker compose ...` of a project of our own, on ports that the engine chooses."""
    done = subprocess.run(
        ["docker", "compose", "--project-name", name, *words], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=DEADLINE_S, env={**os.environ, "PORT": "0", "MLFLOW_PORT": "0"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: docker compose {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def obstacle() -> str | None:
    """Why nothing can be measured here; None when it can."""
    if not _answers("docker", "version") or not _answers("docker", "compose", "version"):
        return "no container engine with compose answers"
    images = compose("medhive-bench", "config", "--images").split()
    missing = [image for image in images if not _answers("docker", "image", "inspect", image)]
    return f"{', '.join(sorted(set(missing)))} not built; make images" if missing else None


def _answers(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False, timeout=DEADLINE_S).returncode == 0
    except FileNotFoundError:
        return False


def size_bytes(text: str) -> float:
    """What `docker stats` shows, such as 196.5MiB."""
    unit = next(unit for unit in UNITS if text.endswith(unit))
    return float(text.removesuffix(unit)) * UNITS[unit]


def memory_gb(name: str) -> dict[str, float]:
    """What each service holds, by its name."""
    ids = compose(name, "ps", "--quiet").split()
    words = ["docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", *ids]
    lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout.splitlines()
    shown = {line.split()[0].removeprefix(f"{name}-").removesuffix("-1"): line.split()[1] for line in lines}
    return {service: round(size_bytes(text) / 1e9, 3) for service, text in sorted(shown.items())}


def measure(name: str) -> dict[str, Any]:
    """Start, wait for health, settle, look."""
    began = time.perf_counter()
    compose(name, "up", "--detach", "--no-build", "--wait", "--wait-timeout", str(DEADLINE_S))
    healthy_s = time.perf_counter() - began
    time.sleep(SETTLE_S)
    held = memory_gb(name)
    total = round(sum(held.values()), 3)
    return {
        "skipped": None,
        "healthy_s": round(healthy_s, 1),
        "healthy_goal_s": HEALTHY_GOAL_S,
        "memory_gb": held,
        "memory_total_gb": total,
        "memory_goal_gb": MEMORY_GOAL_GB,
        "met": healthy_s <= HEALTHY_GOAL_S and total <= MEMORY_GOAL_GB,
    }


def main() -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--or-skip", action="store_true", help="only say why where it cannot be measured")
    chosen, reason = parser.parse_args(), obstacle()
    if reason:
        print(json.dumps({"skipped": reason}))
        return 0 if chosen.or_skip else 1
    machine.end_cleanly_on_signals()
    name = f"medhive-bench-{secrets.token_hex(4)}"
    about = machine.describe()
    try:
        found = measure(name)
    finally:
        compose(name, "down", "--volumes", "--timeout", "5")
    print(json.dumps({"machine": about, **found}, indent=2))
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
