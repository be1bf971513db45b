"""Reading a CSV as the study describes it: columns checked by name, values turned to numbers, rows sorted into parts.

No heavy library here, so that `check-data` starts quickly. A feature is either a numeric column, with NaN where the value
is missing, or one 0/1 column per category that the study lists; a missing or unlisted category is all zeros.
"""

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fl_client.tasks.base import (
    DataReport,
    LocalOptions,
    OnProgress,
    Part,
    Skipped,
    part_of,
    read_options,
)
from fl_client.tasks.errors import (
    DataFolderMissing,
    EmptyClass,
    NotEnoughExamples,
    UnknownClass,
    UnreadableExample,
    WrongColumns,
    WrongOption,
)
from medhive.spec import StudyData, TableFormat

MAX_FILE_BYTES = 2**30  # a million rows of a hundred columns are half of it
MAX_ROWS = 5_000_000
MAX_NUMBER = 1e15  # far above any measurement; its square still fits float32
SUFFIXES = frozenset({".csv", ".data", ".tsv", ".txt"})
PROGRESS_ROWS = 1000
NAMED_COLUMNS = 10  # as many as a person reads

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TableOptions:
    """A study's options of the task `tabular`: the column that tells the patient (none: by content)."""

    group_column: str = ""
    allow_missing_classes: bool = True

    @classmethod
    def of(cls, study: StudyData) -> "TableOptions":
        """Options from the study.

        Raises:
            WrongOption: an option is unknown or of another type.
        """
        return read_options(cls, study)


@dataclass(frozen=True)
class Features:
    """The features that a table's columns become, in order.

    Attributes:
        names: (d,) what each feature is called: the column, or column=category.
        numeric: (d,) whether it is a number that may be missing, or a 0/1 indicator.
    """

    names: tuple[str, ...]
    numeric: tuple[bool, ...]

    @classmethod
    def of(cls, table: TableFormat, group_column: str = "") -> "Features":
        """Features of every column but the label and the patient."""
        names: list[str] = []
        numeric: list[bool] = []
        for column in table.columns:
            if column.name in {table.label.name, group_column}:
                continue
            if column.type == "numeric":
                names.append(column.name)
                numeric.append(True)
            else:
                names.extend(f"{column.name}={category}" for category in column.categories)
                numeric.extend(False for _ in column.categories)
        return cls(tuple(names), tuple(numeric))


@dataclass(frozen=True)
class Table:
    """A read CSV: (n, d) features with NaN for missing numbers, (n,) class indices, (n,) parts, names (file:line)."""

    features: Features
    values: Floats
    labels: Labels
    parts: npt.NDArray[np.str_]
    names: Sequence[str]
    report: DataReport


@dataclass(frozen=True)
class _Row:
    name: str
    values: list[float]
    label: int
    digest: str
    group: str | None


