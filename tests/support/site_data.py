"""Small data for tests of the hospital's side: phantoms for images, a made table for logistic regression."""

import csv
import hashlib
from pathlib import Path

import numpy as np

from fl_client.tasks.phantoms import CLASSES, make_phantoms
from medhive.signing import write_secret
from medhive.spec import Column, LabelColumn, StudyData, TableFormat

IMAGES = StudyData(classes=CLASSES, options={"image_size": 32})

TABLE = StudyData(
    classes=("healthy", "ill"),
    table=TableFormat(
        columns=(
            Column(name="age"),
            Column(name="pressure"),
            Column(name="sex", type="categorical", categories=("f", "m")),
            Column(name="grade"),
        ),
        label=LabelColumn(name="grade", positive_above=0),
    ),
)


def fix_split(state_dir: Path, name: str) -> None:
    """Give a hospital its secret before it joins, so that a few images fall into the same parts in every run of the tests.

    With a secret made at random, one time in ten some class of a dozen images has none in the validation part.
    """
    (state_dir / "keys").mkdir(parents=True, mode=0o700)
    write_secret(state_dir / "keys" / "data.secret", hashlib.sha256(name.encode()).digest())


def make_images(folder: Path, per_class: int = 12, seed: int = 1) -> Path:
    """A folder with one sub-folder a class."""
    return make_phantoms(folder, per_class, seed)


def make_table(folder: Path, rows: int = 200, seed: int = 1) -> Path:
    """A CSV file whose label follows from age and pressure, with some values missing."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    path = folder / "patients-of-ward-7.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "pressure", "sex", "grade"])
        for _ in range(rows):
            age, pressure = rng.uniform(30, 80), rng.normal(130, 15)
            risk = (age - 55) / 12 + (pressure - 130) / 15 + rng.normal(0, 0.5)
            shown = "?" if rng.random() < 0.05 else f"{pressure:.1f}"
            writer.writerow([f"{age:.1f}", shown, rng.choice(["f", "m"]), int(risk > 0)])
    return path
