"""A task of one's own, the whole way: installed at two hospitals alone, and taken from the request to its use there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from own_task import BETA, write_patients
from whole_world import PEOPLE, WholeWorld

from medhive.packing import read_weights

pytestmark = pytest.mark.timeout(900)

STUDY = "survival"
HOSPITALS = ("hospital-a", "hospital-b")
LAID_OUT = ("--option", "features=age stage", "--option", "time=days", "--option", "event=died")
OPTIONS = ("--rounds", "3", "--local-epochs", "2", "--strategy", "fedavg", "--min-sites", "2")


@dataclass(frozen=True)
class Trained:
    """A completed run of the study, and its version as each hospital has it."""

    run: dict[str, Any]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def trained(whole: WholeWorld) -> Trained:
    """Request, approval, the other hospital's consent, training, and the version's way to both."""
    for seed, site in enumerate(HOSPITALS):
        write_patients(whole.stack.site_folder(site) / "data" / STUDY / "patients.csv", seed)
    whole.stack.admin("studies", "create", STUDY, "--task", "survival", "--classes", "censored,event", *LAID_OUT)
    whole.stack.admin("studies", "members", STUDY, *(word for site in HOSPITALS for word in ("--add", site)))
    run_id = whole.approve(whole.request(HOSPITALS[0], STUDY, *OPTIONS)["id"])
    whole.consent(HOSPITALS[1], run_id)
    run = whole.wait_for_run(run_id)
    assert run["state"] == "completed", run["reason"]
    return Trained(run, {site: whole.wait_for_version(site, STUDY, run["version"]) for site in HOSPITALS})


def test_the_coordinator_has_the_study_s_own_figure_of_each_round(whole: WholeWorld, trained: Trained) -> None:
    rounds = [item for item in trained.run["rounds_done"] if item["number"] > 0]
    assert [[site["site"] for site in item["sites"]] for item in rounds] == [list(HOSPITALS)] * 3
    # Coefficients of zero rank nobody; fitted ones rank most pairs right.
    assert rounds[0]["metrics"]["val_concordance"] == pytest.approx(0.5)
    assert trained.run["metrics"]["val_concordance"] > 0.65
    assert "concordance" in whole.stack.admin("model", STUDY, str(trained.run["version"]))
    tracked = whole.tracked_run(trained.run["id"])
    assert "val_concordance" in {item["key"] for item in tracked["data"]["metrics"]}


def test_the_version_is_the_model_that_the_patients_follow(trained: Trained) -> None:
    for file in trained.files.values():
        assert read_weights(file)["beta"] == pytest.approx(BETA, rel=0.25)


def test_each_hospital_judges_accepts_and_uses_it(whole: WholeWorld, trained: Trained, tmp_path: Path) -> None:
    here, version = ("--study", STUDY), str(trained.run["version"])
    for site in HOSPITALS:
        assert "concordance" in whole.stack.site(site, "updates", version, "--evaluate", *here)
        whole.stack.site(site, "accept", version, *here, "--person", PEOPLE[site])
    decided = whole.stack.admin_json("model", STUDY, version)["decisions"]
    assert [item["state"] for item in decided] == ["accepted", "accepted"]
    assert all(item["metrics"]["heldout_concordance"] > 0.5 for item in decided)
    rows = tmp_path / "new-patients.csv"
    rows.write_text("age,stage,days,died\n45,1,1,0\n60,2,1,0\n79,4,1,0\nold,1,1,0\n")
    found = whole.stack.site_json(HOSPITALS[0], "predict", str(rows), *here)
    risks = [item["probabilities"]["event"] for item in found[:3]]
    assert risks == sorted(risks)
    assert risks[0] < risks[2]
    assert found[3]["skipped"] == "not-a-number"


def test_where_it_is_not_installed_it_is_refused_by_name(whole: WholeWorld, trained: Trained) -> None:
    env = dict(whole.stack.site_env(HOSPITALS[0]))
    del env["PYTHONPATH"]
    done = whole.stack.failing(["medhive-site", "check-data", "--study", STUDY], env)
    assert done.returncode == 1
    assert "No task 'survival' is installed here" in done.stderr
