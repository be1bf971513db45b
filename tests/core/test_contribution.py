"""What is refused before it counts, and what honest sites may do without being refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medhive.contribution import (
    NORM_OUTLIER_FACTOR,
    ContributionLimits,
    NormTooLarge,
    NotFinite,
    check_contribution,
    norm_outliers,
)
from medhive.errors import InvalidInput
from medhive.packing import WINDOW_ELEMENTS, CorruptWeights, Layout, WrongLayout, open_flat, write_flat, write_weights

LAYOUT = Layout.of({"a": (WINDOW_ELEMENTS - 3,), "b": (5, 10)})
"""Crosses the border between two windows."""
positive = st.floats(1e-6, 1e6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_flat(tmp_path / "base", LAYOUT, np.ones(LAYOUT.size, np.float32))
    return tmp_path / "base"


def update_with(folder: Path, changes: dict[int, float]) -> Path:
    flat = np.ones(LAYOUT.size, np.float32)
    for place, value in changes.items():
        flat[place] = value
    write_flat(folder / "update", LAYOUT, flat)
    return folder / "update"


def test_the_norm_is_that_of_the_change(base: Path, tmp_path: Path) -> None:
    update = update_with(tmp_path, {0: 4.0, LAYOUT.size - 1: -3.0})
    assert check_contribution(update, LAYOUT, base) == 5.0
    assert check_contribution(update, LAYOUT, open_flat(base)) == 5.0
    assert check_contribution(base, LAYOUT, base) == 0.0


def test_huge_finite_values_do_not_overflow_the_norm(base: Path, tmp_path: Path) -> None:
    update = update_with(tmp_path, {5: 3e38, 6: -3e38})
    assert check_contribution(update, LAYOUT, base) == pytest.approx(math.sqrt(2) * 3e38, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("place", "name"), [(7, "a"), (WINDOW_ELEMENTS + 1, "b")])
def test_nan_and_infinity_are_refused_with_the_tensor(
    base: Path, tmp_path: Path, value: float, place: int, name: str
) -> None:
    with pytest.raises(NotFinite, match=f"'{name}' of the update of st_mary") as caught:
        check_contribution(update_with(tmp_path, {place: value}), LAYOUT, base, whose="the update of st_mary")
    assert caught.value.data == {"tensor": name, "count": 1}


def test_a_broken_base_is_not_blamed_on_the_site(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match="base weights"):
        check_contribution(base, LAYOUT, update_with(tmp_path, {0: math.nan}))


def test_norm_above_the_limit_is_refused_with_numbers(base: Path, tmp_path: Path) -> None:
    update = update_with(tmp_path, {0: 5.0})
    assert check_contribution(update, LAYOUT, base, ContributionLimits(max_norm=4.0)) == 4.0
    with pytest.raises(NormTooLarge, match=r"norm of 4, above the limit of 3\.9") as caught:
        check_contribution(update, LAYOUT, base, ContributionLimits(max_norm=3.9))
    assert (caught.value.norm, caught.value.limit, caught.value.code) == (4.0, 3.9, "norm-too-large")


def test_another_architecture_is_refused(base: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "other", {"a": np.zeros(LAYOUT.size, np.float32)})
    with pytest.raises(WrongLayout, match="'a' has shape"):
        check_contribution(tmp_path / "other", LAYOUT, base)
    with pytest.raises(WrongLayout, match="base weights"):
        check_contribution(base, LAYOUT, tmp_path / "other")
    with pytest.raises(WrongLayout, match="does not hold"):
        check_contribution(base, LAYOUT, np.zeros(3, np.float32))
    (tmp_path / "other").write_bytes(b"PK\3\4 a pickled model")
    with pytest.raises(CorruptWeights):
        check_contribution(tmp_path / "other", LAYOUT, base)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_is_a_positive_number(limit: float) -> None:
    with pytest.raises(InvalidInput):
        ContributionLimits(max_norm=limit)


@pytest.mark.parametrize(
    ("norms", "refused"),
    [
        ({}, set()),
        ({"a": 1e9}, set()),
        ({"a": 1.0, "b": 1000.0}, {"b"}),
        ({"a": 1.0, "b": 20.0}, set()),
        ({"a": 0.0, "b": 1000.0}, set()),
        ({"a": 0.0, "b": 0.0}, set()),
        ({"a": 1.0, "b": 1.0, "c": 1000.0}, {"c"}),
        ({"a": 1.0, "b": 1.0, "c": 1e-3}, set()),
        ({"a": 1.0, "b": 1000.0, "c": 1000.0}, set()),
        ({"a": 0.0, "b": 1.0, "c": 1000.0}, {"c"}),
        ({"a": 1.0, "b": math.nan, "c": math.inf}, {"b", "c"}),
        ({"a": math.inf}, {"a"}),
        ({"a": 1.0, "b": 2.0, "c": 3.0, "d": 2000.0, "e": 3000.0}, {"d", "e"}),
    ],
)
def test_outlying_norms(norms: dict[str, float], refused: set[str]) -> None:
    assert norm_outliers(norms) == refused


@settings(deadline=None)
@given(norms=st.lists(st.floats(1.0, 5.0), min_size=1, max_size=9), culprit=st.integers(0, 8))
def test_a_thousandfold_is_caught_and_no_honest_site_with_it(norms: list[float], culprit: int) -> None:
    sites = {f"s{place}": norm for place, norm in enumerate(norms)} | {"honest": 1.0, "wrong": 1000.0 * max(norms)}
    assert norm_outliers(sites) == {"wrong"}


@settings(deadline=None)
@given(norms=st.dictionaries(st.text(max_size=3), positive, max_size=8), scale=st.floats(1e-3, 1e3))
def test_outliers_depend_on_neither_unit_nor_order(norms: dict[str, float], scale: float) -> None:
    refused = norm_outliers(norms)
    assert norm_outliers(dict(reversed(norms.items()))) == refused
    assert not norms or len(refused) < len(norms)
    # A power of two, so that no rounding moves a norm across the border.
    unit = 2.0 ** round(math.log2(scale))
    assert norm_outliers({site: norm * unit for site, norm in norms.items()}) == refused


@pytest.mark.parametrize("factor", [1.0, 0.0, -5.0, math.nan])
def test_the_factor_must_leave_room(factor: float) -> None:
    with pytest.raises(InvalidInput):
        norm_outliers({"a": 1.0}, factor)


def test_the_factor_lies_between_honest_spread_and_a_thousand() -> None:
    honest: dict[str, Any] = {"small": 1.0, "medium": 3.0, "large": 20.0}
    assert 1 < NORM_OUTLIER_FACTOR < 1000
    assert norm_outliers(honest) == set()
