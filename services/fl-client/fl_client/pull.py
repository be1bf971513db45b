"""Which scans are taken from the PACS, and how they come to lie in a folder: looked for, counted, then fetched.

A file appears under its name only when it is whole, below its study and series: `<study>/<series>/<instance>.dcm`, by the
identifiers of DICOM. So what is there need not come again, however an earlier pull ended. What the PACS offers is compared
with what was asked for, since some archives pass over a filter that they do not know: what does not match is not fetched.
"""

import csv
import errno
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, Final

from fl_client.pacs import (
    MAX_UID,
    PAUSES_S,
    TRIES,
    UID,
    Pacs,
    PacsBusy,
    PacsUnreachable,
    Received,
    RetrievalFailed,
    SeriesFound,
    StudyFound,
    loosely,
)
from fl_client.site import one_at_a_time
from fl_client.tasks.dicom import instance_of
from fl_client.tasks.errors import UnreadableExample
from medhive.errors import Conflict, InvalidInput, MedHiveError, NoSpace
from medhive.leftovers import remove_leftovers, sync_folder

LOCK: Final = ".pull.lock"
SUFFIX: Final = ".dcm"
MODALITY: Final = "CT"
MAX_STUDIES: Final = 1000  # unless more is asked for: a filter that was mistyped shall not fetch an archive
MAX_LIST_BYTES: Final = 64 * 2**20
MAX_LISTED: Final = 100_000
MAX_VALUE: Final = 64  # characters of an identifier in DICOM
KEYS: Final[Mapping[str, str]] = {
    "accession": "AccessionNumber",
    "patient": "PatientID",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
}
# A value of one of these would ask for many, or for several at once (DICOM PS3.4, C.2.2.2).
WILD: Final = re.compile(r"[*?\\\x00-\x1f]")
# Series that could not be had one after the other before the PACS as a whole is taken to be ill.
MOST_IN_A_ROW: Final = 5
TOO_LARGE: Final = "too-large"
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

OnProgress = Callable[[int, int], None]


class PullIncomplete(MedHiveError):
    """Some files that the PACS has could not be had; `data` counts them by reason."""

    code = "pull-incomplete"


class PullUnderWay(Conflict):
    """Another pull is writing to this folder."""

    code = "pull-under-way"


# ---- what is wanted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """Identifiers out of a file: which kind, and each with the number of its line, which messages name instead of it."""

    key: str
    lines: Mapping[str, int]


@dataclass(frozen=True)
class Selection:
    """Which studies; all that is given must match.

    Attributes:
        modality: of the series that are taken.
        since, until: the first and the last day on which the study was made.
        description: of the study, with `*` and `?` for what may stand there; case does not matter.
        listed: only these; None is all.
        max_studies: how many at most, in the order of the PACS.
    """

    modality: str = MODALITY
    since: date | None = None
    until: date | None = None
    description: str = ""
    listed: Listed | None = None
    max_studies: int = MAX_STUDIES

    def __post_init__(self) -> None:
        if self.since and self.until and self.since > self.until:
            raise InvalidInput("The first day lies after the last one.")
        if self.max_studies < 1:
            raise InvalidInput("The number of studies must be 1 at least.")
        if not re.fullmatch(r"[A-Z]{2,16}", self.modality):
            raise InvalidInput("A modality is two letters, such as CT.")

    @property
    def question(self) -> dict[str, str]:
        """The filters of QIDO-RS, but the listed identifier."""
        asked = {"ModalitiesInStudy": self.modality}
        if self.since or self.until:
            asked["StudyDate"] = f"{_day(self.since)}-{_day(self.until)}"
        if self.description:
            asked["StudyDescription"] = loosely(self.description)
        return asked

    def matches(self, study: StudyFound) -> bool:
        """Whether a study is what was asked for, whatever the PACS made of the question."""
        first, last = _day(self.since), _day(self.until)
        if (first or last) and not (first or "0") <= study.date[:8] <= (last or "9"):
            return False
        return not self.description or _like(self.description).fullmatch(study.description) is not None


def _day(day: date | None) -> str:
    return day.strftime("%Y%m%d") if day else ""


