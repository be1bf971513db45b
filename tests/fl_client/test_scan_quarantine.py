"""What a hospital's scans can have wrong with them: each is left out by name and reason, and nobody is named."""

import csv
import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_scans import chest, write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, SecondaryCaptureImageStorage

from fl_client.check import check_data
from fl_client.tasks import DataReport, LocalOptions
from fl_client.tasks.errors import (
    DataFolderMissing,
    EmptyClass,
    NotEnoughExamples,
    UnknownClass,
    WrongColumns,
    WrongOption,
)
from medhive.errors import MedHiveError
from medhive.spec import StudyData

STUDY = StudyData(classes=("benign", "malignant"), options={"size": 32, "spacing_mm": 3.0})
SECRET = b"a site's secret"
SMALL = (5, 24, 24)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "data"
    for number in range(12):
        name = STUDY.classes[number % 2]
        write_series(folder / name / f"p{number}", f"{number}", values=chest(SMALL, seed=number), spacing_mm=(6, 4, 4))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "data")
    return tmp_path / "data"


def check(folder: Path, study: StudyData = STUDY, **local: object) -> DataReport:
    return check_data("ct-volume", folder, study, SECRET, local=LocalOptions(**local))  # type: ignore[arg-type]


def reasons(report: DataReport) -> dict[str, str]:
    return {item.name.split("/")[1]: item.reason for item in report.skipped}


def test_clean_scans(good: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_data("ct-volume", good, STUDY, SECRET, on_progress=lambda done, total: seen.append((done, total)))
    assert report.classes == {"benign": 6, "malignant": 6}
    assert report.skipped == report.duplicates == ()
    assert report.groups == 12
    assert not report.remarks
    assert seen == sorted(seen)
    assert seen[-1] == (120, 120)
    json.dumps(report.to_json())


def positions(heights: list[float]) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, number: int) -> None:
        dataset.ImagePositionPatient = [-30, -20, heights[number]]

    return change


def slanted(dataset: Dataset, number: int) -> None:
    dataset.ImagePositionPatient = [-30, 9.0 * number, 3.0 * number]


def setting(**values: object) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, number: int) -> None:
        for name, value in values.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return change


def on_slice(wanted: int, change: Callable[[Dataset, int], None]) -> Callable[[Dataset, int], None]:
    return lambda dataset, number: change(dataset, number) if number == wanted else None


def in_pixels(number_of_bytes: int) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, number: int) -> None:
        dataset.PixelData = dataset.PixelData[:number_of_bytes]

    return change


def capture(dataset: Dataset, number: int) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.ConversionType, dataset.Modality = "WSD", "OT"


def encoded(syntax: str) -> Callable[[Dataset, int], None]:
    return lambda dataset, _: setattr(dataset.file_meta, "TransferSyntaxUID", syntax)


def garbage(syntax: str) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, number: int) -> None:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.PixelData = dataset.PixelData[:30] + bytes(reversed(dataset.PixelData[30:]))
        dataset.file_meta.TransferSyntaxUID = syntax

    return change


BAD: dict[str, tuple[str, Callable[[Dataset, int], None]]] = {
    "a gap": ("missing-slices", positions([0, 6, 12, 24, 30])),
    "two spacings": ("mixed-spacing", positions([0, 6, 12, 14, 16])),
    "twice at one place": ("duplicate-positions", positions([0, 6, 6, 12, 18])),
    "other pixels": ("mixed-spacing", on_slice(2, setting(PixelSpacing=[2.0, 4.0]))),
    "another direction": ("mixed-geometry", on_slice(1, setting(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]))),
    "too tilted": ("gantry-tilt", slanted),
    "no position": ("missing-position", on_slice(3, setting(ImagePositionPatient=None))),
    "no orientation": ("missing-position", setting(ImageOrientationPatient=None)),
    "no spacing": ("missing-position", setting(PixelSpacing=None)),
    "nonsense": ("missing-position", setting(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])),
    "no series": ("missing-position", setting(SeriesInstanceUID=None)),
    "localizer": ("localizer", setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    "screenshot": ("secondary-capture", capture),
    "no pixels": ("no-pixel-data", setting(PixelData=None)),
    "short pixels": ("truncated", on_slice(2, in_pixels(100))),
    "magnetic": ("wrong-modality", setting(Modality="MR")),
    "no rescale": ("not-hounsfield", setting(RescaleSlope=None)),
    "density": ("not-hounsfield", setting(RescaleType="MGML")),
    "phantom": ("not-hounsfield", setting(RescaleIntercept=0)),
    "many frames": ("multi-frame", setting(NumberOfFrames=7)),
    "colour": ("unsupported-encoding", setting(SamplesPerPixel=3)),
    "huge": ("too-large", setting(Rows=60000, Columns=60000)),
    "deflated": ("unsupported-encoding", encoded(DeflatedExplicitVRLittleEndian)),
    "broken RLE": ("corrupt", on_slice(1, garbage(RLELossless))),
    "broken JPEG 2000": ("corrupt", garbage(JPEG2000Lossless)),
}  # fmt: skip


