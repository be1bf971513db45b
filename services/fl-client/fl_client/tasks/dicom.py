"""One DICOM file at a time: what its header says, and its pixels; the only module that knows pydicom and GDCM.

Files come from scanners, archives and people, so every one is taken as hostile. Sizes are looked at before anything is
decoded, and compressed pixels are decoded by a process of its own (`python -m fl_client.tasks.dicom`) with little memory
and little time: the C++ decoders then can neither crash nor fill the trainer, whatever a file says about itself. Tags that
name people are never part of a message, a log or a digest.
"""

import hashlib
import json
import logging
import math
import os
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import config
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    generate_uid,
)

from fl_client.tasks.errors import UnreadableExample

MAX_FILE_BYTES: Final = 64 * 2**20  # one slice of 2048 × 2048 is 8 MB; an overlay and private tags add little
MAX_SIDE: Final = 2048  # rows and columns; four times a usual CT in both directions
MAX_SLICE_BYTES: Final = MAX_SIDE * MAX_SIDE * 4
DECODER_MEMORY_BYTES: Final = 2**30  # address space; Python with numpy and GDCM takes 400 MB of it
DECODER_PATIENCE_S: Final = 60.0  # a slice takes milliseconds; starting, on a busy machine, seconds
MAX_ANSWER_BYTES: Final = 10_000
# Deflated files are left out on purpose: they are unpacked whole before anything can be looked at.
PLAIN: Final = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian})
COMPRESSED: Final = frozenset(
    {
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEGLSNearLossless,
        JPEG2000Lossless,
        JPEG2000,
        RLELossless,
    }
)
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and what begins with it and a point: the multi-frame ones
DIRECTORY: Final = "1.2.840.10008.1.3.10"
# Of the basic profile of DICOM PS3.15, table E.1-1: those that name or describe a person, or lead to one.
IDENTIFYING: Final = (
    "PatientName",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientMotherBirthName",
    "OtherPatientIDs",
    "OtherPatientNames",
    "AdditionalPatientHistory",
    "PatientComments",
    "AccessionNumber",
    "InstitutionName",
    "InstitutionAddress",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "RequestingPhysician",
    "OperatorsName",
    "StationName",
    "DeviceSerialNumber",
)

# Values that do not follow the standard are common; pydicom would warn of them and print them.
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False

Floats = npt.NDArray[np.float64]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Header:
    """What one file says that reading needs.

    Attributes:
        series, study, instance, patient: identifiers, which stay in memory; empty where there is none.
        unfit: the reason why this is no slice of a CT, or empty.
        spacing_mm: distance of rows, distance of columns.
        position_mm: (x, y, z) of the first voxel's centre, patient coordinates (left, posterior, superior).
        orientation: direction of a row, then direction of a column, each a unit vector.
        slope, intercept: stored value → Hounsfield units; None where there is none.
        units: what the rescaled values are said to be; empty means Hounsfield units in a CT.
        identifying: names of the tags with something in them that may lead to a person.
        burned_in: "declared", "likely" or empty; see `_burned_in`.
        digest: SHA-256 of the stored pixels and of what turns them into a place and into Hounsfield units; empty unless
            the pixels were read too.
    """

    series: str
    study: str
    instance: str
    patient: str
    unfit: str
    rows: int
    columns: int
    spacing_mm: tuple[float, float] | None
    position_mm: tuple[float, float, float] | None
    orientation: tuple[float, ...] | None
    slope: float | None
    intercept: float | None
    units: str
    identifying: tuple[str, ...]
    burned_in: str
    digest: str = ""


def read_header(path: Path, *, pixels: bool = False) -> Header:
    """Read one file's header; with `pixels` its stored pixels too, for their digest.

    Raises:
        UnreadableExample: empty, too-large, unreadable, not-dicom, truncated, corrupt, unsupported-encoding.
    """
    dataset, more = _parsed(path, stop=not pixels)
    return _guarded(lambda: _header(dataset, has_pixels=more, digest=pixels))


def stored_values(path: Path) -> npt.NDArray[Any]:
    """(rows, columns) stored values of one file whose header was found fit, decoded here.

    Raises:
        UnreadableExample: as `read_header`, and truncated or corrupt for pixels that are not as the header says.
    """
    dataset, _ = _parsed(path, stop=False)
    return _guarded(lambda: _decoded(dataset))


def instance_of(path: Path) -> str:
    """The SOPInstanceUID of a DICOM file of any kind, from its meta information; empty where there is none.

    Raises:
        UnreadableExample: empty, too-large, unreadable, not-dicom, corrupt.
    """
    with _opened(path):
        return _meta_value(path, "MediaStorageSOPInstanceUID")


