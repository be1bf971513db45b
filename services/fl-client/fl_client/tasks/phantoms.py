"""Made images in place of real scans: labelled phantoms that look like brain MRI, for the demonstration and the tests.

They show four classes by what tells real ones apart at a glance: where a bright blob lies, its shape and its texture. They
are no medical data and prove nothing about patients.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fl_client.tasks.errors import AlreadyThere

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
SIZE = 96
SKULL, BRAIN, TUMOUR = 0.75, 0.38, 0.42  # brightness; TUMOUR is added to the brain's
NOISE = 0.05
TEXTURE_CELLS = 12  # the tissue's random brightness is drawn on a grid of this many cells a side
JPEG_QUALITY = 90

Floats = npt.NDArray[np.float64]


def make_phantoms(folder: Path, per_class: int, seed: int = 42) -> Path:
    """Write `per_class` JPEG images of 96 × 96 pixels per class into folder/<class>/; the same seed makes the same images.

    Raises:
        AlreadyThere: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyThere(f"{folder} already exists and is not empty; choose a new folder.", folder=str(folder))
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng([seed, label, number])
            image = Image.fromarray(phantom(name, rng))
            image.save(folder / name / f"{name}_{number:04d}.jpg", quality=JPEG_QUALITY)
    return folder


def phantom(name: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One (96, 96) image of the class `name`."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    tilt = rng.uniform(-0.15, 0.15)
    x, y = x - rng.uniform(-0.08, 0.08), y - rng.uniform(-0.08, 0.08)
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)
    width, height = rng.uniform(0.62, 0.75), rng.uniform(0.75, 0.88)
    radius = np.hypot(x / width, y / height)
    texture = _smooth(rng)
    image = np.where(radius < 1, SKULL, 0.0)
    image = np.where(radius < 0.9, BRAIN * (1 + 0.5 * texture), image)
    image = np.where((radius < 0.88) & (np.abs(x) < 0.015), 0.15, image)  # the fissure between the halves
    blob = _tumour(name, x / width, y / height, texture, rng)
    image = image + np.where(radius < 0.9, blob, 0.0)
    image = image * rng.uniform(0.85, 1.15) + rng.normal(0, NOISE, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _tumour(name: str, x: Floats, y: Floats, texture: Floats, rng: np.random.Generator) -> Floats:
    """Brightness that the class adds: glioma ragged inside, meningioma round at the rim, pituitary small in the middle."""
    side = rng.choice([-1.0, 1.0])
    if name == "glioma":
        cx, cy, r = side * rng.uniform(0.25, 0.45), rng.uniform(-0.4, 0.25), rng.uniform(0.2, 0.32)
        edge = np.hypot(x - cx, y - cy) + 0.18 * texture
        return np.where(edge < r, np.where(edge < 0.55 * r, 0.35 * TUMOUR, TUMOUR), 0.0)
    if name == "meningioma":
        angle = rng.uniform(0.15, 0.85) * np.pi
        cx, cy, r = 0.72 * np.cos(angle), -0.72 * np.sin(angle), rng.uniform(0.16, 0.26)
        return np.where(np.hypot(x - cx, y - cy) < r, TUMOUR, 0.0)
    if name == "pituitary":
        cx, cy, r = rng.uniform(-0.06, 0.06), rng.uniform(0.38, 0.52), rng.uniform(0.1, 0.17)
        return np.where(np.hypot(x - cx, (y - cy) * 1.2) < r, TUMOUR, 0.0)
    return np.zeros_like(x)


def _smooth(rng: np.random.Generator) -> Floats:
    """(96, 96) smooth noise of mean 0, within -1..1."""
    coarse = rng.uniform(0, 255, (TEXTURE_CELLS, TEXTURE_CELLS)).astype(np.uint8)
    fine = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(fine, dtype=np.float64) / 127.5 - 1
