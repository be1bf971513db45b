"""Classifiers of volumes: the torch side of the task `ct-volume`.

Boxes come from the cache on disk a batch at a time, so that no memory grows with the number of scans; on a GPU a data set
that fits stays there. `fl_client.tasks.training` has the recipe.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_client.tasks.base import LocalOptions, OnProgress, Prediction, Skipped, Weights
from fl_client.tasks.dicom import Decoder
from fl_client.tasks.errors import UnreadableExample
from fl_client.tasks.models import build_volume_model
from fl_client.tasks.scans import Boxes, Scan, VolumeOptions, open_series, read_labels, scan_series, series_in
from fl_client.tasks.training import Classifier, ClassifierWorkspace
from medhive.spec import StudyData

VOXEL_MEAN, VOXEL_SPREAD = 0.3, 0.3  # of a chest in the lung window, in 0..1
EVALUATION_VOXELS = 8 * 96**3  # judged at a time; the first layer's features are eight times as many numbers
GPU_CACHE_BYTES = 8 * 2**30  # data sets below this move to the GPU once instead of batch by batch
# Augmentation, each drawn evenly from ± its value: how a person lies on the table, and how a scanner is set.
MAX_TURN = math.radians(8)  # about the body's axis
MAX_ZOOM = 0.08
MAX_SHIFT = 0.1  # of half the box
MAX_CONTRAST = 0.1
MAX_BRIGHTNESS = 0.05
RANDOM_NUMBERS = 10  # per box


def open_workspace(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    *,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> "VolumeWorkspace":
    """Read all usable scans once and keep their boxes on disk.

    Raises:
        MedHiveError: as `scans.scan_series`; DeviceUnavailable; UnknownModel.
    """
    local = local or LocalOptions()
    model = VolumeModel(study, device)
    boxes = Boxes(model.options.box, local)
    scan = scan_series(data_dir, study, secret, boxes, on_progress=on_progress, local=local)
    return VolumeWorkspace(model, scan, boxes, local.weights_file)


class VolumeModel(Classifier):
    """A study's classifier without scans; `fl_client.tasks.base.Predictor` describes the methods."""

    memory_format = torch.channels_last_3d

    def __init__(self, study: StudyData, device: str) -> None:
        """Raises WrongOption, DeviceUnavailable, UnknownModel: the study's model cannot be built here."""
        self.options = VolumeOptions.of(study)
        self._study = study
        super().__init__(study.classes, device)

    def network(self, seed: int) -> nn.Module:
        """The study's model."""
        return build_volume_model(self.options.model, classes=len(self.classes), seed=seed)

    def evaluation_batch(self) -> int:
        """Boxes that are judged at a time."""
        return max(1, EVALUATION_VOXELS // math.prod(self.options.box.shape))

    @property
    def random_numbers(self) -> int:
        """How many `augment` takes of a box."""
        return RANDOM_NUMBERS

    def augment(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """See `augment`."""
        return augment(pixels, drawn)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Bytes as floats (0 to 255) → what the networks take."""
        scaled = (pixels / 255 - VOXEL_MEAN) / VOXEL_SPREAD
        return scaled.contiguous(memory_format=torch.channels_last_3d)

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each series once, under the name of its first file; the other files come with nothing.

        Where the study's examples are nodules, a CSV among the paths says their places, as the labels do.
        """
        model = self.new_model(weights)
        tables = [path for path in paths if path.suffix.lower() == ".csv"]
        with Decoder() as decoder:
            for files, reason in series_in([path for path in paths if path not in tables]):
                first = min(files)
                try:
                    if reason:
                        raise UnreadableExample(reason, "This is no scan.")
                    found = self._predict(model, files, tables, decoder)
                except UnreadableExample as error:
                    found = [Skipped(first.name, error.reason)]
                yield first, found
                yield from ((path, []) for path in files if path != first)
        yield from ((path, []) for path in tables)

    def _predict(
        self, model: nn.Module, files: Sequence[Path], tables: Sequence[Path], decoder: Decoder
    ) -> list[Prediction | Skipped]:
        series = open_series(files)
        volume = self.options.box.read(series, decoder)
        middle = volume.grid.centre_mm
        centres = [(float(middle[0]), float(middle[1]), float(middle[2]))]
        if self.options.examples == "nodules":
            centres = self._places(series.headers[0].series if series.headers else "", files, tables)
        name = min(files).name
        found: list[Prediction | Skipped] = []
        for centre in centres:
            box = torch.from_numpy(self.options.box.cut(volume, centre))[None, None].to(self.device)
            place = f"{name} at {', '.join(f'{x:g}' for x in centre)}" if len(centres) > 1 else name
            found.append(self.prediction(place, self.probabilities(model, box)[0]))
        return found or [Skipped(name, "no-position")]

    def _places(self, uid: str, files: Sequence[Path], tables: Sequence[Path]) -> list[tuple[float, float, float]]:
        names = {uid, *(path.name for path in files)}
        found = [read_labels(table, self._study, LocalOptions(), places=True) for table in tables]
        rows = [row for table in found for name in names for row in table.rows.get(name, [])]
        return [row.centre_mm for row in rows if row.centre_mm is not None]


class VolumeWorkspace(ClassifierWorkspace):
    """A site's scans; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(self, model: VolumeModel, scan: Scan, boxes: Boxes, backbone: Path | None) -> None:
        labels = torch.tensor([example.label for example in scan.examples])
        parts = np.array([example.part for example in scan.examples])
        names = [example.digest for example in scan.examples]
        super().__init__(model, report=scan.report, labels=labels, parts=parts, names=names, backbone=backbone)
        self._examples, self._boxes = scan.examples, boxes
        size = len(scan.examples) * math.prod(boxes.box.shape)
        fits = self.device.type == "cuda" and size <= GPU_CACHE_BYTES
        self._resident = self._read(range(len(scan.examples))).to(self.device) if fits else None

    @property
    def resident(self) -> Tensor | None:
        """All boxes, where they lie on the device."""
        return self._resident

    def pixels(self, indices: Tensor) -> Tensor:
        """(n, 1, z, y, x) bytes on the device."""
        if self._resident is not None:
            return self._resident[indices.to(self.device)]
        return self._read(indices.tolist()).to(self.device, non_blocking=True)

    def _read(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self._boxes.get(self._examples[i]) for i in indices]))[:, None]


def augment(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Mirror, turn, zoom, shift, brighten each box of a batch on its own; (n, 1, z, y, x) bytes → floats 0 to 255.

    Boxes are mirrored along all three axes (as in Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): a nodule is one in
    whichever lobe it lies. `drawn` are (n, 10) numbers of [0, 1).
    """
    r = (drawn * 2 - 1).to(pixels.device)
    moved = functional.grid_sample(pixels.float(), sampled(r, pixels.shape[2:]), align_corners=False)
    contrast = (1 + r[:, 6] * MAX_CONTRAST).view(-1, 1, 1, 1, 1)
    return moved * contrast + (r[:, 7] * MAX_BRIGHTNESS * 255).view(-1, 1, 1, 1, 1)


def sampled(r: Tensor, shape: torch.Size) -> Tensor:
    """(n, z, y, x, 3) places to sample at, in -1..1.

    What `affine_grid` gives, put together from planes: the turn is about the body's axis, so that no voxel needs a product
    of matrices of its own, which cost as much as the sampling.
    """
    z, y, x = (((torch.arange(side, device=r.device) + 0.5) * 2 / side - 1) for side in shape)
    angle, zoom, *mirror = (
        value.view(-1, 1, 1)
        for value in (
            r[:, 0] * MAX_TURN,
            1 + r[:, 1] * MAX_ZOOM,
            *(torch.where(r[:, i] < 0, -1.0, 1.0) for i in (2, 8, 9)),
        )
    )
    shift = (r[:, 3:6] * MAX_SHIFT).view(-1, 3, 1, 1).unbind(1)
    c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    x, y = x.view(1, 1, -1) * mirror[0], y.view(1, -1, 1) * mirror[1]
    grid = torch.empty(len(r), *shape, 3, device=r.device)
    grid[..., 0] = (c * x - s * y + shift[0])[:, None]
    grid[..., 1] = (s * x + c * y + shift[1])[:, None]
    grid[..., 2] = (z.view(1, -1, 1) * zoom * mirror[2] + shift[2])[..., None]
    return grid
