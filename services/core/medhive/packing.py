"""Packed weights: the one file format in which a model travels, rests and is summed.

Whatever crosses a wire or comes out of a store is hostile until proved otherwise, so nothing here is ever unpickled. A
packed file is a safetensors file of a stricter kind: every tensor is float32, tensors lie in the order of their names,
and nothing lies between or behind them. What follows the header is therefore one flat little-endian float32 vector, and
two models of one architecture are two vectors of one length, which can be summed, compared and mapped in pieces without
knowing their tensors. The bytes depend on nothing but names, shapes, values and metadata, so that equal weights have
equal digests. Any safetensors library reads these files.

Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medhive.errors import InvalidInput, MedHiveError, NotFound
from medhive.leftovers import disk_errors, sync_folder, temporary_beside

Flat = NDArray[np.float32]

FLOAT32 = np.dtype("<f4")
ITEM_BYTES = 4
LENGTH_BYTES = 8
"""The header's length stands before it as one unsigned 64-bit little-endian number."""
ALIGNMENT_BYTES = 8
"""The header is padded to this with spaces, as the safetensors library does, so that the vector can be mapped."""
MAX_HEADER_BYTES = 8 * 1024 * 1024
"""727 tensors of a DenseNet121 need 80 kB; a hundred times that bounds what the parser holds in memory."""
MAX_TENSORS = 100_000
"""The largest networks in use have a few thousand."""
MAX_RANK = 16
"""A 3D convolution has rank 5; NumPy refuses more than 64."""
MAX_NAME_BYTES = 1024
"""Names are paths of attributes; longer ones only serve to fill logs."""
MAX_ELEMENTS = 1 << 34
"""64 GiB of weights: far above any model here, far below what overflows a 64-bit product."""
METADATA_KEY = "__metadata__"
DTYPE_NAME = "F32"
WINDOW_ELEMENTS = 1 << 18
"""1 MiB of float32 at a time: fits a core's cache, so that several passes over it cost one pass over memory."""
DOUBLES_ELEMENTS = 1 << 15
"""256 KiB of float64."""


class CorruptWeights(MedHiveError):
    """The bytes are no packed weights file."""

    code = "corrupt-weights"


class WrongLayout(MedHiveError):
    """The weights belong to another architecture: tensors are missing, unexpected or of another shape."""

    code = "wrong-layout"


class NotPackable(InvalidInput):
    """These arrays or this metadata cannot be packed."""

    code = "not-packable"


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of a model's tensors in its flat vector.

    `names` is strictly ascending (by code point), `shapes[i]` belongs to `names[i]`, and `offsets[i]` counts the
    float32 elements before it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The layout of tensors with these names and shapes.

        Raises `NotPackable` for no tensors, too many, or a name or shape outside the limits.
        """
        names = tuple(sorted(shapes))
        problem = _shapes_problem(names, shapes)
        if problem:
            raise NotPackable(f"This is no layout of weights: {problem}.")
        ordered = tuple(tuple(int(side) for side in shapes[name]) for name in names)
        return cls(names, ordered, _running_offsets(ordered))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The layout of these arrays, whatever their type."""
        return cls.of({name: array.shape for name, array in arrays.items()})

    @staticmethod
    def from_header(source: bytes | Path) -> "Layout":
        """The layout that a packed file, or the bytes of its beginning, declares.

        A file's length is checked against its header; of bytes only length prefix and header are looked at. Raises
        `CorruptWeights`, and `NotFound` for a file that is not there.
        """
        return WeightsFile.at(source).layout if isinstance(source, Path) else parse_header(source).layout

    @property
    def size(self) -> int:
        """Length of the flat vector in elements."""
        return self.offsets[-1] + math.prod(self.shapes[-1])

    @property
    def size_bytes(self) -> int:
        return self.size * ITEM_BYTES

    def digest(self) -> str:
        """SHA-256 (hex) over names and shapes: equal for equal architectures."""
        pairs = [[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)]
        return hashlib.sha256(_json_bytes(pairs)).hexdigest()

    def require(self, other: "Layout", whose: str = "the weights") -> None:
        """Raise `WrongLayout`, naming the first difference, unless `other` is this layout."""
        if other != self:
            difference = _first_difference(self, other)
            raise WrongLayout(
                f"{whose[:1].upper()}{whose[1:]} belong to another architecture: {difference}. "
                "Use the model that the study names.",
                difference=difference,
            )

    def require_length(self, flat: Flat) -> None:
        """Raise `WrongLayout` unless this vector has `size` elements."""
        if flat.shape != (self.size,):
            raise WrongLayout(
                f"A vector of shape {flat.shape} does not hold the {self.size} numbers of this model.",
                expected=self.size,
                actual=list(flat.shape),
            )

    def name_at(self, element: int) -> str:
        """The name of the tensor that holds the element at this place of the flat vector."""
        ends = np.array([*self.offsets[1:], self.size])
        return self.names[int(np.searchsorted(ends, element, side="right"))]

    def unflatten(self, flat: Flat) -> dict[str, Flat]:
        """Views of a vector of `size` elements, by name and in shape. Raises `WrongLayout` for another length."""
        self.require_length(flat)
        places = zip(self.names, self.shapes, self.offsets, strict=True)
        return {name: flat[at : at + math.prod(shape)].reshape(shape) for name, shape, at in places}


