"""Simulations on Flower's engine with two processes of Ray: the same bits as inline, and nothing that stays behind."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from simulation_world import arguments, make_table, table_flags

from fl_client.tasks.phantoms import make_phantoms
from medhive.packing import sha256_file
from medhive.terminal import main
from simulator import command
from simulator.command import simulate_command
from simulator.desk import END, MODEL, RECORD

DEADLINE_S = 240
MARK = "MEDHIVE_TEST_MARK"


@contextmanager
def simulating(flags: dict[str, Any], out: Path, mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """One life of the command, in one thread a process, whose descendants all carry the mark."""
    words = [sys.executable, "-m", "simulator", *arguments(flags, out), "--option", "image_size=32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: mark}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE) as process:
        yield process


def marked(mark: str) -> set[int]:
    """The processes that carry the mark."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_processes_give_the_bits_of_one_whatever_ends_them(tmp_path: Path) -> None:
    """Images whose optimiser's state stays at each client, who is sent a correction; some drop out, or send NaN.

    Killed, then interrupted.
    """
    make_phantoms(tmp_path / "data", 8)
    flags: dict[str, Any] = {"data": tmp_path / "data", "clients": 6, "rounds": 6, "local_epochs": 3}
    flags |= {"strategy": "scaffold", "poison": "0.2:nan", "dropout": 0.1}
    with simulating(flags, tmp_path / "inline", "") as inline:
        assert inline.wait(DEADLINE_S) == 0
    mark, out = secrets.token_hex(8), tmp_path / "ray"
    spread = {**flags, "backend": "ray", "workers": 2}
    for signals in (signal.SIGKILL, signal.SIGINT):
        before = lines(out / RECORD)
        with simulating(spread, out, mark) as process:
            while lines(out / RECORD) == before and process.poll() is None:
                time.sleep(0.05)
            assert len(marked(mark)) > 3
            process.send_signal(signals)
        wait(lambda: not marked(mark), f"Ray's processes outlive {signals.name}: {marked(mark)}")
        assert not (out / END).exists()
    with simulating(spread, out, mark) as process:
        said = process.communicate(timeout=DEADLINE_S)[1].decode()
        assert process.returncode == 0, said
    wait(lambda: not marked(mark), "Ray's processes outlive the simulation")
    assert "round 6/6: " in said
    assert sha256_file(out / MODEL) == sha256_file(tmp_path / "inline" / MODEL)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "inline"))
    for name in ("clients_answered", "refusals", "heldout", "validation"):
        assert one[name] == other[name]
    assert one["refusals"] > 0


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_table(tmp_path)
    monkeypatch.setattr(command, "find_spec", lambda _name: None)
    assert main(simulate_command, arguments(table_flags(tmp_path, backend="ray"), tmp_path / "out")) == 1
    assert "pip install 'medhive-simulator[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"workers": 2}, {"backend": "ray", "together": 2}])
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_table(tmp_path)
    assert main(simulate_command, arguments(table_flags(tmp_path, **changes), tmp_path / "out")) == 1
    assert "--backend" in capsys.readouterr().err
