"""Whatever process is killed during a run, the run ends with the same bits as one that nothing happened to.

The strategy is one that remembers something between rounds and sends each hospital something of its own (SCAFFOLD), and
the hospitals keep their optimisers' state, so that a round which is repeated, left out, or begun from the wrong place shows
in the digest of the weights. One hospital's trainer is held still in the second round, so that every kill comes in the
middle of a round of which two answers are in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
from hospital_world import SITES, World, is_alive

from fl_client import updates
from fl_client.trainer import Trainer
from medhive.packing import read_weights
from medhive.wire import VersionAnswer

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of eight processes
ROUNDS = 3
KILL_IN = 2  # the round in which each process dies
A, B, C = SITES
MANY_EPOCHS = 20  # some seconds, so that a kill after the first comes in the middle of a training
SPEC: dict[str, Any] = {"rounds": ROUNDS, "strategy": "scaffold", "seed": 7}


@dataclass(frozen=True)
class Unbroken:
    """What a run makes when nothing happens to it."""

    spec_hash: str
    version: VersionAnswer
    digests: list[str | None]


@pytest.fixture(scope="module")
def unbroken(world: World) -> Unbroken:
    """The same specification, without trouble."""
    run_id = world.begin("tumours", base_version=0, **SPEC)
    version = world.completed(run_id)
    return Unbroken(world.run(run_id).spec_hash, version, world.digests(run_id))


def require_same_bits(world: World, run_id: str, unbroken: Unbroken) -> None:
    version = world.completed(run_id)
    assert world.run(run_id).spec_hash == unbroken.spec_hash
    assert world.digests(run_id) == unbroken.digests
    assert version.digest == unbroken.version.digest
    assert version.metrics == unbroken.version.metrics
    assert all(
        len(item.sites) == len(SITES) and not any(s.dropped for s in item.sites) for item in world.rounds(run_id)
    )


def trained_once(world: World, run_id: str, site: str) -> bool:
    """Whether a hospital has trained each round of a run exactly once."""
    lines = world.log(site).splitlines()
    return all(sum(f"{run_id} round {n}/{ROUNDS} done" in line for line in lines) == 1 for n in range(1, ROUNDS + 1))


def test_the_same_run_again_makes_the_same_bits(world: World, unbroken: Unbroken) -> None:
    run_id = world.begin("tumours", base_version=0, **SPEC)
    require_same_bits(world, run_id, unbroken)
    assert len(set(unbroken.digests)) == ROUNDS


def process_named(world: World, words: str) -> psutil.Process:
    return world.wait(lambda: world.process_of_server(words), f"the process {words}")


def kill_serverapp(world: World) -> None:
    world.kill(process_named(world, "fl_server.flower serverapp"))


def kill_superexec(world: World) -> None:
    world.kill(process_named(world, "fl_server.flower superexec"))


def kill_superlink(world: World) -> None:
    world.kill(process_named(world, "fl_server.flower superlink"))


def kill_server(world: World) -> None:
    world.kill_server()
    world.stack.start_server()


def kill_gateway(world: World) -> None:
    world.stack.programs["gateway"].kill()
    world.stack.start_gateway()


COORDINATOR: Mapping[str, Callable[[World], None]] = {
    "serverapp": kill_serverapp,
    "superexec": kill_superexec,
    "superlink": kill_superlink,
    "medhive-server": kill_server,
    "gateway": kill_gateway,
}

# With these the run's own process dies; it is started anew and goes on from its checkpoint. It outlives the others.
TAKING_THE_RUN_ALONG = frozenset({"serverapp", "superexec", "medhive-server"})


@pytest.mark.parametrize("victim", COORDINATOR)
def test_a_killed_process_of_the_coordinator_changes_no_bit(world: World, unbroken: Unbroken, victim: str) -> None:
    run_id = world.begin("tumours", base_version=0, **SPEC)
    with world.held_in_round(run_id, KILL_IN, C, other=A):
        for site in (A, B):
            world.accepted(run_id, KILL_IN, site)
            assert list((world.state(site) / "runs" / run_id).glob("correction-*.safetensors"))
        COORDINATOR[victim](world)
        assert world.find(run_id, "round.closed", round=KILL_IN) is None
    require_same_bits(world, run_id, unbroken)
    assert all(trained_once(world, run_id, site) for site in SITES)
    if victim in TAKING_THE_RUN_ALONG:
        assert world.said("run.resumed", run_id=run_id, round=KILL_IN - 1)


def taken_up(world: World, run_id: str, site: str) -> None:
    """Wait until a hospital has taken up the round in which something of it dies."""

    def look() -> bool:
        return any(item.site == site and item.round == KILL_IN for item in world.run(run_id).activity)

    world.wait(look, f"{site} in round {KILL_IN}")


def kill_node_in_round(world: World, run_id: str) -> None:
    """Kill a hospital's node while its trainer has the round, and start it anew."""
    with world.held_in_round(run_id, KILL_IN, A, other=C) as trainer:
        taken_up(world, run_id, A)
        world.stack.programs[A].kill()
        world.wait(lambda: not is_alive(trainer), "the end of the trainer without its node")
        world.connect(A)