class Decoder:
    """Turns files into Hounsfield units: plain ones here, compressed ones in a process of its own. Close it when done."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def hounsfield(self, path: Path, header: Header) -> npt.NDArray[np.int16]:
        """(rows, columns) of one slice, rounded; raises UnreadableExample as `stored_values`."""
        plain = _transfer_syntax(path) in PLAIN
        stored = stored_values(path) if plain else self._elsewhere(path)
        if stored.shape != (header.rows, header.columns) or header.slope is None or header.intercept is None:
            raise UnreadableExample("corrupt", "The pixels are not as the header says.")
        scaled = stored.astype(np.float32) * np.float32(header.slope) + np.float32(header.intercept)
        return as_hounsfield(scaled)

    def _elsewhere(self, path: Path) -> npt.NDArray[Any]:
        process = self._process = self._process or _start()
        try:
            return _ask(process, path)
        except (OSError, ValueError, TimeoutError) as error:
            # It crashed, ran out of memory or time, or answers nonsense: the next file gets a fresh one.
            self.close()
            raise UnreadableExample("corrupt", "The compressed pixels cannot be decoded.") from error


def as_hounsfield(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int16]:
    """Round to whole Hounsfield units; what does not fit 16 bits (implants, padding) is cut off."""
    limits = np.iinfo(np.int16)
    filled = np.nan_to_num(values, nan=limits.min, posinf=limits.max, neginf=limits.min)
    rounded: npt.NDArray[np.int16] = np.clip(np.rint(filled), limits.min, limits.max).astype(np.int16)
    return rounded


# ---- parsing ---------------------------------------------------------------------------------------------------------


def _guarded(read: Callable[[], Result]) -> Result:
    """Turn whatever pydicom raises for a broken file into one reason, without the text, which may hold a tag."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they print values of tags
            return read()
    except UnreadableExample:
        raise
    except EOFError:
        raise UnreadableExample("truncated", "The file ends too early.") from None
    except Exception:  # noqa: BLE001 - each of pydicom's converters raises its own kinds
        raise UnreadableExample("corrupt", "The file is damaged.") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UnreadableExample("unreadable", "This is no regular file.")
        if not size:
            raise UnreadableExample("empty", "The file is empty.")
        if size > MAX_FILE_BYTES:
            raise UnreadableExample("too-large", f"The file is larger than {MAX_FILE_BYTES} bytes.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UnreadableExample("unreadable", "The file cannot be opened; check its permissions.") from error


def _transfer_syntax(path: Path) -> str:
    """How a file is encoded, from its meta information alone."""
    return _meta_value(path, "TransferSyntaxUID")


def _meta_value(path: Path, name: str) -> str:
    def read() -> str:
        try:
            return str(read_file_meta_info(path).get(name, ""))
        except InvalidDicomError:
            raise UnreadableExample("not-dicom", "This is no DICOM file.") from None

    return _guarded(read)


def _parsed(path: Path, *, stop: bool) -> tuple[FileDataset, bool]:
    """The data set, without its pixels if it shall stop there, and whether anything follows the header."""
    with _opened(path) as file:
        if _transfer_syntax(path) not in PLAIN | COMPRESSED:
            raise UnreadableExample("unsupported-encoding", "The file is encoded in a way that is not read.")
        dataset = _guarded(lambda: pydicom.dcmread(file, stop_before_pixels=stop))
        return dataset, bool(file.read(1)) if stop else "PixelData" in dataset


def _header(dataset: FileDataset, *, has_pixels: bool, digest: bool) -> Header:
    header = Header(
        series=str(dataset.get("SeriesInstanceUID", "") or ""),
        study=str(dataset.get("StudyInstanceUID", "") or ""),
        instance=str(dataset.get("SOPInstanceUID", "") or ""),
        patient=str(dataset.get("PatientID", "") or "").strip(),
        unfit=_unfit(dataset, has_pixels=has_pixels),
        rows=int(dataset.get("Rows", 0) or 0),
        columns=int(dataset.get("Columns", 0) or 0),
        spacing_mm=_numbers(dataset.get("PixelSpacing"), 2),  # type: ignore[arg-type]  # two of them
        position_mm=_numbers(dataset.get("ImagePositionPatient"), 3),  # type: ignore[arg-type]  # three of them
        orientation=_numbers(dataset.get("ImageOrientationPatient"), 6),
        slope=_number(dataset.get("RescaleSlope")),
        intercept=_number(dataset.get("RescaleIntercept")),
        units=str(dataset.get("RescaleType", "") or "").strip().upper(),
        identifying=tuple(name for name in IDENTIFYING if str(dataset.get(name, "") or "").strip()),
        burned_in=_burned_in(dataset),
    )
    if not digest or header.unfit:
        return header
    return Header(**{**vars(header), "digest": _digest(dataset, header)})


def _unfit(dataset: FileDataset, *, has_pixels: bool) -> str:
    """Why this is no slice of a CT; the order is that in which people would say it."""
    kind = [str(word).upper() for word in _listed(dataset.get("ImageType"))]
    sop_class = str(dataset.get("SOPClassUID", "") or "")
    checks = (
        ("directory", sop_class == DIRECTORY or dataset.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY),
        ("secondary-capture", sop_class == SECONDARY_CAPTURE or sop_class.startswith(SECONDARY_CAPTURE + ".")),
        ("truncated", not has_pixels and "Modality" not in dataset),
        ("wrong-modality", str(dataset.get("Modality", "") or "").upper() != "CT"),
        ("localizer", "LOCALIZER" in kind),
        ("no-pixel-data", not has_pixels),
        ("multi-frame", int(dataset.get("NumberOfFrames", 1) or 1) != 1),
        ("too-large", max(int(dataset.get("Rows", 0) or 0), int(dataset.get("Columns", 0) or 0)) > MAX_SIDE),
        ("unsupported-encoding", int(dataset.get("SamplesPerPixel", 1) or 1) != 1),
        ("corrupt", min(int(dataset.get("Rows", 0) or 0), int(dataset.get("Columns", 0) or 0)) < 1),
        ("missing-position", not dataset.get("SeriesInstanceUID")),
    )
    return next((reason for reason, found in checks if found), "")


def _burned_in(dataset: FileDataset) -> str:
    """Whether a name may stand in the picture itself: said by the file, or guessed from how it was made.

    The guess is a heuristic: pictures of screens and scanned sheets carry names, slices of a scanner do not; whether they do
    is not looked for in the pixels.
    """
    said = str(dataset.get("BurnedInAnnotation", "") or "").upper()
    if said:
        return "declared" if said == "YES" else ""
    captured = str(dataset.get("SOPClassUID", "") or "").startswith(SECONDARY_CAPTURE) or "ConversionType" in dataset
    secondary = "SECONDARY" in [str(word).upper() for word in _listed(dataset.get("ImageType"))]
    shown = str(dataset.get("RecognizableVisualFeatures", "") or "").upper() == "YES"
    return "likely" if captured or secondary or shown else ""


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _number(value: Any) -> float | None:
    if value in (None, ""):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if value in (None, ""):
        return None
    found = [_number(item) for item in _listed(value)]
    kept = tuple(item for item in found if item is not None)
    return kept if len(kept) == len(found) == count else None


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _digest(dataset: FileDataset, header: Header) -> str:
    pixels = bytes(dataset.PixelData)
    _require_whole(dataset, pixels)
    said = (
        str(dataset.file_meta.TransferSyntaxUID), header.rows, header.columns, header.spacing_mm, header.position_mm,
        header.orientation, header.slope, header.intercept,
        *(int(dataset.get(name, 0) or 0) for name in ("BitsAllocated", "BitsStored", "PixelRepresentation")),
    )  # fmt: skip
    return hashlib.sha256(repr(said).encode() + b"\0" + pixels).hexdigest()


def _require_whole(dataset: FileDataset, pixels: bytes) -> None:
    """Plain pixels have exactly one length, compressed ones begin with a table and are not much longer than plain ones."""
    expected = dataset.Rows * dataset.Columns * (int(dataset.BitsAllocated) // 8)
    if dataset.file_meta.TransferSyntaxUID in PLAIN:
        if len(pixels) < expected:
            raise UnreadableExample("truncated", "The pixels end too early.")
    elif not dataset["PixelData"].is_undefined_length or len(pixels) > 2 * expected + MAX_ANSWER_BYTES:
        raise UnreadableExample("corrupt", "The compressed pixels are not as long as they may be.")


def _decoded(dataset: FileDataset) -> npt.NDArray[Any]:
    if int(dataset.BitsAllocated) not in (8, 16, 32):
        raise UnreadableExample("unsupported-encoding", "Pixels of this depth are not read.")
    pixels = bytes(dataset.PixelData)
    _require_whole(dataset, pixels)
    if dataset.file_meta.TransferSyntaxUID in PLAIN:
        return _plain(dataset, pixels)
    array: npt.NDArray[Any] = dataset.pixel_array
    return array


def _plain(dataset: FileDataset, pixels: bytes) -> npt.NDArray[Any]:
    """Plain pixels, without pydicom's decoders: those load GDCM, which shall stay out of the trainer."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.get("BitsStored", 0) or dataset.BitsAllocated)
    if not 1 <= stored <= allocated:
        raise UnreadableExample("corrupt", "The pixels' depth makes no sense.")
    order = ">" if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    signed = int(dataset.get("PixelRepresentation", 0) or 0) == 1
    kind = np.dtype(f"{order}{'i' if signed else 'u'}{allocated // 8}")
    count = int(dataset.Rows) * int(dataset.Columns)
    values = np.frombuffer(pixels, kind, count).astype(kind.newbyteorder("="))
    # Bits above those stored may hold anything; the shifts back and forth repeat the sign.
    unused = allocated - stored
    return ((values << unused) >> unused).reshape(int(dataset.Rows), int(dataset.Columns))


def write_axial_series(folder: Path, values: npt.NDArray[np.int16], spacing_mm: Sequence[float], name: str) -> None:
    """Write (slices, rows, columns) Hounsfield units as one axial CT series, of the patient and under identifiers of `name`.

    Args:
        spacing_mm: along z, y, x.
    """
    folder.mkdir(parents=True)
    middle = [(n - 1) / 2 * mm for n, mm in zip(values.shape, spacing_mm, strict=True)]
    for number, plane in enumerate(values):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.Modality, dataset.ImageType = (
            CTImageStorage,
            "CT",
            ["ORIGINAL", "PRIMARY", "AXIAL"],
        )
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(number)])
        dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
        dataset.PatientID = name
        dataset.Rows, dataset.Columns = plane.shape
        dataset.PixelSpacing = list(spacing_mm[1:])
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-middle[2], -middle[1], number * spacing_mm[0] - middle[0]]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.PixelData = plane.astype("<i2").tobytes()
        dataset.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


def _start() -> subprocess.Popen[bytes]:
    # Nothing of the environment but what finding libraries takes: no secret goes to a decoder of strangers' files.
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fl_client.tasks.dicom"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # libraries print what is in a file
        env={**kept, "OPENBLAS_NUM_THREADS": "1"},
    )


def _ask(process: subprocess.Popen[bytes], path: Path) -> npt.NDArray[Any]:
    if process.stdin is None or process.stdout is None:
        raise OSError("the decoder has no pipes")
    until = time.monotonic() + DECODER_PATIENCE_S
    process.stdin.write(json.dumps(str(path.resolve())).encode() + b"\n")
    process.stdin.flush()
    size = int.from_bytes(_read(process.stdout, 4, until), "little")
    if size > MAX_ANSWER_BYTES:
        raise ValueError("the decoder answers too much")
    answer = json.loads(_read(process.stdout, size, until))
    if "reason" in answer:
        raise UnreadableExample(str(answer["reason"]), "The compressed pixels cannot be decoded.")
    rows, columns = (int(side) for side in answer["shape"])
    kind = np.dtype(str(answer["dtype"]))
    if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE and kind.kind in "iu"):
        raise ValueError("the decoder answers nonsense")
    return np.frombuffer(_read(process.stdout, rows * columns * kind.itemsize, until), kind).reshape(rows, columns)


def _read(pipe: IO[bytes], size: int, until: float) -> bytes:
    """Exactly so many bytes, in time."""
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < size:
            left_s = until - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                raise TimeoutError("the decoder takes too long")
            piece = os.read(pipe.fileno(), size - len(found))
            if not piece:
                raise OSError("the decoder ended")
            found += piece
    return bytes(found)


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """The decoder's process: a path a line in, a length, a description and pixels out, until the input ends."""
    while line := questions.readline(MAX_ANSWER_BYTES):
        try:
            array = np.ascontiguousarray(stored_values(Path(json.loads(line))))
            said = {"shape": array.shape, "dtype": array.dtype.str}
            body = array.tobytes()
        except UnreadableExample as error:
            said, body = {"reason": error.reason}, b""
        head = json.dumps(said).encode()
        answers.write(len(head).to_bytes(4, "little") + head + body)
        answers.flush()


def main() -> None:
    """Take little memory, and serve."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - absent on Windows

        resource.setrlimit(resource.RLIMIT_AS, (DECODER_MEMORY_BYTES, DECODER_MEMORY_BYTES))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to where answers go
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
