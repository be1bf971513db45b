"""`split`: one data set into the folders of several sites, for trials and demonstrations.

Every class is divided on its own (stratified), all scans of a patient go to one site, files are copied, the source is only
read, and nothing that exists is overwritten. The same seed gives the same division, whatever the order in which the file
system lists names.
"""

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fl_client.tasks.dicom import read_header
from fl_client.tasks.errors import AlreadyThere, DataFolderMissing, NotEnoughExamples, UnreadableExample, WrongOption
from fl_client.tasks.folders import walk
from fl_client.tasks.images import SUFFIXES as IMAGE_SUFFIXES
from fl_client.tasks.series import is_nifti
from fl_client.tasks.tables import SUFFIXES as TABLE_SUFFIXES

DEFAULT_SEED = 42
MAX_SITES = 10_000
MAX_ALPHA = 1e6  # above it Dirichlet's shares are equal to six digits
DATA_NAME = "data.csv"  # of a site's part of a table


@dataclass(frozen=True)
class SitePart:
    """One site's part: its folder, examples per class, and its share of all examples in per cent."""

    site: str
    folder: Path
    classes: dict[str, int]
    examples: int
    percent: float


def split_dataset(
    source: Path,
    out: Path,
    sites: int | Sequence[str],
    *,
    shares: Sequence[float] | None = None,
    alpha: float | None = None,
    seed: int = DEFAULT_SEED,
    label_column: str | int | None = None,
    has_header: bool = True,
    delimiter: str = ",",
) -> list[SitePart]:
    """Divide a folder of class folders, or one CSV, over sites; IID unless `shares` or `alpha` is given.

    Args:
        out: new folder; gets one folder per site.
        sites: number of sites, named site_1, site_2, ..., or their names.
        shares: one number per site, as counts or ratios (500, 300, 400): how much each gets, of every class.
        alpha: of a Dirichlet distribution from which every class's shares are drawn (Hsu et al. 2019,
            arXiv:1909.06335); the smaller, the more the sites differ. Every site gets at least one of each class.
        label_column: of a CSV, by name or position from 0; divides every class on its own.

    Raises:
        AlreadyThere: `out` exists and is not an empty folder, or lies within the source.
        WrongOption: sites, shares, alpha or the label column make no sense.
        DataFolderMissing: the source has no classes or rows.
        NotEnoughExamples: a class has fewer examples (scans: patients) than there are sites.
    """
    names = _site_names(sites)
    wanted = _shares(names, shares, alpha)
    _require_new(source, out)
    rng = np.random.default_rng(seed)
    if source.is_dir():
        classes = _class_units(source)
        assigned = _assign({name: len(files) for name, files in classes.items()}, len(names), wanted, alpha, rng)
        out.mkdir(parents=True, exist_ok=True)
        for name, files in classes.items():
            _copy_class(files, source, out, names, assigned[name])
    else:
        header, rows = _table_rows(source, has_header=has_header, delimiter=delimiter)
        labels = _row_labels(header, rows, label_column)
        lines = {name: [i for i, label in enumerate(labels) if label == name] for name in sorted(set(labels))}
        assigned = _assign({name: len(found) for name, found in lines.items()}, len(names), wanted, alpha, rng)
        out.mkdir(parents=True, exist_ok=True)
        _write_tables(header, rows, out, names, _site_of_line(lines, assigned), delimiter=delimiter)
    return _summary(out, names, assigned)


def _site_names(sites: int | Sequence[str]) -> list[str]:
    names = [f"site_{i + 1}" for i in range(sites)] if isinstance(sites, int) else list(sites)
    if not 1 <= len(names) <= MAX_SITES:
        raise WrongOption(f"There must be 1 to {MAX_SITES} sites, not {len(names)}.", option="sites")
    unfit = [name for name in names if not name or Path(name).name != name or name.startswith(".")]
    if unfit or len(set(names)) != len(names):
        raise WrongOption("Site names must be different and fit as folder names.", option="sites")
    return names


def _shares(names: list[str], shares: Sequence[float] | None, alpha: float | None) -> npt.NDArray[np.float64]:
    if shares is not None and alpha is not None:
        raise WrongOption("Give shares or a Dirichlet alpha, not both.", option="shares")
    if alpha is not None and not 0 < alpha <= MAX_ALPHA:
        raise WrongOption(f"Dirichlet's alpha must be above 0 and at most {MAX_ALPHA:g}.", option="alpha")
    wanted = np.asarray(shares if shares is not None else [1.0] * len(names), dtype=np.float64)
    if len(wanted) != len(names):
        raise WrongOption(f"There are {len(wanted)} shares for {len(names)} sites; give one per site.", option="shares")
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise WrongOption("Every share must be a number above 0.", option="shares")
    normed: npt.NDArray[np.float64] = wanted / wanted.sum()
    return normed


