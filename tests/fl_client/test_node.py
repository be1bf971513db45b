"""The node: it does what it has consented to, once, and answers until it is heard."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

import pytest
from site_data import IMAGES, TABLE, make_images, make_table
from site_world import DEADLINE_S, Loopback, Running, World, running, wait_for

from fl_client import consents, policy, requests, updates
from fl_client.events import (
    Connected,
    ConsentFailed,
    ConsentGiven,
    ConsentWanted,
    EpochDone,
    PauseChanged,
    Problem,
    Revoked,
    RoundDone,
    RoundFailed,
    RoundStarted,
    RunFinished,
    RunStarted,
    TaskRefused,
    VersionArrived,
    VersionJudged,
)
from fl_client.flower import FleetClosed, Inbound, NodeRevoked
from fl_client.gateway import SiteRevoked
from fl_client.jobs import Job, JobKind
from fl_client.limits import Limits
from fl_client.node import _item_of
from fl_client.site import AlreadyRunning, Site
from fl_client.trainer import Trainer
from medhive import __version__, version
from medhive.envelope import Task, TaskType, check_contribution_envelope, to_bytes
from medhive.errors import InvalidInput
from medhive.packing import read_weights, write_weights
from medhive.signing import SigningKey
from medhive.states import Activity
from medhive.version import OLDEST_PROTOCOL, PROTOCOL
from medhive.wire import API, RunAnswer

MONTH = timedelta(days=30)
TRAIN, EVALUATE = TaskType.TRAIN, TaskType.EVALUATE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    world.study("brain", "image-folder", IMAGES, batch_size=16)
    world.study("heart", "tabular", TABLE)
    yield world
    world.close()


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    data = world.folder / "data"
    make_images(data / "brain")
    make_table(data / "heart")
    return world.join("north", "brain", "heart", data=data)


@pytest.fixture(scope="module")
def trainer(site: Site) -> Iterator[Trainer]:
    """One warm trainer for all tests that do not kill it: importing torch takes longer than they do."""
    with Trainer(site.limits) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def base(world: World, site: Site, trainer: Trainer) -> Path:
    """Version 0's weights."""
    file = world.folder / "base.safetensors"
    source = site.source("brain", "image-folder", IMAGES)
    trainer.run(Job(id="init", kind=JobKind.INITIALISE, source=source, device="cpu", out=file))
    return file


@dataclass(frozen=True)
class Scene:
    """A coordinator, one hospital with a warm trainer, and the weights that its runs start from."""

    world: World
    site: Site
    trainer: Trainer
    base: Path

    def consented(self, study: str = "brain", **options: object) -> RunAnswer:
        """A run that is ready with this site's consent alone."""
        values = {"rounds": 2, "local_epochs": 2, "min_sites": 1, **options}
        run = self.world.run(study, **values)
        check = consents.check_data(self.site, self.trainer, run.spec)
        consents.grant(self.site, run, person="Dr. North", check=check)
        return run

    def train(self, run: RunAnswer, digest: str, number: int = 1, base: Path | None = None, **fields: object) -> Task:
        """A training task."""
        values = {"base_digest": digest, "base_size_bytes": size_of(base or self.base), **fields}
        return self.world.task(run, "north", TRAIN, number, **values)

    def node(self, fleet: Loopback | None = None) -> AbstractContextManager[Running]:
        """The hospital's node, until the block ends."""
        return running(self.site, fleet, self.trainer)


@pytest.fixture(scope="module")
def scene(world: World, site: Site, trainer: Trainer, base: Path) -> Scene:
    return Scene(world, site, trainer, base)


def signal_trainer(trainer: Trainer, number: signal.Signals) -> None:
    assert trainer.process_id, "there is no child"
    os.kill(trainer.process_id, number)


def size_of(file: Path) -> int:
    return file.stat().st_size


