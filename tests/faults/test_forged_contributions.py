"""Contributions that are not what they claim to be, brought over a real fleet connection by another registered node.

Flower checks that a reply names the node that a message went to, and takes that word from any registered node. So the forger
is given more than a hospital ever sees: the ids of another hospital's node and of the message that it was sent. Each forgery
arrives before the true answer, which the other hospital's trainer, held still, cannot have given yet.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from hospital_world import SITES, World

from fl_client.flower import FleetConnection, Inbound
from medhive.envelope import Contribution, ContributionBody, Task, TaskType, from_bytes, to_bytes
from medhive.signing import SigningKey, sign
from medhive.version import PROTOCOL

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of seven processes
A, B, _ = SITES
FORGER = "hospital-z"
ROUNDS = 3


class Forger(FleetConnection):
    """A registered node that signs its requests with its own key and says that its replies are another node's."""

    claimed = 0

    def _compose(self, inbound: Inbound, payload: bytes, created_at: float, ttl: float) -> Any:
        own, self._node_id = self._node_id, self.claimed
        try:
            return super()._compose(inbound, payload, created_at, ttl)
        finally:
            self._node_id = own


@pytest.fixture(scope="module")
def forger(world: World) -> Iterator[Forger]:
    """The fleet connection of a hospital that has joined, with its own registered key, and takes part in nothing."""
    world.add_hospital(FORGER)
    world.sites.remove(FORGER)
    with world.site(FORGER) as site:
        fleet = Forger(address=site.identity.fleet_url, tls=site.identity.tls(), node_key=site.keys.node_file)
        with fleet:
            yield fleet


@pytest.fixture(scope="module")
def honest(world: World) -> list[str | None]:
    """What the same run makes without forgeries."""
    run_id = world.begin("tumours", base_version=0, rounds=ROUNDS)
    world.completed(run_id)
    return world.digests(run_id)


def message_to(world: World, site: str, run_id: str, round_number: int) -> tuple[Inbound, Task]:
    """The message that a hospital holds unanswered, and the task in it."""

    def look() -> tuple[Inbound, Task] | None:
        with world.site(site) as opened:
            for item in opened.store.inbox():
                inbound = Inbound(**item.message, payload=item.payload)
                task = from_bytes(Task, item.payload)
                if (task.body.run_id, task.body.round, task.body.type) == (run_id, round_number, TaskType.TRAIN):
                    return inbound, task
        return None

    return world.wait(look, f"round {round_number} at {site}")


def invented(task: Task) -> ContributionBody:
    """An answer that fits a task in every word, in the name of the hospital that was asked."""
    body = task.body
    return ContributionBody(
        protocol=PROTOCOL,
        type=body.type,
        run_id=body.run_id,
        site=body.site,
        round=body.round,
        spec_hash=body.spec_hash,
        base_digest=body.base_digest,
        content_digest=body.base_digest,
        content_size_bytes=body.base_size_bytes,
        examples=10**6,
        issued_at=datetime.now(UTC),
    )


def key_of(world: World, site: str) -> SigningKey:
    with world.site(site) as opened:
        return opened.consent_key


def in_anothers_name(world: World, task: Task) -> Contribution:
    """Honestly signed, with the forger's own key."""
    return sign(invented(task), key_of(world, FORGER))


def under_anothers_key(world: World, task: Task) -> Contribution:
    """Signed with the forger's key, and called the other hospital's."""
    key_id = key_of(world, task.body.site).public.key_id
    return in_anothers_name(world, task).model_copy(update={"key_id": key_id})


def replayed(world: World, task: Task) -> Contribution:
    """The other hospital's own, genuine answer to the round before."""
    body = task.body
    base = world.digests(body.run_id)[body.round - 3]
    with world.site(body.site) as opened:
        reply = opened.store.reply(body.run_id, TaskType.TRAIN, body.round - 1, str(base))
    assert reply is not None
    return from_bytes(Contribution, reply.payload)


FORGERIES = (
    (in_anothers_name, "is the one on record"),
    (under_anothers_key, "does not fit key"),
    (replayed, "it was made for another task"),
)


def reply_as(world: World, forger: Forger, site: str, inbound: Inbound, forgery: Contribution) -> bool:
    """Answer a message to another hospital in its place; True when Flower has taken it."""
    forger.claimed = int((world.stack.site_folder(site) / "state" / "node.id").read_text())
    return forger.reply(inbound, to_bytes(forgery))


def refusal(world: World, run_id: str, number: int, site: str) -> str:
    """Wait until an answer in a hospital's name is refused; returns why."""
    bound = {"run_id": run_id, "round": number, "site": site}
    return str(world.wait(lambda: world.said("contribution.refused", **bound), f"the refusal of {bound}")[0]["reason"])


def test_forgeries_are_refused_and_named_and_change_no_bit(
    world: World, forger: Forger, honest: list[str | None]
) -> None:
    run_id = world.begin("tumours", base_version=0, rounds=ROUNDS)
    target, other = B, A
    with ExitStack() as holds:
        holding = holds.enter_context(ExitStack())
        holding.enter_context(world.held(target))
        for number, (forge, reason) in enumerate(FORGERIES, 1):
            world.accepted(run_id, number, other)
            next_hold = holds.enter_context(ExitStack())
            # Held before its next round begins, so that the next forgery comes before the true answer as well.
            next_hold.enter_context(world.held(other))
            inbound, task = message_to(world, target, run_id, number)
            assert reply_as(world, forger, target, inbound, forge(world, task))
            refused = refusal(world, run_id, number, target)
            assert reason in refused
            holding.close()
            world.event(run_id, "round.closed", round=number)
            world.event(run_id, "contribution.refused", site=target, round=number, reason_code="bad-signature")
            target, other, holding = other, target, next_hold
    world.completed(run_id)
    assert world.digests(run_id) == honest
    assert not any(site.dropped for item in world.rounds(run_id) for site in item.sites)