@dataclass(frozen=True)
class Header:
    """What stands before the vector: `data_start` is the file offset (bytes) at which it begins."""

    layout: Layout
    metadata: Mapping[str, str]
    data_start: int


@dataclass(frozen=True)
class WeightsFile:
    """A packed file whose header and length have been checked; its numbers are read when asked for.

    The file is opened for each read and closed again: a thousand updates need no thousand descriptors, and what was
    read is in the caller's buffer and nowhere else. It is read, not mapped, because touching a mapping of a file that
    another process cut short ends the process, where a read reports it.
    """

    path: Path
    layout: Layout
    metadata: Mapping[str, str]
    data_start: int

    @classmethod
    def at(cls, path: Path) -> Self:
        """Raises `CorruptWeights` for what is no packed file, `NotFound` where no file is."""
        with _opened(path) as file:
            actual = os.fstat(file.fileno()).st_size
            header = parse_header(_read_header_bytes(file, actual))
        expected = header.data_start + header.layout.size_bytes
        if actual != expected:
            raise CorruptWeights(
                f"{path.name} is {actual} bytes long where its header announces {expected}. Transfer it again.",
                expected_bytes=expected,
                actual_bytes=actual,
            )
        return cls(path, header.layout, header.metadata, header.data_start)

    def read_into(self, start: int, out: Flat) -> None:
        """Fill `out` (contiguous) with the elements from `start` on. Raises `CorruptWeights` if the file ends."""
        view = _bytes_of(out)
        with _opened(self.path) as file:
            file.seek(self.data_start + start * ITEM_BYTES)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CorruptWeights(f"{self.path.name} became shorter while it was read.")
                filled += count

    def read(self, start: int, stop: int) -> Flat:
        """The elements from `start` to before `stop`, as a new vector."""
        out = np.empty(stop - start, FLOAT32)
        self.read_into(start, out)
        return out


class FlatWriter:
    """Writes one packed file block by block; the file appears, whole and on disk, or not at all.

    A context manager. The blocks go to a temporary file beside `path` (a crash leaves it to `medhive.leftovers`), which
    takes the name only when the context ends without an error and after everything reached the disk. `digest` is
    then the file's SHA-256. Raises `NoSpace` when the disk is full, `WrongLayout` when too few or too many elements
    came.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.digest = ""
        self._layout = layout
        self._header = header_bytes(layout, metadata or {})
        self._temporary = temporary_beside(path)
        self._hash = hashlib.sha256()
        self._written = 0

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self._file = self._temporary.open("xb")
        try:
            self._put(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def append(self, block: Flat) -> None:
        """Write the next elements, of any shape, in C order."""
        flat = np.ascontiguousarray(block, FLOAT32).reshape(-1)
        self._written += flat.size
        if self._written > self._layout.size:
            raise self._wrong_count()
        self._put(_bytes_of(flat))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _put(self, data: bytes | memoryview) -> None:
        with disk_errors(self.path):
            self._file.write(data)
        self._hash.update(data)

    def _commit(self) -> None:
        if self._written != self._layout.size:
            raise self._wrong_count()
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            sync_folder(self.path.parent)
        self.digest = self._hash.hexdigest()

    def _discard(self) -> None:
        # What could not be flushed is thrown away with the file; the first error is the one to report.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _wrong_count(self) -> WrongLayout:
        return WrongLayout(
            f"{self._written} numbers were given for a model of {self._layout.size}.",
            expected=self._layout.size,
            actual=self._written,
        )


def write_weights(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> str:
    """Pack float32 arrays into `path`, atomically; returns the file's SHA-256 (hex).

    Raises `NotPackable` for another type than float32 (convert it where its meaning is known), for names, shapes or
    metadata outside the limits, and `NoSpace` when the disk is full.
    """
    layout = _packable_layout(arrays)
    return write_flat(path, layout, (arrays[name] for name in layout.names), metadata)


def overwrite_weights(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Pack float32 arrays over what stands at `path`, taking its room in memory and on disk: cheaper than a new file.

    For a file that nobody else is told of, and that is made again after a crash: the disk is not waited for, and a crash
    leaves anything there. Raises as `write_weights`.
    """
    layout = _packable_layout(arrays)
    with disk_errors(path), open(path, "wb", opener=_keeping_content) as file:
        file.write(header_bytes(layout, {}))
        for name in layout.names:
            file.write(_bytes_of(np.ascontiguousarray(arrays[name], FLOAT32).reshape(-1)))
        file.truncate()


