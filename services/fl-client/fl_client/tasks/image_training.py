"""Image classifiers: the torch side of the task `image-folder`.

Images are resized once and stay in memory as bytes; `fl_client.tasks.training` has the recipe.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_client.tasks.base import DataReport, FloatArray, LocalOptions, OnProgress, Prediction, Skipped, Weights
from fl_client.tasks.errors import UnreadableExample
from fl_client.tasks.images import ImageOptions, UInt8, read_image, scan_folder
from fl_client.tasks.models import build_model
from fl_client.tasks.training import Classifier, ClassifierWorkspace, Plain
from medhive.spec import StudyData

PIXEL_MEAN, PIXEL_SPREAD = 0.2, 0.2  # of grey scans in 0..1: dark background, bright tissue
EVALUATION_BATCH = 128
GPU_CACHE_BYTES = 4 * 2**30  # data sets below this move to the GPU once instead of batch by batch
# Augmentation, each drawn evenly from ± its value: what differs between two positions of a head in one scanner.
MAX_ROTATION = math.radians(5)
MAX_ZOOM = 0.04
MAX_SHIFT = 0.07  # of half the image's width
MAX_CONTRAST = 0.2
MAX_BRIGHTNESS = 0.05
RANDOM_NUMBERS = 7  # per image
CROP_NUMBERS, LIGHT_NUMBERS = 3, 2  # the same of the plain recipe: of `cropped`, of `relit`


def open_workspace(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    *,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> "ImageWorkspace":
    """Read, resize and keep all usable images.

    Raises:
        MedHiveError: as `images.scan_folder`; DeviceUnavailable; UnknownModel.
    """
    model = ImageModel(study, device)
    kept: dict[str, UInt8] = {}

    def keep(digest: str, image: UInt8) -> None:
        kept[digest] = model.resize(image)

    scan = scan_folder(data_dir, study, secret, on_progress=on_progress, local=local, keep=keep)
    images = torch.from_numpy(np.stack([kept[entry.digest] for entry in scan.entries]))
    labels = torch.tensor([entry.label for entry in scan.entries])
    parts = np.array([entry.part for entry in scan.entries])
    return ImageWorkspace(
        model,
        report=scan.report,
        images=images,
        labels=labels,
        parts=parts,
        names=[entry.name for entry in scan.entries],
        backbone=local.weights_file if local is not None else None,
    )


class Resizer:
    """(channels, h, w) bytes → (channels, size, size) bytes: the longer side fits, the shorter is padded with black.

    The same bits as MONAI's Resize and ResizeWithPadOrCrop, whose import alone takes four seconds of processor time and a
    hundred megabytes in every trainer.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: UInt8) -> UInt8:
        """Resize one image."""
        sides = image.shape[1:]
        if sides == (self._size, self._size):
            return image
        scale = self._size / max(sides)
        fitting = [max(1, round(side * scale)) for side in sides]
        pixels = torch.from_numpy(image.astype(np.float32))[None]
        mode = "area" if scale <= 1 else "bilinear"
        resized: FloatArray = functional.interpolate(pixels, size=fitting, mode=mode)[0].numpy()
        before = [(self._size - side) // 2 for side in fitting]
        after = [self._size - side - first for side, first in zip(fitting, before, strict=True)]
        padded: FloatArray = np.pad(resized, ((0, 0), *zip(before, after, strict=True)))
        return np.clip(np.rint(padded), 0, 255).astype(np.uint8)


class ImageModel(Classifier):
    """A study's classifier without images; `fl_client.tasks.base.Predictor` describes the methods."""

    memory_format = torch.channels_last

    def __init__(self, study: StudyData, device: str) -> None:
        """Check that the study's model can be built here.

        Raises:
            WrongOption, DeviceUnavailable, UnknownModel: it cannot.
        """
        self._options = ImageOptions.of(study)
        self.resize = Resizer(self._options.image_size)
        if self._options.recipe == "plain":
            self.plain = Plain(self._options.momentum, self._options.lr_decay, self._options.weight_decay)
        super().__init__(study.classes, device)

    def network(self, seed: int) -> nn.Module:
        """The study's model."""
        options = self._options
        side = options.crop or options.image_size
        return build_model(options.model, channels=options.channels, classes=len(self.classes), seed=seed, side=side)

    def evaluation_batch(self) -> int:
        """Images that are judged at a time."""
        return EVALUATION_BATCH

    @property
    def random_numbers(self) -> int:
        """How many `augment` takes of an image."""
        if self.plain is None:
            return RANDOM_NUMBERS
        return (CROP_NUMBERS if self._options.crop else 0) + (LIGHT_NUMBERS if self._relights else 0)

    @property
    def _relights(self) -> bool:
        return self._options.brightness > 0 or self._options.contrast > 0

    def augment(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """See `augment`, and for the plain recipe `cropped` and `relit`."""
        if self.plain is None:
            return augment(pixels, drawn)
        options = self._options
        seen = cropped(pixels, options.crop, drawn[:, :CROP_NUMBERS], options.pad) if options.crop else pixels.float()
        light = drawn[:, -LIGHT_NUMBERS:]
        return relit(seen, options.brightness, options.contrast, light) if self._relights else seen

    def normalised(self, pixels: Tensor) -> Tensor:
        """See `normalised`, and for the plain recipe `whitened`, or 0 to 1."""
        if self.plain is None:
            return normalised(pixels)
        crop = self._options.crop
        seen = middle(pixels, crop) if crop and pixels.shape[-1] != crop else pixels
        if self._options.pixels == "unit":
            return (seen / 255).contiguous(memory_format=torch.channels_last)
        return whitened(seen)

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each image file with its class probabilities, a batch at a time."""
        model = self.new_model(weights)
        for start in range(0, len(paths), EVALUATION_BATCH):
            batch = paths[start : start + EVALUATION_BATCH]
            for path, item in zip(batch, self._predict_batch(model, batch), strict=True):
                yield path, [item]

    def _predict_batch(self, model: nn.Module, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        read = [self._read(path) for path in paths]
        images = [image for image in read if not isinstance(image, Skipped)]
        if not images:
            return [item for item in read if isinstance(item, Skipped)]
        rows = iter(self.probabilities(model, torch.from_numpy(np.stack(images)).to(self.device)))
        return [
            item if isinstance(item, Skipped) else self.prediction(path.name, next(rows))
            for path, item in zip(paths, read, strict=True)
        ]

    def _read(self, path: Path) -> UInt8 | Skipped:
        try:
            return self.resize(read_image(path, self._options.channels))
        except UnreadableExample as error:
            return Skipped(path.name, error.reason)


class ImageWorkspace(ClassifierWorkspace):
    """A site's images in memory; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(
        self,
        model: ImageModel,
        *,
        report: DataReport,
        images: Tensor,
        labels: Tensor,
        parts: npt.NDArray[np.str_],
        names: Sequence[str],
        backbone: Path | None = None,
    ) -> None:
        super().__init__(model, report=report, labels=labels, parts=parts, names=names, backbone=backbone)
        fits = self.device.type == "cuda" and images.nbytes <= GPU_CACHE_BYTES
        self._images = images.to(self.device) if fits else images

    @property
    def resident(self) -> Tensor | None:
        """All images, where they lie on the device."""
        return self._images if self._images.device.type == self.device.type else None

    def pixels(self, indices: Tensor) -> Tensor:
        """(n, channels, size, size) bytes on the device."""
        return self._images[indices.to(self._images.device)].to(self.device, non_blocking=True)


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as floats (0 to 255) → what the models take."""
    scaled = (pixels / 255 - PIXEL_MEAN) / PIXEL_SPREAD
    return scaled.contiguous(memory_format=torch.channels_last)


def whitened(pixels: Tensor) -> Tensor:
    """Bytes as floats → each image with mean 0 and spread 1, as the CIFAR-10 tutorial has it."""
    flat = pixels.flatten(start_dim=1)
    spread = flat.std(dim=1, correction=0).clamp(min=1 / math.sqrt(flat.shape[1]))
    shape = (-1,) + (1,) * (pixels.ndim - 1)
    return ((pixels - flat.mean(dim=1).view(shape)) / spread.view(shape)).contiguous(memory_format=torch.channels_last)


def middle(pixels: Tensor, side: int) -> Tensor:
    """The square of `side` pixels in the middle of each image."""
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    return pixels[..., top : top + side, left : left + side]


def cropped(pixels: Tensor, side: int, drawn: Tensor, pad: int = 0) -> Tensor:
    """A square somewhere in each image of a batch, mirrored or not; bytes → (n, c, side, side) floats 0 to 255.

    With `pad` the image goes on for so many pixels beyond its edges, as its mirror image. `drawn` are (n, 3) numbers of
    [0, 1).
    """
    n, _channels, height, width = pixels.shape
    r = drawn.to(pixels.device)
    top = (r[:, 0] * (height + 2 * pad - side + 1)).long().view(-1, 1, 1)
    left = (r[:, 1] * (width + 2 * pad - side + 1)).long().view(-1, 1, 1)
    along = torch.arange(side, device=pixels.device)
    columns = _within(torch.where(r[:, 2].view(-1, 1, 1) < 0.5, along, along.flip(0)) + left - pad, width)
    rows = _within(along.view(1, -1, 1) + top - pad, height)
    which = torch.arange(n, device=pixels.device).view(-1, 1, 1)
    moved = pixels.permute(0, 2, 3, 1)[which, rows, columns]
    return moved.permute(0, 3, 1, 2).float()


def _within(places: Tensor, side: int) -> Tensor:
    """Places beyond the edges, mirrored at them."""
    return side - 1 - (side - 1 - places.abs()).abs()


def relit(pixels: Tensor, brightness: float, contrast: float, drawn: Tensor) -> Tensor:
    """Each image of a batch brighter or darker by up to `brightness` levels, its channels' distances from their means
    longer or shorter by up to the share `contrast`, as in TensorFlow's CIFAR-10 tutorial; nothing is cut off. `drawn` are
    (n, 2) numbers of [0, 1).
    """
    r = (drawn * 2 - 1).to(pixels.device).view(-1, 2, 1, 1, 1)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return (pixels - mean) * (1 + r[:, 0] * contrast) + mean + r[:, 1] * brightness


def augment(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Mirror, rotate, zoom, shift, brighten each image of a batch on its own; (n, c, h, w) bytes → floats 0 to 255.

    `drawn` are (n, 7) numbers of [0, 1).
    """
    r = (drawn * 2 - 1).to(pixels.device)
    angle, zoom = r[:, 0] * MAX_ROTATION, 1 + r[:, 1] * MAX_ZOOM
    mirror = torch.where(r[:, 2] < 0, -1.0, 1.0)
    c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = (torch.stack([c * mirror, -s, r[:, 3] * MAX_SHIFT], 1), torch.stack([s * mirror, c, r[:, 4] * MAX_SHIFT], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels.float(), grid, align_corners=False)
    contrast = (1 + r[:, 5] * MAX_CONTRAST).view(-1, 1, 1, 1)
    return moved * contrast + (r[:, 6] * MAX_BRIGHTNESS * 255).view(-1, 1, 1, 1)
