"""`medhive-site pull` against a real PACS: what is found, what comes, what does not come twice, and that nobody is named."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_scans import chest, write_series
from orthanc import Orthanc, installed, running_orthanc
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless, generate_uid
from waiting import until

from fl_client.__main__ import program
from fl_client.check import check_data
from fl_client.tasks import LocalOptions
from medhive.leftovers import temporary_beside
from medhive.spec import StudyData
from medhive.terminal import main as run_program

pytestmark = pytest.mark.skipif(not installed(), reason="orthanc, orthanc-dicomweb and nginx are not all installed")

STUDY = StudyData(classes=("benign", "malignant"), options={"size": 32, "spacing_mm": 3.0})
PATIENTS, SLICES = 12, 5
NAME = "Zyxwanz"  # occurs nowhere by chance
EVERYTHING = ("--max-studies", "100")


def said(number: int) -> dict[str, str]:
    """What the archive knows of one patient's study."""
    return {
        "PatientID": f"{NAME} {number}",
        "PatientName": f"{NAME}^Erika",
        "AccessionNumber": f"{NAME}A{number}",
        "StudyDate": f"2024{number + 1:02d}15",
        "StudyDescription": "CT Thorax nativ" if number % 3 else "CT Abdomen",
    }


def describe(number: int, **more: str) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, _slice: int) -> None:
        for name, value in (said(number) | more).items():
            setattr(dataset, name, value)

    return change


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """SOPInstanceUID → file of every CT; the first patient's is compressed, and has an MR series beside it."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(PATIENTS):
        values = chest((SLICES, 24, 24), seed=number)
        paths = write_series(folder / str(number), f"{number}", values=values, change=describe(number))
        for path in paths if number == 0 else ():
            dataset = dcmread(path)
            dataset.compress(RLELossless)
            dataset.save_as(path)
    return {dcmread(path).SOPInstanceUID: path.read_bytes() for path in folder.glob("*/*")}


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory, scans: dict[str, bytes]) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("pacs")
    magnetic = write_series(folder / "mr", "0", values=chest((3, 24, 24)), change=other_series)
    with running_orthanc(folder / "orthanc") as orthanc:
        for content in scans.values():
            orthanc.http.post("/instances", content=content).raise_for_status()
        orthanc.store(*magnetic)
        yield orthanc


def other_series(dataset: Dataset, number: int) -> None:
    describe(0, Modality="MR", SeriesInstanceUID=generate_uid(entropy_srcs=["magnetic"]))(dataset, number)


@pytest.fixture
def hospital(pacs: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a hospital that reaches the PACS."""
    for name, value in {"STATE_DIR": str(tmp_path / "state"), **pacs.environment()}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "state"


Pull = Callable[..., dict[str, Any]]


@pytest.fixture
def pull(hospital: Path, capsys: pytest.CaptureFixture[str]) -> Pull:
    """Runs the command for the study `lung`; gives its JSON, and its exit code in `code`."""

    def run(*words: str) -> dict[str, Any]:
        code = run_program(program, ["pull", "--study", "lung", "--json", *words])
        value: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {"code": code, **value}

    return run


def pulled(hospital: Path) -> dict[str, Path]:
    """SOPInstanceUID → file of what lies in the folder of `lung`."""
    return {path.stem: path for path in (hospital / "pulled" / "lung").rglob("*.dcm")}


def retrievals(pacs: Orthanc, since: int) -> list[str]:
    """The last word of what was retrieved after so many questions: a series' or an instance's identifier."""
    return [
        line.rsplit("/", 1)[1]
        for line in pacs.asked()[since:]
        if "/series/" in line and "?" not in line.rsplit("/", 1)[1]
    ]


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_and_fetches_nothing(pull: Pull, hospital: Path, pacs: Orthanc) -> None:
    before = len(pacs.asked())
    found = pull("--dry-run", *EVERYTHING)
    assert found["code"] == 0
    assert (found["studies"], found["series"], found["files"], found["here"]) == (12, 12, 60, 0)
    assert not retrievals(pacs, before)
    assert not (hospital / "pulled" / "lung").exists()


@pytest.mark.parametrize(
    ("words", "studies"),
    [
        (["--since", "2024-03-15"], 10),
        (["--until", "2024-03-15"], 3),
        (["--since", "2024-02-01", "--until", "2024-02-28"], 1),
        (["--description", "*thorax*"], 8),
        (["--description", "CT Abdome?"], 4),
        (["--description", "*thorax*", "--since", "2024-12-01"], 1),
        (["--since", "2025-01-01"], 0),
    ],
)
def test_filters(pull: Pull, words: list[str], studies: int) -> None:
    found = pull("--dry-run", *words)
    assert (found["studies"], found["left_out"], found["more"]) == (studies, 0, False)


