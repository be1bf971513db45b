"""Tables: columns checked by name, moments pooled exactly, and federated logistic regression near the pooled one."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_client.check import check_data
from fl_client.tasks import Prediction, RoundPlan, Skipped, Workspace, finish, load_task
from fl_client.tasks.errors import (
    DataFolderMissing,
    DeadlinePassed,
    NotEnoughExamples,
    UnknownClass,
    WrongArchitecture,
    WrongColumns,
    WrongOption,
)
from fl_client.tasks.tables import csv_files
from medhive.spec import StudyData

SECRET = b"a site's secret"
TABLE: dict[str, Any] = {
    "columns": [
        {"name": "age"},
        {"name": "sex", "type": "categorical", "categories": ["m", "f"]},
        {"name": "grade"},
    ],
    "label": {"name": "grade", "positive_above": 0},
    "missing": ["", "?"],
}


@pytest.fixture(scope="module")
def moments() -> Any:
    """`Moments`, imported by the worker that has these tests, not by each that collects them: it takes seconds."""
    from fl_client.tasks.tabular_training import Moments  # noqa: PLC0415

    return Moments


def study(**changes: Any) -> StudyData:
    table = {**TABLE, **changes.pop("table", {})}
    return StudyData.model_validate({"classes": ["healthy", "ill"], "table": table, **changes})


def write(path: Path, n: int = 60, seed: int = 0, shift: float = 0.0) -> Path:
    rng = np.random.default_rng(seed)
    lines = ["age,sex,grade"]
    for _ in range(n):
        age = rng.normal(60 + shift, 10)
        sex = rng.choice(["m", "f", "?"])
        ill = int(rng.random() < 1 / (1 + np.exp(-(age - 60) / 4)))
        lines.append(f"{age if rng.random() > 0.1 else '?'},{sex},{ill * rng.integers(1, 4)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(path: Path, **changes: Any) -> Workspace:
    return load_task("tabular").open(path, study(**changes), SECRET)


def federate(sites: list[Workspace], rounds: int = 5, **options: Any) -> dict[str, np.ndarray]:
    weights = sites[0].initial_weights(42)
    for number in range(1, rounds + 1):
        plan = RoundPlan(**{"round": number, "rounds": rounds, "local_epochs": 5, **options})
        results = [finish(site.train(weights, plan)) for site in sites]
        total = sum(result.examples for result in results)
        weights = {
            name: sum(r.weights[name].astype(np.float64) * r.examples / total for r in results).astype(np.float32)
            for name in weights
        }
    return weights


def test_a_clean_table_and_a_dirty_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    clean = check_data("tabular", path, study(), SECRET)
    assert clean.examples == sum(clean.classes.values()) == 60
    already = clean.counts_by_reason().get("duplicate", 0)  # missing in every column
    with path.open("a") as stream:
        stream.write("50,m,?\n50,m\n50,m,0,9\nold,m,0\n1e300,m,0\ninf,f,0\n50,x,0\n\n51,m,0\n51.0,m,0\n")
    dirty = check_data("tabular", path, study(), SECRET)
    assert dirty.counts_by_reason() == {
        "duplicate": already + 1,
        "no-label": 1,
        "not-a-number": 3,
        "unknown-category": 1,
        "wrong-number-of-cells": 2,
    }
    assert dirty.examples == 62
    assert dirty.skipped[0] == Skipped("t.csv:62", "no-label")
    assert dirty.fingerprint != clean.fingerprint


def test_the_split_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    lines = write(tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "u.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    first, second = (check_data("tabular", tmp_path / name, study(), SECRET) for name in ("t.csv", "u.csv"))
    assert first.parts == second.parts
    assert first.fingerprint == second.fingerprint


def test_equal_rows_count_twice_unless_a_patient_says_they_are_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "age,sex,grade,who\n" + "40,m,0,anna\n40,m,0,anna\n" * 10 + "40,m,0,bert\n50,f,1,cleo\n"
    )
    alone = study(validation_share=0.5)
    sums = {}
    for secret in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"):
        try:
            sums[secret] = check_data("tabular", tmp_path / "t.csv", alone, secret)
        except NotEnoughExamples:
            continue
    report = next(iter(sums.values()))
    assert report.examples == 22
    assert report.counts_by_reason() == {"duplicate": 20}
    assert {part["healthy"] for part in report.parts.values()} == {0, 21}


def test_one_patients_rows_stay_together(tmp_path: Path) -> None:
    rows = "".join(f"{i},p{i % 20},{i % 2}\n" for i in range(200))
    (tmp_path / "t.csv").write_text("age,who,grade\n" + rows)
    columns = [{"name": "age"}, {"name": "who", "type": "categorical", "categories": ["-"]}, {"name": "grade"}]
    grouped = study(table={"columns": columns}, options={"group_column": "who"})
    report = check_data("tabular", tmp_path / "t.csv", grouped, SECRET)
    assert report.groups == 20
    assert all(sum(part.values()) % 10 == 0 for part in report.parts.values())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("age,sex\n1,m\n", "grade"),
        ("Age,sex,grade\n1,m,0\n", "age"),
        ("age;sex;grade\n1;m;0\n", "age, sex, grade"),
        ("age,age,sex,grade\n1,1,m,0\n", "twice"),
        ("1,m,0\n2,f,1\n", "age, sex, grade"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(WrongColumns, match=found):
        check_data("tabular", tmp_path / "t.csv", study(), SECRET)


def test_a_table_without_header_must_have_as_many_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    bare = study(table={"has_header": False})
    assert check_data("tabular", path, bare, SECRET).examples == 60
    path.write_text("1,2,3,4\n")
    with pytest.raises(WrongColumns, match="4 columns, the study has 3: age, sex, grade"):
        check_data("tabular", path, bare, SECRET)


def test_more_columns_than_the_study_names_are_left_alone(tmp_path: Path) -> None:
    lines = write(tmp_path / "t.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join(f"{'name' if i == 0 else 'Anna'},{line}" for i, line in enumerate(lines)))
    assert check_data("tabular", tmp_path / "t.csv", study(), SECRET).examples == 60


def test_folders_and_files_that_cannot_be_used(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(DataFolderMissing):
            check_data("tabular", path, study(), SECRET)
    (tmp_path / "t.csv").write_text("age,sex,grade\n")
    with pytest.raises(NotEnoughExamples):
        check_data("tabular", tmp_path, study(), SECRET)
    (tmp_path / "t.csv").write_bytes(b"age,sex,grade\n" + bytes(range(256)) * 20)
    with pytest.raises((NotEnoughExamples, WrongColumns)):
        check_data("tabular", tmp_path, study(), SECRET)
    assert csv_files(tmp_path) == [tmp_path / "t.csv"]


def test_class_names_instead_of_grades(tmp_path: Path) -> None:
    rows = "".join(f"{i},m,{'krank' if i % 3 else 'healthy'}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("age,sex,grade\n" + rows)
    named = study(table={"label": {"name": "grade"}})
    with pytest.raises(UnknownClass, match=r"krank.*healthy, ill"):
        load_task("tabular").check(tmp_path / "t.csv", named, SECRET)


def test_studies_that_cannot_be_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    wrong = [
        StudyData(classes=("a", "b")),
        study(options={"colour": "red"}),
        study(options={"group_column": 3}),
        study(table={"columns": [{"name": "sex", "type": "categorical"}, {"name": "grade"}]}),
        study(classes=["a", "b", "c"]),
    ]
    for one in wrong:
        with pytest.raises(WrongOption):
            check_data("tabular", path, one, SECRET)


@given(
    values=st.lists(
        st.lists(st.one_of(st.just(float("nan")), st.floats(-1e3, 1e3)), min_size=2, max_size=2), min_size=1
    )
)
def test_scaled_features_are_finite_whatever_the_values(moments: Any, values: list[list[float]]) -> None:
    table = np.array(values)
    scaled = moments.of(table).scaled(table, np.array([True, True]))
    assert scaled.shape == (len(values), 4)
    assert np.isfinite(scaled).all()


def test_the_first_round_pools_the_moments_exactly(tmp_path: Path) -> None:
    sites = [opened(write(tmp_path / f"{i}.csv", n=40 + 30 * i, seed=i, shift=15 * i)) for i in range(3)]
    pooled_sums = {
        name: sum(site.statistics()[name] for site in sites)
        for name in ("examples", "present", "sum", "sum_of_squares")
    }
    weights = federate(sites, rounds=1)
    assert not weights["coefficients"].any()
    n = pooled_sums["examples"][0]
    assert weights["moments.first"] == pytest.approx(pooled_sums["sum"] / n, rel=1e-6)
    assert weights["moments.second"] == pytest.approx(pooled_sums["sum_of_squares"] / n, rel=1e-6)
    # Told beforehand, the sites train at once with the same numbers.
    for site in sites:
        site.use_statistics(pooled_sums)
    at_once = federate(sites, rounds=1)
    assert at_once["coefficients"].any()
    assert at_once["moments.first"] == pytest.approx(weights["moments.first"], rel=1e-6)


def test_one_site_trained_to_the_end_is_scikit_learns_own_fit(moments: Any, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    site = opened(write(tmp_path / "t.csv", n=300))
    for options in ({}, {"C": 0.05}, {"penalty": "none"}):
        weights = federate([site], rounds=3, local_epochs=200, **options)
        table = site._table
        rows = table.parts == "train"
        features = moments.from_weights(weights).scaled(table.values[rows], np.array(table.features.numeric))
        strength = np.inf if options else 1.0
        strength = options.get("C", strength)
        reference = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(features, table.labels[rows])
        assert weights["coefficients"] == pytest.approx(reference.coef_, abs=2e-2)


def test_both_solvers_find_the_same_minimum(tmp_path: Path) -> None:
    site = opened(write(tmp_path / "t.csv", n=300))
    plain = federate([site], rounds=4, local_epochs=200)
    proximal = federate([site], rounds=40, local_epochs=200, mu=0.01)
    assert proximal["coefficients"] == pytest.approx(plain["coefficients"], abs=2e-2)


def test_federated_is_near_pooled_and_the_same_every_time(tmp_path: Path) -> None:
    sites = [opened(write(tmp_path / f"{i}.csv", n=150, seed=i, shift=10 * i)) for i in range(3)]
    weights = federate(sites)
    again = federate(sites)
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    judged = [site.evaluate(weights, "validation") for site in sites]
    accuracy = sum(e.accuracy.value * e.examples for e in judged) / sum(e.examples for e in judged)
    assert accuracy > 0.75
    assert sites[0].compare(weights, sites[0].initial_weights(1), "train").difference.value > 0


def test_a_site_with_one_class_and_a_study_with_three(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("age,sex,grade\n" + "".join(f"{i},m,1\n" for i in range(60)))
    weights = federate([opened(tmp_path / "one.csv"), opened(write(tmp_path / "t.csv"))])
    assert all(np.isfinite(array).all() for array in weights.values())
    rows = "".join(f"{10 * (i % 3) + i / 100},f,{'abc'[i % 3]}\n" for i in range(120))
    (tmp_path / "three.csv").write_text("age,sex,grade\n" + rows)
    three = opened(tmp_path / "three.csv", classes=["a", "b", "c"], table={"label": {"name": "grade"}})
    weights = federate([three], local_epochs=50)
    assert weights["coefficients"].shape[0] == 3
    assert three.evaluate(weights, "validation").accuracy.value > 0.9


def test_rows_are_predicted_with_or_without_their_label(tmp_path: Path) -> None:
    site = opened(write(tmp_path / "t.csv"))
    weights = federate([site])
    (tmp_path / "new.csv").write_text("sex,age\nm,90\nf,?\nm,old\n")
    found = site.predict(weights, [tmp_path / "new.csv"])
    assert found[2] == Skipped("new.csv:4", "not-a-number")
    first = found[0]
    assert isinstance(first, Prediction)
    assert first.label == "ill"
    assert sum(first.probabilities.values()) == pytest.approx(1)
    with pytest.raises(WrongColumns):
        (tmp_path / "bad.csv").write_text("age\n1\n")
        site.predict(weights, [tmp_path / "bad.csv"])


def test_of_several_files_those_that_are_no_table_are_named_and_the_rest_is_predicted(tmp_path: Path) -> None:
    site = opened(write(tmp_path / "t.csv"))
    weights = federate([site])
    good, bad, none = tmp_path / "new.csv", tmp_path / "bad.csv", tmp_path / "none.csv"
    good.write_text("sex,age\nm,90\nf,old\n")
    bad.write_text("age\n1\n")
    alone = load_task("tabular").predictor(site._study)
    found = dict(alone.predict_files(weights, [bad, good, none]))
    assert list(found) == [bad, good, none]
    assert found[bad] == [Skipped("bad.csv", "wrong-columns")]
    assert found[none] == [Skipped("none.csv", "data-folder-missing")]
    assert found[good] == site.predict(weights, [good])
    assert found[good][1] == Skipped("new.csv:3", "not-a-number")


def test_other_weights_and_late_rounds_are_refused(tmp_path: Path) -> None:
    site = opened(write(tmp_path / "t.csv"))
    weights = {**site.initial_weights(1), "coefficients": np.zeros((1, 99), dtype=np.float32)}
    for use in (lambda: site.evaluate(weights, "train"), lambda: site.train(weights, RoundPlan(1, 1, 1))):
        with pytest.raises(WrongArchitecture, match="coefficients"):
            use()
    with pytest.raises(DeadlinePassed):
        finish(site.train(site.initial_weights(1), RoundPlan(round=1, rounds=1, local_epochs=1, deadline=1.0)))


@pytest.mark.realdata
def test_four_real_hospitals(monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("MEDHIVE_TEST_DATA")
    if root is None:
        pytest.skip("MEDHIVE_TEST_DATA names no folder with real data")
    names = [
        "age",
        "sex",
        "cp",
        "trestbps",
        "chol",
        "fbs",
        "restecg",
        "thalach",
        "exang",
        "oldpeak",
        "slope",
        "ca",
        "thal",
        "num",
    ]
    columns = [{"name": name} for name in names]
    heart = study(table={"columns": columns, "label": {"name": "num", "positive_above": 0}, "has_header": False})
    files = csv_files(Path(root) / "heart_disease")
    sites = [load_task("tabular").open(file, heart, SECRET) for file in files]
    assert [site.report.examples for site in sites] == [303, 294, 123, 200]
    weights = federate(sites)
    judged = [site.evaluate(weights, "validation") for site in sites]
    assert sum(e.accuracy.value * e.examples for e in judged) / sum(e.examples for e in judged) > 0.7