def test_a_killed_node_of_a_hospital_changes_no_bit(world: World, unbroken: Unbroken) -> None:
    run_id = world.begin("tumours", base_version=0, **SPEC)
    kill_node_in_round(world, run_id)
    require_same_bits(world, run_id, unbroken)


def test_layers_that_a_hospital_keeps_to_itself_outlive_a_kill_and_are_used(world: World) -> None:
    """FedBN: what the hospitals make of their batch normalisation stays theirs, in training, judging and predicting."""
    spec: dict[str, Any] = {"rounds": KILL_IN, "strategy": "fedbn", "seed": 7}
    world.study("normalised", model="resnet-bn")
    world.warm_up("normalised")
    unbroken = world.begin("normalised", base_version=0, **spec)
    version = world.completed(unbroken)
    run_id = world.begin("normalised", base_version=0, **spec)
    kill_node_in_round(world, run_id)
    again = world.completed(run_id)
    assert (again.digest, again.metrics) == (version.digest, version.metrics)
    own = {site: own_layers(world, site, run_id) for site in SITES}
    assert same_layers(own[A], own_layers(world, A, unbroken))
    assert not same_layers(own[A], own[B])
    with world.site(A) as site, Trainer(site.limits) as trainer_here:
        arrival = site.store.version("normalised", again.version)
        assert arrival is not None
        everybody = read_weights(arrival.file)
        assert not same_layers(own[A], {name: everybody[name] for name in own[A]})
        images = site.settings.data_dir
        mine = updates.predict(site, trainer_here, images, study="normalised", version=again.version)
        (site.folder("models") / "normalised" / f"{A}_{run_id}_own.safetensors").unlink()
        everybodys = updates.predict(site, trainer_here, images, study="normalised", version=again.version)
    assert [item["probabilities"] for item in mine] != [item["probabilities"] for item in everybodys]


def own_layers(world: World, site: str, run_id: str) -> Mapping[str, Any]:
    kept = world.state(site) / "models" / "normalised" / f"{site}_{run_id}_own.safetensors"
    world.wait(kept.exists, f"what {site} keeps of {run_id}")
    return read_weights(kept)


def same_layers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_killed_trainer_begins_its_round_anew_and_changes_no_bit(world: World) -> None:
    spec: dict[str, Any] = {"rounds": 1, "local_epochs": MANY_EPOCHS}
    unbroken = world.begin("tumours", base_version=0, **spec)
    version = world.completed(unbroken)
    run_id = world.begin("tumours", base_version=0, **spec)
    first_epoch = f"{run_id} round 1/1, epoch 1/{MANY_EPOCHS}"
    world.wait(lambda: first_epoch in world.log(A), "the first epoch")
    world.kill(world.trainer(A))
    assert world.completed(run_id).digest == version.digest
    assert world.log(A).count(first_epoch) == 2
    assert not any(site.dropped for site in world.rounds(run_id)[0].sites)
