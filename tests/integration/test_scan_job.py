"""CT scans, the whole way with the real processes: a bad study stays out by its reason, the others make a used model.

How well a model tells scans apart is measured by bench/ct.py; here they are few and small.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from made_scans import chest, write_series
from whole_world import IMAGE_SITES, PATIENT, PEOPLE, WholeWorld, content_of, files_below

from fl_client.tasks.made_chests import CLASSES

pytestmark = pytest.mark.timeout(900)

STUDY: Final = "lung-ct"
A, B, C = IMAGE_SITES
PER_CLASS: Final = 10  # with these seeds every hospital has some in each part of its split
BAD: Final = f"{PATIENT}-cut"


@dataclass(frozen=True)
class Trained:
    """A completed run, what a hospital read at home, and the version it made."""

    run: dict[str, Any]
    checked: dict[str, Any]
    file: Path


def make_scans(folder: Path, seed: int) -> None:
    """A few thick slices a scan; in those of a nodule something bright lies in one lung."""
    for number in range(2 * PER_CLASS):
        label = CLASSES[number % 2]
        values = chest((5, 24, 24), seed=100 * seed + number)
        values[2, 10:14, 5:9] = 60 if label == "nodule" else -850
        write_series(folder / label / f"{PATIENT}-{number}", f"{seed}-{number}", values=values, spacing_mm=(30, 10, 10))


@pytest.fixture(scope="module")
def trained(whole: WholeWorld) -> Trained:
    """Three hospitals, one of them with a truncated study among its scans, and one run of one round."""
    stack = whole.stack
    for number, site in enumerate(IMAGE_SITES):
        make_scans(stack.site_folder(site) / "data" / STUDY, number + 1)
    for path in write_series(stack.site_folder(A) / "data" / STUDY / "clear" / BAD, "bad", values=chest((5, 24, 24))):
        path.write_bytes(path.read_bytes()[:-100])
    box = ["--option", "size=32", "--option", "spacing_mm=8", "--default", "local_epochs=1", "--default", "rounds=1"]
    stack.admin("studies", "create", STUDY, "--task", "ct-volume", "--classes", ",".join(CLASSES), *box)
    stack.admin("studies", "members", STUDY, *(word for site in IMAGE_SITES for word in ("--add", site)))
    checked = stack.site_json(A, "check-data", "--study", STUDY)
    sent = whole.request(A, STUDY, "--min-sites", str(len(IMAGE_SITES)))
    run_id = whole.approve(sent["id"])
    for site in (B, C):
        whole.consent(site, run_id)
    run = whole.wait_for_run(run_id)
    assert run["state"] == "completed", run["reason"]
    return Trained(run, checked, whole.wait_for_version(A, STUDY, run["version"]))


def test_a_bad_study_is_named_at_home_and_counted_in_the_consent(trained: Trained) -> None:
    assert {item["reason"] for item in trained.checked["skipped"]} == {"truncated"}
    assert all(BAD in item["name"] for item in trained.checked["skipped"])
    consents = {item["site"]: item["consent"]["body"] for item in trained.run["consents"]}
    assert consents[A]["skipped"] == {"truncated": 1}
    assert consents[B]["skipped"] == consents[C]["skipped"] == {}


def test_all_scans_but_the_bad_one_are_trained_on_in_the_tasks_own_batches(trained: Trained) -> None:
    assert trained.run["spec"]["options"]["batch_size"] == 4
    (only,) = [item for item in trained.run["rounds_done"] if item["number"] > 0]
    examples = {item["site"]: item["examples"] for item in only["sites"]}
    assert examples[A] == sum(trained.checked["parts"]["train"].values())
    assert set(examples) == set(IMAGE_SITES)
    assert trained.checked["examples"] == 2 * PER_CLASS


def test_a_hospital_judges_accepts_and_predicts_scan_by_scan(
    whole: WholeWorld, trained: Trained, tmp_path: Path
) -> None:
    stack, here = whole.stack, ["--study", STUDY]
    version = str(trained.run["version"])
    assert "sensitivity, nodule" in stack.site(A, "updates", version, "--evaluate", *here)
    stack.site(A, "accept", version, *here, "--person", PEOPLE[A])
    unseen = tmp_path / "unseen"
    write_series(unseen / "one", "unseen", values=chest((5, 24, 24), seed=999), spacing_mm=(30, 10, 10))
    shutil.copytree(stack.site_folder(A) / "data" / STUDY / "clear" / BAD, unseen / "two")
    found = stack.site_json(A, "predict", str(unseen), *here)
    (good,) = [item for item in found if "probabilities" in item]
    assert sum(good["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert {item["skipped"] for item in found if "skipped" in item} == {"truncated"}


def test_no_patient_left_the_hospitals(whole: WholeWorld, trained: Trained) -> None:
    logs = (whole.stack.folder / "logs" / f"{name}.log" for name in ("gateway", "server", "mlflow"))
    files = [path for path in files_below(whole.stack.folder / "coordinator") if path.is_file()]
    assert trained.file.exists()
    assert not [path for path in (*files, *logs) if PATIENT.encode() in content_of(path)]
