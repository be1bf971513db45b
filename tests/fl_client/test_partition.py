"""`split`: stratified, complete, repeatable, and harmless to what exists."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_scans import chest, write_series
from pydicom import Dataset, dcmread

from fl_client.partition import apportion, split_dataset
from fl_client.tasks.errors import AlreadyThere, DataFolderMissing, NotEnoughExamples, WrongOption


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, count in (("a", 60), ("b", 30)):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "source" / name / f"{i:03d}.png").write_bytes(f"{name}{i}".encode())
    return tmp_path / "source"


def contents(folder: Path) -> list[bytes]:
    return sorted(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_equal_shares_divide_every_class_and_copy_every_file(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    parts = split_dataset(source, tmp_path / "out", 3)
    assert [part.classes for part in parts] == [{"a": 20, "b": 10}] * 3
    assert [part.site for part in parts] == ["site_1", "site_2", "site_3"]
    assert sum(part.percent for part in parts) == pytest.approx(100)
    assert contents(tmp_path / "out") == before == contents(source)


def test_shares_are_kept_and_the_seed_alone_decides(source: Path, tmp_path: Path) -> None:
    first = split_dataset(source, tmp_path / "1", ["x", "y"], shares=[300, 600], seed=1)
    assert [part.classes for part in first] == [{"a": 20, "b": 10}, {"a": 40, "b": 20}]
    split_dataset(source, tmp_path / "2", ["x", "y"], shares=[1, 2], seed=1)
    split_dataset(source, tmp_path / "3", ["x", "y"], shares=[1, 2], seed=2)
    assert contents(tmp_path / "1" / "x") == contents(tmp_path / "2" / "x") != contents(tmp_path / "3" / "x")


def test_dirichlet_gives_uneven_mixes_and_every_site_something_of_each(source: Path, tmp_path: Path) -> None:
    parts = split_dataset(source, tmp_path / "out", 3, alpha=0.1)
    assert all(min(part.classes.values()) >= 1 for part in parts)
    assert sum(part.examples for part in parts) == 90
    assert len({tuple(part.classes.values()) for part in parts}) > 1


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda s: sum(s) > 0.01), extra=st.integers(0, 500)
)
def test_apportioned_numbers_add_up(shares: list[float], extra: int) -> None:
    count = len(shares) + extra
    normed = np.array(shares) / sum(shares)
    sizes = apportion(count, normed)
    assert sizes.sum() == count
    assert sizes.min() >= 1


def test_a_table_is_divided_by_its_label(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("age,ill\n" + "".join(f"{i},{i % 2}\n" for i in range(40)))
    parts = split_dataset(table, tmp_path / "out", 2, label_column="ill")
    assert [part.classes for part in parts] == [{"0": 10, "1": 10}] * 2
    texts = [(part.folder / "data.csv").read_text().splitlines() for part in parts]
    assert all(lines[0] == "age,ill" for lines in texts)
    assert sorted(texts[0][1:] + texts[1][1:]) == sorted(table.read_text().splitlines()[1:])


def test_a_table_without_header_or_label(tmp_path: Path) -> None:
    table = tmp_path / "t.data"
    table.write_text("".join(f"{i};{i}\n" for i in range(10)))
    parts = split_dataset(table, tmp_path / "out", 2, has_header=False, delimiter=";")
    assert [part.examples for part in parts] == [5, 5]


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for target in (tmp_path / "out", source / "inside", source):
        with pytest.raises(AlreadyThere):
            split_dataset(source, target, 2)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    "options",
    [
        {"sites": 0},
        {"sites": ["a", "a"]},
        {"sites": ["../a", "b"]},
        {"sites": 2, "shares": [1]},
        {"sites": 2, "shares": [1, -1]},
        {"sites": 2, "shares": [1, float("nan")]},
        {"sites": 2, "alpha": 0},
        {"sites": 2, "alpha": 1, "shares": [1, 1]},
    ],
)
def test_senseless_wishes_are_refused_before_anything_is_written(source: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(WrongOption):
        split_dataset(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_divided_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughExamples, match="b"):
        split_dataset(source, tmp_path / "out", 31)
    with pytest.raises(DataFolderMissing):
        split_dataset(tmp_path / "nowhere", tmp_path / "out", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataFolderMissing):
        split_dataset(tmp_path / "empty", tmp_path / "out", 2)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(WrongOption, match="label"):
        split_dataset(tmp_path / "x.csv", tmp_path / "out", 1, label_column="label")


def test_scans_are_divided_by_patient(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    for number in range(6):
        label = ("clear", "nodule")[number % 2]
        write_series(source / label / f"first{number}", f"{number}", values=chest((3, 8, 8), number))
        # A second series of the same patient, in another folder, and for one of them under the other class.
        second = source / ("nodule" if number == 0 else label) / f"second{number}"
        write_series(second, f"{number}b", values=chest((3, 8, 8), number + 9), change=of_patient(f"patient-{number}"))
    (source / "clear" / "notes.txt").write_text("no scan")
    parts = split_dataset(source, tmp_path / "out", 3)
    assert [part.classes for part in parts] == [{"clear": 1, "nodule": 1}] * 3
    homes: dict[str, set[str]] = {}
    for path in (tmp_path / "out").rglob("IM*"):
        homes.setdefault(dcmread(path).PatientID, set()).add(path.relative_to(tmp_path / "out").parts[0])
    assert len(homes) == 6
    assert all(len(sites) == 1 for sites in homes.values())
    assert len(list((tmp_path / "out").rglob("IM*"))) == len(list(source.rglob("IM*")))


def of_patient(name: str) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, _number: int) -> None:
        dataset.PatientID = name

    return change
