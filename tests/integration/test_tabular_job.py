"""Tables, the whole way with the real processes: four hospitals with a heart disease file each make one model."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_world import PATIENT, PEOPLE, SITES, TABLE_STUDY, WholeWorld, content_of, files_below

from fl_client.tasks.tables import Table, read_table
from medhive.packing import read_weights
from medhive.spec import StudyData

pytestmark = pytest.mark.timeout(900)

ASKING = "hospital-d"
REAL_STUDY = "heart-real"
REAL_FILES = ("cleveland", "hungarian", "switzerland", "va")


@dataclass(frozen=True)
class Fitted:
    """A completed run of a table study, and the version it made as the asking hospital has it."""

    study: str
    run: dict[str, Any]
    file: Path


def fit(world: WholeWorld, study: str) -> Fitted:
    """One hospital asks, the others consent, all decide in the end; every default is the study's."""
    sent = world.request(ASKING, study, "--min-sites", str(len(SITES)))
    run_id = world.approve(sent["id"])
    for site in SITES:
        if site != ASKING:
            world.consent(site, run_id)
    run = world.wait_for_run(run_id)
    assert run["state"] == "completed", run["reason"]
    return Fitted(study, run, world.wait_for_version(ASKING, study, run["version"]))


@pytest.fixture(scope="module")
def fitted(whole: WholeWorld) -> Fitted:
    """The made tables' model."""
    return fit(whole, TABLE_STUDY)


def test_a_table_study_has_its_own_defaults(fitted: Fitted) -> None:
    options = fitted.run["spec"]["options"]
    assert (options["rounds"], options["strategy"], options["penalty"]) == (5, "fedavg", "l2")


def test_it_learns_what_no_single_row_says(fitted: Fitted) -> None:
    trained = [item for item in fitted.run["rounds_done"] if item["number"] > 0]
    assert [len(item["sites"]) for item in trained] == [len(SITES)] * 5
    assert fitted.run["metrics"]["val_accuracy"] > 0.75
    assert fitted.run["metrics"]["val_accuracy"] >= trained[0]["metrics"]["val_accuracy"]


def table_of(world: WholeWorld, site: str, fitted: Fitted) -> Table:
    """A hospital's own table as its trainer reads it, with the hospital's own secret."""
    home = world.stack.site_folder(site)
    data = StudyData.model_validate(fitted.run["spec"]["data"])
    secret = (home / "state" / "keys" / "data.secret").read_bytes()
    return read_table(home / "data" / fitted.study, data, secret)


def test_scaling_uses_the_moments_of_all_hospitals_and_no_row_left_one(whole: WholeWorld, fitted: Fitted) -> None:
    from fl_client.tasks.tabular_training import Moments  # noqa: PLC0415 - seconds to collect, in every worker

    tables = [table_of(whole, site, fitted) for site in SITES]
    rows = [table.values[table.parts == "train"] for table in tables]
    pooled = Moments.of(np.concatenate(rows))
    weights = read_weights(fitted.file)
    for name in ("present", "first", "second"):
        np.testing.assert_allclose(weights[f"moments.{name}"], getattr(pooled, name), rtol=1e-4, atol=1e-5)
    answered = fitted.run["rounds_done"][-1]["sites"]
    assert {item["site"]: item["examples"] for item in answered} == {
        site: len(part) for site, part in zip(SITES, rows, strict=True)
    }
    file_name = f"{PATIENT}-ward.data".encode()
    files = [path for path in files_below(whole.stack.folder / "coordinator") if path.is_file()]
    assert not [path for path in files if file_name in content_of(path)]


def test_a_hospital_accepts_and_predicts_row_by_row(whole: WholeWorld, fitted: Fitted, tmp_path: Path) -> None:
    stack = whole.stack
    here = ["--study", TABLE_STUDY]
    shown = stack.site(ASKING, "updates", str(fitted.run["version"]), "--evaluate", *here)
    assert "sensitivity, present" in shown
    stack.site(ASKING, "accept", str(fitted.run["version"]), *here, "--person", PEOPLE[ASKING])
    rows = tmp_path / "new-patients.csv"
    likely_ill = "60,1,4,200,200,0,1,115,1,2.5,2,?,?,?"
    likely_well = "45,0,2,200,200,0,1,180,0,0.1,1,?,?,?"
    rows.write_text(f"{likely_ill}\n{likely_well}\n60,1,4,broken\n")
    found = stack.site_json(ASKING, "predict", str(rows), *here)
    assert [item.get("class") for item in found] == ["present", "absent", None]
    assert found[2]["skipped"] == "wrong-number-of-cells"
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1, abs=1e-6)


@pytest.fixture
def real_tables(whole: WholeWorld) -> Callable[[], None]:
    """Lays each hospital's real file where its node looks for the study's data."""

    def lay() -> None:
        root = os.environ.get("MEDHIVE_TEST_DATA")
        if root is None:
            pytest.skip("MEDHIVE_TEST_DATA names no folder with real data")
        for site, name in zip(SITES, REAL_FILES, strict=True):
            folder = whole.stack.site_folder(site) / "data" / REAL_STUDY
            folder.mkdir(parents=True)
            shutil.copy(Path(root) / "heart_disease" / f"processed.{name}.data", folder)

    return lay


@pytest.mark.realdata
def test_four_real_hospitals_fit_one_model(whole: WholeWorld, real_tables: Callable[[], None]) -> None:
    real_tables()
    whole.create_table_study(REAL_STUDY)
    whole.stack.admin("studies", "members", REAL_STUDY, *(word for site in SITES for word in ("--add", site)))
    fitted = fit(whole, REAL_STUDY)
    counts = {site: table_of(whole, site, fitted).report.examples for site in SITES}
    assert counts == dict(zip(SITES, (303, 294, 123, 200), strict=True))
    # The validation parts are about 180 patients; 0.7 is about three standard errors below 0.8.
    assert fitted.run["metrics"]["val_accuracy"] > 0.7
