"""The supervisor with real processes: what dies is started again, what it says is passed on, and all of it ends."""

import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

from fl_server.flower import Command
from fl_server.locking import FolderInUse, FolderLock
from fl_server.reports import round_line
from fl_server.settings import BadSettings, ServerSettings
from fl_server.supervisor import (
    FIRST_WAIT_S,
    MAX_LINE,
    PortInUse,
    Relay,
    Service,
    Supervisor,
    require_free_port,
)
from medhive.states import RoundState
from medhive.wire import LeaseRequest, RoundReport, SiteRound

Said = list[tuple[str, str]]


def python(name: str, code: str) -> Service:
    return Service(name, lambda: Command([sys.executable, "-u", "-c", code], dict(os.environ)))


@pytest.fixture
def supervise() -> Iterator[Callable[..., tuple[Supervisor, Said]]]:
    started = []

    def start(*services: Service) -> tuple[Supervisor, Said]:
        said: Said = []
        supervisor = Supervisor(services, lambda name, line: said.append((name, line)))
        started.append(supervisor)
        return supervisor, said

    yield start
    for supervisor in started:
        supervisor.stop()


Supervise = Callable[..., tuple[Supervisor, Said]]
FOREVER = "import os, time; print(os.getpid()); time.sleep(600)"


def test_a_service_that_dies_is_started_again(supervise: Supervise) -> None:
    supervisor, said = supervise(python("steady", FOREVER), python("dying", "print('life')"))
    assert supervisor.look() == frozenset()
    restarted = until(supervisor.look, "the second life begins")
    assert restarted == {"dying"}
    until(lambda: said.count(("dying", "life")) == 2, "it speaks twice")
    until(lambda: "steady" in dict(said), "the other one has come up, too")
    assert len([name for name, _ in said if name == "steady"]) == 1


def test_it_waits_longer_after_each_early_death(supervise: Supervise) -> None:
    supervisor, said = supervise(python("dying", "print('life')"))
    began = time.monotonic()

    def third_life() -> bool:
        supervisor.look()
        return said.count(("dying", "life")) == 3

    until(third_life, "three lives", 60)
    assert time.monotonic() - began >= FIRST_WAIT_S * (1 + 2)


def test_stop_ends_even_what_does_not_listen(supervise: Supervise) -> None:
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(600)"
    supervisor, said = supervise(python("first", FOREVER), python("deaf", deaf))
    supervisor.look()
    until(lambda: len(said) == 2, "both speak")
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < DEADLINE_S, "they sleep for ten minutes"
    for _, pid in said:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_lines_for_people_go_to_standard_output_and_no_line_is_endless() -> None:
    out, err = io.StringIO(), io.StringIO()
    relay = Relay(out, err)
    event = json.dumps({"event": "round.closed", "text": "round 1/2: 3 of 3 sites answered"})
    for line in (event, json.dumps({"event": "quiet"}), "plain words", '{"no": "event"}', "{broken", ""):
        relay("superexec", line)
    assert out.getvalue() == "round 1/2: 3 of 3 sites answered\n"
    assert err.getvalue().splitlines() == [event, json.dumps({"event": "quiet"})]


def test_the_end_of_a_round_that_left_out_many_sites_is_one_line_and_counts() -> None:
    reason = "\u533b" * 300  # six bytes a letter in a JSON line
    sites = tuple(SiteRound(site=f"site-{number}", dropped=reason) for number in range(500))
    report = RoundReport(fence=0, state=RoundState.CLOSED, opened_at=datetime.now(UTC), sites=sites)
    event = {"event": "round.closed", "seconds": 1.0, "overhead_s": 0.5, "text": round_line(1, 9, report)}
    counted: list[str] = []
    line = json.dumps(event)[: MAX_LINE - 500]  # what else stands in it
    Relay(io.StringIO(), io.StringIO(), lambda event: counted.append(event["event"]))("superexec", line)
    assert counted == ["round.closed"]