def test_another_modality(pull: Pull) -> None:
    found = pull("--dry-run", "--modality", "mr", *EVERYTHING)
    assert (found["studies"], found["files"]) == (1, 3)


def test_no_more_studies_than_wanted(pull: Pull) -> None:
    found = pull("--dry-run", "--max-studies", "5")
    assert (found["studies"], found["more"]) == (5, True)


@pytest.mark.parametrize("key", ["accession", "patient", "study", "series"])
def test_a_list_names_what_is_wanted(pull: Pull, tmp_path: Path, scans: dict[str, bytes], key: str) -> None:
    values = {
        "accession": [f"{NAME}A1", f"{NAME}A77", f"{NAME}A2"],
        "patient": [f"{NAME} 1", f"{NAME} 77", f"{NAME} 2"],
        "study": [generate_uid(entropy_srcs=[f"study {n}"]) for n in (1, 77, 2)],
        "series": [generate_uid(entropy_srcs=[f"series {n}"]) for n in (1, 77, 2)],
    }[key]
    file = tmp_path / "list.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["label", key], *(["benign", value] for value in values)])
    found = pull("--dry-run", "--list", str(file))
    assert (found["studies"], found["files"], found["not_found"]) == (2, 10, [3])


@pytest.mark.parametrize("value", ["*", "Zyx?", "", "a" * 65, "one\\two"])
def test_a_list_cannot_ask_for_all(pull: Pull, tmp_path: Path, value: str) -> None:
    file = tmp_path / "list.csv"
    file.write_text(f"patient,label\n{NAME}-1,benign\n{value},benign\n")
    found = pull("--list", str(file))
    assert (found["code"], found["error"]) == (1, "invalid-input")
    assert "Line 3 of" in found["detail"]
    assert NAME not in found["detail"]


