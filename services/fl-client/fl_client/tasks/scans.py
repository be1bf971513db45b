"""Reading a folder of CT scans: which series are used, which are not and why, and which part of the split each one is in.

Files may lie in any arrangement under any name: what belongs together is told by the series' identifier. The folder is gone
through twice. First every header is looked at, and only the path is kept; then one series after the other is read whole, so
that memory does not grow with the number of scans. One bad study never stops the rest: it is left out, with a reason.
"""

import csv
import hashlib
import math
import shutil
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fl_client.tasks.base import DataReport, LocalOptions, OnProgress, Part, Skipped, part_of, read_options
from fl_client.tasks.dicom import Decoder, Header, read_header
from fl_client.tasks.errors import (
    DataFolderMissing,
    EmptyClass,
    NotEnoughExamples,
    UnknownClass,
    UnreadableExample,
    WrongColumns,
    WrongOption,
)
from fl_client.tasks.folders import class_folders, groups_of_csv, walk
from fl_client.tasks.series import TILT_SHOWN_DEG, Series, Volume, arrange, is_nifti, open_nifti
from fl_client.tasks.volumes import DEFAULT_CACHE_BYTES, Box, BoxCache, UInt8
from medhive.spec import StudyData

LABELS_NAME: Final = "labels.csv"  # in the data folder, where no other file is named
MAX_LABELS_BYTES: Final = 64 * 2**20
MAX_FILES: Final = 5_000_000  # ten thousand scans of 500 slices; paths alone are then 500 MB
MIN_SIZE, MAX_SIZE = 32, 256  # the models halve four times; 256 × 256 × 256 is a chest at 1.5 mm
MIN_SPACING_MM, MAX_SPACING_MM = 0.3, 10.0
HU_LIMITS: Final = (-2000, 4000)
KEYS: Final = ("series", "patient", "file")
PLACE: Final = ("x_mm", "y_mm", "z_mm")
DIRECTORY: Final = "directory"  # a DICOMDIR lists files and is none of them


@dataclass(frozen=True)
class VolumeOptions:
    """A study's options of the task `ct-volume`.

    Attributes:
        examples: `series` (one example a scan, around its middle) or `nodules` (one a position that the labels give).
        size, slices: voxels of the box that the model sees, in the plane and along the body; 0 slices: as `size`.
        spacing_mm, slice_spacing_mm: their distances; 0: as `spacing_mm`.
        window_low_hu, window_high_hu: the lung window that values are clipped to.
        lungs_only: in whole scans, whether all but the lungs is taken away; boxes around nodules keep the chest's wall.
        model: one of `fl_client.tasks.models.VOLUME_MODELS`.
        allow_missing_classes: whether a site may lack a class.
    """

    examples: str = "series"
    size: int = 96
    slices: int = 0
    spacing_mm: float = 3.0
    slice_spacing_mm: float = 0.0
    window_low_hu: int = -1000
    window_high_hu: int = 400
    lungs_only: bool = True
    model: str = "resnet-gn"
    allow_missing_classes: bool = False

    @classmethod
    def of(cls, study: StudyData) -> "VolumeOptions":
        """Options from the study.

        Raises:
            WrongOption: an option is unknown, of another type or out of range.
        """
        options = read_options(cls, study)
        low, high = HU_LIMITS
        checks = (
            ("examples", options.examples in {"series", "nodules"}, "series or nodules"),
            ("size", MIN_SIZE <= options.size <= MAX_SIZE, f"{MIN_SIZE} to {MAX_SIZE} voxels"),
            (
                "slices",
                options.slices == 0 or MIN_SIZE <= options.slices <= MAX_SIZE,
                f"0, or {MIN_SIZE} to {MAX_SIZE}",
            ),
            ("spacing_mm", MIN_SPACING_MM <= options.spacing_mm <= MAX_SPACING_MM, "0.3 to 10 mm"),
            (
                "slice_spacing_mm",
                options.slice_spacing_mm == 0 or MIN_SPACING_MM <= options.slice_spacing_mm <= MAX_SPACING_MM,
                "0, or 0.3 to 10 mm",
            ),
            ("window_high_hu", low <= options.window_low_hu < options.window_high_hu <= high, "above window_low_hu"),
        )
        for name, good, wanted in checks:
            if not good:
                raise WrongOption(f"Option {name!r} must be {wanted}.", option=name)
        return options

    @property
    def box(self) -> Box:
        """What is cut out of a scan."""
        along = self.slice_spacing_mm or self.spacing_mm
        return Box(
            (self.slices or self.size, self.size, self.size),
            (along, self.spacing_mm, self.spacing_mm),
            (self.window_low_hu, self.window_high_hu),
            lungs_only=self.lungs_only and self.examples == "series",
        )