def test_a_line_and_its_end_are_one_write() -> None:
    """The log of the supervisor's other threads comes between two."""

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            assert text.endswith("\n")
            return super().write(text)

    out, err = Stream(), Stream()
    Relay(out, err)("superexec", json.dumps({"event": "round.closed", "text": "round 1/2"}))
    assert (out.getvalue().count("\n"), err.getvalue().count("\n")) == (1, 1)


def test_a_flood_is_cut_into_lines(supervise: Supervise) -> None:
    supervisor, said = supervise(python("flood", f"print('x' * {3 * MAX_LINE})"))
    supervisor.look()
    until(lambda: len(said) >= 3, "it is read in pieces")
    assert max(len(line) for _, line in said) <= MAX_LINE


def test_a_taken_port_is_named(supervise: Supervise) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=f"Port {port} .* MEDHIVE_SERVER_FLEET_PORT"):
            require_free_port(port, "MEDHIVE_SERVER_FLEET_PORT")
    require_free_port(port, "MEDHIVE_SERVER_FLEET_PORT")


def test_a_folder_belongs_to_one_service(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(FolderInUse, match="MEDHIVE_SERVER_STATE_DIR"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


def test_wrong_settings_are_named_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MEDHIVE_SERVER_")]:
        monkeypatch.delenv(name)
    with pytest.raises(BadSettings, match="MEDHIVE_SERVER_STATE_DIR is not set"):
        ServerSettings.load()
    files = ("GATEWAY_CA_FILE", "TOKEN_FILE", "COORDINATOR_KEY_FILE", "TLS_CERT", "TLS_KEY")
    for name in files:
        path = tmp_path / name
        path.write_text("x")
        monkeypatch.setenv(f"MEDHIVE_SERVER_{name}", str(path))
    monkeypatch.setenv("MEDHIVE_SERVER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MEDHIVE_SERVER_GATEWAY_URL", "localhost:8000")
    with pytest.raises(BadSettings, match="MEDHIVE_SERVER_GATEWAY_URL does not fit"):
        ServerSettings.load()
    monkeypatch.setenv("MEDHIVE_SERVER_GATEWAY_URL", "https://localhost:8000")
    settings = ServerSettings.load()
    settings.prepare()
    holder = settings.holder()
    assert LeaseRequest(holder=holder).holder == settings.holder()
    for lost in (b"", bytes(23)):  # what a power cut leaves of a file that was being written
        (tmp_path / "state" / "holder").write_bytes(lost)
        assert LeaseRequest(holder=settings.holder()).holder == settings.holder()
    assert (tmp_path / "state" / "secrets" / "superexec").stat().st_mode & 0o077 == 0
    (tmp_path / "TLS_KEY").unlink()
    with pytest.raises(BadSettings, match=r"MEDHIVE_SERVER_TLS_KEY names .* which is no file"):
        ServerSettings.load()


def test_a_renewed_certificate_is_taken_up(supervise: Supervise, tmp_path: Path) -> None:
    certificate = tmp_path / "shown.crt"
    certificate.write_text("first")
    speaks = "import signal; signal.signal(signal.SIGHUP, lambda *_: print('again', flush=True)); "
    argv = [sys.executable, "-u", "-c", speaks + FOREVER]
    listens = Service("gate", lambda: Command(argv, dict(os.environ)), (certificate,), signal.SIGHUP)
    deaf = Service(
        "superlink", lambda: Command([sys.executable, "-u", "-c", FOREVER], dict(os.environ)), (certificate,)
    )
    supervisor, said = supervise(listens, deaf)
    assert supervisor.look() == frozenset()
    until(lambda: len(said) == 2, "both speak")
    assert supervisor.look() == frozenset()
    certificate.unlink()
    assert supervisor.look() == frozenset(), "one that is being replaced is waited for"
    certificate.write_text("second")
    assert supervisor.look() == {"superlink"}
    until(lambda: ("gate", "again") in said, "the gate reads it anew")
    until(lambda: [name for name, _ in said].count("superlink") == 2, "the other one starts with it")
    assert supervisor.look() == frozenset()