def test_without_a_filter_nothing_is_asked(hospital: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(program, ["pull", "--study", "lung"]) == 2
    assert "--max-studies" in capsys.readouterr().err


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_the_files_of_the_archive_come_as_they_are(
    pull: Pull, hospital: Path, pacs: Orthanc, scans: dict[str, bytes]
) -> None:
    found = pull(*EVERYTHING)
    assert (found["code"], found["fetched"], found["failed"]) == (0, 60, {})
    assert {uid: path.read_bytes() for uid, path in pulled(hospital).items()} == scans
    before = len(pacs.asked())
    again = pull(*EVERYTHING)
    assert (again["here"], again.get("fetched")) == (60, None)
    assert not retrievals(pacs, before)
    gone = next(iter(pulled(hospital).values()))
    gone.unlink()
    assert pull(*EVERYTHING)["fetched"] == 1
    assert retrievals(pacs, before) == [gone.stem]
    assert gone.read_bytes() == scans[gone.stem]


def test_pulled_scans_are_read_as_any_others(pull: Pull, hospital: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"{NAME} {number},{STUDY.classes[number % 2]}" for number in range(PATIENTS)]
    labels.write_text("\n".join(["patient,label", *rows]))
    assert pull("--list", str(labels))["fetched"] == 60
    folder = hospital / "pulled" / "lung"
    report = check_data("ct-volume", folder, STUDY, b"a site's secret", local=LocalOptions(labels_csv=labels))
    assert report.classes == {"benign": 6, "malignant": 6}
    assert not report.skipped


def test_a_pull_that_was_killed_goes_on_where_it_was(
    pull: Pull, hospital: Path, pacs: Orthanc, scans: dict[str, bytes]
) -> None:
    slow = {**os.environ, **pacs.environment("slow")}
    command = [sys.executable, "-m", "fl_client", "pull", "--study", "lung", *EVERYTHING]
    with subprocess.Popen(command, env=slow, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(pulled(hospital)) > SLICES, "some files", 60)
        os.kill(process.pid, signal.SIGKILL)
    left = {uid: path.read_bytes() for uid, path in pulled(hospital).items()}
    assert left.items() <= scans.items()
    assert len(left) < 60
    folder = hospital / "pulled" / "lung"
    # The kill may have come between two files; half a file lies there in any case.
    temporary_beside(next(folder.rglob("*.dcm"))).write_bytes(b"half")
    found = pull(*EVERYTHING)
    assert (found["code"], found["fetched"]) == (0, 60 - len(left))
    assert {uid: path.read_bytes() for uid, path in pulled(hospital).items()} == scans
    assert not [
        path for path in folder.rglob("*") if path.is_file() and path.suffix != ".dcm" and path.name != ".pull.lock"
    ]


def test_two_pulls_into_one_folder_do_not_mix(pull: Pull, hospital: Path) -> None:
    from fl_client.pull import only_pull  # noqa: PLC0415

    with only_pull(hospital / "pulled" / "lung"):
        assert pull(*EVERYTHING)["error"] == "pull-under-way"


def test_another_folder(pull: Pull, hospital: Path, tmp_path: Path) -> None:
    found = pull("--until", "2024-01-31", "--out", str(tmp_path / "data"))
    assert found["fetched"] == SLICES
    assert len(list((tmp_path / "data").glob("*/*/*.dcm"))) == SLICES


def test_the_disk_is_not_filled(pull: Pull, hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDHIVE_SITE_PULL_KEEP_FREE_BYTES", str(2**60))
    found = pull(*EVERYTHING)
    assert (found["code"], found["error"]) == (1, "no-space")
    assert not pulled(hospital)


# ---- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["token", "certificate"])
def test_other_ways_to_say_who_asks(pull: Pull, pacs: Orthanc, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    for name in pacs.environment():
        monkeypatch.delenv(name)
    for name, value in pacs.environment(way).items():
        monkeypatch.setenv(name, value)
    assert pull("--dry-run", *EVERYTHING)["studies"] == PATIENTS


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"PACS_PASSWORD_FILE": "{tmp}/wrong"}, "pacs-refuses", "does not accept"),
        ({"PACS_USER": None, "PACS_PASSWORD_FILE": None}, "pacs-refuses", "set PACS_USER"),
        ({"PACS_USER": None, "PACS_TOKEN_FILE": "{tmp}/wrong"}, "pacs-refuses", "does not accept"),
        ({"PACS_TOKEN_FILE": "{tmp}/wrong"}, "invalid-input", "exclude each other"),
        ({"PACS_PASSWORD_FILE": None}, "invalid-input", "neither PACS_PASSWORD_FILE nor"),
        ({"PACS_CA_FILE": None}, "pacs-unreachable", "set PACS_CA_FILE"),
        ({"PACS_CA_FILE": "{tmp}/wrong"}, "invalid-input", "PACS_CA_FILE: cannot use"),
        ({"PACS_URL": None}, "invalid-input", "PACS_URL is missing"),
        ({"PACS_URL": "https://localhost:1/dicom-web"}, "pacs-unreachable", "does not answer"),
        ({"PACS_URL": "{url}/dicom"}, "not-dicomweb", "check the path"),
        ({"PACS_URL": "{url}/app/explorer.html"}, "not-dicomweb", "check the path"),
        ({"PACS_URL": "https://medhive:secret@localhost/"}, "invalid-input", "neither a password nor"),
        ({"PACS_URL": "http://pacs.example/dicom-web"}, "invalid-input", "PACS_PLAIN_HTTP"),
        ({"PACS_URL": "ftp://pacs.example"}, "invalid-input", "must be an address"),
    ],
)
def test_what_is_wrong_is_said(  # noqa: PLR0917
    pull: Pull,
    pacs: Orthanc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    error: str,
    text: str,
) -> None:
    (tmp_path / "wrong").write_text("wrong-secret\n")
    root = f"https://localhost:{pacs.ports['password']}"
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(tmp=tmp_path, url=root))
    found = pull("--dry-run", *EVERYTHING)
    assert (found["code"], found["error"]) == (1, error)
    assert text in found["detail"]
    assert "secret" not in found["detail"]


def test_neither_patients_nor_secrets_are_told(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "list.csv"
    file.write_text(f"patient\n{NAME} 1\n{NAME} 77\n")
    with caplog.at_level(logging.DEBUG):
        for words in (["--dry-run"], [], ["--json"], ["--description", f"*{NAME}*"]):
            assert run_program(program, ["pull", "--study", "lung", "--list", str(file), *words]) == 0
    said_all = "".join(capsys.readouterr()) + caplog.text
    uid = next(iter(pulled(hospital)))
    assert "fetched" in said_all
    for secret in (NAME, uid, uid.rsplit(".", 1)[0], "only for this test", "Basic "):
        assert secret not in said_all