def _like(pattern: str) -> re.Pattern[str]:
    """DICOM's wildcards as an expression."""
    words = {"*": ".*", "?": "."}
    return re.compile("".join(words.get(letter, re.escape(letter)) for letter in pattern), re.IGNORECASE | re.DOTALL)


def read_list(path: Path) -> Listed:
    """Read a CSV whose header names one of accession, patient, study, series, as tables of labels do; `-` is standard input.

    Raises:
        InvalidInput: it cannot be used; the text names lines by their numbers, since the lines name patients.
    """
    try:
        with _opened(path) as file:
            raw = file.read(MAX_LIST_BYTES + 1)
        text = raw.decode("utf-8-sig")
        lines = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"The list {path} cannot be read as a CSV file ({type(error).__name__}).") from error
    if len(raw) > MAX_LIST_BYTES:
        raise InvalidInput(f"The list {path} is larger than {MAX_LIST_BYTES} bytes.")
    keys = [key for key in KEYS if lines and key in lines[0]]
    if len(keys) != 1:
        raise InvalidInput(f"The list {path} needs a header line with one of {', '.join(KEYS)}, and lines below it.")
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 2):
        value = str(line[keys[0]] or "").strip()
        if not value or len(value) > MAX_VALUE or WILD.search(value) or not _fits(keys[0], value):
            raise InvalidInput(f"Line {number} of {path} is no identifier of the kind {keys[0]}.")
        found.setdefault(value, number)
    if len(found) > MAX_LISTED:
        raise InvalidInput(f"The list {path} names more than {MAX_LISTED}; divide it.")
    return Listed(keys[0], found)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
    else:
        with path.open("rb") as file:
            yield file


def _fits(key: str, value: str) -> bool:
    return key not in {"study", "series"} or (len(value) <= MAX_UID and UID.fullmatch(value) is not None)


# ---- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WantedSeries:
    """A series of the PACS: files that it has, and files that lie here already."""

    study: str
    uid: str
    files: int
    here: int


@dataclass(frozen=True)
class Plan:
    """What a pull would do; counts alone but for the series' identifiers.

    Attributes:
        left_out: studies that the PACS offered and that are not what was asked for.
        not_found: lines of the list for which it has nothing.
        more: whether it has more studies than may be taken.
    """

    series: tuple[WantedSeries, ...]
    left_out: int
    not_found: tuple[int, ...]
    more: bool

    @property
    def studies(self) -> int:
        """How many studies the series belong to."""
        return len({item.study for item in self.series})

    @property
    def files(self) -> int:
        """Files of all series at the PACS."""
        return sum(item.files for item in self.series)

    @property
    def here(self) -> int:
        """Those that lie here already."""
        return sum(item.here for item in self.series)

    def to_json(self) -> dict[str, Any]:
        """The counts."""
        return {
            "studies": self.studies,
            "series": len(self.series),
            "files": self.files,
            "here": self.here,
            "left_out": self.left_out,
            "not_found": list(self.not_found),
            "more": self.more,
        }


def plan(pacs: Pacs, selection: Selection, folder: Path, on_study: Callable[[int], None] = lambda _n: None) -> Plan:
    """Ask the PACS what there is; fetches nothing.

    Args:
        on_study: called with the number of studies found so far.
    """
    return _Search(pacs, selection, folder, on_study).plan()


