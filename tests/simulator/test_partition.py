"""How examples are dealt out: nobody is forgotten, nothing is dealt twice, the same seed deals the same way."""

from pathlib import Path

import numpy as np
import pytest

from simulator.partition import Division, Partition, WrongPartition, divide

LABELS = np.repeat(np.arange(10), 100)
NAMES = [f"row:{place}" for place in range(len(LABELS))]


def dealt(text: str, clients: int, seed: int = 1) -> Division:
    return divide(Partition.parse(text), LABELS, NAMES, clients, seed)


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.5", "dirichlet:0.001", "dirichlet:1000", "shards:2"])
@pytest.mark.parametrize("clients", [1, 7, 100])
def test_every_example_has_one_client_and_every_client_an_example(text: str, clients: int) -> None:
    division = dealt(text, clients)
    assert sorted(division.places) == list(range(len(LABELS)))
    assert min(len(division.of(client)) for client in range(clients)) >= 1
    assert list(division.names) == sorted(division.names)
    assert np.array_equal(division.places, dealt(text, clients).places)
    assert clients == 1 or not np.array_equal(division.places, dealt(text, clients, seed=2).places)


def test_iid_is_even_and_mixed() -> None:
    division = dealt("iid", 10)
    assert {len(division.of(client)) for client in range(10)} == {100}
    assert all(len(np.unique(LABELS[division.of(client)])) == 10 for client in range(10))


def test_two_shards_are_two_classes_at_most() -> None:
    division = dealt("shards:2", 50)
    assert {len(division.of(client)) for client in range(50)} == {20}
    assert max(len(np.unique(LABELS[division.of(client)])) for client in range(50)) == 2


def test_a_smaller_alpha_makes_clients_less_alike() -> None:
    def largest_share(text: str) -> float:
        division = dealt(text, 10)
        counts = [np.bincount(LABELS[division.of(client)], minlength=10) for client in range(10)]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share("dirichlet:1000") < 0.15
    assert largest_share("dirichlet:0.1") > 0.3


def test_a_hundred_thousand_clients_are_two_arrays() -> None:
    labels = np.arange(120_000) % 10
    division = divide(Partition.parse("dirichlet:0.3"), labels, [], 100_000, 1)
    assert division.places.nbytes + division.bounds.nbytes < 2_000_000
    assert int(np.diff(division.bounds).min()) >= 1


def test_a_file_says_who_has_what(tmp_path: Path) -> None:
    path = tmp_path / "who.csv"
    path.write_text("example,client\nrow:3,b\nrow:1,a\nrow:2,b\n")
    division = dealt(str(path), 99)
    assert list(division.names) == ["a", "b"]
    assert [division.of(client).tolist() for client in (0, 1)] == [[1], [2, 3]]


@pytest.mark.parametrize("lines", ["row:9999,a\n", "row:1,../a\n", "row:1\n", "example,client\n"])
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "who.csv"
    path.write_text(lines)
    with pytest.raises(WrongPartition):
        dealt(str(path), 2)


@pytest.mark.parametrize("text", ["", "dirichlet", "dirichlet:0", "dirichlet:x", "shards:0", "shards:1.5", "sights"])
def test_what_is_no_partition_is_refused(text: str) -> None:
    with pytest.raises(WrongPartition):
        Partition.parse(text)


@pytest.mark.parametrize(("text", "clients"), [("iid", 1001), ("iid", 0), ("iid", 100_001), ("shards:3", 500)])
def test_too_many_clients_are_refused(text: str, clients: int) -> None:
    with pytest.raises(WrongPartition):
        dealt(text, clients)