def write_flat(
    path: Path, layout: Layout, flat: Flat | Iterable[Flat], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a flat vector, whole or in consecutive blocks, as `path`; otherwise as `write_weights`."""
    blocks = (flat,) if isinstance(flat, np.ndarray) else flat
    with FlatWriter(path, layout, metadata) as writer:
        for block in blocks:
            writer.append(block)
    return writer.digest


def read_weights(path: Path) -> dict[str, Flat]:
    """All tensors of a packed file, in memory: writable views of one vector. Raises as `WeightsFile.at`."""
    file = WeightsFile.at(path)
    return file.layout.unflatten(file.read(0, file.layout.size))


def open_flat(path: Path) -> np.memmap[Any, np.dtype[np.float32]]:
    """The vector of a packed file as a read-only map. Raises as `WeightsFile.at`."""
    file = WeightsFile.at(path)
    return np.memmap(path, FLOAT32, "r", offset=file.data_start, shape=(file.layout.size,))


def windows(size: int, length: int = WINDOW_ELEMENTS) -> Iterator[slice]:
    """Consecutive pieces that cover `size` elements, the last one shorter."""
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def squared_norm(change: NDArray[np.float64]) -> float:
    """Sum of squares, in doubles: no float32 overflows there, and a million terms lose nothing that matters.

    Not `change @ change`, whose threads cost fifty times the sum itself when the cores are busy training.
    """
    return float(np.einsum("i,i->", change, change))


def squared_distance(one: Flat, other: Flat) -> float:
    """`squared_norm` of their difference, in pieces whose doubles stay in a core's nearest cache."""
    pieces = windows(one.size, DOUBLES_ELEMENTS)
    return sum(squared_norm(one[piece].astype(np.float64) - other[piece]) for piece in pieces)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, in constant memory. Raises `NotFound`."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_bytes(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """Length prefix and padded header of a packed file. Raises `NotPackable` for metadata outside the limits."""
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and _is_text(key) and _is_text(value)):
            raise NotPackable(f"Metadata of weights are texts; {key!r} is not.")
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    for name, shape, start in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        span = [start * ITEM_BYTES, (start + math.prod(shape)) * ITEM_BYTES]
        entries[name] = {"dtype": DTYPE_NAME, "shape": list(shape), "data_offsets": span}
    text = _json_bytes(entries)
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise NotPackable(f"The header would take {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed.")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_header(data: bytes) -> Header:
    """Read length prefix and header at the beginning of `data`. Raises `CorruptWeights` for anything out of order."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > MAX_HEADER_BYTES or len(data) < LENGTH_BYTES + length:
        raise CorruptWeights(
            f"This is no weights file: its header is cut short or longer than {MAX_HEADER_BYTES} bytes."
        )
    if length % ALIGNMENT_BYTES:
        raise CorruptWeights("The header is not padded to a multiple of 8 bytes; pack the weights again.")
    entries = _parse_json(data[LENGTH_BYTES : LENGTH_BYTES + length])
    metadata = _checked_metadata(entries.pop(METADATA_KEY, {}))
    return Header(_checked_layout(entries), metadata, LENGTH_BYTES + length)


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptWeights("This is no weights file: its header is no JSON object.") from error
    if not isinstance(entries, dict):
        raise CorruptWeights("This is no weights file: its header is no JSON object.")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two equal names they take: a file that shows two models to two readers is refused.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CorruptWeights("The header names the same thing twice.")
    return found


def _checked_metadata(metadata: object) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _is_text(key) and _is_text(value) for key, value in metadata.items()
    ):
        raise CorruptWeights("The header's metadata are not texts.")
    return MappingProxyType(metadata)


