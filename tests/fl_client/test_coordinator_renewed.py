"""A coordinator renews its key and its CA: hospitals go on, those that were away for all of it too."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_data import TABLE, make_table
from site_world import World, running, wait_for

from fl_client import consents
from fl_client.events import Connected, VersionArrived
from fl_client.site import join_site
from fl_client.trainer import Trainer
from medhive.client import GatewayClient
from medhive.envelope import Task, TaskType
from medhive.introduction import known_key_ids
from medhive.signing import SigningKey
from medhive.wire import API, CoordinatorAnswer, RunAnswer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    world.study("heart", "tabular", TABLE)
    yield world
    world.close()


def renew(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MEDHIVE_GATEWAY_STATE_DIR": str(world.stack.gateway_state)}
    command = [sys.executable, "-m", "api_gateway", "renew", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def told(world: World) -> list[str]:
    with GatewayClient(world.stack.url, world.stack.trust()) as client:
        client.use_token(client.post(f"{API}/login", {"username": "admin", "password": world.password})["token"])
        rows = client.get(f"{API}/events", limit=1000)
    return [row["kind"] for row in rows if row["kind"].startswith(("coordinator.ca", "coordinator.key"))]


def coordinator_key(world: World) -> SigningKey:
    return SigningKey.load(world.stack.gateway_state / "secrets" / "coordinator.key")


def task(world: World, run: RunAnswer, kind: TaskType, number: int, base: Path, *, key: SigningKey) -> Task:
    """A task on these weights, signed with this key."""
    digest = world.put(run, base)
    values = {"base_digest": digest, "base_size_bytes": base.stat().st_size, "key": key}
    return world.task(run, "training", kind, number, **values)


def test_a_run_goes_on_with_another_key(world: World, tmp_path: Path) -> None:
    make_table(tmp_path / "heart")
    site, old = world.join("training", "heart", data=tmp_path), coordinator_key(world)
    with Trainer(site.limits) as trainer, running(site, trainer=trainer) as node:
        node.wait(Connected)
        run = world.run("heart", rounds=2, min_sites=1)
        consents.grant(site, run, person="Dr. West", check=consents.check_data(site, trainer, run.spec))
        lease = world.lease(run)
        weights = node.ask(world.task(run, "training", TaskType.INITIALISE)).content_digest
        base = world.fetch(run, weights, tmp_path / "base")
        first = node.ask(task(world, run, TaskType.TRAIN, 1, base, key=old))
        world.close_round(run, lease, 1, first.content_digest)
        assert renew(world, "key").returncode == 0
        new = coordinator_key(world)
        # The consent names the old key, and covers what the new one signs.
        update = world.fetch(run, first.content_digest, tmp_path / "update")
        second = node.ask(task(world, run, TaskType.TRAIN, 2, update, key=new))
        assert (second.outcome, site.identity.verify_key) == ("ok", new.public)
        # What the aggregator had asked a moment before it got the new key is answered too.
        final = world.fetch(run, second.content_digest, tmp_path / "final")
        assert node.ask(task(world, run, TaskType.EVALUATE, 2, final, key=old)).outcome == "ok"
        stranger = node.ask(task(world, run, TaskType.EVALUATE, 2, final, key=SigningKey.generate()))
        assert (stranger.outcome, stranger.reason_code) == ("refused", "bad-signature")
        world.close_round(run, lease, 2, second.content_digest)
        world.end(run, lease, second.content_digest)
        assert node.wait(VersionArrived).study == "heart"
        assert world.look(run.id).state == "completed"


def test_hospitals_follow_a_new_key_and_a_new_ca(world: World) -> None:
    present, away = world.join("present", "heart"), world.join("away", "heart")
    invited = world.invite("invited", "heart")
    old_key, old_ca = present.identity.verify_key, present.identity.ca_pem
    before = len(told(world))
    with running(present) as node:
        node.wait(Connected)
        done = renew(world, "key")
        assert done.returncode == 0 and f"key {old_key.key_id} has named it" in done.stdout, done.stderr
        new = coordinator_key(world).public
        wait_for(lambda: present.identity.verify_key == new, "the running hospital follows the key")
        assert present.identity.key_ids == (new.key_id, old_key.key_id)
        done = renew(world, "ca")
        assert done.returncode == 0 and "A successor of the CA is trusted from now on" in done.stdout, done.stderr
        wait_for(lambda: present.identity.ca_pem.count("BEGIN") == 2, "the running hospital trusts both")
        again = renew(world, "ca")
        assert again.returncode == 1 and "announced already" in again.stderr
        done = renew(world, "ca", "--at-once")
        assert done.returncode == 0 and "no other is trusted" in done.stdout, done.stderr
        wait_for(lambda: present.identity.ca_pem.count("BEGIN") == 1, "the former one is dropped")
        assert present.identity.ca_pem != old_ca
        assert [study.name for study in present.gateway.studies()] == ["heart"]
    back = world.open(away.settings)
    assert [study.name for study in back.gateway.studies()] == ["heart"]
    back.greet()
    assert back.identity.verify_key == new and back.identity.ca_pem == present.identity.ca_pem
    assert join_site(world.settings("invited"), invited).studies == ("heart",)
    wait_for(lambda: told(world)[-1] == "coordinator.ca-dropped", "the log has it")
    assert told(world)[before:] == [
        "coordinator.key-changed", "coordinator.ca-announced", "coordinator.ca-changed", "coordinator.ca-dropped"
    ]  # fmt: skip
    with GatewayClient(world.stack.url, world.stack.trust()) as client:
        answer = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator"))
    assert known_key_ids(new, answer.successions)[:2] == (new.key_id, old_key.key_id)


def test_a_folder_without_a_coordinator_is_not_made_one(tmp_path: Path) -> None:
    environment = {**os.environ, "MEDHIVE_GATEWAY_STATE_DIR": str(tmp_path / "nothing")}
    command = [sys.executable, "-m", "api_gateway", "renew", "key"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "holds no coordinator yet" in done.stderr
    assert not (tmp_path / "nothing").exists()