@dataclass(frozen=True)
class Example:
    """One box: index of its class, digest of what is in it, part of the split; and where it comes from."""

    label: int
    digest: str
    part: Part
    paths: tuple[Path, ...]
    series: str  # its digest
    centre_mm: tuple[float, float, float] | None


@dataclass(frozen=True)
class Scan:
    """A read folder."""

    examples: tuple[Example, ...]
    report: DataReport


class Boxes:
    """The boxes of examples: out of the cache, or out of the scan again where the cache has lost them."""

    def __init__(self, box: Box, local: LocalOptions) -> None:
        self.box = box
        folder = local.cache_dir
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="medhive-boxes-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._cache = BoxCache(folder, local.cache_bytes or DEFAULT_CACHE_BYTES)

    def has(self, example: Example) -> bool:
        """Whether it is kept."""
        return self._cache.get(self._key(example), self.box.shape) is not None

    def keep(self, example: Example, volume: Volume) -> None:
        """Cut it out of a scan that was read, and keep it."""
        self._cache.put(self._key(example), self._cut(example, volume))

    def get(self, example: Example) -> UInt8:
        """(z, y, x) bytes.

        Raises:
            UnreadableExample: it is no longer kept, and its scan can no longer be read, or is another one.
        """
        kept = self._cache.get(self._key(example), self.box.shape)
        if kept is not None:
            return kept
        series = open_series(example.paths)
        if series.digest != example.series:
            raise UnreadableExample("changed", "A scan was changed while it was in use; consent anew.")
        with Decoder() as decoder:
            found = self._cut(example, self.box.read(series, decoder))
        self._cache.put(self._key(example), found)
        return found

    def _key(self, example: Example) -> str:
        return self.box.key(example.series, example.centre_mm)

    def _cut(self, example: Example, volume: Volume) -> UInt8:
        middle = volume.grid.centre_mm
        return self.box.cut(volume, example.centre_mm or (middle[0], middle[1], middle[2]))


# ---- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One line of the labels: a class, and a place where the study's examples are nodules."""

    label: int
    centre_mm: tuple[float, float, float] | None


@dataclass
class Labels:
    """Labels out of a CSV: by the column series, patient or file; found again by what a series says of itself."""

    key: str
    rows: dict[str, list[_Row]]
    used: set[str] = field(default_factory=set)

    def of(self, found: "_Found") -> list[_Row]:
        """The lines for a series."""
        name = {"series": found.uid, "patient": found.patient, "file": found.name}[self.key]
        self.used.add(name)
        return self.rows.get(name, [])


def read_labels(path: Path, study: StudyData, local: LocalOptions, *, places: bool) -> Labels:
    """Read the labels' CSV, with a header line.

    Args:
        places: whether each line must have x_mm, y_mm, z_mm in patient coordinates.

    Raises:
        DataFolderMissing, WrongColumns, UnknownClass: it cannot be used; the text names lines by their numbers, since the
            lines name patients.
    """
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            raise DataFolderMissing(f"The labels {path} are larger than {MAX_LABELS_BYTES} bytes.")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFolderMissing(f"The labels {path} cannot be read as a CSV file: {error}.") from error
    columns = set(lines[0]) if lines else set()
    keys = [key for key in KEYS if key in columns]
    if len(keys) != 1 or "label" not in columns or (places and not columns.issuperset(PLACE)):
        wanted = ", ".join(("label", *(PLACE if places else ())))
        raise WrongColumns(f"{path} needs a header line with one of {', '.join(KEYS)}, and with {wanted}.")
    rows: dict[str, list[_Row]] = defaultdict(list)
    for number, line in enumerate(lines, 2):
        rows[str(line[keys[0]] or "").strip()].append(_row(path, number, line, study, local, places=places))
    return Labels(keys[0], dict(rows))


