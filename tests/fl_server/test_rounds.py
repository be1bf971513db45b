"""The round loop: what counts, who is dropped, when it ends, and that a crash changes no bit of the result."""

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from round_world import CLASSES, DEADLINE_S, Crash, DictDesk, DictExchange, Hospital, World, replayed

from fl_server.collect import EVALUATOR_PATIENCE_S, SILENCE_S
from fl_server.flower import Reply, ReplyError
from fl_server.gateway import RunOver, unfit_versions
from fl_server.pooling import MAX_STATISTIC_NAMES
from medhive.client import RemoteError
from medhive.envelope import ContributionBody, TaskBody, TaskType, to_bytes
from medhive.errors import MedHiveError, NoSpace
from medhive.packing import read_weights, write_weights
from medhive.signing import SigningKey, sign
from medhive.spec import Column, LabelColumn, StudyData, TableFormat
from medhive.states import Activity, RoundState, RunState
from medhive.version import OLDEST_PROTOCOL, PROTOCOL
from medhive.wire import NodeAnswer, RunEnd

MAX_JSON_BYTES = 1024 * 1024
"""What the gateway takes of a body."""
TRAIN, EVALUATE, INITIALISE, STATISTICS = TaskType.TRAIN, TaskType.EVALUATE, TaskType.INITIALISE, TaskType.STATISTICS


def silence(_: Hospital, __: TaskBody, ___: ContributionBody) -> None:
    return None


def failed(_: Hospital, __: TaskBody, body: ContributionBody) -> ContributionBody:
    return body.model_copy(
        update={"outcome": "failed", "reason_code": "out-of-memory", "reason": "The trainer ran out of memory."}
    )


def final_weights(world: World) -> dict[str, Any]:
    assert world.desk.ended is not None
    assert world.desk.ended.digest is not None
    path = world.folder / "final.safetensors"
    path.write_bytes(world.desk.blobs[world.desk.ended.digest])
    return read_weights(path)


def test_a_run_trains_its_rounds_and_ends_with_the_final_evaluation(tmp_path: Path) -> None:
    world = World(tmp_path)
    end = world.run()
    assert end.state == "completed"
    assert [world.asked(TRAIN, number) for number in (1, 2, 3)] == [["a", "b", "c"]] * 3
    assert world.asked(EVALUATE, 3) == ["a", "b", "c"]
    assert {number: report.state for number, report in world.desk.reported.items()} == dict.fromkeys(
        (1, 2, 3), RoundState.CLOSED
    )
    assert end.digest == world.desk.reported[3].weights_digest
    assert end.confusion == [[21, 9], [0, 0]]
    assert end.metrics["val_accuracy"] == pytest.approx(21 / 30)
    assert not (tmp_path / "runs" / "RUN_1").exists()