def _require_new(source: Path, out: Path) -> None:
    if not source.exists():
        raise DataFolderMissing(f"There is nothing at {source}; give a folder of classes or a CSV.", folder=str(source))
    if out.resolve().is_relative_to(source.resolve()):
        raise AlreadyThere(f"{out} lies within the source; choose a folder outside it.", folder=str(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AlreadyThere(f"{out} already exists and is not empty; choose a new folder.", folder=str(out))


def _class_units(source: Path) -> dict[str, list[list[Path]]]:
    """Per class what is divided: images one by one, CT scans by patient."""
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataFolderMissing(f"{source} has no class folders; give the folder that holds them.", folder=str(source))
    root = source.resolve()
    files = {
        folder.name: sorted(p for p in walk(folder) if not p.name.startswith(".") and p.resolve().is_relative_to(root))
        for folder in folders
    }
    images = {name: [[p] for p in paths if p.suffix.lower() in IMAGE_SUFFIXES] for name, paths in files.items()}
    return images if any(images.values()) else _patients(files)


def _patients(files: dict[str, list[Path]]) -> dict[str, list[list[Path]]]:
    """The files of each patient, under the first class that has one; what is no scan is left out.

    Where no patient is known, all of one study stay together, or of one series.
    """
    found: dict[str, list[Path]] = {}
    units: dict[str, list[list[Path]]] = {name: [] for name in files}
    for name, paths in files.items():
        for path in paths:
            key = _patient(path)
            if key is None:
                continue
            if key not in found:
                found[key] = []
                units[name].append(found[key])
            found[key].append(path)
    return units


def _patient(path: Path) -> str | None:
    if is_nifti(path):
        return str(path)
    try:
        header = read_header(path)
    except UnreadableExample:
        return None
    return header.patient or header.study or header.series or None


def _assign(
    counts: dict[str, int],
    sites: int,
    wanted: npt.NDArray[np.float64],
    alpha: float | None,
    rng: np.random.Generator,
) -> dict[str, npt.NDArray[np.int64]]:
    """Per class, the site of each example."""
    few = [name for name, count in counts.items() if count < sites]
    if few:
        raise NotEnoughExamples(
            f"{', '.join(few)}: fewer than {sites} examples, so not every site gets one; use fewer sites.", classes=few
        )
    assigned = {}
    for name, count in counts.items():
        share = wanted if alpha is None else rng.dirichlet([alpha] * sites)
        sizes = apportion(count, np.nan_to_num(share, nan=1 / sites))
        assigned[name] = rng.permutation(np.repeat(np.arange(sites), sizes))
    return assigned


def apportion(count: int, shares: npt.NDArray[np.float64], least: int = 1) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `count`, at least `least` each, near `shares` by largest remainders.

    `count` must do for `least` each.
    """
    free = count - least * len(shares)
    exact = np.maximum(shares * count - least, 0)
    exact = exact * (free / exact.sum()) if exact.sum() > 0 else np.full(len(shares), free / len(shares))
    sizes: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - sizes), kind="stable")
    sizes[order[: free - int(sizes.sum())]] += 1
    sizes += least
    return sizes


def _copy_class(
    units: list[list[Path]], source: Path, out: Path, names: list[str], assigned: npt.NDArray[np.int64]
) -> None:
    for files, site in zip(units, assigned, strict=True):
        for file in files:
            target = out / names[site] / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _table_rows(source: Path, *, has_header: bool, delimiter: str) -> tuple[list[str] | None, list[list[str]]]:
    if source.suffix.lower() not in TABLE_SUFFIXES:
        raise DataFolderMissing(
            f"{source} is neither a folder nor a table ({', '.join(sorted(TABLE_SUFFIXES))}).", folder=str(source)
        )
    try:
        with source.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream, delimiter=delimiter) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFolderMissing(f"{source} cannot be read as a CSV file: {error}.", folder=str(source)) from error
    header = rows.pop(0) if has_header and rows else None
    if not rows:
        raise DataFolderMissing(f"{source} has no rows.", folder=str(source))
    return header, rows


def _row_labels(header: list[str] | None, rows: list[list[str]], label: str | int | None) -> list[str]:
    if label is None:
        return ["rows"] * len(rows)
    if isinstance(label, str):
        if header is None or label not in header:
            raise WrongOption(
                f"The table has no column {label!r}; its columns are {header or 'unnamed'}.", option="label"
            )
        label = header.index(label)
    if not -len(rows[0]) <= label < len(rows[0]) or any(len(row) != len(rows[0]) for row in rows):
        raise WrongOption(f"Not every row has a column {label}; check the delimiter.", option="label")
    return [row[label].strip() for row in rows]


def _site_of_line(lines: dict[str, list[int]], assigned: dict[str, npt.NDArray[np.int64]]) -> dict[int, int]:
    return {line: int(site) for name in lines for line, site in zip(lines[name], assigned[name], strict=True)}


def _write_tables(
    header: list[str] | None,
    rows: list[list[str]],
    out: Path,
    names: list[str],
    site_of: dict[int, int],
    *,
    delimiter: str,
) -> None:
    for index, name in enumerate(names):
        (out / name).mkdir()
        with (out / name / DATA_NAME).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter=delimiter)
            if header is not None:
                writer.writerow(header)
            writer.writerows(row for line, row in enumerate(rows) if site_of[line] == index)


def _summary(out: Path, names: list[str], assigned: dict[str, npt.NDArray[np.int64]]) -> list[SitePart]:
    counts = {name: np.bincount(sites, minlength=len(names)) for name, sites in assigned.items()}
    total = sum(int(count.sum()) for count in counts.values())
    parts = []
    for index, site in enumerate(names):
        classes = {name: int(count[index]) for name, count in counts.items()}
        examples = sum(classes.values())
        parts.append(SitePart(site, out / site, classes, examples, 100 * examples / total))
    return parts
