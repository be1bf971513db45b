"""SCAFFOLD on files against the paper's algorithm written out by itself, and against what it promises."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medhive.packing import read_weights, write_weights
from medhive.strategies import FedAvg, NoRateSum, Scaffold, Strategy, StrategyState, Update, make_strategy

Vector = NDArray[np.float64]
STEPS, RATE = 10, 0.1
CURVATURES = (np.array([1.0, 4.0]), np.array([8.0, 0.5]), np.array([2.0, 2.0]))
MINIMA = (np.array([1.0, -1.0]), np.array([-2.0, 3.0]), np.array([0.5, 0.5]))
SITES = ("a", "a-b", "a-000001")
"""Names of which one begins as another goes on, as files are named."""


def descended(place: int, start: Vector, correction: Vector | float) -> Vector:
    """A site's steps down its own parabola."""
    at = start.copy()
    for _ in range(STEPS):
        at -= RATE * (CURVATURES[place] * (at - MINIMA[place]) + correction)
    return at


def by_the_paper(cohorts: Sequence[Sequence[int]], server_rate: float) -> Vector:
    """Algorithm 1 of https://arxiv.org/abs/1910.06378 with its option II, each site keeping its own variate."""
    x, c, own = np.zeros(2), np.zeros(2), [np.zeros(2) for _ in SITES]
    for cohort in cohorts:
        moves, changes = [], []
        for place in cohort:
            y = descended(place, x, c - own[place])
            after = own[place] - c + (x - y) / (STEPS * RATE)
            moves.append(y - x)
            changes.append(after - own[place])
            own[place] = after
        x = x + server_rate * np.mean(moves, axis=0)
        c = c + len(cohort) / len(SITES) * np.mean(changes, axis=0)
    return x


def on_files(folder: Path, strategy: Strategy, cohorts: Sequence[Sequence[int]], *, crash: bool = False) -> Vector:
    """The same by the strategy, with sites that remember nothing; read back from its checkpoint where it crashes."""
    state, base = strategy.initial_state(folder), folder / "global"
    write_weights(base, {"w": np.zeros(2, np.float32)})
    for cohort in cohorts:
        x = read_weights(base)["w"].astype(np.float64)
        updates = []
        for place in cohort:
            digest = strategy.correction(state, SITES[place], folder / "correction")
            correction = read_weights(folder / "correction")["w"].astype(np.float64) if digest else 0.0
            path = folder / f"update-{place}"
            write_weights(path, {"w": descended(place, x, correction).astype(np.float32)})
            updates.append(Update(SITES[place], path, 100, STEPS * RATE))
        state, _ = strategy.aggregate(base, updates, state, base, population=len(SITES))
        if crash:
            state = StrategyState.from_dict(folder, state.to_dict())
        state.remove_superseded()
    return read_weights(base)["w"].astype(np.float64)


ALL = [[0, 1, 2]] * 8
SAMPLED = [[0], [1, 2], [0, 2], [1], [2, 0], [0, 1, 2], [1]]


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("server_rate", [1.0, 0.5])
@pytest.mark.parametrize("cohorts", [ALL, SAMPLED], ids=["all", "sampled"])
def test_it_is_the_papers_algorithm(tmp_path: Path, cohorts: list[list[int]], server_rate: float, crash: bool) -> None:
    strategy = make_strategy("scaffold", {"server_learning_rate": server_rate})
    found = on_files(tmp_path, strategy, cohorts, crash=crash)
    np.testing.assert_allclose(found, by_the_paper(cohorts, server_rate), rtol=1e-5, atol=1e-6)


def test_it_ends_where_all_sites_losses_are_least_and_averaging_does_not(tmp_path: Path) -> None:
    best = sum(h * m for h, m in zip(CURVATURES, MINIMA, strict=True)) / sum(CURVATURES)
    (tmp_path / "scaffold").mkdir()
    (tmp_path / "fedavg").mkdir()
    corrected = on_files(tmp_path / "scaffold", Scaffold(), [[0, 1, 2]] * 60)
    averaged = on_files(tmp_path / "fedavg", FedAvg(), [[0, 1, 2]] * 60)
    assert np.abs(corrected - best).max() < 1e-4
    assert np.abs(averaged - best).max() > 0.1


def test_a_site_that_does_not_say_its_rates_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", {"w": np.zeros(2, np.float32)})
    strategy = Scaffold()
    with pytest.raises(NoRateSum, match="does not say the sum of its learning rates") as refused:
        updates = [Update("a", tmp_path / "w", 1, 0.1), Update("b", tmp_path / "w", 1)]
        strategy.aggregate(tmp_path / "w", updates, strategy.initial_state(tmp_path), tmp_path / "out")
    assert refused.value.data == {"site": "b"}
    assert not (tmp_path / "out").exists()