def read_table(
    source: Path,
    study: StudyData,
    secret: bytes,
    *,
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> Table:
    """Read a CSV file, or every CSV of a folder.

    Raises:
        DataFolderMissing, WrongColumns, UnknownClass, EmptyClass, NotEnoughExamples, WrongOption: the table cannot be
            used as a whole. Single bad rows are skipped and reported.
    """
    local, table, options = local or LocalOptions(), table_format(study), TableOptions.of(study)
    features = Features.of(table, options.group_column)
    rows: list[_Row] = []
    first: dict[str, str] = {}
    skipped: list[Skipped] = []
    duplicates: list[tuple[str, str]] = []
    label_of = _label_reader(study, local)
    for done, (name, cells) in enumerate(_cells(source, table, with_label=True), 1):
        try:
            row = _parse(name, cells, table, options, label_of)
        except UnreadableExample as error:
            skipped.append(Skipped(name, error.reason))
            continue
        same = first.setdefault(row.digest, name)
        if same != name:
            duplicates.append((name, same))
        # Without patients' keys, equal rows of a narrow table are as likely two patients as one: both count.
        if same == name or row.group is None:
            rows.append(row)
        if on_progress is not None and done % PROGRESS_ROWS == 0:
            on_progress(done, done)
    ordered = sorted(rows, key=lambda row: row.digest)
    parts = [_part(row, study, secret) for row in ordered]
    _require_enough(ordered, parts, study, options)
    grouped = any(row.group is not None for row in ordered)
    report = DataReport.of(
        "tabular",
        study,
        secret,
        [(row.label, part, row.digest) for row, part in zip(ordered, parts, strict=True)],
        skipped=skipped,
        duplicates=duplicates,
        groups=len({row.group for row in ordered}) if grouped else None,
    )
    return Table(
        features,
        np.array([row.values for row in ordered], dtype=np.float64).reshape(len(ordered), len(features.names)),
        np.array([row.label for row in ordered], dtype=np.int64),
        np.array(parts),
        [row.name for row in ordered],
        report,
    )


def read_features(source: Path, study: StudyData) -> Iterator[tuple[str, list[float] | Skipped]]:
    """Rows to predict: (name, features) or (name, why not); the label column may be absent or empty.

    Raises:
        DataFolderMissing, WrongColumns: the file cannot be used as a whole.
    """
    table, options = table_format(study), TableOptions.of(study)
    for name, cells in _cells(source, table, with_label=False):
        try:
            yield name, _values(cells, table, options)
        except UnreadableExample as error:
            yield name, Skipped(name, error.reason)


def table_format(study: StudyData) -> TableFormat:
    """The study's table format.

    Raises:
        WrongOption: the study has none, or a categorical column without categories.
    """
    if study.table is None:
        raise WrongOption("A study of the task 'tabular' must describe its table: columns, types and label.")
    label = study.table.label.name
    for column in study.table.columns:
        if column.type == "categorical" and not column.categories and column.name != label:
            raise WrongOption(f"The categorical column {column.name!r} needs its categories in the study.")
    if study.table.label.positive_above is not None and len(study.classes) != 2:
        raise WrongOption("A label with a bound ('positive_above') makes two classes; the study must name two.")
    return study.table


def csv_files(source: Path) -> list[Path]:
    """The CSV files of a folder, or the file itself.

    Raises:
        DataFolderMissing: there is none, or one is too large.
    """
    if source.is_dir():
        root = source.resolve()
        found = [p for p in sorted(source.iterdir()) if p.suffix.lower() in SUFFIXES and p.is_file()]
        files = [p for p in found if p.resolve().is_relative_to(root) and not p.name.startswith(".")]
    else:
        files = [source] if source.is_file() else []
    if not files:
        raise DataFolderMissing(
            f"There is no CSV file at {source}; give a file, or a folder with one.", folder=str(source)
        )
    for file in files:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataFolderMissing(f"{file} is larger than {MAX_FILE_BYTES} bytes; split it.", folder=str(file))
    return files


def _cells(source: Path, table: TableFormat, *, with_label: bool) -> Iterator[tuple[str, dict[str, str] | None]]:
    """(file:line, column → cell) of every row that is not blank; None where the number of cells is wrong."""
    count = 0
    for path in csv_files(source):
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            reader = csv.reader(stream, delimiter=table.delimiter)
            header: list[str] | None = None
            try:
                for row in reader:
                    if not any(cell.strip() for cell in row):
                        continue
                    if header is None:
                        header = _header(path, row, table, with_label=with_label)
                        if table.has_header:
                            continue
                    name = f"{path.name}:{reader.line_num}"
                    fits = len(row) == len(header)
                    yield name, dict(zip(header, (c.strip() for c in row), strict=True)) if fits else None
                    count += 1
                    if count > MAX_ROWS:
                        raise WrongOption(f"{source} has more than {MAX_ROWS} rows; split it over several studies.")
            except csv.Error as error:
                raise WrongColumns(f"{path} is no CSV file ({error}); check its delimiter and quotes.") from error


def _header(path: Path, first: Sequence[str], table: TableFormat, *, with_label: bool) -> list[str]:
    """Names of the file's columns, from its first line or, without a header, from the study.

    Raises:
        WrongColumns: they are not the study's.
    """
    wanted = [column.name for column in table.columns]
    required = [name for name in wanted if with_label or name != table.label.name]
    if not table.has_header:
        for names in (wanted, required):
            if len(first) == len(names):
                return names
        raise WrongColumns(
            f"{path} has {len(first)} columns, the study has {len(wanted)}: {_list(wanted)}. The file must have no "
            f"header and the delimiter {table.delimiter!r}.",
            found=len(first),
            wanted=len(wanted),
        )
    found = [cell.strip() for cell in first]
    missing = [name for name in required if name not in found]
    repeated = [name for name, n in Counter(found).items() if n > 1 and name in wanted]
    if missing or repeated:
        problem = f"lacks {_list(missing)}" if missing else f"has {_list(repeated)} twice"
        raise WrongColumns(
            f"{path} {problem}; it has {_list(found)}. Its first line must name the study's columns, with the delimiter "
            f"{table.delimiter!r}.",
            missing=missing,
            repeated=repeated,
        )
    return found


def _list(names: Sequence[str]) -> str:
    more = len(names) - NAMED_COLUMNS
    return ", ".join(names[:NAMED_COLUMNS]) + (f" and {more} more" if more > 0 else "")


def _parse(
    name: str,
    cells: dict[str, str] | None,
    table: TableFormat,
    options: TableOptions,
    label_of: Callable[[str], int],
) -> _Row:
    values = _values(cells, table, options)
    assert cells is not None  # noqa: S101 - _values refused it
    label = label_of(cells[table.label.name])
    group = cells.get(options.group_column) if options.group_column else None
    if group is not None and group in table.missing:
        raise UnreadableExample("no-group", "The row names no patient.")
    content = f"{group}|{label}|" + "|".join(map(repr, values))
    return _Row(name, values, label, hashlib.sha256(content.encode()).hexdigest(), group)


def _values(cells: dict[str, str] | None, table: TableFormat, options: TableOptions) -> list[float]:
    if cells is None:
        raise UnreadableExample("wrong-number-of-cells", "The row has more or fewer cells than columns.")
    values: list[float] = []
    for column in table.columns:
        if column.name in {table.label.name, options.group_column}:
            continue
        cell = cells[column.name]
        missing = cell in table.missing
        if column.type == "numeric":
            values.append(math.nan if missing else _number(cell))
            continue
        index = None if missing else _category(cell, column.categories)
        values.extend(float(i == index) for i in range(len(column.categories)))
    return values


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError as error:
        raise UnreadableExample("not-a-number", "A numeric cell holds something else.") from error
    if not abs(value) <= MAX_NUMBER:
        raise UnreadableExample("not-a-number", "A numeric cell is infinite or absurdly large.")
    return value


def _same(cell: str) -> str:
    """`3`, `3.0` and `3.` are one category."""
    try:
        return repr(float(cell))
    except ValueError:
        return cell


def _category(cell: str, categories: Sequence[str]) -> int:
    if cell in categories:
        return categories.index(cell)
    same = [_same(category) for category in categories]
    if _same(cell) in same:
        return same.index(_same(cell))
    raise UnreadableExample("unknown-category", "A cell holds a category that the study does not list.")


def _label_reader(study: StudyData, local: LocalOptions) -> Callable[[str], int]:
    table = table_format(study)
    bound = table.label.positive_above
    if bound is not None:

        def graded(cell: str) -> int:
            if cell in table.missing:
                raise UnreadableExample("no-label", "The label is missing.")
            return int(_number(cell) > bound)

        return graded

    def named(cell: str) -> int:
        if cell in table.missing:
            raise UnreadableExample("no-label", "The label is missing.")
        name = local.class_map.get(cell, cell)
        try:
            return _category(name, study.classes)
        except UnreadableExample as error:
            raise UnknownClass(
                f"The study has no class {name!r}; its classes are {', '.join(study.classes)}. Correct the label, or map "
                f"it: class_map {cell}=<class of the study>.",
                found=cell,
                classes=list(study.classes),
            ) from error

    return named


def _part(row: _Row, study: StudyData, secret: bytes) -> Part:
    key = f"group:{row.group}" if row.group is not None else f"content:{row.digest}"
    return part_of(secret, key.encode(), study.validation_share, study.heldout_share)


def _require_enough(rows: list[_Row], parts: list[Part], study: StudyData, options: TableOptions) -> None:
    counts = Counter(row.label for row in rows)
    empty = [name for label, name in enumerate(study.classes) if not counts[label]]
    if rows and empty and not options.allow_missing_classes:
        raise EmptyClass(f"There is no row of class {', '.join(empty)}; add some.", classes=empty)
    found = Counter(parts)
    if not all(found[part] for part in study.needed_parts):
        raise NotEnoughExamples(
            f"{len(rows)} usable rows leave {found['train']} for training and {found['validation']} for validation; "
            "each needs at least one. Add rows, or look at check-data's reasons for those skipped.",
            examples=len(rows),
        )
