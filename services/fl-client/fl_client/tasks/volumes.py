"""Volumes as the models take them: resampled to the study's spacing, cut to its size, clipped to its window, kept on disk.

Each example is a box of fixed size in the patient, its sides along the patient's axes, around a nodule or around the middle
of the scan. Whatever the scanner's directions, spacing or tilt, resampling follows the positions; what lies outside the scan
is air. Finished boxes are bytes in a cache of bounded size that is keyed by content and parameters, so that no scan is
decoded twice, and no memory grows with the number of scans.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import affine_transform

from fl_client.tasks.dicom import Decoder
from fl_client.tasks.lungs import lungs_alone
from fl_client.tasks.series import Series, Volume
from medhive.errors import NoSpace
from medhive.leftovers import remove_leftovers, temporary_beside

FORMAT: Final = 3  # of the preprocessing: a change of it or of how lungs are found makes all kept boxes stale
DEFAULT_CACHE_BYTES: Final = 20 * 2**30  # ten thousand boxes of 128 × 128 × 128
CHECKSUM_BYTES: Final = 4
SUFFIX: Final = ".box"

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Box:
    """What is cut out of a scan.

    Attributes:
        shape: voxels along z, y, x.
        spacing_mm: their distance along z, y, x.
        window_hu: what becomes 0 and what becomes 255.
        lungs_only: whether all but the lungs is taken away, and a box without a place lies around their middle.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    window_hu: tuple[int, int]
    lungs_only: bool = False

    def read(self, series: Series, decoder: Decoder) -> Volume:
        """What boxes are cut out of; raises UnreadableExample."""
        volume = series.read(decoder, self.spacing_mm)
        return lungs_alone(volume) if self.lungs_only else volume

    def cut(self, volume: Volume, centre_mm: Sequence[float]) -> UInt8:
        """(z, y, x) bytes around a point (x, y, z) of the patient, by linear interpolation."""
        target = np.zeros((4, 4))
        for axis in range(3):  # z, y, x of the box are the third, second and first of the patient's
            target[2 - axis, axis] = self.spacing_mm[axis]
        middle = np.array([(n - 1) / 2 for n in self.shape])
        target[:3, 3] = np.asarray(centre_mm) - target[:3, :3] @ middle
        target[3, 3] = 1
        index = np.linalg.inv(volume.grid.affine) @ target
        low, high = self.window_hu
        found = affine_transform(
            volume.values, index[:3, :3], index[:3, 3], self.shape, np.float32, order=1, mode="constant", cval=low
        )
        scaled = (np.clip(found, low, high) - low) * np.float32(255 / (high - low))
        bytes_: UInt8 = np.rint(scaled).astype(np.uint8)
        return bytes_

    def key(self, digest: str, centre_mm: Sequence[float] | None) -> str:
        """What a box of a series is known by: the series' content, the place, and all parameters."""
        place = None if centre_mm is None else tuple(round(float(x), 3) for x in centre_mm)
        said = (FORMAT, digest, place, self.shape, self.spacing_mm, self.window_hu, self.lungs_only)
        return hashlib.sha256(repr(said).encode()).hexdigest()


class BoxCache:
    """Boxes on disk, the longest unused deleted first. Safe for several processes on one folder, and for kill -9.

    The files are patients' data: the folder belongs to the hospital alone (mode 0700).
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._folder, self._limit = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_leftovers(folder)
        self._size = sum(size for _, size, _ in self._files())

    def get(self, key: str, shape: tuple[int, int, int]) -> UInt8 | None:
        """A box, or None where it is not kept, or was damaged (then it is deleted)."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if len(body) != int(np.prod(shape)) or zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little") != checksum:
            path.unlink(missing_ok=True)
            return None
        return np.frombuffer(body, np.uint8).reshape(shape)

    def put(self, key: str, box: UInt8) -> None:
        """Keep a box; it appears whole or not at all.

        Raises:
            NoSpace: the disk is full.
        """
        path = self._path(key)
        body = box.tobytes()
        part = temporary_beside(path)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            part.write_bytes(body + zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little"))
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise NoSpace(f"Cannot keep a preprocessed scan in the state folder: {error.strerror}.") from error
        self._size += len(body) + CHECKSUM_BYTES
        if self._size > self._limit:
            self._shrink()

    def _shrink(self) -> None:
        """Delete the longest unused down to nine tenths of the limit."""
        files = sorted(self._files())
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= self._limit * 0.9:
                return
            path.unlink(missing_ok=True)
            self._size -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._folder.glob(f"*/*{SUFFIX}"):
            try:
                status = path.stat()
            except OSError:  # another process was quicker
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{SUFFIX}"
