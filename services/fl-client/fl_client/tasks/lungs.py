"""Where the lungs are in a CT scan of the chest, by density alone.

Most of a chest is bright, and a nodule is no brighter than muscle: a classifier that sees the whole chest spends a small
study's few scans on learning what is lung. So the lungs are found first and the rest is taken away, as programs that read
chest CT do (Armato and Sensakovic 2004, doi:10.1016/j.acra.2004.06.005; Liao et al. 2019, arXiv:1711.08324).
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fl_client.tasks.series import Grid, Volume

BODY_HU: Final = -500  # lung and air lie below, all else above: halfway between aerated lung and soft tissue
# Vessels, and nodules that touch the wall, are brighter than lung: a ball of this radius closes the gaps they leave.
CLOSING_MM: Final = 10.0
# What an end of the scan cuts is enclosed in that plane alone. Larger than a 30 mm nodule with its rim is the mediastinum.
MAX_CUT_MM2: Final = np.pi * 20.0**2
MIN_PART_ML: Final = 50.0  # airways and gas in the bowel are smaller; a small child's lung is larger
MIN_LUNGS_ML: Final = 200.0  # less is no scan of the chest, or one in which this way finds nothing

OUTSIDE_HU: Final = -1000  # air, as outside the scan

Mask = npt.NDArray[np.bool_]


def lungs_alone(volume: Volume) -> Volume:
    """The part of a scan around the lungs, all else in it air; the whole scan where no lungs are found."""
    along_body = int(np.abs(volume.grid.affine[2, :3]).argmax())
    lungs = find_lungs(volume.values, volume.grid.spacing_mm, along_body)
    if lungs is None:
        return volume
    part = ndimage.find_objects(lungs.astype(np.int8))[0]
    values = np.where(lungs[part], volume.values[part], np.int16(OUTSIDE_HU))
    affine = volume.grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in part]
    return Volume(values, Grid(values.shape, affine))


def find_lungs(
    values: npt.NDArray[np.int16], spacing_mm: tuple[float, float, float], slices_axis: int = 0
) -> Mask | None:
    """Voxels of the lungs, with the vessels and nodules in them; None where no lungs are found.

    Args:
        values: (a, b, c) Hounsfield units.
        spacing_mm: distance of voxels along each axis of the array.
        slices_axis: the axis along the body. In planes across it the body closes around the lungs.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    body = _largest(values > BODY_HU)
    for plane in np.moveaxis(body, slices_axis, 0):
        plane[...] = ndimage.binary_fill_holes(plane)
    air = body & (values <= BODY_HU)
    labels, _ = ndimage.label(air)
    sizes_ml = np.bincount(labels.ravel()) * voxel_ml
    sizes_ml[0] = 0
    lungs: Mask = (sizes_ml >= MIN_PART_ML)[labels]
    if np.count_nonzero(lungs) * voxel_ml < MIN_LUNGS_ML:
        return None
    closed: Mask = np.moveaxis(_closed(lungs, spacing_mm) & body, slices_axis, 0)
    plane_mm2 = voxel_ml * 1000 / spacing_mm[slices_axis]
    for end in (0, -1):
        closed[end] |= _small_holes(closed[end], MAX_CUT_MM2 / plane_mm2)
    # Closing leaves the middle of a large nodule out, which the lung around it encloses.
    whole: Mask = np.moveaxis(ndimage.binary_fill_holes(closed), 0, slices_axis)
    return whole


def _largest(mask: Mask) -> Mask:
    """The largest connected part: the patient, without the table."""
    labels, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest: Mask = labels == sizes.argmax()
    return largest


def _small_holes(plane: Mask, most: float) -> Mask:
    """The holes of a plane that have at most so many pixels."""
    labels, _ = ndimage.label(ndimage.binary_fill_holes(plane) & ~plane)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    small: Mask = ((sizes > 0) & (sizes <= most))[labels]
    return small


def _closed(mask: Mask, spacing_mm: tuple[float, float, float]) -> Mask:
    """Closing by a ball, by distances: as quick for a large ball as for a small one."""
    pad = [int(CLOSING_MM / mm) + 1 for mm in spacing_mm]
    wide = np.pad(mask, [(n, n) for n in pad])
    near = ndimage.distance_transform_edt(~wide, spacing_mm) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(near, spacing_mm) > CLOSING_MM
    inner: Mask = closed[tuple(slice(n, -n) for n in pad)] | mask
    return inner