def _checked_layout(entries: Mapping[str, Any]) -> Layout:
    if len(entries) > MAX_TENSORS:
        raise CorruptWeights(f"The header describes {len(entries)} tensors, where {MAX_TENSORS} are allowed.")
    try:
        layout = Layout.of({name: _checked_shape(name, entry) for name, entry in entries.items()})
    except NotPackable as error:
        raise CorruptWeights(f"The header describes no usable model. {error}") from error
    for name, shape, start in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        span = [start * ITEM_BYTES, (start + math.prod(shape)) * ITEM_BYTES]
        if entries[name]["data_offsets"] != span:
            raise CorruptWeights(
                f"Tensor {name!r} is not where the packed order puts it (bytes {span[0]} to {span[1]}).", tensor=name
            )
    return layout


def _checked_shape(name: str, entry: object) -> tuple[int, ...]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptWeights(f"Tensor {_shown(name)} has no dtype, shape and data_offsets.")
    if entry["dtype"] != DTYPE_NAME:
        raise CorruptWeights(f"Tensor {_shown(name)} is not float32.")
    shape, span = entry["shape"], entry["data_offsets"]
    if not (_is_ints(shape) and _is_ints(span)):
        raise CorruptWeights(f"Shape or place of tensor {_shown(name)} is no list of whole numbers.")
    return tuple(shape)


def _is_ints(value: object) -> bool:
    # `type` and not `isinstance`: True is an int, and 2.0 == 2.
    return isinstance(value, list) and len(value) <= MAX_RANK and all(type(item) is int for item in value)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON escapes can spell lone surrogates, which cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A name that may come from anybody, made fit for a message."""
    return ascii(name[:80])


def _shapes_problem(names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What keeps these tensors from being a layout, or None."""
    if not 0 < len(names) <= MAX_TENSORS:
        return f"it has {len(names)} tensors, where 1 to {MAX_TENSORS} are allowed"
    total = 0
    for name in names:
        problem = _tensor_problem(name, shapes[name])
        if problem:
            return f"tensor {_shown(name)} {problem}"
        total += math.prod(shapes[name])
    if not 0 < total <= MAX_ELEMENTS:
        return f"it has {total} numbers, where 1 to {MAX_ELEMENTS} are allowed"
    return None


def _tensor_problem(name: str, shape: tuple[int, ...]) -> str | None:
    if name == METADATA_KEY or not _is_text(name) or len(name.encode()) > MAX_NAME_BYTES:
        return "has a name that cannot be used"
    # A zero among the sides must not hide that the others overflow, so they are multiplied as ones.
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(side or 1 for side in shape) > MAX_ELEMENTS:
        return "has a shape outside the limits"
    return None


def _running_offsets(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    offsets, place = [], 0
    for shape in shapes:
        offsets.append(place)
        place += math.prod(shape)
    return tuple(offsets)


def _first_difference(expected: Layout, actual: Layout) -> str:
    wanted = dict(zip(expected.names, expected.shapes, strict=True))
    given = dict(zip(actual.names, actual.shapes, strict=True))
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            return f"tensor {_shown(name)} is missing"
        if name not in wanted:
            return f"tensor {_shown(name)} is unexpected"
        if wanted[name] != given[name]:
            return f"tensor {_shown(name)} has shape {given[name]} instead of {wanted[name]}"
    return "the tensors lie in another order"


def _packable_layout(arrays: Mapping[str, NDArray[Any]]) -> Layout:
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise NotPackable(f"Tensor {name!r} is {array.dtype}; convert it to float32 before packing.", tensor=name)
    return Layout.of_arrays(arrays)


def _keeping_content(name: str, flags: int) -> int:
    return os.open(name, flags & ~os.O_TRUNC, 0o666)


def _bytes_of(flat: Flat) -> memoryview:
    # A view without elements cannot be cast.
    return flat.data.cast("B") if flat.size else memoryview(b"")


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _read_header_bytes(file: FileIO, file_bytes: int) -> bytes:
    prefix = file.read(LENGTH_BYTES)
    length = min(int.from_bytes(prefix, "little"), file_bytes)
    # One byte over the limit is enough for the parser to refuse it.
    return prefix + file.read(min(length, MAX_HEADER_BYTES + 1))


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise NotFound(f"There is no file {path.name}.", file=path.name) from error
    with file:
        yield file
