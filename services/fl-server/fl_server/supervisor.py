"""The processes beside the dispatcher, kept running: SuperLink, superexec, tracking.

Each is started again when it dies, sooner after a long life than after a short one. What it says goes to this service's
log, one line at a time; the lines for people, which carry a `text`, go to standard output as well.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import structlog

from fl_server.flower import Command
from medhive.errors import MedHiveError

LOOPBACK = "127.0.0.1"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Before a process that died is started again; doubled with every early death."""
LONG_LIFE_S = 60.0
"""Whoever lived this long is started again at once."""
GRACE_S = 1.5
"""From SIGTERM to SIGKILL of the last. Each of them may be killed at any moment without harm, and the whole service ends
within five seconds, whatever step it was in."""
MAX_LINE = 8192
"""Longer lines are cut: no process may fill the log with one."""

log = structlog.get_logger()


class PortInUse(MedHiveError):
    """Another program listens where the SuperLink should."""

    code = "port-in-use"


def require_free_port(port: int, variable: str) -> None:
    """Refuse to start where another program listens.

    Raises:
        PortInUse: the text names the variable to change.
    """
    with socket.socket() as probe:
        if os.name != "nt":  # There the option means sharing the port, which is what must be found out.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PortInUse(
                f"Port {port} on {LOOPBACK} is in use by another program; stop that one, or set {variable}.", port=port
            ) from error


@dataclass(frozen=True)
class Service:
    """A process to keep running. `command` is asked anew at each start.

    When one of `files` changes (a renewed certificate), the process is told so by `reload`, a signal, or, where it knows
    none, ended and started again at once.
    """

    name: str
    command: Callable[[], Command]
    files: tuple[Path, ...] = ()
    reload: signal.Signals | None = None

    def reading(self) -> tuple[bytes, ...]:
        """What the files hold now; one that is away for a moment holds nothing."""
        return tuple(path.read_bytes() if path.is_file() else b"" for path in self.files)


class _Kept:
    """A service, its present process and when it may be started again."""

    def __init__(self, service: Service, say: Callable[[str, str], None], on_start: Callable[[str], None]) -> None:
        self.service = service
        self.starts = 0
        self._say = say
        self._on_start = on_start
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._wait_s = FIRST_WAIT_S
        self._start_at = 0.0
        self._read: tuple[bytes, ...] = ()

    def look(self, now: float) -> bool:
        """Start it if it should run and does not; True when it was started."""
        if self._process is not None and self._process.poll() is not None:
            self._on_death(now, self._process.returncode)
        elif self._process is not None and self.service.files:
            self._follow_files(self._process)
        if self._process is None and now >= self._start_at:
            self._start(now)
            return True
        return False

    def _follow_files(self, process: "subprocess.Popen[bytes]") -> None:
        found = self.service.reading()
        if found == self._read or b"" in found:
            return
        self._read = found
        log.info("service.certificate-renewed", service=self.service.name)
        if self.service.reload is not None:
            process.send_signal(self.service.reload)
            return
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process, self._start_at = None, 0.0

    def _on_death(self, now: float, code: int) -> None:
        self._process = None
        if now - self._started_at >= LONG_LIFE_S:
            self._wait_s = FIRST_WAIT_S
        self._start_at = now + self._wait_s
        log.warning("service.died", service=self.service.name, exit_code=code, again_in_s=self._wait_s)
        self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)

    def _start(self, now: float) -> None:
        command = self.service.command()
        self._read = self.service.reading()
        self._process = subprocess.Popen(
            command.argv, env=command.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._started_at = now
        self.starts += 1
        self._on_start(self.service.name)
        reader = threading.Thread(
            target=self._relay, args=(self._process.stdout,), name=f"log-{self.service.name}", daemon=True
        )
        reader.start()
        log.info("service.started", service=self.service.name, pid=self._process.pid)

    def _relay(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(MAX_LINE):
                self._say(self.service.name, line.decode("utf-8", "replace").rstrip())

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._process.terminate()

    def wait_or_kill(self, deadline: float) -> None:
        """Wait until the (monotonic) deadline, then end it by force."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Supervisor:
    """Keeps services running; `look` is called about once a second.

    Args:
        services: in the order of their start.
        say: told the name of a service and each line that it says.
        on_start: told the name of a service at each of its starts.
    """

    def __init__(
        self,
        services: Sequence[Service],
        say: Callable[[str, str], None],
        on_start: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._kept = [_Kept(service, say, on_start) for service in services]

    def look(self) -> frozenset[str]:
        """Start what is not running and may be; returns the names of what was started again after a death."""
        now = time.monotonic()
        started = [kept for kept in self._kept if kept.look(now)]
        return frozenset(kept.service.name for kept in started if kept.starts > 1)

    def stop(self) -> None:
        """End all services, within `GRACE_S` seconds and a moment.

        The last one first, and the first one (the SuperLink) only when the others are gone: they may still talk to it.
        """
        deadline = time.monotonic() + GRACE_S
        first, *others = self._kept
        for kept in reversed(others):
            kept.terminate()
        for kept in reversed(others):
            kept.wait_or_kill(deadline - GRACE_S / 2)
        first.terminate()
        first.wait_or_kill(deadline)


class Relay:
    """Passes the lines of services on: JSON as it is, other text as an event, the lines for people to `out` as well.

    Args:
        out, err: for people, and for the log.
        observe: told each event.
    """

    def __init__(
        self,
        out: TextIO = sys.stdout,
        err: TextIO = sys.stderr,
        observe: Callable[[Mapping[str, Any]], None] = lambda _event: None,
    ) -> None:
        self._out = out
        self._err = err
        self._observe = observe
        self._lock = threading.Lock()

    def __call__(self, service: str, line: str) -> None:
        """Take one line of a service."""
        if not line:
            return
        event = _event_of(line)
        if event is None:
            log.info("service.said", service=service, line=line)
            return
        text = str(event.get("text", ""))
        with self._lock:
            self._observe(event)
            _put(self._err, line)
            if text:
                _put(self._out, text)


def _put(stream: TextIO, line: str) -> None:
    """A line and its end in one write: this process's own log comes between two."""
    stream.write(f"{line}\n")
    stream.flush()


def _event_of(line: str) -> Mapping[str, Any] | None:
    """The event of a JSON log line; None for what is no JSON log line."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