def _row(
    path: Path, number: int, line: Mapping[str, str], study: StudyData, local: LocalOptions, *, places: bool
) -> _Row:
    given = str(line["label"] or "").strip()
    name = local.class_map.get(given, given)
    if name not in study.classes:
        raise UnknownClass(
            f"Line {number} of {path} has a label that the study does not know; its classes are "
            f"{', '.join(study.classes)}. Correct it, or map it with --class LOCAL=<class of the study>."
        )
    if not places:
        return _Row(study.classes.index(name), None)
    try:
        x, y, z = (float(line[axis]) for axis in PLACE)
    except (TypeError, ValueError):
        x = y = z = math.nan
    if not all(map(math.isfinite, (x, y, z))):
        raise WrongColumns(f"Line {number} of {path} has no position in millimetres in {', '.join(PLACE)}.")
    return _Row(study.classes.index(name), (x, y, z))


# ---- series ----------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The files of one series, and what the first of them says; `label` is that of its folder."""

    name: str
    uid: str
    patient: str
    study: str
    label: int | None
    paths: list[Path]


@dataclass(frozen=True)
class _Usable:
    """A series whose slices form a grid."""

    found: _Found
    paths: tuple[Path, ...]
    digest: str
    slices: int


def open_series(paths: Sequence[Path]) -> Series:
    """A series whose files are known; raises UnreadableExample."""
    if len(paths) == 1 and is_nifti(paths[0]):
        return open_nifti(paths[0])
    headers: dict[str, tuple[Path, Header]] = {}
    for path in paths:
        header = read_header(path, pixels=True)
        headers.setdefault(header.digest, (path, header))  # the same slice twice is one slice
    return arrange([path for path, _ in headers.values()], [header for _, header in headers.values()])


