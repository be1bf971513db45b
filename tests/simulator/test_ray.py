"""Simulations on Flower's engine, over Ray of their own and over a cluster: the bits of inline, and nothing left behind."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from simulation_world import arguments, make_table, run, table_flags

from fl_client.tasks.phantoms import make_phantoms
from medhive.packing import sha256_file
from medhive.terminal import main
from simulator import command
from simulator.command import simulate_command
from simulator.compare import COMPARISON_JSON, folder_of
from simulator.desk import END, MODEL, RECORD
from simulator.flower import MachineUnfit, Seen, look_at, require_fit

DEADLINE_S = 240
MARK = "MEDHIVE_TEST_MARK"
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
"""Two machines of a cluster, on this one. Not 127.0.0.1, in whose place Ray takes an address that others reach."""
ACTOR = b"ray::ClientAppActor"


@contextmanager
def simulating(flags: dict[str, Any], out: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One life of the command, in one thread a process."""
    words = [sys.executable, "-m", "simulator", *arguments(flags, out)]
    # Whoever is started by a script in the background is deaf to Ctrl-C, and so is what he starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(words, env=one_thread(**environment), stderr=subprocess.PIPE) as process:
        yield process


def one_thread(**environment: str) -> dict[str, str]:
    """Without what `simulator.flower` has told the Ray of this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "OMP_NUM_THREADS": "1", **environment}


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def marked(mark: str, title: bytes = b"") -> set[int]:
    """The processes that carry the mark, and whose title begins so."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            carries = folder.name.isdigit() and f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes()
            if carries and (folder / "cmdline").read_bytes().startswith(title):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def listening(processes: set[int]) -> set[str]:
    """The addresses on which they listen."""
    found = set()
    for pid in processes:
        with suppress(psutil.NoSuchProcess):
            sockets = psutil.Process(pid).net_connections("tcp")
            found |= {item.laddr.ip.removeprefix("::ffff:") for item in sockets if item.status == psutil.CONN_LISTEN}
    return found


def wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def a_round_later(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until this life has closed a round; it has more of them before it."""
    before = lines(out / RECORD)
    wait(lambda: lines(out / RECORD) > before or process.poll() is not None, "no round closes")
    assert process.poll() is None, process.communicate()[1].decode()


@contextmanager
def cluster(token: Path, marks: dict[str, str]) -> Iterator[str]:
    """Ray with a core on each of two addresses, whose processes carry the marks; gives the address of its head."""
    with socket.create_server((HEAD, 0)) as free:
        address = f"{HEAD}:{free.getsockname()[1]}"
    head = ["--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false"]
    with node(HEAD, head, token, marks[HEAD]), node(SECOND, [f"--address={address}"], token, marks[SECOND]):
        yield address


@contextmanager
def node(host: str, words: list[str], token: Path, mark: str) -> Iterator[None]:
    """One machine of a cluster, whose processes carry the mark."""
    usual = ["--num-cpus=1", "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0", "--block"]
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: mark,
    }
    # Not in pytest's: the names of Ray's sockets may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, Path(folder, "said").open("wb") as said:
        start = [str(Path(sys.executable).with_name("ray")), "start", *words, f"--node-ip-address={host}", *usual]
        process = subprocess.Popen(
            [*start, f"--temp-dir={folder}"], env=one_thread(**variables), stdout=said, stderr=said
        )
        try:
            wait(lambda: b"Ray runtime started" in Path(said.name).read_bytes() or process.poll() is not None, host)
            assert process.poll() is None, Path(said.name).read_text()
            yield
            assert process.poll() is None, "the cluster has ended"
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
            wait(lambda: not marked(mark), f"the cluster's processes outlive it: {marked(mark)}")


def test_it_goes_on_wherever_it_is_ended_and_in_a_cluster_with_the_bits_of_one_process(
    tmp_path: Path, one_torch_thread: None
) -> None:
    """Interrupted, told to end; then in a cluster, where it loses an actor, is killed, and goes on to the end."""
    make_table(tmp_path)
    flags = table_flags(tmp_path, rounds=16, dropout=0.1, poison="0.2:nan")
    expected = run(tmp_path / "inline", flags)
    mark, out = secrets.token_hex(8), tmp_path / "ray"
    spread = {**flags, "backend": "ray", "workers": 2}
    for sent in (signal.SIGINT, signal.SIGTERM):
        with simulating(spread, out, **{MARK: mark}) as process:
            wait(lambda: bool(marked(mark, ACTOR)), "no actor comes up")
            process.send_signal(sent)
            said = process.communicate(timeout=DEADLINE_S)[1].decode()
        assert process.returncode, said
        assert "***" not in said, "Ray aborts"
        wait(lambda: not marked(mark), f"Ray's processes outlive {sent.name}: {marked(mark)}")
        assert not (out / END).exists()
    in_a_cluster(flags, out, mark, tmp_path / "token")
    assert sha256_file(out / MODEL) == sha256_file(tmp_path / "inline" / MODEL)
    found = json.loads((out / "summary.json").read_text())
    for name in ("clients_answered", "refusals", "heldout", "validation"):
        assert found[name] == expected[name]
    assert found["refusals"] > 0


def lose_an_actor(flags: dict[str, Any], out: Path, mark: str, **environment: str) -> None:
    """One life, in which the processes with this mark lose an actor."""
    with simulating(flags, out, **environment) as process:
        a_round_later(out, process)
        os.kill(min(marked(mark, ACTOR)), signal.SIGKILL)
        said = process.communicate(timeout=DEADLINE_S)[1].decode()
    assert process.returncode == 1, said
    assert "A process of Ray did not do its work" in said
    assert not (out / END).exists()


def in_a_cluster(flags: dict[str, Any], out: Path, mark: str, token: Path) -> None:
    """The last lives, on two machines: one loses the second's actor, one is killed, one goes on to the end."""
    token.write_text(secrets.token_hex(32))
    marks = {host: f"{mark}-{host}" for host in (HEAD, SECOND)}
    known = {"RAY_AUTH_TOKEN_PATH": str(token)}

    def actors() -> list[set[int]]:
        return [marked(one, ACTOR) for one in marks.values()]

    with cluster(token, marks) as address:
        there = {**flags, "backend": "ray", "ray_address": address}
        lose_an_actor(there, out, marks[SECOND], **known)
        with simulating(there, out, **known) as process:
            wait(lambda: all(actors()), "no actors come up on one of the machines")
            process.kill()
        wait(lambda: not any(actors()), "actors outlive a command that is killed")
        with simulating(there, out, **known) as process:
            said = process.communicate(timeout=DEADLINE_S)[1].decode()
        assert process.returncode == 0, said
        wait(lambda: not any(actors()), "actors outlive the simulation")
    assert f"round {flags['rounds']}/{flags['rounds']}: " in said


def test_a_comparison_shares_its_processes_and_goes_on_after_a_kill_with_the_bits_of_one_process(
    tmp_path: Path, one_torch_thread: None
) -> None:
    """Images whose optimiser's state stays at each client, who is sent a correction; without a fault and with NaN."""
    make_phantoms(tmp_path / "data", 8)
    flags = {"data": tmp_path / "data", "clients": 4, "rounds": 3, "local_epochs": 1, "compare": "scaffold"}
    flags |= {"poison": "0.3:nan", "option": "image_size=32"}
    assert main(simulate_command, arguments(flags, tmp_path / "inline")) == 0
    mark, out = secrets.token_hex(8), tmp_path / "ray"
    spread = {**flags, "backend": "ray", "workers": 2}
    without, with_nan = (out / folder_of("scaffold", fault) for fault in ("none", "nan 0.3"))
    with simulating(spread, out, **{MARK: mark}) as process:
        a_round_later(without, process)
        actors = marked(mark, ACTOR)
        assert listening(marked(mark)) == {"127.0.0.1"}
        a_round_later(with_nan, process)
        assert marked(mark, ACTOR) == actors, "each simulation has its own"
        process.kill()
    wait(lambda: not marked(mark), f"Ray's processes outlive the comparison: {marked(mark)}")
    assert not (with_nan / END).exists()
    with simulating(spread, out, **{MARK: mark}) as process:
        said = process.communicate(timeout=DEADLINE_S)[1].decode()
    assert process.returncode == 0, said
    assert "none holds it complete" in said
    assert said.index("goes on after round") < said.index("starting Ray's processes")
    wait(lambda: not marked(mark), "Ray's processes outlive the comparison")
    one, other = (json.loads((folder / COMPARISON_JSON).read_text()) for folder in (out, tmp_path / "inline"))
    assert [{**cell, "seconds": 0} for cell in one] == [{**cell, "seconds": 0} for cell in other]
    assert [cell["refusals"] > 0 for cell in one] == [False, True]
    for folder in (without, with_nan):
        assert sha256_file(folder / MODEL) == sha256_file(tmp_path / "inline" / folder.relative_to(out) / MODEL)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_table(tmp_path)
    with socket.create_server((HEAD, 0)) as free:
        address = f"{HEAD}:{free.getsockname()[1]}"
    flags = table_flags(tmp_path, backend="ray", ray_address=address)
    assert main(simulate_command, arguments(flags, tmp_path / "out")) == 1
    assert f"The Ray cluster at {address} cannot be used from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "does not see the result folder"),
        ({"text": "told", "is_guarded": False}, "asks for no token"),
        ({"text": "told", "version": ""}, "has no MedHive"),
        ({"text": "told", "version": "0.0.1"}, "has MedHive 0.0.1"),
    ],
)
def test_a_machine_that_is_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    """What an actor is asked, asked here; the file is not there as on a machine that does not share the folder."""
    meeting = tmp_path / "out" / "meeting"
    seen = replace(Seen(*look_at(meeting)(None)), **changes)
    with pytest.raises(MachineUnfit, match=f"{socket.gethostname()}.* {reason}"):
        require_fit(seen, "told", meeting)


def test_a_machine_that_sees_the_folder_is_fit(tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.write_text("told")
    require_fit(Seen(*look_at(meeting)(None)), "told", meeting)


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_table(tmp_path)
    monkeypatch.setattr(command, "find_spec", lambda _name: None)
    assert main(simulate_command, arguments(table_flags(tmp_path, backend="ray"), tmp_path / "out")) == 1
    assert "pip install 'medhive-simulator[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"workers": 2}, {"ray_address": "10.0.0.1:6379"}, {"backend": "ray", "together": 2}]
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_table(tmp_path)
    assert main(simulate_command, arguments(table_flags(tmp_path, **changes), tmp_path / "out")) == 1
    assert "--backend" in capsys.readouterr().err