def test_a_run_from_initial_weights_to_a_version(scene: Scene, tmp_path: Path) -> None:
    world, site = scene.world, scene.site
    run = scene.consented()
    with scene.node() as node:
        lease = world.lease(run)
        first = node.ask(world.task(run, "north", TaskType.INITIALISE))
        assert first.outcome == "ok"
        base = world.fetch(run, first.content_digest, tmp_path / "base")
        for number in (1, 2):
            digest = world.put(run, base)
            task = world.task(run, "north", TRAIN, number, base_digest=digest, base_size_bytes=size_of(base))
            envelope = node.answer(node.send(task))
            body = check_contribution_envelope(envelope, site.consent_key.public, task.body)
            assert body.outcome == "ok"
            assert body.examples > 0
            assert {"val_accuracy", "val_recall/glioma", "train_loss"} <= body.metrics.keys()
            assert body.training_s > 0
            base = world.fetch(run, body.content_digest, tmp_path / f"update-{number}")
            world.close_round(run, lease, number, body.content_digest)
        digest = world.put(run, base)
        task = world.task(run, "north", EVALUATE, 2, base_digest=digest, base_size_bytes=size_of(base))
        final = node.ask(task)
        assert final.metrics["val_accuracy"] >= 0
        assert not final.content_digest
        world.end(run, lease, digest, metrics=final.metrics)
        finished = node.wait(RunFinished)
        assert (finished.run_id, finished.state, finished.rounds) == (run.id, "completed", 2)
        assert finished.file is not None
        assert finished.file.name == f"north_FinalGlobal_v{finished.version}.safetensors"
        assert read_weights(finished.file).keys() == read_weights(base).keys()
        assert updates.manifest_file(finished.file).exists()
        assert node.wait(VersionArrived).candidate
        judged = node.wait(VersionJudged)
        assert set(judged.accuracies) == {"candidate"}
    start = node.all(RunStarted)
    assert [sum(item.classes.values()) for item in start] == [48]
    assert len(node.all(EpochDone)) == 4
    assert [item.kind for item in node.all(RoundDone)] == ["initialise", "train", "train", "evaluate"]
    assert len(node.all(RoundStarted)) == 4
    assert sorted(event.to for event in node.all(Connected)) == ["fleet", "gateway"]
    names = {path.name for path in site.folder("runs").glob(f"{run.id}/*")}
    assert not any("update-train-1" in name for name in names)


def test_a_version_is_decided_rolled_back_and_used(world: World, site: Site, trainer: Trainer) -> None:
    """Goes on with the version of the run before."""
    [candidate] = [item for item in updates.undecided(site) if item.study == "brain"]
    evaluation = site.store.version("brain", candidate.version)
    assert evaluation is not None
    assert evaluation.evaluation is not None
    decided = updates.accept(site, "brain", candidate.version, person="Dr. North", reason="better")
    assert decided.delivered
    assert site.store.champion("brain") == candidate.version
    seen = world.admin.get(f"{API}/studies/brain/versions/{candidate.version}")
    [own] = [item for item in seen["decisions"] if item["site"] == "north"]
    assert own["state"] == "accepted"
    assert "heldout_accuracy" in own["metrics"]
    predictions = updates.predict(site, trainer, site.data_dir("brain") / "glioma")
    judged = updates.judge(site, trainer, "brain", candidate.version, local_only=True)
    again = updates.judge(site, trainer, "brain", candidate.version, local_only=True)
    assert len(predictions) == 12
    assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1)
    assert set(judged["evaluations"]) == {"candidate", "local_only"}
    assert "local_only" in judged["comparisons"]
    assert again["evaluations"] == judged["evaluations"]
    updates.reject(site, "brain", candidate.version, person="Dr. North", reason="on second thought")
    assert site.store.champion("brain") is None
    assert [entry.version for entry in updates.history(site, "brain")] == [candidate.version]


@pytest.fixture
def ready(scene: Scene) -> tuple[RunAnswer, str]:
    world, base = scene.world, scene.base
    run = scene.consented(local_epochs=1)
    world.lease(run)
    return run, world.put(run, base)


