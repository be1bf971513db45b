"""Each strategy beside Flower's own of the same name: same updates, same parameters, same weights round after round."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from medhive.packing import read_weights, write_weights
from medhive.strategies import STRATEGIES, Update, make_strategy, strategy_parameters

THEIRS: Mapping[str, Any] = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
}
NOT_FLOWERS = {"fedbn", "scaffold"}
LEFT_OUT = {"eta_l", "proximal_mu"}
"""Rates of the sites: options of the run here."""
SHAPES: dict[str, tuple[int, ...]] = {"conv.weight": (8, 4, 3, 3), "norm.bias": (8,), "scale": ()}
ROUNDS = 4
Arrays = dict[str, NDArray[np.float32]]

CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("fedavg", {}, True),
    ("fedprox", {}, True),
    ("fedavgm", {}, True),
    ("fedavgm", {"server_learning_rate": 0.7}, True),
    ("fedavgm", {"server_momentum": 0.9}, True),
    ("fedavgm", {"server_momentum": 0.5, "server_learning_rate": 0.3}, True),
    ("fedadam", {}, True),
    ("fedadam", {"eta": 0.01, "beta_1": 0.5, "beta_2": 0.9, "tau": 1e-2}, True),
    ("fedyogi", {}, True),
    ("fedyogi", {"eta": 0.1, "beta_1": 0.0, "beta_2": 0.5, "tau": 1e-1}, True),
    ("fedmedian", {}, True),
    ("fedtrimmedavg", {}, False),
    ("fedtrimmedavg", {"beta": 0.4}, False),
    ("fedtrimmedavg", {"beta": 0.0}, False),
    ("krum", {}, True),
    ("krum", {"num_malicious_nodes": 1}, True),
]
"""Strategy, parameters, and whether the bytes are equal. Trimmed means add up in another order: a few last bits."""


def their_parameters(kind: Any) -> dict[str, Any]:
    shared = inspect.signature(flower.FedAvg.__init__).parameters
    own = inspect.signature(kind.__init__).parameters
    return {name: item.default for name, item in own.items() if name not in shared and name not in LEFT_OUT}


def reply(arrays: Arrays, examples: int) -> Message:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": examples})})
    # Written out, because the short form asks for the identity of a running Flower task.
    metadata = Metadata(
        run_id=1,
        message_id="",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=60.0,
        message_type="train",
    )
    return make_message(metadata=metadata, content=content)


def step(strategy: Any, server_round: int, base: Arrays, replies: list[Message]) -> Arrays:
    """One round of Flower's strategy without its network; sites hold float32, so the result is rounded to it."""
    if isinstance(strategy, flower.FedAvgM) and strategy.current_arrays is None:
        strategy.current_arrays = ArrayRecord({name: Array(array) for name, array in base.items()})
    elif hasattr(strategy, "m_t"):
        strategy.current_arrays = dict(base)
    arrays, _ = strategy.aggregate_train(server_round, replies)
    return {name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()}


def local_training(base: Arrays, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(a + 0.1 * rng.standard_normal(a.shape), np.float32) for name, a in sorted(base.items())}


@pytest.mark.parametrize("name", THEIRS)
def test_parameters_and_defaults_are_flowers(name: str) -> None:
    assert strategy_parameters(name) == their_parameters(THEIRS[name])


def test_every_strategy_is_compared() -> None:
    assert STRATEGIES.keys() - NOT_FLOWERS == THEIRS.keys() == {name for name, _, _ in CASES}


@pytest.mark.parametrize(("name", "params", "exact"), CASES)
@pytest.mark.parametrize("sites", [3, 6])
def test_same_weights_as_flower(tmp_path: Path, name: str, params: Any, exact: bool, sites: int) -> None:
    if sites < 2 * params.get("num_malicious_nodes", 0) + 3:
        pytest.skip("Krum is not defined for so few")
    ours, theirs = make_strategy(name, params), THEIRS[name](**params)
    state = ours.initial_state(tmp_path)
    base = local_training({key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}, 0)
    for server_round in range(1, ROUNDS + 1):
        updates, replies = [], []
        for site in range(sites):
            arrays, examples = local_training(base, 100 * server_round + site), 50 + 37 * site
            write_weights(tmp_path / f"update-{site}", arrays)
            updates.append(Update(f"site_{site}", tmp_path / f"update-{site}", examples))
            replies.append(reply(arrays, examples))
        write_weights(tmp_path / "base", base)
        state, _ = ours.aggregate(tmp_path / "base", updates, state, tmp_path / "out")
        expected, found = step(theirs, server_round, base, replies), read_weights(tmp_path / "out")
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(found[key], array, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-8)
        base = expected
