"""Two runs on the same hospitals at once, a long and a short one: neither waits for the other's end."""

import pytest
from hospital_world import SITES, World

from medhive.states import RoundState, RunState
from medhive.wire import API

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of seven processes
LONG, SHORT = 50, 2  # more than it can do meanwhile, however slow the short one is


def test_a_short_run_is_not_held_up_by_a_long_one(world: World) -> None:
    long = world.begin("tumours", rounds=LONG)
    world.event(long, "round.closed", round=1)
    world.study("lesions", *SITES)
    short = world.begin("lesions", rounds=SHORT)
    world.completed(short)
    assert world.run(long).state == RunState.RUNNING
    order = [(event.run_id, event.kind) for event in world.events()]
    done = order.index((short, "run.completed"))
    begun = order.index((short, "run.started"))
    assert (long, "round.closed") in order[begun:done], "the long run stood still meanwhile"
    world.admin.post(f"{API}/runs/{long}/stop", {"reason": "seen enough"})
    assert world.ended(long).state == RunState.CANCELLED
    assert len(world.rounds(short)) == SHORT
    closed = [item for run_id in (long, short) for item in world.rounds(run_id) if item.state == RoundState.CLOSED]
    assert all(len(item.sites) == len(SITES) and not any(site.dropped for site in item.sites) for item in closed)
