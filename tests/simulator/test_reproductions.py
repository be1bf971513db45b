"""The program that takes published figures again: the division that it copies, and one figure on a few made images."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("reproductions")


def test_the_division_is_the_published_one(program: Any) -> None:
    """Counted in the baseline's own code for 10 classes of 5,000, alpha 0.5 and seed 42: its first and its last client."""
    labels = np.repeat(np.arange(10), 5000)
    owners = program.balanced_dirichlet(labels, 10, 0.5, 42)
    counts = np.array([np.bincount(labels[owners == client], minlength=10) for client in range(10)])
    assert counts[0].tolist() == [60, 568, 12, 186, 145, 1, 273, 476, 8, 56]
    assert counts[9].tolist() == [7, 292, 5, 833, 15, 1, 74, 440, 104, 1942]
    assert counts.sum(axis=0).tolist() == [5000] * 10
    again = program.balanced_dirichlet(labels[::-1].copy(), 10, 0.5, 43)
    assert np.bincount(again, minlength=10).min() >= program.LEAST


def test_a_figure_is_taken_and_goes_on(program: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "set.npz", images=images, labels=np.arange(400) % 10, is_test=np.arange(400) >= 360)
    chosen = argparse.Namespace(data=tmp_path / "data", out=tmp_path, together=4)
    item = program.take("niid-fedprox", 2, 7, chosen)
    assert (item.size, item.rounds, item.best_round in (1, 2)) == ("reduced", 2, True)
    spec = json.loads((tmp_path / "niid-fedprox-2-7" / "simulation.json").read_text())["spec"]
    assert (spec["options"]["local_epochs"], spec["options"]["mu"]) == (10, 0.01)
    assert program.take("niid-fedprox", 2, 7, chosen) == item
    assert "65.63" in program.line(item)
