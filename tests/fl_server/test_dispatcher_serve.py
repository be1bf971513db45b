"""`medhive-server serve` beside a real gateway, with light hospitals on the real fleet connection."""

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from coordinator_stack import CoordinatorStack, coordinator, processes_of
from old_files import old_leftover
from stack import free_port
from waiting import DEADLINE_S, until

from medhive.queues import QueueAnswer
from medhive.states import ConsentState, RunState
from medhive.wire import API, RunAnswer

NAMES = ("a", "b", "c")
LONG_BEFORE_A_MINUTE_S = 30.0  # a minute is what a question takes that nobody answers; tests/containers take the time
LARGE = 8_000_000  # numbers of a model whose average takes a second, twenty times what a kill needs


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorStack]:
    with coordinator(tmp_path_factory.mktemp("coordinator")) as stack:
        stack.start_server()
        stack.add_study("tumours", NAMES, min_sites=2, deadline_s=600)
        for hospital in stack.hospitals.values():
            hospital.start()
        yield stack


def final_digest(stack: CoordinatorStack, run: RunAnswer) -> str:
    assert (run.state, run.reason) == (RunState.COMPLETED, ""), stack.server.text[-4000:]
    assert run.version is not None
    return stack.version("tumours", run.version).digest


def process_named(stack: CoordinatorStack, words: str) -> int:
    return until(lambda: next((p for p, args in processes_of(stack.server).items() if words in args), None), words)


def test_a_run_goes_from_request_to_version(stack: CoordinatorStack) -> None:
    run_id = stack.request("tumours", rounds=2)
    run = stack.ended(run_id)
    assert (run.state, run.reason) == (RunState.COMPLETED, ""), stack.server.text[-4000:]
    rounds = {item.number: item for item in stack.rounds(run_id)}
    assert sorted(rounds)[-2:] == [1, 2]
    assert all(site.answered for item in rounds.values() for site in item.sites)
    assert stack.version("tumours", 1).metrics["val_accuracy"] == pytest.approx(0.7)
    assert f"{run_id} round 2/2: 3 of 3 sites answered" in stack.server.text
    until(lambda: not (stack.folder / "server" / "runs" / run_id).exists(), "its folder is removed")


def test_what_its_processes_do_is_counted(stack: CoordinatorStack) -> None:
    before = stack.figures()
    stack.train_up_to(0)
    run_id = stack.request("tumours", rounds=2)
    stack.reached(run_id, 1)
    during = stack.figures()
    assert during["medhive_server_runs_active"] == 1
    assert 0 <= during["medhive_server_lease_age_seconds"] < 30
    stack.train_up_to(math.inf)
    final_digest(stack, stack.ended(run_id))
    until(lambda: stack.figures()["medhive_server_runs_active"] == 0, "the lease is given back")
    after = stack.figures()
    assert after["medhive_server_rounds_total closed"] == before["medhive_server_rounds_total closed"] + 2
    assert after["medhive_server_last_round_seconds"] >= after["medhive_server_last_round_overhead_seconds"] > 0
    accepted = "medhive_server_contributions_total accepted"
    # Two rounds and the last judgement, three sites.
    assert after[accepted] - before[accepted] == 9
    assert after["medhive_server_process_starts_total superlink"] == 1


@pytest.mark.timeout(400)
def test_killed_processes_change_no_bit_of_the_result(stack: CoordinatorStack) -> None:
    """One run of six rounds without trouble, and one in which each process is killed in turn, each in a round of its own."""
    unbroken = final_digest(stack, stack.ended(stack.request("tumours", base_version=0, rounds=6)))
    stack.train_up_to(0)
    run_id = stack.request("tumours", base_version=0, rounds=6)
    for number, victim in enumerate(("serverapp", "superexec", "superlink", "gateway", "serve"), 1):
        stack.reached(run_id, number)
        kill(stack, victim)
        stack.train_up_to(number)
    stack.train_up_to(math.inf)
    assert final_digest(stack, stack.ended(run_id)) == unbroken
    trained = [[number for run, number in site.trained if run == run_id] for site in stack.hospitals.values()]
    assert trained == [[1, 2, 3, 4, 5, 6]] * 3


def kill(stack: CoordinatorStack, victim: str, *, again: bool = True) -> None:
    if victim == "gateway":
        stack.gateway.kill()
        stack.gateway.start()
    elif victim == "serve":
        stack.server.kill()
        until(lambda: not processes_of(stack.server), "what the service started is gone")
        if again:
            stack.start_server()
    else:
        os.kill(process_named(stack, f"fl_server.flower {victim}"), signal.SIGKILL)