def test_the_result_is_the_mean_weighted_by_examples(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    base = read_weights_of(world, world.desk.run.base_digest)
    world.run()
    noise = {n: np.random.default_rng([n, 1]).standard_normal((8,), np.float32) for n in (1, 2, 3)}
    expected = base["layer.bias"] + sum(n / 6 * np.float32(0.01) * noise[n] for n in (1, 2, 3))
    assert np.allclose(final_weights(world)["layer.bias"], expected, atol=1e-6)


def read_weights_of(world: World, digest: str | None) -> dict[str, Any]:
    assert digest is not None
    path = world.folder / "some.safetensors"
    path.write_bytes(world.desk.blobs[digest])
    return read_weights(path)


def test_the_figures_of_a_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run()
    report = world.desk.reported[1]
    size = len(world.desk.blobs[str(report.weights_digest)])
    assert report.bytes_down == report.bytes_up == 3 * size
    assert report.overhead_s == pytest.approx(max(0.0, report.seconds - 2.0))
    # val_* weighs by the validation part (10 each), train_* by the training examples (10, 20, 30).
    assert report.metrics["val_accuracy"] == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert report.metrics["train_loss"] == pytest.approx((10 * 1 + 20 / 2 + 30 / 3) / 60)
    assert [site.site for site in report.sites if site.answered] == ["a", "b", "c"]
    assert report.sites[0].metrics["update_norm"] > 0


# ---- who does not count ----------------------------------------------------------------------------------------------


def test_a_contribution_in_another_sites_name_is_refused_and_the_real_one_counts(tmp_path: Path) -> None:
    world = World(tmp_path)
    unforged = World(tmp_path / "unforged")
    forger = SigningKey.generate()

    def forged(hospital: Hospital) -> bytes:
        task = world.exchange.sent[-1][1]
        body = hospital._do(task).model_copy(update={"examples": 10**6})
        return to_bytes(sign(body, forger))

    class Forgery(list[bytes]):
        def pop(self, _: Any = 0) -> bytes:
            super().pop(0)
            return forged(world.sites["a"])

    world.exchange.foreign["a", 2] = Forgery([b"x", b"x"])
    world.run()
    unforged.run()
    assert world.asked(TRAIN, 2).count("a") == 3
    assert world.dropped(2) == {}
    assert refused(world, 2) == [("a", "bad-signature")] * 2
    assert refused(world, 1) == refused(world, 3) == []
    assert world.desk.reported[2].sites[0].examples == 10
    assert same_weights(world, unforged)


def refused(world: World, round_number: int) -> list[tuple[str, str]]:
    return [(refusal.site, refusal.code) for refusal in world.desk.reported[round_number].refusals]


def same_weights(one: World, other: World) -> bool:
    assert one.desk.ended is not None
    assert other.desk.ended is not None
    return one.desk.ended.digest is not None and one.desk.ended.digest == other.desk.ended.digest


def test_a_site_that_only_sends_forgeries_is_dropped_and_named(tmp_path: Path) -> None:
    world = World(tmp_path)

    def as_a(hospital: Hospital, _: TaskBody, body: ContributionBody) -> bytes:
        return to_bytes(sign(body.model_copy(update={"site": "a"}), hospital.key))

    world.sites["b"].changes[TRAIN, 1] = as_a
    world.run()
    assert "refused" in world.dropped(1)["b"]
    assert refused(world, 1) == [("b", "bad-signature")] * 3
    assert [site.answered for site in world.desk.reported[1].sites] == [True, False, True]
    assert world.desk.ended is not None
    assert world.desk.ended.state == "completed"


def test_an_answer_to_an_earlier_round_is_a_replay(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sites["b"].changes[TRAIN, 2] = lambda hospital, _, __: replayed(hospital, TRAIN, 1)
    world.run()
    assert "another task" in world.dropped(2)["b"]


def test_an_unsigned_answer_and_garbage_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)

    def unsigned(hospital: Hospital, _: TaskBody, body: ContributionBody) -> bytes:
        signed = sign(body, hospital.key)
        return signed.model_copy(update={"signature": ""}).model_dump_json().encode()

    world.sites["a"].changes[TRAIN, 1] = unsigned
    world.sites["b"].changes[TRAIN, 2] = lambda *_: b"\xff not json"
    end = world.run()
    assert end.state == "completed"
    assert "signature" in world.dropped(1)["a"]
    assert "cannot be read" in world.dropped(2)["b"]


def with_weights(change: Any) -> Any:
    def changed(hospital: Hospital, task: TaskBody, body: ContributionBody) -> ContributionBody:
        return body.model_copy(update=hospital.pack(change(hospital.train(task))))

    return changed


def set_nan(weights: dict[str, Any]) -> dict[str, Any]:
    weights["layer.bias"][3] = np.nan
    return weights


BAD_UPDATES: dict[str, tuple[Any, str, str | None]] = {
    "nan": (with_weights(set_nan), "layer.bias", "not-finite"),
    "length": (
        with_weights(lambda weights: {**weights, "layer.bias": np.zeros(9, np.float32)}),
        "layer.bias",
        "wrong-layout",
    ),
    "architecture": (with_weights(lambda _: {"conv": np.zeros(4, np.float32)}), "conv", "wrong-layout"),
    "norm": (
        with_weights(lambda weights: {k: v + np.float32(1000) for k, v in weights.items()}),
        "far above the others",
        "norm-outlier",
    ),
    "missing": (
        lambda _, __, b: b.model_copy(update={"content_digest": "0" * 64}),
        "not in the blob store",
        "update-missing",
    ),
    "none": (lambda _, __, b: b.model_copy(update={"content_digest": ""}), "without an update", "update-missing"),
    "huge": (lambda _, __, b: b.model_copy(update={"content_size_bytes": 10**9}), "bytes", "too-large"),
    "confusion": (lambda _, __, b: b.model_copy(update={"confusion": [[1, 2, 3]]}), "confusion", "bad-confusion"),
    # The site itself says that it has nothing to give: dropped, but nothing was refused.
    "failed": (failed, "out-of-memory", None),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_bad_update_is_refused_and_named_and_the_round_goes_on(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    change, words, code = BAD_UPDATES[kind]
    world.sites["b"].changes[TRAIN, 2] = change
    assert world.run().state == "completed"
    assert set(world.dropped(2)) == {"b"}
    assert words in world.dropped(2)["b"]
    assert refused(world, 2) == ([("b", code)] if code else [])
    assert world.dropped(1) == world.dropped(3) == {}
    assert all(np.isfinite(value).all() for value in final_weights(world).values())


def test_bytes_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)

    def garbage(hospital: Hospital, _: TaskBody, body: ContributionBody) -> ContributionBody:
        raw = b"\x80\x04pickle"
        digest = hashlib.sha256(raw).hexdigest()
        hospital.desk.blobs[digest] = raw
        return body.model_copy(update={"content_digest": digest})

    world.sites["c"].changes[TRAIN, 1] = garbage
    assert world.run().state == "completed"
    assert "no weights file" in world.dropped(1)["c"]
    assert refused(world, 1) == [("c", "corrupt-weights")]


def test_what_is_refused_without_a_rounds_report_is_told_at_the_end(tmp_path: Path) -> None:
    def unsigned(_: Hospital, __: TaskBody, body: ContributionBody) -> bytes:
        return to_bytes(sign(body, SigningKey.generate()))

    judging = World(tmp_path / "judging", {"rounds": 1})
    judging.sites["b"].changes[EVALUATE, 1] = unsigned
    end = judging.run()
    assert end.state == "completed"
    assert [(item.site, item.code) for item in end.refusals] == [("b", "bad-signature")] * 3

    stopped = World(tmp_path / "stopped", {"rounds": 1})
    stopped.sites["b"].changes[TRAIN, 1] = unsigned
    stopped.sites["c"].changes[TRAIN, 1] = silence
    stopped.desk.on_look = lambda desk: desk.change(stop_requested=stopped.clock.seconds > DEADLINE_S / 2)
    end = stopped.run()
    assert end.state == "cancelled"
    assert [item.site for item in end.refusals] == ["b"] * 3


def test_reports_of_many_sites_and_classes_are_no_longer_than_the_gateway_takes(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(220))
    world = World(tmp_path, {"rounds": 1}, names=tuple("abcdefghijkl"), data=StudyData(classes=classes))
    matrix = [[int(row == column) for column in range(len(classes))] for row in range(len(classes))]
    metrics = {"val_accuracy": 0.5} | {f"val_recall/{name}": 0.25 for name in classes}
    for site in world.sites.values():
        for kind in (TRAIN, EVALUATE):
            site.changes[kind, 1] = lambda _, __, b: b.model_copy(update={"metrics": metrics, "confusion": matrix})
    end = world.run()
    report = world.desk.reported[1]
    assert max(len(report.model_dump_json()), len(end.model_dump_json())) < MAX_JSON_BYTES
    assert [site.metrics["val_accuracy"] for site in (*report.sites, *end.sites)] == [0.5] * 24
    assert report.metrics[f"val_recall/{classes[-1]}"] == 0.25
    assert end.confusion[3][3] == 12


def test_metric_names_that_no_task_reports_are_left_out(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    metrics = {"val_accuracy": 0.5, f"val_recall/{CLASSES[0]}": 0.25, "Mr. Miller, born 1950": 1.0, "val_recall/x": 1.0}
    for site in world.sites.values():
        site.changes[TRAIN, 1] = lambda _, __, b: b.model_copy(update={"metrics": metrics})
    world.run()
    assert world.desk.reported[1].metrics == {"val_accuracy": 0.5, f"val_recall/{CLASSES[0]}": pytest.approx(0.25)}
    assert set(world.desk.reported[1].sites[0].metrics) == {"val_accuracy", f"val_recall/{CLASSES[0]}", "update_norm"}


def test_numbers_that_no_training_gives_end_no_run(tmp_path: Path) -> None:
    """Each is finite, and fits its field; summed up with others' they are not, and no report could hold them."""
    world = World(tmp_path, {"rounds": 1})

    def boast(_: Hospital, __: TaskBody, body: ContributionBody) -> ContributionBody:
        return body.model_copy(update={"metrics": {**body.metrics, "train_loss": 1.7e308, "val_loss": -1.7e308}})

    for kind in (TRAIN, EVALUATE):
        world.sites["b"].changes[kind, 1] = world.sites["c"].changes[kind, 1] = boast
    end = world.run()
    assert end.state == "completed"
    report = world.desk.reported[1]
    json.dumps([end.metrics, report.model_dump(mode="json")], allow_nan=False)
    assert report.metrics["train_loss"] == 1.0, "that of a, which alone says what can be"
    assert [site.answered for site in report.sites] == [True] * 3


def test_counts_that_no_hospital_has_cost_their_site_the_round(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    counts = [[2**53 - 1, 0], [0, 0]]
    world.sites["c"].changes[TRAIN, 1] = lambda _, __, body: body.model_copy(update={"confusion": counts})
    assert world.run().state == "completed"
    assert "no table of counts" in world.dropped(1)["c"]


# ---- time ----------------------------------------------------------------------------------------------------------


def test_a_site_without_a_sign_of_life_is_late_after_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sites["c"].changes[TRAIN, 1] = silence
    world.run()
    assert "late" in world.dropped(1)["c"]
    assert DEADLINE_S <= world.desk.reported[1].seconds < DEADLINE_S + 5
    assert world.desk.reported[2].seconds < 5


def test_the_deadline_counts_from_the_start_of_the_training(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    world.sites["c"].changes[TRAIN, 1] = silence

    def queue_then_train(desk: Any) -> None:
        if world.asked(TRAIN, 1):
            began = desk.clock.seconds > 3 * DEADLINE_S
            desk.act("c", 1, Activity.TRAINING if began else Activity.QUEUED)

    world.desk.on_look = queue_then_train
    world.run()
    assert "after its training began" in world.dropped(1)["c"]
    assert 4 * DEADLINE_S <= world.desk.reported[1].seconds < 4 * DEADLINE_S + 5


def test_a_round_closes_as_soon_as_all_have_answered(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    world.run()
    assert world.desk.reported[1].seconds < 5


def test_a_round_that_can_no_longer_reach_min_sites_fails_at_once_and_says_why(tmp_path: Path) -> None:
    world = World(tmp_path, {"min_sites": 3})
    world.sites["a"].changes[TRAIN, 2] = failed
    world.sites["c"].changes[TRAIN, 2] = silence
    end = world.run()
    assert end.state == "failed"
    assert "Round 2 of 3" in end.reason
    assert "(a: failed (out-of-memory): The trainer ran out of memory; c: " in end.reason
    assert world.desk.reported[2].state == RoundState.FAILED
    assert world.desk.reported[2].seconds < 5


# ---- consents, stops ------------------------------------------------------------------------------------------------


def test_a_site_that_withdraws_is_out_at_once_and_at_the_next_round(tmp_path: Path) -> None:
    world = World(tmp_path)

    def withdraw(hospital: Hospital, _: TaskBody, __: ContributionBody) -> None:
        hospital.desk.withdraw("b")

    world.sites["b"].changes[TRAIN, 2] = withdraw
    assert world.run().state == "completed"
    assert world.dropped(2) == {"b": "it withdrew its consent"}
    assert world.desk.reported[2].seconds < 5
    assert world.asked(TRAIN, 3) == ["a", "c"]
    assert [site.site for site in world.desk.reported[3].sites] == ["a", "c"]


def test_with_too_few_consents_left_the_run_fails_and_names_each_site(tmp_path: Path) -> None:
    world = World(tmp_path, {"min_sites": 3})
    world.desk.withdraw("b")
    end = world.run()
    assert end.state == "failed"
    assert "b: it withdrew its consent" in end.reason
    assert world.exchange.sent == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("spec_hash", "0" * 64), ("run_id", "RUN_9"), ("max_rounds", 1), ("site", "a"), ("coordinator_key_id", "0" * 16)],
)
def test_a_consent_that_does_not_hold_addresses_nobody(tmp_path: Path, field: str, value: Any) -> None:
    world = World(tmp_path)
    wrong = world.desk.consent(world.sites["b"], **{field: value}).model_copy(update={"site": "b"})
    world.desk.change(consents=tuple(wrong if item.site == "b" else item for item in world.desk.run.consents))
    assert world.run().state == "completed"
    assert "b" not in {name for name, _ in world.exchange.sent}
    assert "not addressed" in world.dropped(1)["b"]


def test_consents_given_to_a_former_key_of_the_coordinator_hold(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.desk.change_key()
    assert world.run().state == "completed"
    assert world.asked(TRAIN, 3) == ["a", "b", "c"]


def test_a_site_revoked_within_a_round_is_dropped_at_once_and_not_asked_again(tmp_path: Path) -> None:
    world = World(tmp_path)

    def revoked(hospital: Hospital, _: TaskBody, __: ContributionBody) -> ReplyError:
        hospital.desk.revoked.add("b")
        world.exchange.unknown[2] = 99
        return ReplyError.NODE_OFFLINE

    world.sites["b"].changes[TRAIN, 2] = revoked
    assert world.run().state == "completed"
    assert "revoked" in world.dropped(2)["b"]
    assert world.desk.reported[2].seconds < 5
    assert world.asked(TRAIN, 3) == ["a", "c"]


def test_a_site_whose_version_does_not_fit_is_not_asked_to_train_and_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.desk.unfit = unfit_versions(
        NodeAnswer(site=name, node_public_key="", wanted=True, software="0.0.9", protocol=protocol)
        for name, protocol in {"a": PROTOCOL, "b": OLDEST_PROTOCOL - 1}.items()
    )
    assert world.run().state == RunState.COMPLETED
    assert world.sites["b"].trained == []
    assert "(MedHive 0.0.9) speaks protocol" in world.dropped(1)["b"]
    assert "upgrade the hospital" in world.dropped(1)["b"]


def test_answers_of_another_version_end_the_wait_and_say_so(tmp_path: Path) -> None:
    def older(hospital: Hospital, _: TaskBody, body: ContributionBody) -> bytes:
        return to_bytes(sign(body.model_copy(update={"protocol": OLDEST_PROTOCOL - 1}), hospital.key))

    world = World(tmp_path)
    world.sites["b"].changes[TRAIN, 1] = older
    assert world.run().state == RunState.COMPLETED
    assert f"speaks protocol {OLDEST_PROTOCOL - 1}" in world.dropped(1)["b"]
    assert "incompatible-version" in {code for _, code in refused(world, 1)}


def test_a_node_that_has_never_connected_is_asked_once_it_has(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.exchange.unknown[2] = 3
    world.run()
    assert world.dropped(1) == {}
    assert world.asked(TRAIN, 1) == ["a", "c", "b"]


def test_a_node_that_goes_offline_is_asked_again(tmp_path: Path) -> None:
    world = World(tmp_path)

    def offline_once(hospital: Hospital, _: TaskBody, __: ContributionBody) -> ReplyError:
        hospital.changes.clear()
        return ReplyError.NODE_OFFLINE

    world.sites["b"].changes[TRAIN, 1] = offline_once
    world.run()
    assert world.dropped(1) == {}
    assert world.asked(TRAIN, 1) == ["a", "b", "c", "b"]


def lost_once(hospital: Hospital, _: TaskBody, __: ContributionBody) -> None:
    """The node was killed between Flower's delivery and its own store."""
    hospital.changes.clear()


@pytest.mark.parametrize(("kind", "number", "based"), [(TRAIN, 2, True), (EVALUATE, 3, True), (INITIALISE, 0, False)])
def test_a_question_that_a_killed_node_lost_is_asked_again(
    tmp_path: Path, kind: TaskType, number: int, based: bool
) -> None:
    world = World(tmp_path, based=based)
    world.sites["b"].changes[kind, number] = lost_once
    # The others' words of the last training are still to be read; they are no answer to an evaluation.
    world.desk.on_look = lambda desk: desk.act("b", 3, Activity.DONE) if kind == EVALUATE else None
    world.run()
    assert world.asked(kind, number) == ["a", "b", "c", "b"]
    assert all(not world.dropped(each) for each in world.desk.reported)
    assert SILENCE_S <= world.clock.seconds < SILENCE_S + 10 < DEADLINE_S


def test_the_word_of_an_earlier_life_is_no_answer(tmp_path: Path) -> None:
    """Aggregator and node were both killed in the round: what the node said before is all that the gateway shows."""
    world = World(tmp_path, {"rounds": 1})
    world.sites["b"].changes[TRAIN, 1] = lost_once
    world.desk.act("b", 1, Activity.TRAINING)
    world.run()
    assert world.asked(TRAIN, 1) == ["a", "b", "c", "b"]
    assert world.dropped(1) == {}


def test_a_site_that_says_what_it_does_is_asked_once(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    world.sites["c"].changes[TRAIN, 1] = silence
    world.desk.on_look = lambda desk: desk.act("c", 1, Activity.TRAINING) if world.asked(TRAIN, 1) else None
    world.run()
    assert world.clock.seconds > DEADLINE_S
    assert world.asked(TRAIN, 1) == ["a", "b", "c"]


def test_a_node_that_is_away_is_not_asked_again_and_again(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1, "deadline_s": 8 * SILENCE_S})
    world.sites["b"].changes[TRAIN, 1] = world.sites["c"].changes[TRAIN, 1] = silence
    world.desk.offline.add("b")
    world.run()
    assert world.asked(TRAIN, 1).count("b") == 1
    assert world.asked(TRAIN, 1).count("c") == 4, "after 30, 90 and 210 seconds"


def test_the_answer_to_the_first_question_counts_after_the_second(tmp_path: Path) -> None:
    world = World(tmp_path, {"rounds": 1})
    delayed: list[Reply] = []

    class Slow(DictExchange):
        def wait(self, seconds: float) -> list[Reply]:
            replies = super().wait(seconds)
            if world.asked(TRAIN, 1).count("b") == 1:
                mine = [reply for reply in replies if reply.node_id == 2]
                delayed.extend(mine)
                return [reply for reply in replies if reply not in mine]
            first, delayed[:] = delayed[:], []
            return first or replies

    world.exchange = Slow(world.desk.hospitals)
    world.run()
    assert world.asked(TRAIN, 1).count("b") == 2
    assert world.sites["b"].trained == [1]
    assert world.dropped(1) == {}


def test_a_stop_ends_the_run_within_the_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sites["c"].changes[TRAIN, 2] = silence

    def stop(desk: Any) -> None:
        if world.asked(TRAIN, 2):
            desk.change(stop_requested=True, reason="wrong data")

    world.desk.on_look = stop
    end = world.run()
    assert (end.state, end.reason) == ("cancelled", "wrong data")
    assert world.clock.seconds < DEADLINE_S


def test_a_run_that_is_over_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.desk.change(state=RunState.CANCELLED)
    with pytest.raises(RunOver):
        world.run()
    assert world.desk.ended is None


def test_the_sample_of_a_round_depends_on_seed_and_round_alone(tmp_path: Path) -> None:
    names = tuple(f"site-{number}" for number in range(8))
    chosen = []
    for life in ("one", "two"):
        world = World(tmp_path / life, {"fraction": 0.5, "rounds": 4}, names)
        world.run()
        chosen.append([world.asked(TRAIN, number) for number in range(1, 5)])
    assert chosen[0] == chosen[1]
    assert all(len(cohort) == 4 for cohort in chosen[0])
    assert len({tuple(cohort) for cohort in chosen[0]}) > 1


# ---- beginning -----------------------------------------------------------------------------------------------------


def test_the_first_run_makes_version_zero(tmp_path: Path) -> None:
    world = World(tmp_path, based=False)
    assert world.run().state == "completed"
    assert world.asked(INITIALISE, 0) == ["a", "b", "c"]
    assert world.desk.run.base_digest == world.desk.reported[0].weights_digest
    assert same_weights(world, world_run(tmp_path / "based"))


def world_run(folder: Path, **kwargs: Any) -> World:
    world = World(folder, **kwargs)
    world.run()
    return world


def test_initial_weights_that_differ_are_named_and_the_first_site_wins(tmp_path: Path) -> None:
    world = World(tmp_path, based=False)
    world.sites["b"].initial_seed = 43
    assert world.run().state == "completed"
    assert "initial weights" in world.dropped(0)["b"]
    assert refused(world, 0) == [("b", "other-initial-weights")]
    assert world.asked(TRAIN, 1) == ["a", "b", "c"]


def test_a_table_study_pools_its_statistics_once(tmp_path: Path) -> None:
    table = TableFormat(columns=(Column(name="age"), Column(name="sick")), label=LabelColumn(name="sick"))
    world = World(tmp_path, names=("a", "b", "c", "d", "e"), data=StudyData(classes=CLASSES, table=table), based=False)
    for number, site in enumerate(world.sites.values(), 1):
        site.statistics = {"age/sum": [0.1 * number], "age/count": [number]}
    world.sites["c"].statistics = {"weight/sum": [3.0]}
    world.sites["d"].statistics = {"age/sum": [1.7e308], "age/count": [4]}
    world.sites["e"].statistics = {str(number): [] for number in range(MAX_STATISTIC_NAMES + 1)}
    end = world.run()
    assert end.statistics == {"age/count": [3.0], "age/sum": [0.1 + 0.2]}
    assert "other columns" in world.dropped(0)["c"]
    assert "no table" in world.dropped(0)["d"]
    assert "more statistics" in world.dropped(0)["e"]
    assert refused(world, 0) == [(site, "other-columns") for site in "cde"]
    assert world.desk.statistics == end.statistics
    assert all(task.statistics == end.statistics for _, task in world.exchange.sent if task.type == TRAIN)


# ---- control variates ------------------------------------------------------------------------------------------------


def test_each_site_is_sent_a_correction_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path, {"strategy": "scaffold", "rounds": 2})
    assert world.run().state == "completed"
    told = {(task.round, task.site): task.correction_digest for _, task in world.exchange.sent if task.type == TRAIN}
    assert {digest for (number, _), digest in told.items() if number == 1} == {""}
    second = {site: digest for (number, site), digest in told.items() if number == 2}
    assert world.desk.alone == {digest: site for site, digest in second.items()}
    assert len(world.desk.alone) == 3


def test_a_site_whose_learning_rates_are_not_the_others_bends_no_control_variate(tmp_path: Path) -> None:
    world = World(tmp_path, {"strategy": "scaffold", "rounds": 2}, names=("a", "b", "c", "d"))
    world.sites["b"].rate_sum = 0.0
    world.sites["c"].rate_sum = 0.0001
    assert world.run().state == "completed"
    assert "does not say the sum of its learning rates" in world.dropped(1)["b"]
    assert "its mean learning rate is 2e-05, far from the others'" in world.dropped(1)["c"]
    assert set(refused(world, 1)) == {("b", "no-rate-sum"), ("c", "other-learning-rates")}


# ---- crashes ---------------------------------------------------------------------------------------------------------

STRATEGIES = [
    {"strategy": "fedavg"},
    {"strategy": "fedavgm", "strategy_params": {"server_momentum": 0.9}},
    {"strategy": "fedadam", "strategy_params": {"eta": 0.01}},
    {"strategy": "scaffold"},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda item: item["strategy"])
@pytest.mark.parametrize("moment", ["crash_before", "crash_after"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_crash_at_a_report_changes_no_bit(tmp_path: Path, strategy: dict[str, Any], moment: str, number: int) -> None:
    unbroken = world_run(tmp_path / "unbroken", options=strategy)
    world = World(tmp_path / "broken", strategy)
    setattr(world.desk, moment, number)
    with pytest.raises(Crash):
        world.run()
    assert world.run().state == "completed"
    assert same_weights(world, unbroken)
    assert [world.sites["a"].trained, world.sites["b"].trained] == [[1, 2, 3]] * 2


def crash_with_two_kept(world: World) -> None:
    """Kill the process in round 2, when the updates of a and b are verified and c is still training."""
    kept = world.folder / "runs" / "RUN_1" / "round-2"

    def die_once_two_are_kept(desk: DictDesk) -> None:
        if len(list(kept.glob("*.json"))) == 2:
            desk.on_look = lambda _: None
            raise Crash

    world.sites["c"].changes[TRAIN, 2] = silence
    world.desk.on_look = die_once_two_are_kept
    with pytest.raises(Crash):
        world.run()
    world.sites["c"].changes.clear()


def test_a_crash_within_a_round_keeps_the_verified_updates(tmp_path: Path) -> None:
    unbroken = world_run(tmp_path / "unbroken")
    world = World(tmp_path / "broken")
    crash_with_two_kept(world)
    assert world.run().state == "completed"
    assert world.asked(TRAIN, 2) == ["a", "b", "c", "c"]
    assert same_weights(world, unbroken)


def test_a_kept_update_that_was_changed_on_disk_is_fetched_again(tmp_path: Path) -> None:
    unbroken = world_run(tmp_path / "unbroken")
    world = World(tmp_path / "broken")
    crash_with_two_kept(world)
    kept = tmp_path / "broken" / "runs" / "RUN_1" / "round-2"
    (kept / "a.safetensors").write_bytes(b"changed")
    (kept / "b.json").write_bytes(b"changed")
    assert world.run().state == "completed"
    assert world.asked(TRAIN, 2) == ["a", "b", "c", "b", "c"]
    assert same_weights(world, unbroken)


def test_a_gateway_that_is_away_for_a_while_costs_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.desk.away = 5
    assert world.run().state == "completed"


@pytest.mark.parametrize(("trouble", "status"), [(NoSpace("Its disk is full."), 507), (RemoteError("It failed."), 500)])
def test_a_gateway_in_trouble_costs_no_run(tmp_path: Path, trouble: MedHiveError, status: int) -> None:
    trouble.data["status"] = status
    world = World(tmp_path, {"rounds": 1})
    world.sites["c"].changes[TRAIN, 1] = silence
    looks = itertools.count()

    def fail_often(_: DictDesk) -> None:
        if next(looks) % 3 < 2:
            raise trouble

    def fail() -> frozenset[str]:
        raise trouble

    world.desk.on_look = fail_often
    world.desk.online = fail  # type: ignore[method-assign]
    assert world.run().state == "completed"
    assert list(world.dropped(1)) == ["c"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names an open file by /proc")
def test_a_full_disk_at_the_checkpoint_fails_the_run_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    before: list[bytes] = []
    sync = os.fsync

    def full_at_two(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name == ".checkpoint.json.tmp" and 2 in world.desk.reported:
            before.append((tmp_path / "runs" / "RUN_1" / "checkpoint.json").read_bytes())
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_two)
    end = world.run()
    assert end.state == "failed"
    assert "disk is full" in end.reason
    assert b'"round":1' in before[0]
    assert world.desk.reported[2].state == RoundState.OPEN


def test_another_aggregator_goes_on_from_the_gateways_weights(tmp_path: Path) -> None:
    unbroken = world_run(tmp_path / "unbroken")
    world = World(tmp_path / "broken")
    world.desk.crash_after = 2
    with pytest.raises(Crash):
        world.run()
    (tmp_path / "broken" / "runs").rename(tmp_path / "lost")
    assert world.run().state == "completed"
    assert same_weights(world, unbroken)


def test_another_aggregator_cannot_go_on_with_a_strategy_that_remembers(tmp_path: Path) -> None:
    world = World(tmp_path, {"strategy": "fedadam"})
    world.desk.crash_after = 2
    with pytest.raises(Crash):
        world.run()
    (tmp_path / "runs").rename(tmp_path / "lost")
    end: RunEnd = world.run()
    assert end.state == "failed"
    assert "another aggregator" in end.reason


def test_base_weights_that_are_not_finite_fail_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    bad = tmp_path / "bad.safetensors"
    digest = write_weights(bad, {"w": np.array([np.nan], np.float32)})
    world.desk.blobs[digest] = bad.read_bytes()
    world.desk.change(base_digest=digest)
    end = world.run()
    assert end.state == "failed"
    assert "NaN" in end.reason


# ---- a site that only evaluates --------------------------------------------------------------------------------------


def with_a_test_set(world: World, name: str) -> World:
    """The same where this site is asked for its judgement alone."""
    consents = tuple(item.model_copy(update={"evaluates_only": item.site == name}) for item in world.desk.run.consents)
    world.desk.change(consents=consents)
    return world


def test_a_test_set_is_judged_each_round_beside_the_sites_and_gives_nothing(tmp_path: Path) -> None:
    world = with_a_test_set(World(tmp_path), "c")
    end = world.run()
    for number in (1, 2, 3):
        report = world.desk.reported[number]
        assert world.asked(TRAIN, number) == ["a", "b"]
        assert [site.site for site in report.sites] == ["a", "b"]
        assert [(site.site, site.answered) for site in report.evaluators] == [("c", True)]
        # 6 and 7 of 10 at those that train, 8 of 10 in the test set: neither is in the other's mean.
        assert report.metrics["val_accuracy"] == pytest.approx(0.65)
        assert report.metrics["test_accuracy"] == pytest.approx(0.8)
        assert "test_train_loss" not in report.metrics
    assert [world.asked(EVALUATE, number).count("c") for number in (1, 2, 3)] == [1, 1, 2]
    assert (end.state, world.sites["c"].trained) == ("completed", [])
    assert (end.metrics["val_accuracy"], end.metrics["test_accuracy"]) == (pytest.approx(0.65), pytest.approx(0.8))
    assert ([site.site for site in end.sites], [site.site for site in end.evaluators]) == (["a", "b"], ["c"])
    assert end.confusion == [[13, 7], [0, 0]]
    alone = World(tmp_path / "alone", names=("a", "b"))
    assert alone.run().digest == end.digest


def test_a_test_set_is_asked_for_no_weights_and_no_sums(tmp_path: Path) -> None:
    table = TableFormat(columns=(Column(name="age"), Column(name="ill")), label=LabelColumn(name="ill"))
    world = World(tmp_path, {"rounds": 1}, data=StudyData(classes=CLASSES, table=table), based=False)
    with_a_test_set(world, "c")
    for hospital in world.desk.hospitals:
        hospital.statistics = {"count": [float(hospital.examples)]}
    world.run()
    assert world.asked(STATISTICS, 0) == world.asked(INITIALISE, 0) == ["a", "b"]
    assert world.desk.statistics == {"count": [30.0]}


def test_a_test_set_does_not_count_for_the_fewest_sites(tmp_path: Path) -> None:
    world = with_a_test_set(World(tmp_path, {"min_sites": 3}), "c")
    end = world.run()
    assert end.state == "failed"
    assert "3 are needed" in end.reason
    assert world.asked(EVALUATE, 1) == []


def test_a_test_set_does_not_keep_a_round_waiting_that_has_too_few_sites(tmp_path: Path) -> None:
    world = with_a_test_set(World(tmp_path), "c")
    world.sites["a"].changes[TRAIN, 1] = failed
    world.sites["b"].changes[TRAIN, 1] = silence
    assert world.run().state == "failed"
    assert world.desk.reported[1].seconds < DEADLINE_S / 2


def test_a_round_goes_on_without_a_test_set_that_says_nothing(tmp_path: Path) -> None:
    world = with_a_test_set(World(tmp_path, {"rounds": 2}), "c")
    for number in (1, 2):
        world.sites["c"].changes[EVALUATE, number] = silence
    end = world.run()
    assert end.state == "completed"
    report = world.desk.reported[1]
    assert [site.dropped for site in report.evaluators] == ["it had not begun to evaluate when all others were done"]
    assert report.seconds < EVALUATOR_PATIENCE_S + 2
    assert "test_accuracy" not in report.metrics
    assert [site.dropped for site in report.sites] == [None, None]
    # Two rounds and the final evaluation: none of them waits for the deadline.
    assert world.clock.seconds < 3 * (EVALUATOR_PATIENCE_S + 2)


def test_a_test_set_that_is_at_work_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    world = with_a_test_set(World(tmp_path, {"rounds": 1}), "c")
    world.sites["c"].changes[EVALUATE, 1] = silence
    world.desk.on_look = lambda desk: desk.act("c", 1, Activity.EVALUATING)
    world.run()
    report = world.desk.reported[1]
    assert report.seconds >= DEADLINE_S
    assert str(report.evaluators[0].dropped).startswith("late:")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_crash_beside_a_test_set_changes_no_bit(tmp_path: Path, where: str) -> None:
    world, calm = (with_a_test_set(World(tmp_path / name), "c") for name in ("crashing", "calm"))
    setattr(world.desk, f"crash_{where}", 2)
    with pytest.raises(Crash):
        world.run()
    assert world.run().digest == calm.run().digest
    assert world.sites["c"].trained == []
