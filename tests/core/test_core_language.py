"""States, specification, envelopes and versions: the words that both sides share."""

import math
from datetime import UTC, datetime

import pytest

from medhive import states
from medhive.envelope import (
    MAX_ENVELOPE_BYTES,
    MAX_MATRIX_CLASSES,
    Contribution,
    ContributionBody,
    Task,
    TaskBody,
    TaskType,
    check_contribution_envelope,
    from_bytes,
    matrix_to_send,
    to_bytes,
)
from medhive.errors import BadSignature, IllegalTransition, InvalidInput, TooLarge
from medhive.signing import SigningKey, sign
from medhive.spec import MAX_CLASSES, MAX_COLUMNS, Privacy, RunSpec, StudyData, TableFormat, build_options
from medhive.states import RUN_TRANSITIONS, RunState, require_transition
from medhive.version import PROTOCOL

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DATA = StudyData(classes=("glioma", "notumor"))


def spec(**options: object) -> RunSpec:
    return RunSpec(study="brain", task="image-folder", data=DATA, options=build_options("image-folder", {}, options))


def test_every_transition_table_covers_every_state() -> None:
    tables = [getattr(states, name) for name in dir(states) if name.endswith("_TRANSITIONS")]
    assert len(tables) == 6
    for table in tables:
        kind = type(next(iter(table)))
        assert set(table) == set(kind)
        assert all(target in table for targets in table.values() for target in targets)


def test_illegal_transition_says_what_is_possible() -> None:
    require_transition(RUN_TRANSITIONS, RunState.READY, RunState.RUNNING, "RUN_1")
    with pytest.raises(
        IllegalTransition, match="RUN_1 is completed and cannot become running; possible from here: nothing"
    ):
        require_transition(RUN_TRANSITIONS, RunState.COMPLETED, RunState.RUNNING, "RUN_1")


def test_spec_hash_is_stable_and_sensitive() -> None:
    assert spec().spec_hash == spec().spec_hash
    assert spec().spec_hash != spec(seed=43).spec_hash
    assert RunSpec.model_validate_json(spec().model_dump_json()).spec_hash == spec().spec_hash


def test_documented_defaults() -> None:
    image = build_options("image-folder", {}, {})
    assert (image.rounds, image.local_epochs, image.batch_size, image.min_sites) == (10, 5, 32, 2)
    assert (image.fraction, image.seed, image.strategy, image.mu) == (1.0, 42, "fedprox", 0.1)
    table = build_options("tabular", {}, {})
    assert (table.rounds, table.strategy, table.penalty) == (5, "fedavg", "l2")
    assert build_options("tabular", {"rounds": 7}, {"rounds": 9}).rounds == 9


@pytest.mark.parametrize(
    ("option", "value"),
    [("rounds", 0), ("rounds", 10**9), ("lr", -1), ("fraction", 0), ("rouns", 3), ("compress", "zip"), ("seed", -1)],
)
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=option):
        build_options("image-folder", {}, {option: value})


def test_unsupported_privacy_is_refused_not_ignored() -> None:
    Privacy().require_supported()
    for privacy in (Privacy(dp_epsilon=1.0), Privacy(secagg=True), Privacy(dp_clip=1.0), Privacy(dp_delta=1e-5)):
        with pytest.raises(InvalidInput, match="differential privacy"):
            privacy.require_supported()


def test_study_data_must_make_sense() -> None:
    with pytest.raises(ValueError, match="same name"):
        StudyData(classes=("a", "a"))
    with pytest.raises(ValueError, match="less than a tenth"):
        StudyData(classes=("a", "b"), validation_share=0.6, heldout_share=0.5)
    with pytest.raises(ValueError, match="label column"):
        TableFormat.model_validate({"columns": [{"name": "age"}], "label": {"name": "disease"}})


def task(**changes: object) -> TaskBody:
    values: dict[str, object] = {
        "protocol": PROTOCOL, "type": "train", "run_id": "RUN_1", "study": "brain", "site": "a", "round": 1, "rounds": 3,
        "spec_hash": "a" * 64, "base_digest": "b" * 64, "deadline_s": 60, "issued_at": NOW, "nonce": "0" * 32,
    }  # fmt: skip
    return TaskBody.model_validate({**values, **changes})


def contribution(**changes: object) -> ContributionBody:
    values: dict[str, object] = {
        "protocol": PROTOCOL, "type": "train", "run_id": "RUN_1", "site": "a", "round": 1, "spec_hash": "a" * 64,
        "base_digest": "b" * 64, "content_digest": "d" * 64, "examples": 10, "metrics": {"val_accuracy": 0.5},
        "issued_at": NOW,
    }  # fmt: skip
    return ContributionBody.model_validate({**values, **changes})


def test_envelopes_survive_the_wire() -> None:
    key = SigningKey.generate()
    envelope = sign(task(), key)
    assert from_bytes(Task, to_bytes(envelope)).verify(key.public) == task()
    answer = sign(contribution(), key)
    read = from_bytes(Contribution, to_bytes(answer))
    assert check_contribution_envelope(read, key.public, task()) == contribution()


def test_what_the_largest_studies_say_fits_an_envelope() -> None:
    """Of as many classes and columns as a study may have: the sites would train, and could not answer."""
    key, numbers = SigningKey.generate(), [math.pi * 10**6] * MAX_COLUMNS
    sums = {"examples": [500.0], "present": [500.0] * MAX_COLUMNS, "sum": numbers, "sum_of_squares": numbers}
    to_bytes(sign(task(statistics=sums), key))
    to_bytes(sign(contribution(statistics=sums), key))
    for classes in (MAX_MATRIX_CLASSES, MAX_CLASSES):
        matrix = matrix_to_send([[int(row == column) for column in range(classes)] for row in range(classes)])
        recalls = {f"val_recall/class number {number}": math.pi / 10 for number in range(classes)}
        to_bytes(sign(contribution(metrics=recalls, confusion=matrix), key))
        assert bool(matrix) == (classes == MAX_MATRIX_CLASSES)


@pytest.mark.parametrize(
    "change",
    [{"site": "b"}, {"round": 2}, {"run_id": "RUN_2"}, {"base_digest": "c" * 64}, {"spec_hash": "c" * 64},
     {"type": TaskType.EVALUATE}],
)  # fmt: skip
def test_an_answer_to_another_task_is_refused(change: dict[str, object]) -> None:
    key = SigningKey.generate()
    with pytest.raises(BadSignature):
        check_contribution_envelope(sign(contribution(**change), key), key.public, task())


def test_garbage_and_giants_are_refused() -> None:
    for raw in (b"", b"{}", b"\x80\x04pickle", b"[1,2]", b'{"body": {"nan": NaN}}'):
        with pytest.raises(InvalidInput):
            from_bytes(Contribution, raw)
    with pytest.raises(TooLarge):
        from_bytes(Task, b" " * (MAX_ENVELOPE_BYTES + 1))


def test_metrics_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        contribution(metrics={"loss": float("nan")})
