"""Made CT scans in place of real ones: chests with and without a nodule, for trials and the tests.

Half of them hold one ball of a nodule's size and density in a lung, beside vessels of the same density that every lung has.
The chests are drawn, or they are copies of one real scan. They prove nothing about patients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from fl_client.tasks.dicom import Decoder, write_axial_series
from fl_client.tasks.errors import AlreadyThere
from fl_client.tasks.folders import walk
from fl_client.tasks.lungs import find_lungs
from fl_client.tasks.scans import open_series
from medhive.errors import InvalidInput

CLASSES: Final = ("clear", "nodule")
SHAPE: Final = (40, 80, 80)
SPACING_MM: Final = (5.0, 4.0, 4.0)
AIR, TISSUE, LUNG, BONE = -1000.0, 40.0, -850.0, 400.0  # Hounsfield units
NOISE_HU: Final = 25.0
NODULE_MM: Final = (12.0, 28.0)  # diameters; Fleischner counts up to 30 mm as a nodule
NODULE_HU: Final = (-20.0, 80.0)
VESSELS: Final = 10  # a lung
VESSEL_MM: Final = (2.5, 6.0)
COPY_MM: Final = (3.0, 4.0, 4.0)  # what a real scan is averaged to, at most, before it is copied
COPY_SHIFT: Final = 5  # voxels in the plane

Floats = npt.NDArray[np.floating[Any]]


def make_chests(folder: Path, per_class: int, seed: int = 42, *, shuffled: bool = False) -> Path:
    """Write `per_class` series a class into folder/<class>/<patient>/; the same seed makes the same scans.

    Args:
        shuffled: sort the scans into the classes by chance, so that there is nothing to learn.

    Raises:
        AlreadyThere: the folder exists and is not empty.
    """
    return _write(folder, per_class, seed, chest, SPACING_MM, shuffled=shuffled)


def make_chests_from(scan: Path, folder: Path, per_class: int, seed: int = 42, *, shuffled: bool = False) -> Path:
    """The same out of copies of one real chest CT, a folder of DICOM files: mirrored, shifted, noisy, half with a ball.

    All copies are of one patient, so what is learned of them says nothing about another's lungs.

    Raises:
        AlreadyThere: the folder exists and is not empty.
        UnreadableExample: the scan cannot be read.
        InvalidInput: no lungs are found in it.
    """
    with Decoder() as decoder:
        volume = open_series([path for path in walk(scan) if not path.name.startswith(".")]).read(decoder, COPY_MM)
    spacing = volume.grid.spacing_mm
    lungs = find_lungs(volume.values, spacing)
    if lungs is None:
        raise InvalidInput(f"No lungs are found in the scan {scan}, which balls shall be put into; give another one.")
    inner_mm = distance_transform_edt(lungs, spacing)

    def draw(rng: np.random.Generator, *, nodule: bool) -> npt.NDArray[np.int16]:
        return copy_of(volume.values, inner_mm, spacing, rng, nodule=nodule)

    return _write(folder, per_class, seed, draw, spacing, shuffled=shuffled)


def copy_of(
    values: npt.NDArray[np.int16],
    inner_mm: Floats,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    *,
    nodule: bool,
) -> npt.NDArray[np.int16]:
    """One copy of a scan in Hounsfield units, with a ball in a lung or without.

    Args:
        inner_mm: of each voxel of the lungs the distance from their rim; 0 outside.
    """
    made: Floats = values.astype(np.float64)
    if nodule:
        radius = rng.uniform(*NODULE_MM) / 2
        # Where nowhere is a ball's width from the rim, as deep inside as there is.
        places = np.argwhere(inner_mm >= min(radius, inner_mm.max()))
        place = places[rng.integers(len(places))]
        axes = np.ogrid[tuple(slice(0, n) for n in values.shape)]
        to_mm = [(axis - at) * mm for axis, at, mm in zip(axes, place, spacing_mm, strict=True)]
        distance = np.sqrt(to_mm[0] ** 2 + to_mm[1] ** 2 + to_mm[2] ** 2)
        made = _blend(made, distance - radius, rng.uniform(*NODULE_HU))
    if rng.random() < 0.5:
        made = made[:, :, ::-1]
    shift = tuple(int(n) for n in rng.integers(-COPY_SHIFT, COPY_SHIFT + 1, 2))
    made = np.roll(made, shift, axis=(1, 2))
    return np.rint(made + rng.normal(0, NOISE_HU, made.shape)).astype(np.int16)


def _write(
    folder: Path,
    per_class: int,
    seed: int,
    draw: Callable[..., npt.NDArray[np.int16]],
    spacing_mm: tuple[float, float, float],
    *,
    shuffled: bool,
) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyThere(f"{folder} already exists and is not empty; choose a new folder.", folder=str(folder))
    shown = [name for name in CLASSES for _ in range(per_class)]
    labels = list(np.random.default_rng(seed).permutation(shown)) if shuffled else shown
    for number, (name, label) in enumerate(zip(shown, labels, strict=True)):
        values = draw(np.random.default_rng([seed, number]), nodule=name == "nodule")
        write_axial_series(folder / str(label) / f"scan_{number:04d}", values, spacing_mm, f"{seed}-{number}")
    return folder


def chest(rng: np.random.Generator, *, nodule: bool) -> npt.NDArray[np.int16]:
    """One (40, 80, 80) chest in Hounsfield units."""
    z, y, x = (
        (np.arange(n, dtype=np.float64) - (n - 1) / 2).reshape([-1 if i == axis else 1 for i in range(3)])
        * np.float64(mm)
        for axis, (n, mm) in enumerate(zip(SHAPE, SPACING_MM, strict=True))
    )
    sick = rng.choice([-1, 1])
    width, depth = rng.uniform(135, 150), rng.uniform(95, 115)
    body = np.hypot(x / width, y / depth) + 0 * z
    values = np.where(body < 1, TISSUE, AIR)
    values = np.where(np.hypot(x / 12, (y - depth + 30) / 12) + 0 * z < 1, BONE, values)
    for side in (-1, 1):
        middle = np.array([rng.uniform(-10, 10), rng.uniform(-5, 5), side * width * 0.47])
        radii = np.array([rng.uniform(85, 110), depth * 0.72, width * 0.36])
        # Only the part of the scan around the lung is worked on.
        part = tuple(
            slice(*np.searchsorted(a.ravel(), (m - r, m + r))) for a, m, r in zip((z, y, x), middle, radii, strict=True)
        )
        axes = (z[part[0]], y[:, part[1]], x[:, :, part[2]])
        inside = sum(((a - m) / r) ** 2 for a, m, r in zip(axes, middle, radii, strict=True)) < 1
        lung = np.full(inside.shape, LUNG)
        for _ in range(VESSELS):
            lung = _vessel(lung, axes, middle, radii, rng)
        if nodule and side == sick:
            lung = _with_nodule(lung, axes, middle, radii, rng)
        values[part] = np.where(inside, lung, values[part])
    return np.rint(values + rng.normal(0, NOISE_HU, SHAPE)).astype(np.int16)


def _vessel(
    values: Floats, axes: tuple[Floats, ...], middle: Floats, radii: Floats, rng: np.random.Generator
) -> Floats:
    """A thin straight tube from the lung's root outwards."""
    root = middle - np.array([0, 0, np.sign(middle[2]) * radii[2] * 0.8])
    way = _direction(rng) * radii
    to = [a - r for a, r in zip(axes, root, strict=True)]
    along = np.clip(sum(t * w for t, w in zip(to, way, strict=True)) / (way @ way), 0, 1)
    distance = np.sqrt(sum((t - along * w) ** 2 for t, w in zip(to, way, strict=True)))
    radius = rng.uniform(*VESSEL_MM) / 2 * (1.2 - along)
    return _blend(values, distance - radius, TISSUE)


def _with_nodule(
    values: Floats, axes: tuple[Floats, ...], middle: Floats, radii: Floats, rng: np.random.Generator
) -> Floats:
    place = middle + _direction(rng) * radii * rng.uniform(0.2, 0.7)
    distance = np.sqrt(sum((a - p) ** 2 for a, p in zip(axes, place, strict=True)))
    return _blend(values, distance - rng.uniform(*NODULE_MM) / 2, rng.uniform(*NODULE_HU))


def _blend(values: Floats, outside_mm: Floats, density: float) -> Floats:
    """Lay something over the scan; at its rim a voxel shows both, by their shares."""
    share = np.clip(0.5 - outside_mm / SPACING_MM[1], 0, 1)
    blended: Floats = values + share * (density - values)
    return blended


def _direction(rng: np.random.Generator) -> Floats:
    drawn = rng.normal(size=3)
    unit: Floats = drawn / np.linalg.norm(drawn)
    return unit
