"""The documented task of one's own, installed as users install it, and patients for it."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np

SOURCE: Final = Path(__file__).parents[2] / "docs" / "own-task"
BETA: Final = (0.05, 0.8)
"""What the made patients follow: the log hazard a year of age, and a stage."""


def install(folder: Path) -> Path:
    """Install the package into a folder of its own; returns what goes onto the path of a hospital's programs."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", folder / "packages", copy_of_source(folder / "source")],
        check=True, timeout=120,
    )  # fmt: skip
    return folder / "packages"


def image_context(folder: Path) -> Path:
    """The folder that its image is built of: the source with the wheel beside it."""
    context = copy_of_source(folder / "context")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", context, copy_of_source(folder / "source")],
        check=True, timeout=120,
    )  # fmt: skip
    return context


def copy_of_source(target: Path) -> Path:
    """The package's files; pip leaves a build folder beside what it installs."""
    target.mkdir(parents=True)
    for path in SOURCE.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def write_patients(path: Path, seed: int, patients: int = 400) -> None:
    """Times that follow Cox' model with the coefficients `BETA`; a third is censored, and one line is broken."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True)
    age, stage = rng.uniform(40, 80, patients), rng.integers(1, 5, patients)
    hazard = np.exp(BETA[0] * (age - 60) + BETA[1] * (stage - 2))
    died_at = rng.exponential(1000 * (1 + seed), patients) / hazard
    seen_until = rng.exponential(2000, patients)
    rows = zip(age, stage, np.minimum(died_at, seen_until) + 1e-3, (died_at <= seen_until).astype(int), strict=True)
    lines = [f"{a:.2f},{s},{t:.3f},{d}" for a, s, t, d in rows]
    path.write_text("\n".join(["age,stage,days,died", *lines, "old,2,3,1"]) + "\n")
