"""Made DICOM series for tests: a chest of air, lungs and tissue on a grid that the test chooses, tag by tag."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
INTERCEPT = -1024


def chest(shape: tuple[int, int, int] = (12, 32, 40), seed: int = 0) -> npt.NDArray[np.int16]:
    """(slices, rows, columns) in HU: air around, tissue, two lungs, noise that makes every voxel its own."""
    z, y, x = np.mgrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    values = np.full(shape, -1000.0)
    values[np.hypot(x / 0.9, y / 0.8) < 1] = 40
    values[np.hypot((np.abs(x) - 0.4) / 0.3, y / 0.55) < 1] = -850
    noise = np.random.default_rng(seed).normal(0, 15, shape)
    return np.rint(values + 10 * z + noise).clip(INTERCEPT).astype(np.int16)


def tags(uid: str = "1") -> Dataset:
    """A slice's data set without a place and without pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.Modality, dataset.ImageType = CTImageStorage, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[f"series {uid}"])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[f"study {uid}"])
    dataset.PatientID = f"patient-{uid}"
    return dataset


def write_series(
    folder: Path,
    uid: str = "1",
    *,
    values: npt.NDArray[np.int16] | None = None,
    spacing_mm: Sequence[float] = (2.0, 1.5, 1.5),
    origin_mm: Sequence[float] = (-30.0, -20.0, -100.0),
    orientation: Sequence[float] = AXIAL,
    step_mm: Sequence[float] | None = None,
    change: Callable[[Dataset, int], None] | None = None,
) -> list[Path]:
    """Write one file a slice, under names that say nothing of the order; returns them in the order of the slices.

    Args:
        step_mm: from one slice to the next; along the slice normal where left out.
        change: called with each data set and its number before it is written.
    """
    values = chest() if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    across, down = np.reshape(np.array(orientation, dtype=float), (2, 3))
    step = np.cross(across, down) * spacing_mm[0] if step_mm is None else np.asarray(step_mm)
    names = np.random.default_rng(len(values)).permutation(len(values))
    paths = []
    for number, plane in enumerate(values):
        dataset = tags(uid)
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelSpacing = [float(spacing_mm[1]), float(spacing_mm[2])]
        dataset.ImageOrientationPatient = [float(f"{x:.9g}") for x in orientation]
        dataset.ImagePositionPatient = [float(f"{x:.9g}") for x in np.asarray(origin_mm) + number * step]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, INTERCEPT
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PixelData = (plane.astype(np.int32) - INTERCEPT).astype(np.uint16).tobytes()
        if change is not None:
            change(dataset, number)
        paths.append(folder / f"IM{names[number]:05d}")
        syntax = dataset.file_meta.TransferSyntaxUID
        kind = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        dcmwrite(paths[-1], dataset, **kind, enforce_file_format=True)
    return paths
