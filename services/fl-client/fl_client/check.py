"""`check-data`: what a hospital looks at before anything is sent, and again when it consents."""

import json
from pathlib import Path

from fl_client.tasks.base import DataReport, LocalOptions, OnProgress, load_task
from fl_client.tasks.errors import DataFolderMissing
from fl_client.tasks.packed_images import packed_classes, packed_files, require_unpickled
from medhive.errors import InvalidInput
from medhive.spec import StudyData
from medhive.terminal import build

MAX_STUDY_BYTES = 8 * 1024 * 1024
"""The widest table's description is a tenth of it."""


def check_data(
    task: str,
    path: Path,
    study: StudyData,
    secret: bytes,
    *,
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> DataReport:
    """Read every example once, and report counts, skipped files, duplicates, parts and the keyed fingerprint.

    Nothing is written and nothing leaves the machine. `DataReport.counts_by_reason()` is what a consent may carry.

    Raises:
        UnknownTask: the task is not installed.
        MedHiveError: the data as a whole do not fit the study, by cause (`fl_client.tasks.errors`).
    """
    if not path.exists():
        raise DataFolderMissing(f"There is nothing at {path}; give the study's data folder or file.", folder=str(path))
    return load_task(task).check(path, study, secret, on_progress=on_progress, local=local or LocalOptions())


def study_of_folder(path: Path) -> StudyData:
    """A stand-in study for `check-data` before any study exists: the folder's own class folders are its classes.

    Raises:
        DataFolderMissing: there is nothing, or there are not two folders, nor packed images of two classes.
        PickledData: there are pickled files alone.
    """
    if not path.exists():
        raise DataFolderMissing(f"There is nothing at {path}; give the data's folder or file.", folder=str(path))
    classes = classes_of(path)
    if len(classes) < 2:
        inner = path / classes[0] if classes else path  # an archive that was unpacked brings a folder of its own
        require_unpickled(inner)
        meant = f" Or give {inner}, which holds packed images." if inner.is_dir() and packed_files(inner) else ""
        raise DataFolderMissing(
            f"{path} holds {len(classes)} class folders; at least two are needed, one per class.{meant}",
            folder=str(path),
        )
    return StudyData(classes=classes)


def classes_of(path: Path) -> tuple[str, ...]:
    """The classes that data tell of themselves: those of packed images, else the names of sub-folders; none without any.

    Raises:
        DataFolderMissing: a packed file is none of the known ones.
        PickledData: there are pickled files alone.
    """
    if packed_files(path):
        return packed_classes(path)
    require_unpickled(path)
    folders = path.iterdir() if path.is_dir() else ()
    return tuple(sorted(p.name for p in folders if p.is_dir() and not p.name.startswith(".")))


def read_study(path: Path) -> tuple[str, StudyData]:
    """A study's task and data out of a JSON file, before any coordinator knows of it.

    Raises:
        InvalidInput: the file cannot be read, or describes no study; the text names what is wrong.
    """
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_STUDY_BYTES))
        return str(value.get("task", "image-folder")), build(StudyData, **value.get("data", value))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(f"Cannot read a study from {path}: {error}.") from error