def test_a_queues_contributions_count_once_though_the_service_is_killed_in_the_middle_of_an_average(
    stack: CoordinatorStack, tmp_path: Path
) -> None:
    """It is killed when it has taken them up, long before such weights are averaged."""
    stack.add_study("large", NAMES)
    path = f"{API}/studies/large"
    queue = QueueAnswer.model_validate(stack.admin.put(f"{path}/queue", {"capacity": 3}))
    stack.hospitals["a"].begin(queue, LARGE, tmp_path)
    before = len(stack.server.text)
    for name, examples in zip(NAMES, (10, 20, 30), strict=True):
        stack.hospitals[name].contribute(queue, stack.version("large", 0), examples, tmp_path)
    until(lambda: "queue.leased" in stack.server.text[before:], "the average is begun")
    kill(stack, "serve", again=False)
    said = stack.server.text[before:]
    assert "queue.average-made" not in said and "queue.settled" not in said, "the kill came too late to prove anything"
    assert max(row["version"] for row in stack.admin.get(f"{path}/versions")) == 0
    stack.start_server()
    until(lambda: stack.admin.get("/status", study="large")["queue_size"] == 0, "all are averaged")
    rows = stack.admin.get(f"{path}/queue/contributions", version=1)
    assert [(row["site"], row["state"]) for row in reversed(rows)] == [(name, "counted") for name in NAMES]
    assert [row["weight"] for row in reversed(rows)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert max(row["version"] for row in stack.admin.get(f"{path}/versions")) == 1
    stack.admin.post(f"{path}/queue/close", {"reason": "done"})


def test_a_stopped_run_is_cancelled_and_its_process_ends(stack: CoordinatorStack) -> None:
    stack.train_up_to(0)
    run_id = stack.request("tumours", rounds=5)
    stack.reached(run_id, 1)
    stack.admin.post(f"{API}/runs/{run_id}/stop", {"reason": "wrong data"})
    stack.train_up_to(math.inf)
    run = stack.ended(run_id)
    assert (run.state, run.reason) == (RunState.CANCELLED, "wrong data")
    until(lambda: not any("serverapp" in args for args in processes_of(stack.server).values()), "the process ends")


def test_a_site_that_withdraws_is_out_and_the_run_goes_on(stack: CoordinatorStack) -> None:
    stack.train_up_to(0)
    run_id = stack.request("tumours", rounds=2)
    stack.reached(run_id, 1)
    stack.hospitals["b"].consent(stack.run(run_id), "withdrawn")
    stack.train_up_to(math.inf)
    run = stack.ended(run_id)
    assert run.state == RunState.COMPLETED
    assert {item.site for item in run.consents if item.state == ConsentState.WITHDRAWN} == {"b"}
    assert [site.site for site in stack.rounds(run_id)[-1].sites] == ["a", "c"]


def test_a_short_run_is_not_held_up_by_a_long_one(stack: CoordinatorStack) -> None:
    for hospital in stack.hospitals.values():
        hospital.training_s = 0.3
    stack.add_study("other", NAMES, min_sites=2, deadline_s=600)
    long = stack.request("tumours", rounds=100)  # more than it can do meanwhile, however slow the short one is
    stack.reached(long, 1)
    short = stack.request("other", rounds=1)
    assert stack.ended(short).state == RunState.COMPLETED
    going_on = stack.run(long)
    assert going_on.state == RunState.RUNNING
    stack.reached(long, going_on.round + 1)
    stack.admin.post(f"{API}/runs/{long}/stop", {"reason": "seen enough"})
    assert stack.ended(long).state == RunState.CANCELLED


def test_a_second_service_and_a_taken_port_are_refused_in_one_sentence(stack: CoordinatorStack, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_server", "serve"]
    same = {**os.environ, **stack.server.environment}
    second = subprocess.run(command, env=same, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith("error: Another medhive-server works in")
    other = {**same, "MEDHIVE_SERVER_STATE_DIR": str(tmp_path)}
    leftover = old_leftover(tmp_path / "runs" / "RUN_1")
    taken = subprocess.run(command, env=other, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert taken.returncode == 1
    assert f"error: Port {stack.fleet_port} on 127.0.0.1 is in use" in taken.stderr
    assert not leftover.exists()


def test_sigterm_ends_a_service_whose_gateway_never_answers(stack: CoordinatorStack, tmp_path: Path) -> None:
    """A gateway whose host is gone answers nothing, not even no; each try to reach it may take a minute."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://localhost:{silent.getsockname()[1]}"
        settings = {"MEDHIVE_SERVER_STATE_DIR": str(tmp_path), "MEDHIVE_SERVER_GATEWAY_URL": address}
        settings["MEDHIVE_SERVER_FLEET_PORT"] = str(free_port())
        env = {**os.environ, **stack.server.environment, **settings}
        service = subprocess.Popen([sys.executable, "-m", "fl_server", "serve"], env=env, stdout=subprocess.DEVNULL)
        try:
            silent.settimeout(DEADLINE_S)
            caller, _ = silent.accept()
            with caller:
                service.terminate()
                assert service.wait(LONG_BEFORE_A_MINUTE_S) == 0
        finally:
            service.kill()
            service.wait()


def test_sigterm_ends_everything_though_the_gateway_does_not_answer(stack: CoordinatorStack) -> None:
    for hospital in stack.hospitals.values():
        hospital.training_s = 3.0
    run_id = stack.request("tumours", rounds=2)
    stack.reached(run_id, 1)
    assert stack.gateway.running is not None
    stack.gateway.running.send_signal(signal.SIGSTOP)  # whatever the aggregator asks it now takes a minute to fail
    try:
        assert stack.server.stop(LONG_BEFORE_A_MINUTE_S) == 0
    finally:
        stack.gateway.running.send_signal(signal.SIGCONT)
    until(lambda: not processes_of(stack.server), "nothing is left behind")


def test_no_secret_stands_on_a_command_line_or_in_a_log(stack: CoordinatorStack) -> None:
    token = (stack.state / "secrets" / "server-token").read_text().strip()
    superexec = (stack.folder / "server" / "secrets" / "superexec").read_text().strip()
    assert token not in stack.server.text
    assert superexec not in stack.server.text