def test_every_bad_series_is_left_out_by_name_and_reason(folder: Path) -> None:
    for number, (name, (_, change)) in enumerate(BAD.items()):
        values = chest(SMALL, seed=100 + number)
        write_series(folder / "benign" / name, f"bad {number}", values=values, spacing_mm=(6, 4, 4), change=change)
    write_series(folder / "malignant" / "two slices", "two", values=chest((2, 24, 24)))
    report = check(folder)
    assert reasons(report) == {name: reason for name, (reason, _) in BAD.items()} | {"two slices": "too-few-slices"}
    assert report.classes == {"benign": 6, "malignant": 6}
    counts = report.counts_by_reason()
    assert counts["not-hounsfield"] == 3
    assert "benign/" not in json.dumps(counts)


def test_files_that_are_no_dicom_or_end_too_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(path for path in (folder / "benign" / "p0").iterdir()).read_bytes()
    files = {
        "empty": (b"", "empty"),
        "report.pdf": (b"%PDF", "not-dicom"),
        "preamble": (b"\0" * 128 + b"DICM", "unsupported-encoding"),
        "cut in the header": (whole[:150], "truncated"),
        "cut in the tags": (whole[:460], "truncated"),
        "nonsense": (whole[:400] + b"\xff" * 400, "truncated"),
    }
    for name, (content, _) in files.items():
        (folder / "benign" / name).write_bytes(content)
    (folder / "benign" / "gone").symlink_to(folder / "nowhere")
    (folder / "benign" / "outside").symlink_to("/etc/hostname")
    (folder / "benign" / ".hidden").write_bytes(b"x")
    cut = next(path for path in (folder / "malignant" / "p1").iterdir())
    cut.write_bytes(cut.read_bytes()[:-500])
    found = reasons(check(folder))
    expected = {name: reason for name, (_, reason) in files.items()}
    assert {name: found[name] for name in ("empty", "report.pdf", "gone", "outside")} == {
        "empty": "empty", "report.pdf": "not-dicom", "gone": "unreadable", "outside": "link-outside",
    }  # fmt: skip
    assert found["p1"] == "truncated"
    assert found.keys() == {*expected, "gone", "outside", "p1"}
    # A file may be cut in the very tag that says what it is.
    usual = {"empty", "not-dicom", "truncated", "corrupt", "unsupported-encoding", "wrong-modality"}
    assert {found[name] for name in expected} <= usual


def test_several_series_in_one_folder_are_told_apart_and_one_a_study_is_used(folder: Path) -> None:
    def of_study(uid: str) -> Callable[[Dataset, int], None]:
        return lambda dataset, _: setattr(dataset, "StudyInstanceUID", f"1.2.3.{uid}")

    mixed = folder / "benign" / "mixed"
    write_series(mixed / "a", "thick", values=chest((5, 24, 24), 50), spacing_mm=(6, 4, 4), change=of_study("1"))
    write_series(mixed / "b", "thin", values=chest((9, 24, 24), 51), spacing_mm=(3, 4, 4), change=of_study("1"))
    write_series(mixed / "c", "other", values=chest((5, 24, 24), 52), spacing_mm=(6, 4, 4), change=of_study("2"))
    for number, path in enumerate(sorted(mixed.rglob("IM*"))):
        path.rename(mixed / f"{number}.dcm")
    report = check(folder)
    assert report.classes == {"benign": 8, "malignant": 6}
    assert [item.reason for item in report.skipped] == ["several-series"]
    assert "4 more" in report.skipped[0].name


