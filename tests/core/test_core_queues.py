"""The contribution queue's decisions, compared with an independent computation where there is a formula."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medhive.consent import ConsentBody
from medhive.errors import BadSignature, Expired, InvalidInput
from medhive.packing import read_weights, write_weights
from medhive.queues import (
    Change,
    NotForQueues,
    NothingToAverage,
    QueueContributionBody,
    QueueOptions,
    QueueSpec,
    QueueState,
    TooStale,
    Waiting,
    check_queue_consent,
    check_queue_contribution,
    due,
    manifest_from_header,
    manifest_to_header,
    mean_metrics,
    plan_average,
    queue_state,
    require_enough,
    require_fresh_enough,
    staleness_weight,
    taken,
    write_average,
)
from medhive.signing import SigningKey, sign
from medhive.spec import Privacy, StudyData
from medhive.strategies import AggregateNotFinite

DIGEST = "a" * 64
NOW = datetime.now(UTC)
KEY = SigningKey.generate()


def spec(**options: object) -> QueueSpec:
    data = StudyData(classes=("a", "b"))
    return QueueSpec(study="brain", task="image-folder", data=data, options=QueueOptions.model_validate(options))


def waiting(*sites: str) -> list[Waiting]:
    return [Waiting(number, site, 10, 0) for number, site in enumerate(sites, 1)]


def test_the_hash_is_over_everything() -> None:
    one = spec()
    assert one.spec_hash == spec().spec_hash
    assert (
        len({one.spec_hash, spec(capacity=3).spec_hash, spec(lr=0.1).spec_hash, spec(max_staleness=0).spec_hash}) == 4
    )


def test_what_a_queue_cannot_do_is_refused_with_the_reason() -> None:
    with pytest.raises(NotForQueues, match="exchange keys"):
        QueueOptions(privacy=Privacy(secagg=True)).require_supported()
    with pytest.raises(InvalidInput, match="differential privacy"):
        QueueOptions(privacy=Privacy(dp_epsilon=1.0)).require_supported()
    QueueOptions().require_supported()


@pytest.mark.parametrize(
    ("size", "state"), [(0, "empty"), (1, "partial"), (9, "partial"), (10, "full"), (11, "overflow"), (12, "overflow")]
)
def test_states(size: int, state: str) -> None:
    assert queue_state(size, 10) is QueueState(state)


# ---- signatures ----------------------------------------------------------------------------------------------------


def consent_of(queue: QueueSpec, **changes: object) -> ConsentBody:
    values = {
        "decision": "granted",
        "coordinator_key_id": "0" * 16,
        "site": "a",
        "run_id": "QUEUE_1",
        "spec_hash": queue.spec_hash,
        "max_rounds": 100,
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=1),
        "nonce": "0" * 32,
        "person": "Dr. A",
    }
    return ConsentBody.model_validate(values | changes)


def test_a_consent_covers_its_own_queue_alone() -> None:
    known = {"site": "a", "queue_id": "QUEUE_1", "spec": spec(), "coordinator_key_ids": ("0" * 16,), "now": NOW}
    assert check_queue_consent(sign(consent_of(spec()), KEY), KEY.public, **known).person == "Dr. A"
    for other in (spec(lr=0.5), spec(max_staleness=3)):
        with pytest.raises(BadSignature, match="spec_hash"):
            check_queue_consent(sign(consent_of(other), KEY), KEY.public, **known)
    with pytest.raises(BadSignature, match="run_id"):
        check_queue_consent(sign(consent_of(spec(), run_id="RUN_1"), KEY), KEY.public, **known)
    with pytest.raises(Expired):
        check_queue_consent(sign(consent_of(spec()), KEY), KEY.public, **{**known, "now": NOW + timedelta(days=2)})


def contribution_of(queue: QueueSpec, **changes: object) -> QueueContributionBody:
    values = {
        "queue_id": "QUEUE_1",
        "study": queue.study,
        "site": "a",
        "spec_hash": queue.spec_hash,
        "base_version": 0,
        "base_digest": DIGEST,
        "content_digest": DIGEST,
        "content_size_bytes": 100,
        "examples": 5,
        "issued_at": NOW,
    }
    return QueueContributionBody.model_validate(values | changes)


@pytest.mark.parametrize(
    "changes",
    [{"site": "b"}, {"study": "heart"}, {"queue_id": "QUEUE_2"}, {"spec_hash": "b" * 64}],
    ids=lambda each: next(iter(each)),
)
def test_a_contribution_is_for_one_queue_by_one_site(changes: dict[str, str]) -> None:
    known = {"site": "a", "queue_id": "QUEUE_1", "spec": spec()}
    assert check_queue_contribution(sign(contribution_of(spec()), KEY), KEY.public, **known).examples == 5
    with pytest.raises(BadSignature) as refused:
        check_queue_contribution(sign(contribution_of(spec(), **changes), KEY), KEY.public, **known)
    assert refused.value.data["field"] == next(iter(changes))
    with pytest.raises(BadSignature):
        check_queue_contribution(sign(contribution_of(spec()), SigningKey.generate()), KEY.public, **known)


def test_a_manifest_travels_in_a_header() -> None:
    signed = sign(contribution_of(spec(), metrics={"train_loss": 0.5}), KEY)
    assert manifest_from_header(manifest_to_header(signed)).verify(KEY.public) == signed.body
    for text in (None, "", "x" * 7000, "e30=", "\u00e9", "AAAA"):
        with pytest.raises(InvalidInput):
            manifest_from_header(text)


def test_no_contribution_claims_nothing_or_too_much() -> None:
    for examples in (0, -1, 10**9 + 1):
        with pytest.raises(ValueError, match="examples"):
            contribution_of(spec(), examples=examples)


# ---- what an average takes -----------------------------------------------------------------------------------------


def test_twelve_in_a_queue_of_ten() -> None:
    all_of_them = waiting(*"abcdefghijkl")
    options = QueueOptions(capacity=10)
    assert due(all_of_them, options)
    assert [item.number for item in taken(all_of_them, options)] == list(range(1, 11))
    assert not due(all_of_them[10:], options)


def test_one_hospital_alone_is_never_averaged_and_holds_up_nobody() -> None:
    options = QueueOptions(capacity=4)
    alone = waiting(*"aaaaaa")
    assert not due(alone, options)
    with pytest.raises(NothingToAverage, match="min_sites"):
        require_enough(alone, options)
    joined = waiting(*"aaaaaab")
    assert due(joined, options)
    assert [item.number for item in taken(joined, options)] == [1, 2, 3, 7]
    with pytest.raises(NothingToAverage):
        require_enough([], options)


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 12), st.integers(1, 4))
def test_all_are_taken_exactly_once(sites: list[str], capacity: int, min_sites: int) -> None:
    options = QueueOptions(capacity=capacity, min_sites=min_sites)
    left, seen = waiting(*sites), []
    while due(left, options):
        chosen = taken(left, options)
        assert 0 < len(chosen) <= capacity and len({item.site for item in chosen}) >= min_sites
        seen += chosen
        left = [item for item in left if item not in chosen]
    assert sorted(item.number for item in [*seen, *left]) == list(range(1, len(sites) + 1))


# ---- staleness -----------------------------------------------------------------------------------------------------


def test_staleness_is_limited_and_shrinks() -> None:
    assert require_fresh_enough(3, 5, 2) == 2
    with pytest.raises(TooStale, match="3 versions ago"):
        require_fresh_enough(2, 5, 2)
    with pytest.raises(InvalidInput, match="does not exist"):
        require_fresh_enough(6, 5, 2)
    weights = [staleness_weight(number) for number in range(20)]
    assert weights[0] == 1.0 and weights == sorted(weights, reverse=True) and weights[3] == 0.5


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 8)), min_size=1, max_size=20))
def test_shares_are_examples_times_staleness(given_: list[tuple[int, int]]) -> None:
    contributions = [Waiting(number, f"s{number}", n, base) for number, (n, base) in enumerate(given_)]
    total = sum(n for n, _ in given_)
    for share, (n, base) in zip(plan_average(contributions, 8), given_, strict=True):
        assert share.staleness == 8 - base
        assert share.weight == pytest.approx(n / total / math.sqrt(9 - base), rel=1e-12)
    assert plan_average(list(reversed(contributions)), 8) == plan_average(contributions, 8)


# ---- the average ---------------------------------------------------------------------------------------------------


def model(folder: Path, name: str, values: np.ndarray) -> Path:
    half = len(values) // 2
    path = folder / f"{name}.safetensors"
    write_weights(path, {"a": values[:half].astype(np.float32), "b": values[half:].astype(np.float32)})
    return path


def flat(path: Path) -> np.ndarray:
    tensors = read_weights(path)
    return np.concatenate([tensors["a"], tensors["b"]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_fresh_contributions_give_the_weighted_mean(
    tmp_path_factory: pytest.TempPathFactory, seed: int, counts: list[int]
) -> None:
    folder, random = tmp_path_factory.mktemp("fresh"), np.random.default_rng(seed)
    base = model(folder, "base", random.standard_normal(1000))
    values = [random.standard_normal(1000).astype(np.float32) for _ in counts]
    shares = plan_average([Waiting(n, f"s{n}", count, 4) for n, count in enumerate(counts)], 4)
    changes = [
        Change(model(folder, f"u{n}", each), base, share.weight)
        for n, (each, share) in enumerate(zip(values, shares, strict=True))
    ]
    write_average(base, changes, folder / "out.safetensors")
    independent = np.average(np.array(values, np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(flat(folder / "out.safetensors"), independent, rtol=1e-5, atol=1e-6)


def test_stale_contributions_bring_their_change_and_not_their_past(tmp_path: Path) -> None:
    old, new = model(tmp_path, "old", np.zeros(600_000)), model(tmp_path, "new", np.full(600_000, 100.0))
    fresh, stale = model(tmp_path, "fresh", np.full(600_000, 104.0)), model(tmp_path, "stale", np.full(600_000, 8.0))
    shares = plan_average([Waiting(1, "a", 30, 3), Waiting(2, "b", 10, 0)], 3)
    out, windows_seen = tmp_path / "out.safetensors", []
    changes = [Change(fresh, new, shares[0].weight), Change(stale, old, shares[1].weight)]
    digest, norm = write_average(new, changes, out, lambda: windows_seen.append(1))
    assert flat(out) == pytest.approx(100.0 + 0.75 * 4.0 + 0.25 * 0.5 * 8.0)
    assert norm == pytest.approx(4.0 * math.sqrt(600_000)) and len(windows_seen) > 1
    assert write_average(new, changes, tmp_path / "again.safetensors")[0] == digest


def test_a_stale_variance_stays_a_variance(tmp_path: Path) -> None:
    def net(name: str, variance: float) -> Path:
        path = tmp_path / f"{name}.safetensors"
        write_weights(path, {"a": np.zeros(300_000, np.float32), "bn.running_var": np.full(7, variance, np.float32)})
        return path

    newest, old, stale = net("newest", 0.5), net("old", 9.0), net("stale", 0.3)
    write_average(newest, [Change(stale, old, 0.5)], tmp_path / "out.safetensors")
    averaged = read_weights(tmp_path / "out.safetensors")
    assert averaged["bn.running_var"] == pytest.approx(0.4) and not averaged["a"].any()


def test_an_overflow_writes_nothing(tmp_path: Path) -> None:
    base, huge = model(tmp_path, "base", np.full(10, 3e38)), model(tmp_path, "huge", np.full(10, 3.3e38))
    low = model(tmp_path, "low", np.full(10, -3e38))
    with pytest.raises(AggregateNotFinite):
        write_average(base, [Change(huge, low, 1.0)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_only_what_the_training_said_becomes_the_versions() -> None:
    given_ = [(30, {"train_loss": 1.0, "val_accuracy": 0.5}), (10, {"train_loss": 2.0}), (5, {})]
    assert mean_metrics(given_) == {"train_loss": 1.25}


def test_a_figure_that_no_training_gives_spoils_no_versions_mean() -> None:
    """It is finite; times the examples it is not, and no manifest could be signed."""
    given_ = [(30, {"train_loss": 1.0}), (10, {"train_loss": 1.7e308, "train_accuracy": -1.7e308})]
    assert mean_metrics(given_) == {"train_loss": 1.0}
