"""The coordinator's key and its CA change in the middle of a run: it goes on with every hospital, nothing is refused."""

import re

import pytest
from hospital_world import SITES, World

from medhive.signing import SigningKey

pytestmark = pytest.mark.timeout(600)
A, B, C = SITES
KEY_IN, CA_IN = 2, 4  # the rounds in which they change
REFUSED = re.compile(r"(task|contribution|token)\.refused|bad-signature|not-followed|log was rewritten")


def test_a_run_goes_on_with_another_key_and_another_ca(world: World) -> None:
    before = {name: len(world.log(name)) for name in (*SITES, "server")}
    run_id = world.begin("tumours", base_version=0, rounds=CA_IN)
    with world.held_in_round(run_id, KEY_IN, C, other=A):
        for site in (A, B):
            world.accepted(run_id, KEY_IN, site)
        world.renew("key")
    with world.held_in_round(run_id, CA_IN, A, other=C):
        for site in (B, C):
            world.accepted(run_id, CA_IN, site)
        world.renew("ca", "--at-once")
    version = world.completed(run_id)
    rounds = world.rounds(run_id)
    assert len(rounds) == CA_IN
    assert all(len(item.sites) == len(SITES) and not any(site.dropped for site in item.sites) for item in rounds)
    key = SigningKey.load(world.stack.gateway_state / "secrets" / "coordinator.key").public
    assert version.manifest.verify(key).digest == version.digest
    for name in SITES:
        world.wait(lambda name=name: follows(world, name), f"{name} knows the coordinator's new key and CA")
    for name, start in before.items():
        assert not REFUSED.findall(world.log(name)[start:]), world.log(name)[start:][-4000:]


def follows(world: World, name: str) -> bool:
    """Whether a hospital has on record what the coordinator has now, and no more."""
    with world.site(name) as site:
        key = SigningKey.load(world.stack.gateway_state / "secrets" / "coordinator.key").public
        return (site.identity.verify_key, site.identity.ca_pem) == (key, world.stack.ca_file.read_text())
