"""Images that a publisher packed into few files: NumPy archives (npz) and CIFAR-10's binary version. Nothing is unpickled.

A site's folder holds such files in place of folders of classes. Where a publisher set a test set apart, training takes the
rest; a simulation asks for the test set by name.

Known archives: `images` (n, h, w) or (n, h, w, 3) bytes with `labels` (n,); the same with the prefixes `train_`, `val_` and
`test_` (MedMNIST); `blob` and `offsets` (n + 1,) of JPEG or PNG files with `labels`. `class_names` and `is_test` (n,) may be
with them. Binary version (https://www.cs.toronto.edu/~kriz/cifar.html): records of one byte of class and 3 × 32 × 32 of
pixels, with the names of the classes in batches.meta.txt.
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fl_client.tasks.errors import DataFolderMissing, PickledData

Subset = Literal["train", "test"]
Wanted = Literal["train", "test", "judge"]
"""What to take of packed files; `judge` is the test set that was set apart, or all where none was."""
MAX_ARCHIVE_BYTES = 16 * 2**30  # unpacked, of one file; the largest public sets of small images are 12 GB
MAX_SIDE = 8192  # as many pixels as one decoded file may have
CIFAR_SIDE, CIFAR_RECORD = 32, 1 + 3 * 32 * 32
CIFAR_NAMES = "batches.meta.txt"
PICKLES = tuple(b"\x80%c" % protocol for protocol in range(2, 6))  # how they begin, since protocol 2
SETS: Mapping[Subset, str] = {"train": "training", "test": "test"}
PREFIXES: Mapping[Subset, tuple[str, ...]] = {"train": ("train_", "val_"), "test": ("test_",)}

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PackedImage:
    """One image: its name (file:number), its class, and either a whole JPEG or PNG file, or (channels, h, w) pixels."""

    name: str
    label: str
    encoded: bytes | None = None
    pixels: UInt8 | None = None


def packed_files(data: Path) -> list[Path]:
    """The packed files of a folder, or the file itself; none where it holds folders of classes or something else."""
    found = sorted(p for p in data.iterdir() if p.is_file()) if data.is_dir() else [data] if data.is_file() else []
    root = data.resolve() if data.is_dir() else data.resolve().parent
    return [
        path
        for path in found
        if path.suffix.lower() in (".npz", ".bin")
        and not path.name.startswith(".")
        and path.resolve().is_relative_to(root)
    ]


def require_unpickled(data: Path) -> None:
    """Say so where there is nothing but pickled files, such as CIFAR-10's version for Python.

    Raises:
        PickledData: nothing of it will be read.
    """
    found = sorted(p for p in data.iterdir() if not p.name.startswith(".")) if data.is_dir() else [data]
    if any(path.is_dir() for path in found):
        return
    pickled = next((path for path in found if path.is_file() and _is_pickled(path)), None)
    if pickled is not None:
        raise PickledData(
            f"{pickled} is a pickled file, which is never read, since reading it can run any code; give images in one "
            "folder per class, npz archives, or the binary version of CIFAR-10 (cifar-10-binary.tar.gz).",
            file=pickled.name,
        )


def _is_pickled(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.suffix.lower() in (".pkl", ".pickle") or file.read(2) in PICKLES
    except OSError:
        return False


def packed_classes(data: Path) -> tuple[str, ...]:
    """The names of the classes in packed files; numbers where they tell none. Raises `DataFolderMissing`."""
    labels: set[str] = set()
    for path in packed_files(data):
        with _opened(path) as file:
            names = file.names()
            if names:
                return names
            labels |= {str(label) for labels_of in file.all_labels() for label in np.unique(labels_of)}
    return tuple(sorted(labels, key=lambda text: (len(text), text)))


def read_packed(data: Path, wanted: Wanted) -> Iterator[PackedImage]:
    """The images of one subset, file by file.

    Raises:
        DataFolderMissing: a file is none of the known ones; the text says why.
    """
    subset = _judging(data) if wanted == "judge" else wanted
    for path in packed_files(data):
        with _opened(path) as file:
            yield from file.images(subset)


def set_apart(data: Path, wanted: Wanted) -> Mapping[str, int]:
    """What `read_packed` does not take since it belongs to the publisher's other set, with how many images that are.

    Raises:
        DataFolderMissing: a file is none of the known ones.
    """
    subset = _judging(data) if wanted == "judge" else wanted
    other: Subset = "train" if subset == "test" else "test"
    count = sum(1 for _ in read_packed(data, other))
    return {f"images of the publisher's {SETS[other]} set, not used": count} if count else {}


def _judging(data: Path) -> Subset:
    return "test" if any(True for _ in read_packed(data, "test")) else "train"


class _Packed(ABC):
    """One file; a context, since an archive stays open while it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Packed":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def names(self) -> tuple[str, ...]:
        """The names of the classes by number; empty where there are none."""
        return ()

    @abstractmethod
    def all_labels(self) -> Iterator[npt.NDArray[np.int64]]:
        """The numbers of the classes."""

    @abstractmethod
    def images(self, subset: Subset) -> Iterator[PackedImage]:
        """The images of one subset."""

    def _class(self, label: int) -> str:
        names = self.names()
        return names[label] if 0 <= label < len(names) else str(label)

    def _wrong(self, why: str) -> DataFolderMissing:
        return DataFolderMissing(f"{self._path.name} is no archive of images: {why}.", file=self._path.name)