class _Reader:
    """One reading of a folder."""

    def __init__(self, data_dir: Path, study: StudyData, secret: bytes, local: LocalOptions) -> None:
        self._data_dir, self._study, self._secret, self._local = data_dir, study, secret, local
        self._options = VolumeOptions.of(study)
        self._groups = groups_of_csv(local.groups_csv) if local.groups_csv else {}
        self.skipped: list[Skipped] = []
        self.duplicates: list[tuple[str, str]] = []
        self._remarks: dict[str, set[str]] = defaultdict(set)
        self._labels = self._open_labels()

    def _open_labels(self) -> Labels | None:
        path = self._local.labels_csv or self._data_dir / LABELS_NAME
        places = self._options.examples == "nodules"
        if path.exists() or self._local.labels_csv is not None:
            return read_labels(path, self._study, self._local, places=places)
        if places:
            raise DataFolderMissing(f"There is no {path}; the study's examples are nodules, whose places it must list.")
        return None

    def files(self) -> Iterator[tuple[Path, int | None]]:
        """Every file with the class of its folder, where classes are folders."""
        if self._labels is not None:
            if not self._data_dir.is_dir():
                raise DataFolderMissing(f"There is no folder {self._data_dir}.", folder=str(self._data_dir))
            yield from ((path, None) for path in walk(self._data_dir))
            return
        allow = self._options.allow_missing_classes
        folders = class_folders(self._data_dir, self._study, self._local, allow_missing=allow)
        for label, name in enumerate(self._study.classes):
            for folder in folders[name]:
                yield from ((path, label) for path in walk(folder))

    def survey(self, files: Sequence[tuple[Path, int | None]], tell: OnProgress) -> list[_Found]:
        """Sort the files into series by their headers; those that are none are skipped, series by series."""
        found: dict[tuple[int | None, str], _Found] = {}
        unfit: dict[tuple[str, str], list[str]] = defaultdict(list)
        root = self._data_dir.resolve()
        for done, (path, label) in enumerate(files, 1):
            name = path.relative_to(self._data_dir).as_posix()
            try:
                if not path.resolve().is_relative_to(root):
                    raise UnreadableExample("link-outside", "The link leads out of the folder.")
                self._take(path, name, label, found, unfit)
            except UnreadableExample as error:
                self.skipped.append(Skipped(name, error.reason))
            tell(done, 2 * len(files))
        for (_series, reason), names in unfit.items():
            self.skipped.append(Skipped(_together(names[0], len(names)), reason))
        return list(found.values())

    def _take(
        self,
        path: Path,
        name: str,
        label: int | None,
        found: dict[tuple[int | None, str], _Found],
        unfit: dict[tuple[str, str], list[str]],
    ) -> None:
        if path.name.startswith(".") or path == (self._local.labels_csv or self._data_dir / LABELS_NAME):
            return
        if is_nifti(path):
            found[label, name] = _Found(name, "", "", "", label, [path])
            return
        header = read_header(path)
        self._remark_privacy(header, name)
        if header.unfit == DIRECTORY:
            return
        if header.unfit:
            unfit[header.series or name, header.unfit].append(name)
            return
        key = (label, header.series)
        if key not in found:
            found[key] = _Found(name, header.series, header.patient, header.study, label, [])
        found[key].paths.append(path)

    def _remark_privacy(self, header: Header, name: str) -> None:
        key = header.series or name
        if header.burned_in:
            self._remarks[f"names in the picture itself are {header.burned_in}"].add(key)
        for tag in header.identifying:
            self._remarks[f"identifying tag {tag}"].add(key)

    def usable(self, found: Sequence[_Found], tell: OnProgress, total: int) -> list[_Usable]:
        """The series that form a grid, one of each study where a label is not for one series."""
        kept: list[_Usable] = []
        done = total
        for item in found:
            try:
                series = open_series(item.paths)
            except UnreadableExample as error:
                self.skipped.append(Skipped(_together(item.name, len(item.paths)), error.reason))
            else:
                kept.append(_Usable(item, series.paths, series.digest, len(series.paths)))
                if series.grid.tilt_deg > TILT_SHOWN_DEG and not is_nifti(series.paths[0]):
                    self._remarks["gantry tilt, corrected"].add(item.uid)
                if not item.patient:
                    self._remarks["no patient known, so it may be on two sides of the split"].add(item.uid or item.name)
            done += len(item.paths)
            tell(min(done, 2 * total), 2 * total)
        if self._labels is not None and self._labels.key != "patient":
            return kept
        return self._one_a_study(kept)

    def _one_a_study(self, kept: Sequence[_Usable]) -> list[_Usable]:
        """Of several reconstructions of one study the one of most slices; the others are the same patient again."""
        best: dict[object, _Usable] = {}
        for item in sorted(kept, key=lambda item: (-item.slices, item.digest)):
            key = (item.found.label, item.found.study) if item.found.study else item.found.name
            if best.setdefault(key, item) is not item and best[key].digest != item.digest:
                self.skipped.append(Skipped(_together(item.found.name, item.slices), "several-series"))
            elif best[key] is not item:
                self.duplicates.append((item.found.name, best[key].found.name))
        return sorted(best.values(), key=lambda item: item.found.name)

    def examples(self, usable: Sequence[_Usable], boxes: Boxes) -> list[Example]:
        """The examples of all series, each with its box kept."""
        first: dict[str, tuple[Example, str]] = {}
        conflicting: dict[str, list[str]] = {}
        with Decoder() as decoder:
            for item in usable:
                for example in self._of_series(item, boxes, decoder):
                    known, name = first.setdefault(example.digest, (example, item.found.name))
                    if known.label != example.label:
                        conflicting.setdefault(example.digest, [name]).append(item.found.name)
                    elif known is not example:
                        self.duplicates.append((item.found.name, name))
        for digest, names in conflicting.items():
            self.skipped.extend(Skipped(name, "conflicting-labels") for name in names)
            del first[digest]
        return [example for example, _ in first.values()]

    def _of_series(self, item: _Usable, boxes: Boxes, decoder: Decoder) -> list[Example]:
        rows = self._labels.of(item.found) if self._labels else [_Row(item.found.label or 0, None)]
        name = _together(item.found.name, item.slices)
        if not rows:
            self.skipped.append(Skipped(name, "no-label"))
            return []
        examples = [self._example(item, row) for row in dict.fromkeys(rows)]
        volume: Volume | None = None
        series: Series | None = None
        kept = []
        try:
            for example in examples:
                if example.centre_mm is not None:
                    series = series or open_series(item.paths)
                    if not series.grid.holds(example.centre_mm):
                        self.skipped.append(Skipped(name, "nodule-outside"))
                        continue
                if not boxes.has(example):
                    series = series or open_series(item.paths)
                    volume = volume or boxes.box.read(series, decoder)
                    boxes.keep(example, volume)
                kept.append(example)
        except UnreadableExample as error:
            self.skipped.append(Skipped(name, error.reason))
            return []
        return kept

    def _example(self, item: _Usable, row: _Row) -> Example:
        group = self._groups.get(item.found.name) or item.found.patient or item.found.study
        key = f"group:{group}" if group else f"content:{item.digest}"
        part = part_of(self._secret, key.encode(), self._study.validation_share, self._study.heldout_share)
        digest = hashlib.sha256(repr((item.digest, row.centre_mm)).encode()).hexdigest()
        return Example(row.label, digest, part, item.paths, item.digest, row.centre_mm)

    def report(self, examples: Sequence[Example], usable: Sequence[_Usable]) -> DataReport:
        """What was found."""
        remarks = {what: len(series) for what, series in sorted(self._remarks.items())}
        if self._labels is not None and (unused := len(self._labels.rows.keys() - self._labels.used)):
            remarks["labels without a scan"] = unused
        groups = {item.found.patient for item in usable if item.found.patient}
        return DataReport.of(
            "ct-volume",
            self._study,
            self._secret,
            [(example.label, example.part, example.digest) for example in examples],
            skipped=self.skipped,
            duplicates=self.duplicates,
            groups=len(groups) if groups else None,
            remarks=remarks,
        )


