"""The rules of aggregation against their definitions: order, shares, the pooled mean, limits, state, crashes."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medhive import strategies
from medhive.errors import InvalidInput, NotFound
from medhive.packing import (
    CorruptWeights,
    Layout,
    WrongLayout,
    open_flat,
    read_weights,
    sha256_file,
    windows,
    write_weights,
)
from medhive.strategies import (
    MAX_EXAMPLES,
    STRATEGIES,
    AggregateNotFinite,
    BadStrategyParameter,
    NoExamples,
    StrategyState,
    TooFewUpdates,
    UnknownStrategy,
    Update,
    WrongStrategyState,
    make_strategy,
    min_updates,
    sorting_network,
    strategy_parameters,
)

ANY_SPEED = settings(deadline=None, max_examples=50)
"""Every example syncs several files to the disk, and a busy machine must not fail a test that is right."""
Arrays = dict[str, NDArray[np.float32]]
SHAPES: dict[str, tuple[int, ...]] = {"conv.weight": (4, 3, 3), "head.bias": (5,), "scale": ()}
SMALL_WINDOW = 7
"""Divides the model of SHAPES into six windows, the last one shorter."""
counts = st.integers(1, MAX_EXAMPLES)
values = st.floats(-1e3, 1e3, width=32)


def model(seed: int, scale: float = 1.0, shapes: dict[str, tuple[int, ...]] | None = None) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * rng.standard_normal(shape), np.float32) for name, shape in (shapes or SHAPES).items()
    }


def updates_in(folder: Path, models: Sequence[Arrays], examples: Sequence[int] | None = None) -> list[Update]:
    found = []
    for place, arrays in enumerate(models):
        path = folder / f"update-{place:03d}"
        write_weights(path, arrays)
        found.append(Update(f"site_{place:03d}", path, examples[place] if examples else 10 * (place + 1), rate_sum=0.5))
    return found


def base_in(folder: Path) -> Path:
    write_weights(folder / "base", model(0))
    return folder / "base"


def aggregate(name: str, folder: Path, updates: Sequence[Update], **params: float) -> Any:
    strategy = make_strategy(name, params)
    out = folder / "out"
    _, stats = strategy.aggregate(base_in(folder), updates, strategy.initial_state(folder), out)
    assert stats.digest == sha256_file(out)
    return np.array(open_flat(out)), stats


@pytest.mark.parametrize("name", STRATEGIES)
def test_order_of_arrival_does_not_matter(tmp_path: Path, name: str) -> None:
    updates = updates_in(tmp_path, [model(seed) for seed in range(1, 5)])
    digests = {aggregate(name, tmp_path, order)[1].digest for order in itertools.permutations(updates)}
    assert len(digests) == 1


@ANY_SPEED
@given(rows=st.lists(st.tuples(values, counts), min_size=1, max_size=8), order=st.randoms(use_true_random=False))
def test_weighted_mean_is_the_pooled_mean(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int]], order: Any
) -> None:
    folder = tmp_path_factory.mktemp("mean")
    updates = updates_in(
        folder, [{"w": np.array([value], np.float32)} for value, _ in rows], [count for _, count in rows]
    )
    write_weights(folder / "base", {"w": np.zeros(1, np.float32)})
    order.shuffle(updates)
    strategy = make_strategy("fedavg")
    _, stats = strategy.aggregate(folder / "base", updates, strategy.initial_state(folder), folder / "out")
    total = sum(count for _, count in rows)
    exact = sum(count * value for value, count in rows) / total
    magnitude = sum(count * abs(value) for value, count in rows) / total
    assert abs(float(open_flat(folder / "out")[0]) - exact) <= (len(rows) + 1) * 6e-8 * magnitude + 1e-42
    assert math.isclose(sum(stats.shares.values()), 1.0, abs_tol=1e-15 * len(rows))
    assert stats.examples == total


@ANY_SPEED
@given(parts=st.lists(st.lists(values, min_size=1, max_size=5), min_size=1, max_size=6))
def test_mean_of_site_means_is_the_mean_of_all_examples(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("pool")
    updates = updates_in(
        folder, [{"w": np.array([np.mean(part)], np.float32)} for part in parts], [len(part) for part in parts]
    )
    write_weights(folder / "base", {"w": np.zeros(1, np.float32)})
    strategy = make_strategy("fedavg")
    strategy.aggregate(folder / "base", updates, strategy.initial_state(folder), folder / "out")
    pooled = np.mean([value for part in parts for value in part])
    np.testing.assert_allclose(open_flat(folder / "out")[0], pooled, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedmedian", "fedtrimmedavg"])
def test_a_single_update_is_itself(tmp_path: Path, name: str) -> None:
    mean, stats = aggregate(name, tmp_path, updates_in(tmp_path, [model(1)]))
    assert mean.tobytes() == np.array(open_flat(tmp_path / "update-000")).tobytes()
    assert dict(stats.shares) == {"site_000": 1.0}


@pytest.mark.parametrize("name", ["fedavg", "fedmedian", "fedtrimmedavg", "krum"])
def test_equal_updates_give_themselves(tmp_path: Path, name: str) -> None:
    mean, _ = aggregate(name, tmp_path, updates_in(tmp_path, [model(1)] * 7))
    np.testing.assert_allclose(mean, open_flat(tmp_path / "update-000"), rtol=8 * 6e-8)


def test_many_and_huge_counts_are_defined(tmp_path: Path) -> None:
    updates = updates_in(tmp_path, [model(1), model(2), model(3)], [1, MAX_EXAMPLES, MAX_EXAMPLES])
    mean, stats = aggregate("fedavg", tmp_path, updates)
    exact = (np.array(open_flat(updates[1].path)) + np.array(open_flat(updates[2].path))) / 2
    np.testing.assert_allclose(mean, exact, atol=1e-6)
    assert stats.examples == 2 * MAX_EXAMPLES + 1
    for count in (-1, MAX_EXAMPLES + 1, 2.0, True, None):
        with pytest.raises(InvalidInput, match="st_mary"):
            Update("st_mary", tmp_path, count)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_site_without_examples_has_no_say(tmp_path: Path, name: str) -> None:
    three = [model(seed) for seed in (1, 2, 3)]
    expected, _ = aggregate(name, tmp_path, updates_in(tmp_path, three, [5, 6, 7]))
    with_idle, stats = aggregate(name, tmp_path, updates_in(tmp_path, [*three, model(4, 1e6)], [5, 6, 7, 0]))
    np.testing.assert_array_equal(with_idle, expected)
    assert stats.shares["site_003"] == 0.0
    assert math.isclose(sum(stats.shares.values()), 1.0)


def test_nothing_to_combine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoExamples):
        aggregate("fedavg", tmp_path, updates_in(tmp_path, [model(1), model(2)], [0, 0]))
    with pytest.raises(TooFewUpdates, match="needs 1"):
        aggregate("fedavg", tmp_path, [])
    with pytest.raises(TooFewUpdates, match="krum needs 5 updates with examples and has 4") as caught:
        aggregate("krum", tmp_path, updates_in(tmp_path, [model(seed) for seed in range(4)]), num_malicious_nodes=1)
    assert caught.value.data == {"needed": 5, "actual": 4}


def test_two_updates_of_one_site_are_refused(tmp_path: Path) -> None:
    update = updates_in(tmp_path, [model(1)])[0]
    with pytest.raises(InvalidInput, match="same site"):
        aggregate("fedavg", tmp_path, [update, update])


def test_wrong_files_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    good, bad = updates_in(tmp_path, [model(1), model(2)])
    for arrays in (model(2, shapes={"other": (42,)}), model(2, shapes=SHAPES | {"scale": (1,)})):
        write_weights(bad.path, arrays)
        with pytest.raises(WrongLayout, match="update of site_001"):
            aggregate("fedavg", tmp_path, [good, bad])
    bad.path.write_bytes(b"nothing")
    with pytest.raises(CorruptWeights):
        aggregate("fedavg", tmp_path, [good, bad])
    bad.path.unlink()
    with pytest.raises(NotFound):
        aggregate("fedavg", tmp_path, [good, bad])
    assert not (tmp_path / "out").exists()


NO_MODEL = [(name, value) for name in STRATEGIES for value in (math.nan, math.inf)] + [
    # Finite updates whose sum or square does not fit float32.
    (name, 3e38)
    for name in ("fedmedian", "fedtrimmedavg", "fedadam", "fedyogi")
]


@pytest.mark.parametrize(("name", "value"), NO_MODEL)
def test_an_aggregate_that_is_no_model_is_not_written(tmp_path: Path, name: str, value: float) -> None:
    models = [{key: np.full(shape, value, np.float32) for key, shape in SHAPES.items()} for _ in range(4)]
    updates = updates_in(tmp_path, models)
    before = set(tmp_path.iterdir()) | {tmp_path / "base"}
    with pytest.raises(AggregateNotFinite):
        aggregate(name, tmp_path, updates)
    assert set(tmp_path.iterdir()) == before


def test_norm_is_that_of_the_global_change(tmp_path: Path) -> None:
    mean, stats = aggregate("fedavg", tmp_path, updates_in(tmp_path, [model(1), model(2)]))
    exact = np.linalg.norm(mean.astype(np.float64) - open_flat(tmp_path / "base"))
    assert stats.norm == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_windows_do_not_show_in_the_result(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_in(tmp_path, [model(seed) for seed in range(1, 6)])
    whole, _ = aggregate(name, tmp_path, updates)
    monkeypatch.setattr(strategies, "STACK_BYTES", 4 * SMALL_WINDOW * 5)
    monkeypatch.setattr(strategies, "windows", lambda size, length: windows(size, min(length, SMALL_WINDOW)))
    pieces, _ = aggregate(name, tmp_path, updates)
    np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("size", range(1, 9))
def test_sorting_network_sorts_everything(size: int) -> None:
    # A network that sorts all rows of zeros and ones sorts everything (Knuth, 5.3.4, theorem Z).
    columns = np.array(list(itertools.product([0, 1], repeat=size)), np.float32).T.copy()
    expected = np.sort(columns, axis=0)
    strategies._sort_columns(columns, sorting_network(size))
    np.testing.assert_array_equal(columns, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 40])
def test_median_is_numpys(tmp_path: Path, size: int) -> None:
    updates = updates_in(tmp_path, [model(seed) for seed in range(size)])
    median, stats = aggregate("fedmedian", tmp_path, updates)
    np.testing.assert_array_equal(median, np.median([open_flat(update.path) for update in updates], axis=0))
    assert set(stats.shares.values()) == {1 / size}


def test_trimming_says_how_much_it_cut(tmp_path: Path) -> None:
    updates = updates_in(tmp_path, [model(1), model(2), model(3), model(4), model(5, 1e6)])
    robust, stats = aggregate("fedtrimmedavg", tmp_path, updates)
    assert stats.trimmed == 1
    assert np.abs(robust).max() < 5
    assert aggregate("fedtrimmedavg", tmp_path, updates[:4])[1].trimmed == 0


def test_krum_takes_the_update_in_the_middle_even_when_all_are_close(tmp_path: Path) -> None:
    # Differences of a millionth of the weights: in float32 the formula with squared norms sees only rounding.
    large = model(0, 100.0)
    models = [{key: array + np.float32(1e-3 * step) for key, array in large.items()} for step in (0, 2, 3, 4, 7)]
    chosen, stats = aggregate("krum", tmp_path, updates_in(tmp_path, models), num_malicious_nodes=1)
    assert stats.shares["site_002"] == 1.0
    np.testing.assert_array_equal(chosen, open_flat(tmp_path / "update-002"))


def test_krum_ignores_forged_majors(tmp_path: Path) -> None:
    models = [model(1, 0.01), model(2, 0.01), model(3, 0.01), model(4, 0.01), model(5, 1e4)]
    _, stats = aggregate("krum", tmp_path, updates_in(tmp_path, models), num_malicious_nodes=1)
    assert stats.shares["site_004"] == 0.0


STATEFUL = [
    ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    ("fedadam", {}),
    ("fedyogi", {}),
]


@pytest.mark.parametrize(("name", "params"), STATEFUL)
def test_a_step_repeated_after_a_crash_gives_the_same_bytes(tmp_path: Path, name: str, params: Any) -> None:
    strategy, folder = make_strategy(name, params), tmp_path / "state"
    folder.mkdir()
    base, updates = base_in(tmp_path), updates_in(tmp_path, [model(1), model(2)])
    first, _ = strategy.aggregate(base, updates, strategy.initial_state(folder), tmp_path / "one")
    checkpoint = first.to_dict()
    second, stats = strategy.aggregate(tmp_path / "one", updates, first, tmp_path / "two")
    # The process dies here, before a checkpoint holds `second`; the next one starts from `first`.
    resumed = StrategyState.from_dict(folder, checkpoint)
    assert resumed == first
    again, stats_again = make_strategy(name, params).aggregate(tmp_path / "one", updates, resumed, tmp_path / "two")
    assert (again, stats_again.digest) == (second, stats.digest)
    assert (again.step, again.strategy) == (2, name)


@pytest.mark.parametrize(("name", "params"), STATEFUL)
def test_superseded_files_go_and_nothing_else(tmp_path: Path, name: str, params: Any) -> None:
    strategy = make_strategy(name, params)
    base, updates = base_in(tmp_path), updates_in(tmp_path, [model(1), model(2)])
    first, _ = strategy.aggregate(base, updates, strategy.initial_state(tmp_path), tmp_path / "global.safetensors")
    second, _ = strategy.aggregate(base, updates, first, tmp_path / "global.safetensors")
    second.remove_superseded()
    assert not any((tmp_path / item.file).exists() for item in first.files)
    assert StrategyState.from_dict(tmp_path, second.to_dict()) == second
    assert (tmp_path / "global.safetensors").exists()
    assert read_weights(tmp_path / second.files[0].file).keys() == SHAPES.keys()


def test_state_of_another_run_or_changed_files_are_refused(tmp_path: Path) -> None:
    strategy = make_strategy("fedadam")
    base, updates = base_in(tmp_path), updates_in(tmp_path, [model(1), model(2)])
    state, _ = strategy.aggregate(base, updates, strategy.initial_state(tmp_path), tmp_path / "out")
    with pytest.raises(WrongStrategyState, match="belongs to fedadam"):
        make_strategy("fedyogi").aggregate(base, updates, state, tmp_path / "out")
    plain, _ = make_strategy("fedavgm").aggregate(base, updates, StrategyState("fedavgm", tmp_path), tmp_path / "out")
    with pytest.raises(WrongStrategyState, match="parameters changed"):
        make_strategy("fedavgm", {"server_momentum": 0.9}).aggregate(base, updates, plain, tmp_path / "out")
    write_weights(tmp_path / state.files[0].file, model(7))
    with pytest.raises(WrongStrategyState, match="m is missing or changed"):
        StrategyState.from_dict(tmp_path, state.to_dict())
    data = state.to_dict()
    for wrong in (
        {},
        data | {"step": -1},
        data | {"step": "x"},
        data | {"files": [{"name": "m"}]},
        data | {"files": [data["files"][0] | {"file": "../base"}]},
    ):
        with pytest.raises(WrongStrategyState):
            StrategyState.from_dict(tmp_path, wrong)


def test_unknown_strategies_and_parameters_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownStrategy, match=r"'fedavgg'. Did you mean fedavg\? Choose one of: fedavg, fedprox"):
        make_strategy("fedavgg")
    with pytest.raises(BadStrategyParameter, match="fedadam has no parameter 'gamma'; it has eta, beta_1"):
        make_strategy("fedadam", {"gamma": 1.0})
    with pytest.raises(BadStrategyParameter, match="mu is an option of the run"):
        make_strategy("fedprox", {"mu": 0.1})
    assert type(make_strategy("FedProx")) is STRATEGIES["fedprox"]


@pytest.mark.parametrize(
    ("name", "parameter", "wrong"),
    [
        ("fedavgm", "server_learning_rate", [0.0, -1.0, 1e9]),
        ("fedavgm", "server_momentum", [-0.1, 1.0]),
        ("fedadam", "eta", [0.0, -1.0]),
        ("fedadam", "beta_1", [-0.1, 1.0]),
        ("fedyogi", "beta_2", [-0.1, 1.0]),
        ("fedyogi", "tau", [0.0]),
        ("fedtrimmedavg", "beta", [-0.1, 0.5]),
        ("krum", "num_malicious_nodes", [-1, 0.5, 1e9]),
    ],
)
def test_bad_values_are_named(name: str, parameter: str, wrong: list[float]) -> None:
    values: list[Any] = [*wrong, math.nan, math.inf, "1", True, None]
    for value in values:
        with pytest.raises(BadStrategyParameter, match=parameter):
            make_strategy(name, {parameter: value})


def test_whole_floats_are_whole_numbers() -> None:
    assert make_strategy("krum", {"num_malicious_nodes": 2.0}) == strategies.Krum(2)
    assert min_updates("krum", {"num_malicious_nodes": 2.0}) == 7
    assert {name: min_updates(name) for name in STRATEGIES if name != "krum"} == dict.fromkeys(list(STRATEGIES)[:-1], 1)
    assert strategy_parameters("fedtrimmedavg") == {"beta": 0.2}


def test_metadata_reach_the_file(tmp_path: Path) -> None:
    strategy = make_strategy("fedavg")
    updates = updates_in(tmp_path, [model(1)])
    strategy.aggregate(base_in(tmp_path), updates, strategy.initial_state(tmp_path), tmp_path / "out", {"round": "1"})
    assert b'"round":"1"' in (tmp_path / "out").read_bytes()
    assert Layout.from_header(tmp_path / "out") == Layout.of(SHAPES)