class _Archive(_Packed):
    """A NumPy archive."""

    def __enter__(self) -> "_Archive":
        try:
            with zipfile.ZipFile(self._path) as archive:
                if sum(item.file_size for item in archive.infolist()) > MAX_ARCHIVE_BYTES:
                    raise self._wrong(f"unpacked it has more than {MAX_ARCHIVE_BYTES} bytes")
            self._file = np.load(self._path, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._wrong("it cannot be opened") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def names(self) -> tuple[str, ...]:
        if "class_names" not in self._file.files:
            return ()
        return tuple(str(name) for name in self._read("class_names").ravel().tolist())

    def all_labels(self) -> Iterator[npt.NDArray[np.int64]]:
        for name in self._file.files:
            if name == "labels" or name.endswith("_labels"):
                yield self._labels(name)

    def images(self, subset: Subset) -> Iterator[PackedImage]:
        files = set(self._file.files)
        if {"blob", "offsets", "labels"} <= files:
            blob, offsets = self._read("blob"), self._read("offsets").astype(np.int64).ravel()
            labels = self._labels("labels")
            if (
                len(offsets) != len(labels) + 1
                or offsets[0] < 0
                or (np.diff(offsets) < 0).any()
                or offsets[-1] > len(blob)
            ):
                raise self._wrong("its offsets do not fit its blob and labels")
            for place in self._wanted(labels, subset):
                content = blob[offsets[place] : offsets[place + 1]].tobytes()
                yield PackedImage(self._name(place), self._class(int(labels[place])), encoded=content)
            return
        found = [prefix for prefix in PREFIXES[subset] if {f"{prefix}images", f"{prefix}labels"} <= files]
        if {"images", "labels"} <= files:
            yield from self._arrays("", subset)
        elif not found and not any(f"{prefix}images" in files for item in PREFIXES.values() for prefix in item):
            raise self._wrong("it holds neither images and labels, nor blob, offsets and labels")
        for prefix in found:
            yield from self._arrays(prefix, None)

    def _arrays(self, prefix: str, subset: Subset | None) -> Iterator[PackedImage]:
        images, labels = self._read(f"{prefix}images"), self._labels(f"{prefix}labels")
        sides = images.shape[1:3]
        fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
        if (
            images.dtype != np.uint8
            or not fits
            or len(images) != len(labels)
            or not 0 < max(sides, default=0) <= MAX_SIDE
        ):
            raise self._wrong("its images are not (n, h, w) or (n, h, w, 3) bytes, one a label")
        for place in self._wanted(labels, subset):
            image = images[place]
            pixels = image[None] if image.ndim == 2 else np.ascontiguousarray(np.moveaxis(image, 2, 0))
            yield PackedImage(self._name(place, prefix), self._class(int(labels[place])), pixels=pixels)

    def _wanted(self, labels: npt.NDArray[np.int64], subset: Subset | None) -> npt.NDArray[np.int64]:
        """The places of a subset's images; without a mark all are to train on."""
        if subset is None:
            return np.arange(len(labels))
        if "is_test" not in self._file.files:
            return np.arange(len(labels) if subset == "train" else 0)
        marks = self._read("is_test").ravel().astype(bool)
        if len(marks) != len(labels):
            raise self._wrong("is_test is not one mark a label")
        return np.flatnonzero(marks == (subset == "test"))

    def _labels(self, name: str) -> npt.NDArray[np.int64]:
        labels = self._read(name).ravel()
        if labels.dtype.kind not in "iu":
            raise self._wrong(f"{name} are not whole numbers")
        return labels.astype(np.int64)

    def _read(self, name: str) -> npt.NDArray[np.generic]:
        try:
            found: npt.NDArray[np.generic] = self._file[name]
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise self._wrong(f"{name} cannot be read without running code, or is damaged") from error
        return found

    def _name(self, place: np.integer[npt.NBitBase] | int, prefix: str = "") -> str:
        return f"{self._path.name}:{prefix}{int(place)}"


class _Binary(_Packed):
    """One batch of CIFAR-10's binary version; test_batch.bin is the test set."""

    def names(self) -> tuple[str, ...]:
        meta = self._path.with_name(CIFAR_NAMES)
        if not meta.is_file():
            return ()
        return tuple(line.strip() for line in meta.read_text("utf-8").splitlines() if line.strip())

    def all_labels(self) -> Iterator[npt.NDArray[np.int64]]:
        yield self._records()[:, 0].astype(np.int64)

    def images(self, subset: Subset) -> Iterator[PackedImage]:
        if self._path.name.startswith("test") != (subset == "test"):
            return
        for place, record in enumerate(self._records()):
            pixels = record[1:].reshape(3, CIFAR_SIDE, CIFAR_SIDE)
            yield PackedImage(f"{self._path.name}:{place}", self._class(int(record[0])), pixels=pixels)

    def _records(self) -> UInt8:
        size = self._path.stat().st_size
        if not size or size % CIFAR_RECORD or size > MAX_ARCHIVE_BYTES:
            raise self._wrong(f"it is no whole number of records of {CIFAR_RECORD} bytes")
        return np.fromfile(self._path, dtype=np.uint8).reshape(-1, CIFAR_RECORD)


def _opened(path: Path) -> _Packed:
    kinds: Mapping[str, Callable[[Path], _Packed]] = {".npz": _Archive, ".bin": _Binary}
    return kinds[path.suffix.lower()](path)