class _Search:
    """One search: question after question, until enough is found."""

    def __init__(self, pacs: Pacs, selection: Selection, folder: Path, on_study: Callable[[int], None]) -> None:
        self._pacs, self._selection, self._folder, self._tell = pacs, selection, folder, on_study
        self._series: dict[str, list[WantedSeries]] = {}
        self._left_out = 0
        self._more = False

    def plan(self) -> Plan:
        not_found = tuple(self._unfound_lines()) if self._selection.listed else self._all()
        series = tuple(item for items in self._series.values() for item in items)
        return Plan(series, self._left_out, not_found, self._more)

    def _all(self) -> tuple[int, ...]:
        for study in self._pacs.studies(self._selection.question):
            if not self._more:
                self._take(study)
            if self._more:
                break
        return ()

    def _unfound_lines(self) -> Iterator[int]:
        listed = self._selection.listed
        if listed is None:
            return
        for value, line in listed.lines.items():
            if self._more:
                return
            if not (self._of_series(value) if listed.key == "series" else self._of_value(listed.key, value)):
                yield line

    def _of_value(self, key: str, value: str) -> bool:
        """Whether there is a study of this identifier; asked for a second time where it may not have been understood."""
        return any(self._ask(key, value, asked) for asked in dict.fromkeys((value, loosely(value))))

    def _ask(self, key: str, value: str, asked: str) -> bool:
        found = False
        for study in self._pacs.studies({**self._selection.question, KEYS[key]: asked}):
            if {"accession": study.accession, "patient": study.patient, "study": study.uid}[key] != value:
                self._left_out += 1
            elif self._take(study):
                found = True
            if self._more:
                return True
        return found

    def _of_series(self, uid: str) -> bool:
        study_uid = self._pacs.study_of_series(uid)
        if study_uid is None:
            return False
        studies = self._pacs.studies({**self._selection.question, KEYS["study"]: study_uid})
        study = next((item for item in studies if item.uid == study_uid), None)
        return study is not None and self._take(study, uid)

    def _take(self, study: StudyFound, only: str | None = None) -> bool:
        """Take up a study, or one series of it; whether there is one to take."""
        known = study.uid in self._series
        if known and only is None:
            return True
        if not self._selection.matches(study):
            self._left_out += 1
            return False
        items = [item for item in self._pacs.series(study.uid, self._asked(only)) if self._fits(item, only)]
        if not items:
            self._left_out += 1
            return False
        if not known and len(self._series) >= self._selection.max_studies:
            self._more = True
            return True
        wanted = self._series.setdefault(study.uid, [])
        wanted.extend(self._counted(item) for item in items if item.uid not in {kept.uid for kept in wanted})
        self._tell(len(self._series))
        return True

    def _asked(self, only: str | None) -> dict[str, str]:
        asked = {"Modality": self._selection.modality}
        return {**asked, KEYS["series"]: only} if only else asked

    def _fits(self, item: SeriesFound, only: str | None) -> bool:
        return item.modality == self._selection.modality and only in {None, item.uid}

    def _counted(self, item: SeriesFound) -> WantedSeries:
        here = here_already(series_folder(self._folder, item.study, item.uid))
        if item.files is not None and not here:
            return WantedSeries(item.study, item.uid, item.files, 0)
        files = self._pacs.files(item.study, item.uid, item.files)
        return WantedSeries(item.study, item.uid, len(files), len(files & here))


def series_folder(folder: Path, study: str, series: str) -> Path:
    """Where the files of a series lie."""
    return folder / study / series


def here_already(folder: Path) -> set[str]:
    """The SOPInstanceUIDs whose files lie in a series' folder."""
    try:
        return {entry.name.removesuffix(SUFFIX) for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}
    except FileNotFoundError:
        return set()


# ---- fetching --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a pull did: files and bytes that came, and files that did not, by reason."""

    fetched: int = 0
    fetched_bytes: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def is_complete(self) -> bool:
        """Whether another pull would bring nothing more: files too large to be read are never had."""
        return not set(self.failed) - {TOO_LARGE}

    def to_json(self) -> dict[str, Any]:
        """The counts."""
        return {
            "fetched": self.fetched,
            "fetched_bytes": self.fetched_bytes,
            "failed": dict(sorted(self.failed.items())),
        }


