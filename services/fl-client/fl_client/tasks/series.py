"""From the slices of one series to a volume in Hounsfield units that knows where each voxel lies in the patient.

Slices are ordered by their position along the slice normal, never by name or number. What does not form one regular grid is
refused by reason, since a volume with a gap looks like a patient who is shorter. A tilted gantry is such a grid, a sheared
one: it needs no refusal, because resampling follows the positions. NIfTI files are read into the same form.
"""

import gzip
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fl_client.tasks.dicom import Decoder, Header, as_hounsfield
from fl_client.tasks.errors import UnreadableExample

MIN_SLICES: Final = 3
MAX_SLICES: Final = 4096  # two metres at half a millimetre
MAX_VOXELS: Final = 700_000_000  # in memory at a time, 1.4 GB: 2,600 slices of 512 × 512, after averaging
SPACING_TOLERANCE: Final = 0.1  # share of the slice distance; tables are read to a tenth of a millimetre
PLANE_TOLERANCE: Final = 1e-3  # of pixel spacings and direction cosines, which are rounded when they are written
REGULAR_SHARE: Final = 0.8  # as many equal distances make the others gaps; fewer make it a series of mixed spacing
# US is "unspecified", which programs write that pack files anew; the share of air tells then.
UNITS: Final = frozenset({"", "HU", "US"})
MAX_TILT_DEG: Final = 45.0  # gantries tilt up to 30 degrees; more is an error in the tags
TILT_SHOWN_DEG: Final = 0.5
# Air in and around a chest; a volume in other units, or of something else, has nearly none of it.
AIR_HU: Final = (-1200, -400)
MIN_AIR_SHARE: Final = 0.005
NIFTI_SUFFIXES: Final = (".nii", ".nii.gz")
NIFTI_HEADER_BYTES: Final = 348
MAX_NIFTI_OFFSET: Final = 64 * 1024  # header extensions; a file that says more would have it all unpacked
MAX_NIFTI_BYTES: Final = 4 * 2**30
TO_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI counts towards right and anterior, DICOM left and posterior

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A regular grid in the patient.

    Attributes:
        shape: voxels along the three axes of the array.
        affine: (4, 4), index → millimetres (x, y, z) towards left, posterior, superior.
    """

    shape: tuple[int, int, int]
    affine: Floats

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbours along each axis of the array."""
        a, b, c = (float(np.linalg.norm(self.affine[:3, axis])) for axis in range(3))
        return a, b, c

    @property
    def centre_mm(self) -> Floats:
        """The middle of the grid in the patient."""
        middle = np.array([(n - 1) / 2 for n in self.shape])
        centre: Floats = self.affine[:3, :3] @ middle + self.affine[:3, 3]
        return centre

    @property
    def tilt_deg(self) -> float:
        """Angle between the slices' normal and the way from one to the next."""
        step, down, across = self.affine[:3, 0], self.affine[:3, 1], self.affine[:3, 2]
        normal = np.cross(across, down)
        cosine = abs(step @ normal) / (np.linalg.norm(step) * np.linalg.norm(normal))
        return math.degrees(math.acos(min(1.0, float(cosine))))

    def holds(self, point_mm: Sequence[float]) -> bool:
        """Whether a point of the patient lies in the grid."""
        index = np.linalg.solve(self.affine, [*point_mm, 1.0])[:3]
        return bool((index >= -0.5).all() and (index <= np.array(self.shape) - 0.5).all())

    def averaged(self, factors: tuple[int, int, int]) -> "Grid":
        """The grid whose voxels are the means of blocks of this one's."""
        scale = np.diag([*(float(f) for f in factors), 1.0])
        scale[:3, 3] = [(f - 1) / 2 for f in factors]
        a, b, c = (n // f for n, f in zip(self.shape, factors, strict=True))
        return Grid((a, b, c), self.affine @ scale)


@dataclass(frozen=True)
class Volume:
    """Hounsfield units on a grid."""

    values: npt.NDArray[np.int16]
    grid: Grid


@dataclass(frozen=True)
class Series:
    """One series, looked through but not decoded: its files in order, their headers' grid, and what it is known by.

    Attributes:
        paths: the files, ordered along the slice normal; one for a NIfTI file.
        headers: theirs, in the same order; none for a NIfTI file.
        digest: SHA-256 over the slices' digests: of pixels, places and units, of nothing that names a person.
    """

    paths: tuple[Path, ...]
    headers: tuple[Header, ...]
    grid: Grid
    digest: str

    def read(self, decoder: Decoder, spacing_mm: tuple[float, float, float] | None = None) -> Volume:
        """Decode the series, slice by slice.

        Args:
            spacing_mm: what the volume will be resampled to, along z, y, x: blocks of voxels that are finer are averaged
                while reading, which keeps noise from aliasing and the memory small. None reads every voxel.

        Raises:
            UnreadableExample: truncated, corrupt, too-large, not-hounsfield.
        """
        factors = _block(self.grid, spacing_mm)
        grid = self.grid.averaged(factors)
        if math.prod(grid.shape) > MAX_VOXELS or min(grid.shape) < 1:
            raise UnreadableExample("too-large", f"The series has more than {MAX_VOXELS} voxels.")
        values = self._read_nifti(factors) if not self.headers else self._read_dicom(decoder, grid, factors)
        low, high = AIR_HU
        if np.count_nonzero((values > low) & (values < high)) < MIN_AIR_SHARE * values.size:
            raise UnreadableExample("not-hounsfield", "The values are not Hounsfield units of a chest.")
        return Volume(values, grid)

    def _read_dicom(self, decoder: Decoder, grid: Grid, factors: tuple[int, int, int]) -> npt.NDArray[np.int16]:
        values = np.empty(grid.shape, np.int16)
        per_block, *in_plane = factors
        for number in range(grid.shape[0]):
            block = range(number * per_block, (number + 1) * per_block)
            slices = (decoder.hounsfield(self.paths[i], self.headers[i]) for i in block)
            total = sum(_means(plane, (in_plane[0], in_plane[1])) for plane in slices)
            values[number] = as_hounsfield(np.asarray(total) / per_block)
        return values

    def _read_nifti(self, factors: tuple[int, int, int]) -> npt.NDArray[np.int16]:
        return _nifti_values(self.paths[0], self.grid.shape, factors)


def _block(grid: Grid, spacing_mm: tuple[float, float, float] | None) -> tuple[int, int, int]:
    if spacing_mm is None:
        return 1, 1, 1
    # Each axis of the array against the target's spacing along the axis of the patient that it follows most.
    wanted = [spacing_mm[2 - int(np.abs(grid.affine[:3, axis]).argmax())] for axis in range(3)]
    a, b, c = (
        min(max(1, int(target / own + 1e-6)), n)
        for target, own, n in zip(wanted, grid.spacing_mm, grid.shape, strict=True)
    )
    return a, b, c


def _means(plane: npt.NDArray[np.int16], factors: tuple[int, int]) -> npt.NDArray[np.float32]:
    down, across = factors
    rows, columns = plane.shape[0] // down, plane.shape[1] // across
    cut = plane[: rows * down, : columns * across].astype(np.float32)
    means: npt.NDArray[np.float32] = cut.reshape(rows, down, columns, across).mean(axis=(1, 3))
    return means


# ---- DICOM -----------------------------------------------------------------------------------------------------------


def arrange(paths: Sequence[Path], headers: Sequence[Header]) -> Series:
    """Put the slices of one series in order and check that they form one grid.

    Raises:
        UnreadableExample: missing-position, not-hounsfield, mixed-spacing, mixed-geometry, duplicate-positions,
            missing-slices, gantry-tilt, too-few-slices, too-large.
    """
    first = headers[0]
    for header in headers:
        _require_alike(first, header)
    if not MIN_SLICES <= len(headers) <= MAX_SLICES:
        reason = "too-few-slices" if len(headers) < MIN_SLICES else "too-large"
        raise UnreadableExample(reason, f"A series has {MIN_SLICES} to {MAX_SLICES} slices.")
    positions = np.array([header.position_mm for header in headers], dtype=np.float64)
    across, down = np.reshape(np.array(first.orientation, dtype=np.float64), (2, 3))
    order = np.argsort(positions @ np.cross(across, down), kind="stable")
    positions = positions[order]
    _require_regular(positions @ np.cross(across, down))
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / (len(positions) - 1)
    row_mm, column_mm = first.spacing_mm or (0.0, 0.0)
    affine[:3, 1], affine[:3, 2], affine[:3, 3] = down * row_mm, across * column_mm, positions[0]
    grid = Grid((len(headers), first.rows, first.columns), affine)
    _require_straight(grid, positions)
    digests = "".join(headers[i].digest for i in order)
    return Series(
        tuple(paths[i] for i in order),
        tuple(headers[i] for i in order),
        grid,
        hashlib.sha256(digests.encode()).hexdigest(),
    )


def _require_alike(first: Header, header: Header) -> None:
    if header.position_mm is None or header.orientation is None or header.spacing_mm is None:
        raise UnreadableExample("missing-position", "A slice does not say where it lies.")
    across, down = np.reshape(np.array(header.orientation), (2, 3))
    square = max(abs(np.linalg.norm(across) - 1), abs(np.linalg.norm(down) - 1), abs(across @ down))
    if square > 10 * PLANE_TOLERANCE or min(header.spacing_mm) <= 0 or np.abs(header.position_mm).max() > 1e6:
        raise UnreadableExample("missing-position", "A slice's directions, place or spacing make no sense.")
    if header.units not in UNITS or header.slope is None or header.intercept is None or header.slope <= 0:
        raise UnreadableExample("not-hounsfield", "The values cannot be turned into Hounsfield units.")
    if first.spacing_mm is not None and not np.allclose(header.spacing_mm, first.spacing_mm, rtol=PLANE_TOLERANCE):
        raise UnreadableExample("mixed-spacing", "The slices have different pixel spacings.")
    if (header.rows, header.columns) != (first.rows, first.columns) or not np.allclose(
        header.orientation, first.orientation or (), atol=PLANE_TOLERANCE
    ):
        raise UnreadableExample("mixed-geometry", "The slices differ in size or direction.")


def _require_regular(heights: Floats) -> None:
    """Distances between neighbours are equal; a few that are larger are gaps."""
    distances = np.diff(heights)
    usual = float(np.median(distances))
    tolerance = SPACING_TOLERANCE * max(usual, 0.0)
    if usual <= 0 or (distances <= tolerance).any():
        raise UnreadableExample("duplicate-positions", "Several slices lie at the same place.")
    regular = np.abs(distances - usual) <= tolerance
    if regular.all():
        return
    if regular.mean() >= REGULAR_SHARE and (distances[~regular] > usual).all():
        raise UnreadableExample("missing-slices", "There is a gap between slices.")
    if regular.size <= 1 / (1 - REGULAR_SHARE) and np.abs(distances / usual - np.rint(distances / usual)).max() < 0.1:
        raise UnreadableExample("missing-slices", "There is a gap between slices.")
    raise UnreadableExample("mixed-spacing", "The distances between slices differ.")


def _require_straight(grid: Grid, positions: Floats) -> None:
    expected = positions[0] + np.arange(len(positions))[:, None] * grid.affine[:3, 0]
    if np.abs(positions - expected).max() > max(grid.spacing_mm):
        raise UnreadableExample("mixed-geometry", "The slices do not lie on one line.")
    if grid.tilt_deg > MAX_TILT_DEG:
        raise UnreadableExample("gantry-tilt", f"The slices are tilted by more than {MAX_TILT_DEG:g} degrees.")


# ---- NIfTI -----------------------------------------------------------------------------------------------------------


def is_nifti(path: Path) -> bool:
    """Whether a file's name says so."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def open_nifti(path: Path) -> Series:
    """Look through a NIfTI-1 file of Hounsfield units, packed or not.

    Raises:
        UnreadableExample: corrupt, too-large, unreadable, unsupported-encoding, missing-position, truncated.
    """
    try:
        if path.stat().st_size > MAX_NIFTI_BYTES:
            raise UnreadableExample("too-large", f"The file is larger than {MAX_NIFTI_BYTES} bytes.")
        _require_sane_nifti(path)
        image = _nifti(path)
        digest = hashlib.sha256()
        # Neither name nor free text of the header: shape, place and values alone.
        digest.update(repr((image.shape, image.affine.tolist())).encode())
        shape = tuple(int(n) for n in image.shape[:3])
        for number in range(shape[2]):
            digest.update(np.ascontiguousarray(image.dataobj[..., number]).tobytes())
    except OSError as error:
        raise UnreadableExample("truncated" if isinstance(error, EOFError) else "unreadable", "Not readable.") from None
    except EOFError:
        raise UnreadableExample("truncated", "The file ends too early.") from None
    except UnreadableExample:
        raise
    except Exception:  # noqa: BLE001 - nibabel and zlib raise many kinds
        raise UnreadableExample("corrupt", "The file is damaged.") from None
    affine: Floats = TO_LPS @ np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnreadableExample("missing-position", "The file does not say where its voxels lie.")
    return Series((path,), (), Grid((shape[0], shape[1], shape[2]), affine), digest.hexdigest())


def _require_sane_nifti(path: Path) -> None:
    """Look at the bare header before nibabel does, which trusts it."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        head = file.read(NIFTI_HEADER_BYTES)
    if len(head) < NIFTI_HEADER_BYTES:
        raise UnreadableExample("truncated", "The file ends in its header.")
    order = "<" if head[:4] == struct.pack("<i", NIFTI_HEADER_BYTES) else ">"
    if struct.unpack_from(f"{order}i", head)[0] != NIFTI_HEADER_BYTES or head[344:348] != b"n+1\0":
        raise UnreadableExample("unsupported-encoding", "This is no NIfTI-1 file in one piece.")
    axes, *sides = struct.unpack_from(f"{order}8h", head, 40)
    (offset,) = struct.unpack_from(f"{order}f", head, 108)
    if axes not in (3, 4) or min(sides[:3]) < 1 or (axes == 4 and sides[3] != 1):
        raise UnreadableExample("multi-frame", "The file does not hold one volume.")
    if not (NIFTI_HEADER_BYTES <= offset <= MAX_NIFTI_OFFSET) or math.prod(sides[:3]) > MAX_VOXELS:
        raise UnreadableExample("too-large", "The file says that it is larger than a scan can be.")


def _nifti(path: Path):  # type: ignore[no-untyped-def]
    import nibabel  # noqa: PLC0415 - half a second of imports for files that most hospitals do not have

    image = nibabel.load(path)
    if image.get_data_dtype().kind not in "iuf":
        raise UnreadableExample("unsupported-encoding", "The file holds no plain numbers.")
    return image


def _nifti_values(path: Path, shape: tuple[int, int, int], factors: tuple[int, int, int]) -> npt.NDArray[np.int16]:
    try:
        image = _nifti(path)
        a, b, c = factors
        n, m, k = (side // factor for side, factor in zip(shape, factors, strict=True))
        values = np.empty((n, m, k), np.int16)
        for number in range(k):
            slab = np.asarray(image.dataobj[..., number * c : (number + 1) * c], dtype=np.float32).reshape(
                *shape[:2], c
            )
            cut = slab[: n * a, : m * b].reshape(n, a, m, b, c)
            values[:, :, number] = as_hounsfield(cut.mean(axis=(1, 3, 4)))
        return values
    except UnreadableExample:
        raise
    except Exception:  # noqa: BLE001 - nibabel and zlib raise many kinds
        raise UnreadableExample("corrupt", "The file is damaged.") from None
