"""A hospital that withdraws, is revoked, falls silent or comes early, and an admin who stops a run: the rest goes on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from hospital_world import DEADLINE_S, PERSON, SITES, World, is_alive
from stack import wait_until

from medhive.states import ConsentState, RunState, SiteState

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of eight processes
A, B, C = SITES
NEW, WITH_NEW = "hospital-d", "tumours-with-d"
SHORT_DEADLINE_S = 10.0  # a training takes a fraction of a second here; a busy machine may take several


@pytest.fixture(scope="module")
def newcomer(world: World) -> str:
    """A hospital whose node was started while its coordinator was away, and a study of it with A and B."""
    world.add_hospital(NEW)
    world.kill_server()
    world.stack.programs["gateway"].kill()
    program = world.stack.start_site(NEW)
    program.wait_for("the gateway does not answer, trying again", DEADLINE_S)
    world.stack.start_gateway()
    world.stack.start_server()
    world.study(WITH_NEW, A, B, NEW)
    world.warm_up(WITH_NEW)
    return NEW


def taking_part(world: World, run_id: str) -> list[list[str]]:
    """By round, the sites whose answer counted."""
    return [[site.site for site in item.sites if site.answered and not site.dropped] for item in world.rounds(run_id)]


def test_a_hospital_that_starts_before_its_coordinator_waits_says_so_and_trains(world: World, newcomer: str) -> None:
    said = world.log(newcomer)
    away, back = said.index("the gateway does not answer, trying again"), said.index("connected to the gateway")
    assert away < back
    assert "connected to the fleet" in said
    assert "round 1/1 done" in said


def test_a_withdrawn_consent_takes_the_site_out_and_the_run_goes_on(world: World) -> None:
    run_id = world.begin("tumours", rounds=3)
    with world.held_in_round(run_id, 2, C, other=A) as trainer:
        world.stack.site(C, "withdraw", run_id, "--person", PERSON, "--reason", "second thoughts", "--yes")
        dropped = world.event(run_id, "site.dropped", site=C)
        world.wait(lambda: not is_alive(trainer), "the end of a trainer that would not give way")
    assert dropped.data["round"] == 2
    # Whoever is first: the aggregator sees the withdrawal, or the hospital's node says so.
    assert re.search("withdrew its consent|not-allowed", str(dropped.data["reason"]))
    world.completed(run_id)
    assert taking_part(world, run_id) == [[A, B, C], [A, B], [A, B]]
    assert [item.site for item in world.rounds(run_id)[2].sites] == [A, B]
    consents = {item.site: item.state for item in world.run(run_id).consents}
    assert consents == {A: ConsentState.GRANTED, B: ConsentState.GRANTED, C: ConsentState.WITHDRAWN}


def test_a_revoked_site_is_out_at_once_and_its_node_stops_for_good(world: World, newcomer: str) -> None:
    run_id = world.begin(WITH_NEW, rounds=3)
    with world.held_in_round(run_id, 2, A, other=B):
        world.stack.admin("revoke", newcomer, "--reason", "left the study", "--yes")
        program = world.stack.programs[newcomer]
        wait_until(lambda: not program.running(), "the revoked node's end", DEADLINE_S)
    world.completed(run_id)
    assert taking_part(world, run_id)[2] == [A, B]
    assert "stopped for good" in program.text()
    assert program.process is not None
    assert program.process.returncode == 1
    again = world.stack.failing(["medhive-site", "run"], world.stack.site_env(newcomer))
    assert again.returncode == 1
    assert "revoked" in again.stderr
    states = {item["name"]: item["state"] for item in world.stack.admin_json("sites")}
    assert states[newcomer] == SiteState.REVOKED


def test_a_stopped_run_is_cancelled_everywhere(world: World) -> None:
    run_id = world.begin("tumours", rounds=40)
    world.event(run_id, "round.closed", round=1)
    world.stack.admin("stop", run_id, "--reason", "wrong data", "--yes")
    run = world.ended(run_id)
    assert (run.state, run.reason) == (RunState.CANCELLED, "wrong data")
    assert run.version is None
    news = f"{run_id} of tumours is cancelled"
    world.wait(lambda: all(news in world.log(site) for site in SITES), "the news at every hospital")
    world.wait(lambda: world.process_of_server("fl_server.flower serverapp") is None, "the end of the run's process")


@contextmanager
def silent(world: World, site: str) -> Iterator[None]:
    """A hospital whose node and trainer do nothing at all until the block ends."""
    node = psutil.Process(world.stack.programs[site].pid)
    processes = [node, *node.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_silent_site_is_dropped_at_the_deadline_and_named(world: World) -> None:
    run_id = world.begin("tumours", rounds=1, deadline_s=SHORT_DEADLINE_S)
    with silent(world, C):
        dropped = world.event(run_id, "site.dropped", site=C)
        world.event(run_id, "round.closed", round=1)
    assert "late: no answer" in str(dropped.data["reason"])
    world.completed(run_id)
    assert taking_part(world, run_id) == [[A, B]]


def test_with_too_few_answers_the_run_fails_and_says_who_was_missing(world: World) -> None:
    run_id = world.begin("tumours", rounds=1, min_sites=3, deadline_s=SHORT_DEADLINE_S)
    with silent(world, C):
        run = world.ended(run_id)
    assert run.state == RunState.FAILED
    assert "2 of 3 sites answered, 3 are needed" in run.reason
    assert f"{C}: late" in run.reason