def test_a_round_is_trained_once_and_answered_again(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    run, digest = ready
    with scene.node() as node:
        first = node.answer(node.send(scene.train(run, digest)))
        again = node.answer(node.send(scene.train(run, digest)))
        assert again == first
    with scene.node() as restarted:
        assert restarted.answer(restarted.send(scene.train(run, digest))) == first
        assert not restarted.all(EpochDone)
    assert len(node.all(EpochDone)) == 1


def test_a_message_is_on_disk_before_it_is_confirmed(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    run, digest = ready
    fleet = Loopback()
    kept: list[bool] = []

    def look(inbound: Inbound) -> None:
        kept.append(inbound.message_id in [item.message_id for item in scene.site.store.inbox()])

    fleet.on_confirm = look
    with scene.node(fleet) as node:
        message = node.send(scene.train(run, digest))
        wait_for(lambda: message in fleet.confirmed, "the confirmation")
        assert kept == [True]
        node.answer(message)


def test_a_message_that_was_kept_but_not_confirmed_is_confirmed_later(
    scene: Scene, ready: tuple[RunAnswer, str]
) -> None:
    run, digest = ready
    payload = to_bytes(scene.train(run, digest))
    kept = Inbound("of-a-killed-process", 1, payload, time.time(), 3600.0, "train")
    scene.site.store.keep_inbound(_item_of(kept))
    fleet = Loopback()
    with scene.node(fleet) as node:
        assert node.answer(kept.message_id).body.outcome == "ok"
        wait_for(lambda: fleet.confirmed == [kept.message_id], "the confirmation")


def test_a_killed_node_goes_on_with_the_same_bits(scene: Scene, ready: tuple[RunAnswer, str], tmp_path: Path) -> None:
    world, site, base = scene.world, scene.site, scene.base
    run, digest = ready
    reference = scene.consented(local_epochs=1)
    world.lease(reference)
    with scene.node() as node:
        message = node.send(scene.train(run, digest))
        node.wait(RoundStarted)
    # Stopped in mid-round: nothing was answered, and the message is still owed an answer.
    if message not in node.fleet.replies:
        assert [item.message_id for item in site.store.inbox()] == [message]
    fleet = Loopback()
    with scene.node(fleet) as restarted:
        body = restarted.answer(message).body if message not in node.fleet.replies else node.answer(message).body
        other = restarted.ask(scene.train(reference, world.put(reference, base)))
    assert body.content_digest == other.content_digest
    assert site.store.inbox() == []


def test_the_end_of_the_own_work_is_waited_for_and_no_look_in_between(
    scene: Scene, ready: tuple[RunAnswer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, digest = ready
    monkeypatch.setattr("fl_client.node.WORKING_POLL_S", 600.0)
    monkeypatch.setattr(scene.site, "settings", scene.site.settings.model_copy(update={"slow_poll_s": 600.0}))
    with scene.node() as node:
        for number in (1, 2):
            assert node.ask(scene.train(run, digest, number)).outcome == "ok"


class SlowToReconnect(Loopback):
    """Connects a second time when the test lets it; Flower takes no answer from a node that is not connected."""

    def __init__(self) -> None:
        super().__init__()
        self.connects = 0
        self.inside = False
        self.too_early: list[str] = []
        self.may = threading.Event()

    def __enter__(self) -> Self:
        self.connects += 1
        assert self.connects == 1 or self.may.wait(DEADLINE_S)
        self.inside = True
        return super().__enter__()

    def __exit__(self, *words: object) -> None:
        self.inside = False
        super().__exit__(*words)

    def reply(self, inbound: Inbound, payload: bytes) -> bool:
        if not self.inside:
            self.too_early.append(inbound.message_id)
            raise NodeRevoked("The node key is not accepted.")
        return super().reply(inbound, payload)


def test_an_answer_that_is_made_between_two_connections_waits_for_the_second(
    scene: Scene, ready: tuple[RunAnswer, str]
) -> None:
    run, digest = ready
    fleet = SlowToReconnect()
    with scene.node(fleet) as node:
        message = node.send(scene.train(run, digest))
        node.wait(RoundStarted)
        node.node._reach_fleet_anew()
        wait_for(lambda: fleet.connects > 1, "it connects again")
        node.wait(RoundDone)
        wait_for(lambda: not node.node._in_work, "the answer is made")
        fleet.may.set()
        node.answer(message)
        assert not fleet.too_early


PATIENCE_S = 20.0  # for what takes no training


class LosesTheFirstAnswer(Loopback):
    """The first answer fails with its connection, and only when the next connection has its task again."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self.taken_again = threading.Event()

    def confirm(self, inbound: Inbound) -> None:
        super().confirm(inbound)
        if self.confirmed.count(inbound.message_id) > 1:
            self.taken_again.set()

    def reply(self, inbound: Inbound, payload: bytes) -> bool:
        if self.lost:
            return super().reply(inbound, payload)
        self.lost = True
        self.close()
        assert self.taken_again.wait(DEADLINE_S)
        raise FleetClosed("closed")


def test_an_answer_that_is_lost_with_its_connection_is_brought_over_the_next(
    scene: Scene, ready: tuple[RunAnswer, str]
) -> None:
    run, digest = ready
    with scene.node(LosesTheFirstAnswer()) as node:
        assert node.ask(scene.train(run, digest)).outcome == "ok"
    with scene.node(LosesTheFirstAnswer()) as node:
        refused = node.answer(node.send(scene.train(run, digest, protocol=99)), PATIENCE_S).body
    assert refused.outcome == "refused"


def test_rounds_go_upward_only(scene: Scene, ready: tuple[RunAnswer, str], tmp_path: Path) -> None:
    world, base = scene.world, scene.base
    run, digest = ready
    other = tmp_path / "other.safetensors"
    write_weights(other, {name: array + 1 for name, array in read_weights(base).items()})
    elsewhere = world.put(run, other)
    with scene.node() as node:
        assert node.ask(scene.train(run, digest, 2)).outcome == "ok"
        late = node.ask(scene.train(run, digest, 1))
        twice = node.ask(scene.train(run, elsewhere, 2, other))
        beyond = node.ask(scene.train(run, digest, 3))
    assert (late.outcome, late.reason_code) == ("refused", "round-passed")
    assert (twice.outcome, twice.reason_code) == ("refused", "already-trained")
    assert (beyond.outcome, beyond.reason_code) == ("refused", "invalid-input")


def test_what_is_not_the_coordinators_is_refused(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    run, digest = ready
    good = scene.train(run, digest)
    with scene.node() as node:
        forged = node.ask(scene.train(run, digest, key=SigningKey.generate()))
        changed = node.ask(good.model_copy(update={"body": good.body.model_copy(update={"deadline_s": 1e6})}))
        foreign = node.ask(scene.train(run, digest, site="south"))
        spec = node.ask(scene.train(run, digest, spec_hash="0" * 64))
        newer = node.ask(scene.train(run, digest, protocol=99))
        huge = node.ask(scene.train(run, digest, base_size_bytes=2**40))
        node.send(b"not an envelope")
        assert node.ask(good).outcome == "ok"
    assert {item.reason_code for item in (forged, changed, foreign, spec)} == {"bad-signature"}
    assert newer.reason_code == "incompatible-version"
    assert huge.reason_code == "too-large"
    assert {item.outcome for item in (forged, changed, foreign, spec, newer, huge)} == {"refused"}
    assert len(node.all(TaskRefused)) == 6


def test_a_task_of_another_version_is_refused_at_once_though_it_cannot_be_read(
    scene: Scene, ready: tuple[RunAnswer, str]
) -> None:
    run, digest = ready
    task = json.loads(to_bytes(scene.train(run, digest)))
    later = {**task, "body": {**task["body"], "protocol": PROTOCOL + 1, "invented": "later"}}
    with scene.node() as node:
        answer = node.answer(node.send(json.dumps(later).encode())).body
    assert (answer.outcome, answer.reason_code, answer.round) == ("refused", "incompatible-version", 1)
    assert f"MedHive {__version__}, protocol {PROTOCOL}" in answer.reason
    assert "upgrade this hospital" in node.all(TaskRefused)[0].message


def test_an_answer_from_before_an_upgrade_is_made_again(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    run, digest = ready
    task = scene.train(run, digest)
    with scene.node() as node:
        first = node.ask(task)
        kept = scene.site.store.reply(run.id, "train", 1, digest)
        assert kept is not None
        old = kept.payload.replace(f'"protocol":{PROTOCOL}'.encode(), f'"protocol":{OLDEST_PROTOCOL - 1}'.encode())
        assert old != kept.payload
        scene.site.store.forget_reply(run.id, "train", 1, digest)
        scene.site.store.keep_reply(replace(kept, payload=old))
        again = node.ask(task)
    assert again.protocol == PROTOCOL
    assert again.content_digest == first.content_digest, "the same training, bit for bit"


def test_a_coordinator_of_another_version_is_told_once_and_greeted_when_it_fits(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process plays a hospital of an older version, and is upgraded while it runs."""
    asked: list[str] = []
    introduction = scene.site.gateway.introduction
    monkeypatch.setattr(scene.site.gateway, "introduction", lambda: (asked.append(""), introduction())[1])
    with monkeypatch.context() as older:
        older.setattr(version, "PROTOCOL", OLDEST_PROTOCOL - 1)
        older.setattr(version, "OLDEST_PROTOCOL", OLDEST_PROTOCOL - 1)
        with scene.node() as node:
            wait_for(lambda: len(asked) >= 3, "several looks")
            (problem,) = node.all(Problem)
            assert re.search(rf"speaks protocol {PROTOCOL}, this hospital .* upgrade this hospital", problem.message)
            assert not [event for event in node.all(Connected) if event.to == "gateway"]
            older.undo()
            wait_for(lambda: any(event.to == "gateway" for event in node.all(Connected)), "the coordinator")


def test_a_test_set_is_judged_as_a_whole_and_nothing_else_is_done_with_it(scene: Scene, tmp_path: Path) -> None:
    world, base = scene.world, scene.base
    images = tmp_path / "brain"
    make_images(images)
    site = world.join("referee", "brain", data=tmp_path, evaluates_only=True)
    assert site.identity.evaluates_only
    run = world.run("brain", rounds=2, min_sites=1)
    check = consents.check_data(site, scene.trainer, run.spec)
    consents.grant(site, run, person="Dr. Ref", check=check)
    consents.grant(scene.site, run, person="Dr. North", check=consents.check_data(scene.site, scene.trainer, run.spec))
    world.lease(run)
    digest = world.put(run, base)
    weights = {"base_digest": digest, "base_size_bytes": size_of(base)}
    with running(site, None, scene.trainer) as node:
        judged = node.ask(world.task(run, "referee", TaskType.EVALUATE, 1, **weights))
        kinds = (TRAIN, TaskType.INITIALISE, TaskType.STATISTICS)
        refused = [node.ask(world.task(run, "referee", kind, int(kind is TRAIN), **weights)) for kind in kinds]
    assert judged.outcome == "ok"
    assert judged.examples == sum(map(sum, judged.confusion)) == check.examples == len(list(images.glob("*/*")))
    world.admin.delete(f"{API}/studies/brain/members/referee")  # else the runs of other tests wait for its consent
    assert {(item.outcome, item.reason_code) for item in refused} == {("refused", "evaluates-only")}


def test_no_task_without_an_own_consent(scene: Scene) -> None:
    world = scene.world
    run = world.run("brain", rounds=2, min_sites=1)
    with scene.node() as node:
        body = node.ask(scene.train(run, "0" * 64))
        assert (body.outcome, body.reason_code) == ("refused", "not-allowed")
        wanted = node.wait(ConsentWanted)
        assert (wanted.run_id, wanted.study) == (run.id, "brain")
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": "test"})


def test_a_withdrawal_stops_the_training(scene: Scene) -> None:
    world, site, base = scene.world, scene.site, scene.base
    run = scene.consented(local_epochs=100)
    world.lease(run)
    digest = world.put(run, base)
    with scene.node() as node:
        message = node.send(scene.train(run, digest))
        node.wait(EpochDone)
        consents.withdraw(site, run.id, person="Dr. North", reason="stop it")
        body = node.answer(message).body
        assert (body.outcome, body.reason_code) == ("refused", "not-allowed")
        epochs = len(node.all(EpochDone))
        assert node.ask(scene.train(run, digest)).outcome == "refused"
        assert len(node.all(EpochDone)) == epochs


def test_a_stopped_run_stops_the_training(scene: Scene) -> None:
    world, base = scene.world, scene.base
    run = scene.consented(local_epochs=100)
    lease = world.lease(run)
    digest = world.put(run, base)
    with scene.node() as node:
        message = node.send(scene.train(run, digest))
        node.wait(EpochDone)
        world.end(run, lease, None, "cancelled", reason="stopped by an admin")
        assert node.answer(message).body.outcome == "refused"
        finished = node.wait(RunFinished)
        assert (finished.run_id, finished.state) == (run.id, "cancelled")


def test_a_killed_trainer_is_answered_and_the_next_round_works(scene: Scene) -> None:
    world, trainer, base = scene.world, scene.trainer, scene.base
    restarts = trainer.restarts
    run = scene.consented(local_epochs=100)
    world.lease(run)
    digest = world.put(run, base)
    quick = scene.consented(local_epochs=1)
    world.lease(quick)
    with scene.node() as node:
        message = node.send(scene.train(run, digest))
        for deaths in (1, 2):
            node.wait(RoundStarted, count=deaths)
            signal_trainer(trainer, signal.SIGKILL)
        body = node.answer(message).body
        assert (body.outcome, body.reason_code) == ("failed", "out-of-memory")
        assert node.wait(RoundFailed).code == "out-of-memory"
        assert node.ask(scene.train(quick, world.put(quick, base))).outcome == "ok"
        assert node.node.trainer_restarts == restarts + 2


def test_activity_is_reported_while_it_lasts(scene: Scene) -> None:
    world, base = scene.world, scene.base
    run = scene.consented(local_epochs=15)
    world.lease(run)
    digest = world.put(run, base)

    def activities() -> list[Activity]:
        return [item.activity for item in world.look(run.id).activity if item.site == "north"]

    with scene.node() as node:
        message = node.send(scene.train(run, digest))
        node.wait(RoundStarted)
        signal_trainer(scene.trainer, signal.SIGSTOP)  # else it may be over before it is seen
        try:
            wait_for(lambda: Activity.TRAINING in activities(), "training being seen")
            [seen] = world.look(run.id).activity
        finally:
            signal_trainer(scene.trainer, signal.SIGCONT)
        assert seen.started_at is not None
        node.answer(message)
        wait_for(lambda: activities() == [Activity.DONE], "done being seen")


def test_a_pause_holds_training_and_lets_it_go_on(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    world, site = scene.world, scene.site
    run, digest = ready
    limits = site.limits()
    limits.with_changes(paused=True).save(site.store)
    try:
        with scene.node() as node:
            node.wait(PauseChanged)
            message = node.send(scene.train(run, digest))
            queued = [Activity.QUEUED]
            wait_for(lambda: [item.activity for item in world.look(run.id).activity] == queued, "queued being seen")
            assert not node.all(RoundStarted)
            limits.save(site.store)
            assert node.answer(message).body.outcome == "ok"
    finally:
        limits.save(site.store)


def test_two_runs_at_once_and_the_short_one_is_not_held_up(scene: Scene) -> None:
    world, base = scene.world, scene.base
    long = scene.consented(local_epochs=100)
    world.lease(long)
    short = scene.consented(local_epochs=1)
    world.lease(short)
    with scene.node() as node:
        slow = node.send(scene.train(long, world.put(long, base)))
        node.wait(EpochDone)
        quick = node.send(scene.train(short, world.put(short, base)))
        assert node.answer(quick).body.outcome == "ok"
        assert slow not in node.fleet.replies


def test_tables_and_images_side_by_side(scene: Scene) -> None:
    world = scene.world
    run = scene.consented("heart")
    world.lease(run)
    with scene.node() as node:
        sums = node.ask(world.task(run, "north", TaskType.STATISTICS))
        assert sums.statistics["examples"][0] > 100
        first = node.ask(world.task(run, "north", TaskType.INITIALISE, statistics=sums.statistics))
        assert first.outcome == "ok"
        fields = {"base_digest": first.content_digest, "base_size_bytes": first.content_size_bytes}
        task = world.task(run, "north", TRAIN, 1, statistics=sums.statistics, **fields)
        # The aggregator makes the initial weights a blob of its own; a site may fetch its own upload as well.
        trained = node.ask(task)
        assert trained.outcome == "ok"
        assert trained.metrics["train_accuracy"] > 0.7


def test_own_requests_and_policies_consent_by_themselves(scene: Scene) -> None:
    world, site = scene.world, scene.site
    policy.sign_policy(site, person="Prof. Chief", studies=("heart",), max_rounds=2, valid_for=MONTH)
    try:
        allowed = world.run("heart", rounds=2, min_sites=1)
        request = requests.send_request(site, "brain", {"rounds": 3, "min_sites": 1}, person="Dr. North")
        own = world.approve(request.id)
        with scene.node() as node:
            node.wait(ConsentGiven, count=2)
        given = {event.run_id: event.person for event in node.all(ConsentGiven)}
        assert given == {allowed.id: "Prof. Chief", own.id: "Dr. North"}
        assert world.look(own.id).state == "ready"
    finally:
        policy.remove_policy(site)


def test_data_that_do_not_fit_are_not_consented_to_by_itself(scene: Scene, tmp_path: Path) -> None:
    world, site = scene.world, scene.site
    folder = tmp_path / "wrong"
    make_images(folder)
    (folder / "glioma").rename(folder / "cyst")
    settings = site.store.study("brain")
    site.store.set_study(type(settings)("brain", data_dir=folder))
    try:
        request = requests.send_request(site, "brain", {"rounds": 3, "min_sites": 1}, person="Dr. North")
        run = world.approve(request.id)
        with scene.node() as node:
            failed = node.wait(ConsentFailed)
        assert failed.run_id == run.id
        assert "cyst" in failed.reason
    finally:
        site.store.set_study(settings)


def test_changed_data_are_not_trained_on(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    site = scene.site
    run, digest = ready
    extra = site.data_dir("brain") / "glioma" / "extra.jpg"
    # Another picture than all others: a copy of one would count once.
    picture = bytearray((site.data_dir("brain") / "glioma" / "glioma_0001.jpg").read_bytes())
    extra.write_bytes(bytes(picture) + b"\0")
    try:
        # A trainer that has the consented data open goes on with those; one that reads them anew must notice.
        with running(site) as node:
            body = node.ask(scene.train(run, digest))
        assert (body.outcome, body.reason_code) == ("failed", "data-changed")
    finally:
        extra.unlink()


def test_only_numbers_leave(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    """No name of a file or folder in anything that the coordinator or the fleet was ever sent."""
    world, site = scene.world, scene.site
    run, digest = ready
    with scene.node() as node:
        node.ask(scene.train(run, digest))
        node.ask(scene.train(run, "0" * 64, 2))
    sent = [payload.decode() for payload in node.fleet.replies.values()]
    sent.append(json.dumps(world.admin.get(f"{API}/runs/{run.id}")))
    sent.append(json.dumps(world.admin.get(f"{API}/runs/{run.id}/consents")))
    sent.append(json.dumps(world.admin.get(f"{API}/events", limit=1000)))
    # Other hospitals' files lie below the same folder, so the names are this site's own.
    names = {path.name for path in site.data_dir("brain").rglob("*.jpg")} | {
        "patients-of-ward-7",
        str(site.data_dir("x")),
    }
    assert len(names) > 40
    for text in sent:
        assert not [name for name in names if name in text]


def test_event_heads_are_kept_and_countersigned(scene: Scene) -> None:
    world, site = scene.world, scene.site
    with scene.node() as node:
        node.wait(Connected)

        def countersigned() -> bool:
            head = site.store.newest_head()
            return head is not None and head.countersigned

        wait_for(countersigned, "a countersigned head")
    rows = world.admin.get(f"{API}/events/countersignatures")
    assert any(row["body"]["site"] == "north" for row in rows)


def test_the_gateway_may_be_away_and_come_back(scene: Scene, ready: tuple[RunAnswer, str]) -> None:
    world = scene.world
    run, digest = ready
    program = world.stack.programs["gateway"]
    with scene.node() as node:
        node.wait(Connected)
        program.kill()
        message = node.send(scene.train(run, digest))
        assert message not in node.fleet.replies
        world.stack.start_gateway()
        assert node.answer(message).body.outcome == "ok"


def test_one_node_a_state_folder(scene: Scene) -> None:
    with scene.node() as node:
        node.wait(Connected)
        with scene.node() as second:
            wait_for(lambda: second.error is not None, "a refusal")
        assert isinstance(second.error, AlreadyRunning)


def test_a_revoked_site_stops_with_a_clear_message(world: World, base: Path) -> None:
    data = world.folder / "data"
    unwanted = world.join("unwanted", "brain", data=data)
    with running(unwanted) as node:
        node.wait(Connected, count=2)
        world.admin.post(f"{API}/sites/unwanted/revoke", {"reason": "test"})
        wait_for(lambda: isinstance(node.error, SiteRevoked), "the end")
        assert "no longer works with this hospital" in node.wait(Revoked).message


def test_a_fleet_that_forgets_the_key_is_asked_again(scene: Scene) -> None:
    fleet = Loopback()
    with scene.node(fleet) as node:
        node.wait(Connected, count=2)
        fleet.revoked.set()
        wait_for(fleet._closed.is_set, "the end of the connection")
        fleet.revoked.clear()
        node.wait(Connected, count=3)
    assert not node.all(Revoked)


def test_hours_and_limits() -> None:
    night = Limits(hours=("20:00-06:00",))
    assert night.may_train(datetime(2026, 1, 1, 23, 0))
    assert night.may_train(datetime(2026, 1, 1, 5, 59))
    assert not night.may_train(datetime(2026, 1, 1, 6, 0))
    assert not Limits(paused=True).may_train(datetime(2026, 1, 1, 6, 0))
    for wrong in (
        {"hours": ("8-9-10",)},
        {"hours": ("08:00-08:00",)},
        {"cpu_threads": 0},
        {"gpu_memory_fraction": 2.0},
    ):
        with pytest.raises(InvalidInput):
            Limits(**wrong)