def test_the_same_scan_again_counts_once_and_under_two_labels_not_at_all(folder: Path) -> None:
    shutil.copytree(folder / "benign" / "p0", folder / "benign" / "p0 again")
    shutil.copytree(folder / "benign" / "p2", folder / "malignant" / "p2")
    report = check(folder)
    assert report.classes == {"benign": 5, "malignant": 6}
    assert report.counts_by_reason() == {"conflicting-labels": 2}


CANARY = "ZYXWANZ"


def name_everyone(dataset: Dataset, number: int) -> None:
    """The canary in every tag that takes a text, in private ones, and in some that should hold numbers."""
    for keyword in ("PatientName", "InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName",
                    "ReferringPhysicianName", "OperatorsName", "PatientComments", "AccessionNumber", "StationName",
                    "PatientBirthDate", "StudyDate", "PatientAge", "PatientWeight", "KVP",
                    "DeviceSerialNumber"):  # fmt: skip
        dataset.add_new(keyword, "LO", f"{CANARY} {keyword}")
    dataset.add_new(0x00091010, "LO", f"{CANARY} private")
    dataset.add_new(0x7FE10010, "LO", f"{CANARY} behind the pixels")
    dataset.PatientID = CANARY + dataset.PatientID


def test_names_in_tags_come_out_nowhere(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither reports nor logs nor errors hold one, and the fingerprint does not depend on one."""
    caplog.set_level(logging.DEBUG)
    study = STUDY.model_copy(update={"validation_share": 0.4})
    before = check(folder, study)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        dataset = dcmread(path)
        name_everyone(dataset, 0)
        dataset.save_as(path, enforce_file_format=True)
    for number, (name, (_, change)) in enumerate(BAD.items()):

        def both(dataset: Dataset, index: int, change: Callable[[Dataset, int], None] = change) -> None:
            change(dataset, index)
            name_everyone(dataset, index)

        write_series(folder / "benign" / name, f"bad {number}", values=chest(SMALL, 100 + number), change=both)
    report = check(folder, study)
    assert report.fingerprint == before.fingerprint
    assert report.remarks["identifying tag PatientName"] > 12
    assert report.remarks["names in the picture itself are likely"] == 1
    study_file = tmp_path / "study.json"
    study_file.write_text(json.dumps({"task": "ct-volume", "data": study.model_dump(mode="json")}))
    shown = subprocess.run(
        [sys.executable, "-m", "fl_client", "check-data", str(folder), "--study-file", str(study_file), "--all"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "to know, identifying tag PatientName" in shown.stdout
    said = json.dumps(report.to_json()) + shown.stdout + shown.stderr + caplog.text + "".join(capfd.readouterr())
    assert CANARY not in said
    with pytest.raises(MedHiveError) as refused:
        check(folder, STUDY.model_copy(update={"classes": ("benign", "malignant", "other")}))
    assert CANARY not in str(refused.value)


def test_no_patient_is_on_two_sides_of_the_split(tmp_path: Path) -> None:
    def of_patient(name: str) -> Callable[[Dataset, int], None]:
        return lambda dataset, _: setattr(dataset, "PatientID", name)

    folder = tmp_path / "data"
    for number in range(30):
        write_series(
            folder / STUDY.classes[number % 2] / f"{number}", f"{number}", values=chest((3, 16, 16), number),
            spacing_mm=(9, 6, 6), change=of_patient(f"patient {number // 3}"),
        )  # fmt: skip
    report = check(folder)
    assert report.groups == 10
    assert all(sum(counts.values()) % 3 == 0 for counts in report.parts.values())
    assert report.parts["validation"] != {"benign": 0, "malignant": 0}


def labels(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def flat(good: Path, tmp_path: Path) -> Path:
    """The same scans in one heap."""
    (tmp_path / "heap").mkdir()
    for number, path in enumerate(sorted(path for path in good.rglob("*") if path.is_file())):
        shutil.copy(path, tmp_path / "heap" / f"{number:03}")
    return tmp_path / "heap"


def test_labels_come_from_a_table_by_patient_or_by_series(good: Path, flat: Path, tmp_path: Path) -> None:
    rows = [[f"patient-{number}", "b" if number % 2 == 0 else "malignant"] for number in range(11)]
    labels(flat / "labels.csv", ["patient", "label"], [*rows, ["patient-99", "b"]])
    report = check(flat, class_map={"b": "benign"})
    assert report.classes == {"benign": 6, "malignant": 5}
    assert [item.reason for item in report.skipped] == ["no-label"]
    assert report.remarks["labels without a scan"] == 1
    uid = {dcmread(path).PatientID: dcmread(path).SeriesInstanceUID for path in good.rglob("IM*")}
    by_series = [[uid[name], label.replace("b", "benign") if label == "b" else label] for name, label in rows]
    elsewhere = labels(tmp_path / "mine.csv", ["series", "label"], by_series)
    again = check(flat, labels_csv=elsewhere)
    assert again.fingerprint == report.fingerprint
    assert again.parts == report.parts


def test_a_wrong_table_of_labels_is_refused_without_naming_a_patient(flat: Path) -> None:
    path = flat / "labels.csv"
    labels(path, ["name", "label"], [["patient-0", "benign"]])
    with pytest.raises(WrongColumns, match="series, patient, file"):
        check(flat)
    labels(path, ["patient", "label"], [["patient-0", "benign"], ["patient-1", CANARY]])
    with pytest.raises(UnknownClass, match="Line 3") as refused:
        check(flat)
    assert CANARY not in str(refused.value)
    assert "patient-1" not in str(refused.value)
    labels(path, ["patient", "label"], [["patient-0", "benign"]])
    with pytest.raises(EmptyClass, match="no-label 11"):
        check(flat)
    with pytest.raises(DataFolderMissing):
        check(flat, labels_csv=flat / "none.csv")


def test_examples_are_boxes_around_nodules(flat: Path) -> None:
    study = STUDY.model_copy(update={"options": {"size": 32, "spacing_mm": 1.0, "examples": "nodules"}})
    with pytest.raises(DataFolderMissing, match="nodules"):
        check(flat, study)
    rows: list[list[object]] = [
        [f"patient-{n}", STUDY.classes[n % 2], 0, 10 * k, -90] for n in range(12) for k in (1, 2)
    ]
    header = ["patient", "label", "x_mm", "y_mm", "z_mm"]
    labels(flat / "labels.csv", header, [*rows, ["patient-3", "benign", 0, 0, 900]])
    report = check(flat, study)
    assert report.classes == {"benign": 12, "malignant": 12}
    assert report.counts_by_reason() == {"nodule-outside": 1}
    assert all(sum(counts.values()) % 2 == 0 for counts in report.parts.values())
    labels(flat / "labels.csv", header, [["patient-0", "benign", 0, "", 0]])
    with pytest.raises(WrongColumns, match="Line 2"):
        check(flat, study)


def test_options_are_checked(folder: Path) -> None:
    wrong = (
        {"size": 8},
        {"spacing_mm": 0.0},
        {"examples": "slices"},
        {"window_low_hu": 500},
        {"slices": 3},
        {"sizes": 3},
    )
    for options in wrong:
        with pytest.raises(WrongOption):
            check(folder, STUDY.model_copy(update={"options": options}))
    with pytest.raises(NotEnoughExamples):
        check(folder, STUDY.model_copy(update={"heldout_share": 0.69, "validation_share": 0.2, "options": {}}))


def test_a_compressed_bomb_takes_no_memory(folder: Path) -> None:
    """A slice of a few kilobytes that would unpack to gigabytes is one bad series."""

    def bomb(dataset: Dataset, number: int) -> None:
        dataset.compress(RLELossless, generate_instance_uid=False)
        run = b"\x81\x00" * 4_000_000  # each pair is 128 bytes
        frame = (2).to_bytes(4, "little") + (64).to_bytes(4, "little") + (64 + len(run)).to_bytes(4, "little")
        body = frame.ljust(64, b"\0") + run + run
        length = len(body).to_bytes(4, "little")
        dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0" + length + body

    write_series(folder / "benign" / "bomb", "bomb", values=chest((3, 24, 24)), change=bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reasons(check(folder)) == {"bomb": "corrupt"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
