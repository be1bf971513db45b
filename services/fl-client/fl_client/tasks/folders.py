"""What the tasks that read folders share: the folders of classes, the files below them, the list of patient groups."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from fl_client.tasks.base import LocalOptions
from fl_client.tasks.errors import DataFolderMissing, GroupUnknown, MissingClass, UnknownClass
from medhive.spec import StudyData


def class_folders(
    data_dir: Path, study: StudyData, local: LocalOptions, *, allow_missing: bool
) -> dict[str, list[Path]]:
    """The study's classes with the folders that hold their examples.

    Raises:
        DataFolderMissing, UnknownClass, MissingClass: the folders are not those of the study's classes.
    """
    if not data_dir.is_dir():
        raise DataFolderMissing(
            f"There is no folder {data_dir}; give the folder that holds one folder per class.", folder=str(data_dir)
        )
    folders: dict[str, list[Path]] = {name: [] for name in study.classes}
    for path in sorted(p for p in data_dir.iterdir() if p.is_dir() and not p.name.startswith(".")):
        name = local.class_map.get(path.name, path.name)
        if name not in folders:
            raise UnknownClass(
                f"The study has no class {name!r} (folder {path}); its classes are {', '.join(study.classes)}. Rename "
                f"the folder, move it away, or map it with --class {path.name}=<class of the study>.",
                found=path.name,
                classes=list(study.classes),
            )
        folders[name].append(path)
    missing = [name for name, paths in folders.items() if not paths]
    if missing and not allow_missing:
        raise MissingClass(
            f"{data_dir} has no folder for {', '.join(missing)}. Add it, map a local folder to it with --class, or "
            "have the study set the option allow_missing_classes.",
            missing=missing,
        )
    return folders


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, in an order that depends on their names alone; links to folders are not followed."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(names))


def known_group(group: str | None, name: str, how: str) -> str:
    """The group, if there is one; raises GroupUnknown."""
    if not group:
        raise GroupUnknown(
            f"No patient group can be told for {name}: it is not {how}. Correct the list or the pattern, or move the "
            "file away: without its group one patient could be on both sides of the split.",
            file=name,
        )
    return group


def groups_of_csv(path: Path) -> dict[str, str]:
    """A CSV of file and patient group; raises DataFolderMissing, GroupUnknown."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFolderMissing(f"The list of groups {path} cannot be read as a CSV file: {error}.") from error
    if any(len(row) < 2 for row in rows):
        raise GroupUnknown(f"Each line of {path} needs two columns: file (from the data folder) and patient group.")
    return {row[0].strip(): row[1].strip() for row in rows}