@contextmanager
def only_pull(folder: Path) -> Iterator[None]:
    """Hold a folder against other pulls, and take away what one that was killed has left.

    Raises:
        PullUnderWay: another one holds it.
        InvalidInput: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / LOCK, 0) as held:
            if not held:
                raise PullUnderWay(f"Another pull into {folder} is under way; wait for its end.")
            remove_leftovers(folder, age_s=0)
            yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(f"The disk of {folder} is full; make room. What has come is kept.") from error
        raise InvalidInput(f"Cannot write to {folder} ({error.strerror}); give another folder with --out.") from error


def fetch(pacs: Pacs, wanted: Sequence[WantedSeries], folder: Path, on_progress: OnProgress) -> Outcome:
    """Fetch what is missing of these series; the caller holds the folder by `only_pull`.

    Args:
        on_progress: called with (files here, files of all series).

    Raises:
        PacsUnreachable, PacsBusy: it is away, or fails series after series; what has come is kept.
        NoSpace: the disk is full.
    """
    outcome, done, in_a_row = Outcome(), 0, 0
    total = sum(item.files for item in wanted)
    for item in wanted:
        failed = outcome.failed.total()
        if item.here < item.files:
            _fetch_one(pacs, item, folder, outcome, _shifted(on_progress, done, total))
        done += item.files
        on_progress(done, total)
        in_a_row = in_a_row + 1 if outcome.failed.total() > failed else 0
        if in_a_row >= MOST_IN_A_ROW:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(outcome.failed.items()))
            raise PacsBusy(
                f"The PACS failed {in_a_row} series in a row ({reasons}); ask its administrator, and pull again."
            )
    return outcome


def _shifted(on_progress: OnProgress, before: int, total: int) -> Callable[[int], None]:
    return lambda here: on_progress(before + here, total)


def _fetch_one(pacs: Pacs, item: WantedSeries, folder: Path, outcome: Outcome, tell: Callable[[int], None]) -> None:
    try:
        _Series(pacs, item, folder, outcome, tell).fetch()
    except PacsBusy:  # with this one; it has been given its time, and may do better with the next
        outcome.failed["busy"] += item.files - item.here


class _Series:
    """Fetches one series: whole at once where nothing is here, else file by file."""

    def __init__(
        self, pacs: Pacs, item: WantedSeries, folder: Path, outcome: Outcome, tell: Callable[[int], None]
    ) -> None:
        self._pacs, self._outcome, self._tell = pacs, outcome, tell
        self._path = f"/studies/{item.study}/series/{item.uid}"
        self._folder = series_folder(folder, item.study, item.uid)
        self._all = pacs.files(item.study, item.uid, item.files)
        self._missing: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._whole = True

    def fetch(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._missing = self._all - here_already(self._folder)
        for attempt in range(TRIES):
            if not self._missing:
                break
            self._attempt(attempt)
        sync_folder(self._folder)
        self._outcome.failed.update(self._reasons.get(uid, "missing") for uid in self._missing)

    def _attempt(self, attempt: int) -> None:
        whole = self._whole and self._missing == self._all
        for uid in [""] if whole else sorted(self._missing - self._hopeless()):
            path = self._path if whole else f"{self._path}/instances/{uid}"
            try:
                for received in self._pacs.retrieve(path, self._folder, len(self._all) if whole else 1):
                    self._place(received)
            except RetrievalFailed as error:
                self._whole = False
                self._because(error.reason, self._missing if whole else {uid})
                if self._missing == self._all:  # nothing of it has ever come
                    return
            except (PacsBusy, PacsUnreachable) as error:
                if attempt == TRIES - 1:
                    raise
                self._pacs.wait_after(error, PAUSES_S[attempt])
                return

    def _hopeless(self) -> set[str]:
        return {uid for uid, reason in self._reasons.items() if reason == TOO_LARGE}

    def _because(self, reason: str, uids: set[str]) -> None:
        self._reasons.update(dict.fromkeys(uids, reason))

    def _place(self, received: Received) -> None:
        """Give a file its name if it is one that was asked for."""
        path = received.path
        if path is None:
            return
        try:
            uid = instance_of(path)
        except UnreadableExample as error:
            self._because(error.reason, self._missing)
            uid = ""
        if uid not in self._missing:
            path.unlink()
            return
        size = path.stat().st_size
        _durable(path, self._folder / f"{uid}{SUFFIX}")
        self._missing.discard(uid)
        self._outcome.fetched += 1
        self._outcome.fetched_bytes += size
        self._tell(len(self._all) - len(self._missing))


def _durable(temporary: Path, path: Path) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
