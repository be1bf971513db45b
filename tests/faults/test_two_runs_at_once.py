"""Two runs on the same hospitals at once, a long and a short one: neither waits for the other's end."""

import pytest
from hospital_world import SITES, World

from medhive.states import RunState

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of seven processes
LONG, SHORT = 14, 2


def test_a_short_run_is_not_held_up_by_a_long_one(world: World) -> None:
    long = world.begin("tumours", rounds=LONG)
    world.event(long, "round.closed", round=1)
    world.study("lesions", *SITES)
    short = world.begin("lesions", rounds=SHORT)
    world.completed(short)
    assert world.run(long).state == RunState.RUNNING
    world.completed(long)
    order = [(event.run_id, event.kind) for event in world.events()]
    assert order.index((short, "run.completed")) < order.index((long, "run.completed"))
    done = order.index((short, "run.completed"))
    begun = order.index((short, "run.started"))
    assert (long, "round.closed") in order[begun:done], "the long run stood still meanwhile"
    for run_id, rounds in ((long, LONG), (short, SHORT)):
        assert [len(item.sites) for item in world.rounds(run_id)] == [len(SITES)] * rounds
        assert not any(site.dropped for item in world.rounds(run_id) for site in item.sites)
