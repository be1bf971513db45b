"""Metrics and intervals against values worked out elsewhere, and against properties that must hold for any predictions."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_client.tasks.errors import NotEnoughExamples
from fl_client.tasks.evaluation import auc_interval, calibration_error, compare, evaluate, wilson


@pytest.fixture(scope="module")
def metrics() -> Any:
    """scikit-learn's, imported by the worker that has these tests, not by each that collects them: it takes seconds."""
    from sklearn import metrics  # noqa: PLC0415

    return metrics


def rows(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, k, n), rng.dirichlet(np.ones(k), n)


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    found = wilson(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    found = wilson(0, 20)
    assert (found.low, found.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_hand_counted_confusion_matrix() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    predicted = [0, 0, 1, 1, 2, 2]
    result = evaluate(labels, np.eye(3)[predicted], ["a", "b", "c"])
    assert result.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert result.accuracy.value == pytest.approx(4 / 6)
    assert result.per_class["a"].sensitivity.value == pytest.approx(2 / 3)
    assert result.per_class["b"].specificity.value == pytest.approx(3 / 4)
    assert result.macro_f1.value == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert np.isfinite(result.loss)


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), k=st.integers(2, 5))
def test_any_predictions_give_values_inside_their_intervals(seed: int, n: int, k: int) -> None:
    labels, probabilities = rows(seed, n, k)
    result = evaluate(labels, probabilities, [f"c{i}" for i in range(k)])
    json.dumps(result.to_json(), allow_nan=False)
    estimates = [result.accuracy, result.macro_f1]
    for item in result.per_class.values():
        estimates += [e for e in (item.sensitivity, item.specificity, item.auc) if e is not None]
    assert all(0 <= e.low <= e.value + 1e-12 and e.value <= e.high + 1e-12 and e.high <= 1 for e in estimates)
    assert 0 <= result.ece <= 1
    assert 0 <= result.brier <= 2
    assert sum(map(sum, result.confusion)) == n


@given(seed=st.integers(0, 1000), n=st.integers(1, 60), k=st.integers(2, 5), decimals=st.integers(1, 9))
def test_the_metrics_are_those_of_scikit_learn(metrics: Any, seed: int, n: int, k: int, decimals: int) -> None:
    labels, probabilities = rows(seed, n, k)
    probabilities = probabilities.round(decimals) + 1e-3  # with ties, as small data have them
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted, indices = probabilities.argmax(axis=1), list(range(k))
    found = evaluate(labels, probabilities, [f"c{i}" for i in indices])
    assert found.confusion == tuple(map(tuple, metrics.confusion_matrix(labels, predicted, labels=indices)))
    assert found.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=indices))
    # Told, because scikit-learn halves the score of two classes otherwise.
    assert found.brier == pytest.approx(
        metrics.brier_score_loss(labels, probabilities, labels=indices, scale_by_half=False)
    )
    assert found.macro_f1.value == pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    for index in indices:
        area = auc_interval(labels == index, probabilities[:, index])
        if area is not None:
            assert area.value == pytest.approx(metrics.roc_auc_score(labels == index, probabilities[:, index]))


def test_delong_covers_the_true_area_about_95_times_in_100(metrics: Any) -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(120) < 50
    truth = 0.7602499389065233  # P(N(1,1) > N(0,1))
    hits = 0
    for _ in range(300):
        scores = rng.normal(positive.astype(float), 1.0)
        found = auc_interval(positive, scores)
        assert found.value == pytest.approx(metrics.roc_auc_score(positive, scores))
        hits += found.low <= truth <= found.high
    assert 0.9 < hits / 300 < 0.985


def test_an_area_that_cannot_be_told_is_none_and_a_perfect_one_stays_uncertain() -> None:
    assert auc_interval(np.array([True, True]), np.array([0.1, 0.2])) is None
    perfect = auc_interval(np.array([True, True, False, False]), np.array([0.9, 0.8, 0.2, 0.1]))
    assert perfect.value == perfect.high == 1
    assert perfect.low < 0.6


def test_calibration_error_of_certain_and_wrong_predictions() -> None:
    labels = np.array([0, 0, 1, 1])
    assert calibration_error(labels, np.eye(2)[[0, 0, 1, 1]]) == 0
    assert calibration_error(labels, np.eye(2)[[1, 1, 0, 0]]) == 1


def test_the_same_predictions_do_not_differ_and_better_ones_do() -> None:
    labels, probabilities = rows(1, 200, 3)
    same = compare(labels, probabilities, probabilities)
    assert same.difference.value == 0
    assert same.difference.low < 0 < same.difference.high
    assert same.p_value == 1
    better = compare(labels, np.eye(3)[labels], probabilities)
    assert better.difference.low > 0
    assert better.p_value < 1e-6


def test_nothing_to_judge_is_said() -> None:
    with pytest.raises(NotEnoughExamples):
        evaluate(np.array([], dtype=int), np.zeros((0, 2)), ["a", "b"])
    with pytest.raises(NotEnoughExamples):
        compare(np.array([], dtype=int), np.zeros((0, 2)), np.zeros((0, 2)))