def scan_series(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    boxes: Boxes,
    *,
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> Scan:
    """Read every series of the folder once, and keep each example's box.

    Raises:
        DataFolderMissing, UnknownClass, MissingClass, EmptyClass, NotEnoughExamples, WrongColumns, WrongOption: the
            folder as a whole cannot be used.
    """
    tell = on_progress or (lambda _done, _total: None)
    reader = _Reader(data_dir, study, secret, local or LocalOptions())
    files = []
    for item in reader.files():
        files.append(item)
        if len(files) > MAX_FILES:
            raise WrongOption(f"{data_dir} holds more than {MAX_FILES} files; split it over several studies.")
    usable = reader.usable(reader.survey(files, tell), tell, len(files))
    examples = reader.examples(usable, boxes)
    report = reader.report(examples, usable)
    _require_enough(report, study)
    return Scan(tuple(examples), report)


def series_in(paths: Sequence[Path]) -> Iterator[tuple[list[Path], str]]:
    """Files sorted into series, for prediction: each with the reason why it is none, or an empty one."""
    found: dict[str, list[Path]] = defaultdict(list)
    bad: list[tuple[list[Path], str]] = []
    for path in paths:
        try:
            header = None if is_nifti(path) else read_header(path)
        except UnreadableExample as error:
            bad.append(([path], error.reason))
            continue
        if header is not None and header.unfit:
            bad.append(([path], header.unfit))
        else:
            found[header.series if header else str(path)].append(path)
    yield from ((files, "") for files in found.values())
    yield from bad


def _together(name: str, count: int) -> str:
    return name if count == 1 else f"{name} and {count - 1} more of its series"


def _require_enough(report: DataReport, study: StudyData) -> None:
    allow = VolumeOptions.of(study).allow_missing_classes
    empty = [name for name, count in report.classes.items() if not count]
    if empty and not allow:
        raise EmptyClass(
            f"There is no usable scan of {', '.join(empty)}; `medhive-site check-data` names those left out, with the "
            f"reason. Left out: {_in_words(report)}.",
            classes=empty,
        )
    parts = Counter({part: sum(counts.values()) for part, counts in report.parts.items()})
    if not all(parts[part] for part in study.needed_parts):
        raise NotEnoughExamples(
            f"{report.examples} usable examples leave {parts['train']} for training and {parts['validation']} for "
            "validation; each needs at least one. Add patients: all scans of one are on one side. Left out: "
            f"{_in_words(report)}.",
            examples=report.examples,
        )


def _in_words(report: DataReport) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in report.counts_by_reason().items()) or "nothing"
