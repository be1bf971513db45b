"""A real gateway with hospitals that have joined, and somebody who speaks the aggregator's part over HTTP.

For tests of the command lines: everything else is a real process, only the training is left out.
"""

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from site_data import fix_split
from stack import Stack

from fl_client.consents import DataCheck, grant
from fl_client.settings import Settings
from fl_client.site import Site
from fl_client.tasks.phantoms import CLASSES, make_phantoms
from medhive.client import GatewayClient
from medhive.packing import sha256_file, write_weights
from medhive.states import RoundState
from medhive.wire import API, Lease, LeaseRequest, RoundReport, RunEnd, SiteRound

STUDY = "brain-mri"
PER_CLASS = 10
ANSWER_DEADLINE_S = 180.0


@dataclass
class Aggregator:
    """Speaks to the gateway as the aggregator does, with its token."""

    client: GatewayClient
    lease: Lease | None = None
    opened_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def start(self) -> str:
        """Lease the run that is ready and start it; returns its id."""
        self.lease = Lease.model_validate(self.client.post(f"{API}/server/lease", LeaseRequest(holder="trial")))
        self.client.post(f"{API}/server/runs/{self.lease.run_id}/start", {"fence": self.lease.fence})
        return self.lease.run_id

    @property
    def path(self) -> str:
        """The run's path for the aggregator."""
        assert self.lease is not None
        return f"{API}/server/runs/{self.lease.run_id}"

    def close_round(self, number: int, accuracy: float, answered: Sequence[str], dropped: Mapping[str, str]) -> None:
        """Report a round as closed."""
        assert self.lease is not None
        metrics = {"val_accuracy": accuracy, "val_loss": 1 - accuracy}
        sites = [SiteRound(site=name, answered=True, examples=40, metrics=metrics) for name in answered]
        sites += [SiteRound(site=name, dropped=reason) for name, reason in dropped.items()]
        report = RoundReport(
            fence=self.lease.fence,
            state=RoundState.CLOSED,
            opened_at=self.opened_at,
            closed_at=datetime.now(UTC),
            seconds=12.5,
            overhead_s=0.5,
            bytes_down=1_000_000,
            bytes_up=2_000_000,
            metrics=metrics,
            sites=tuple(sites),
        )
        self.client.put(f"{self.path}/rounds/{number}", report)

    def complete(self, file: Path, accuracy: float) -> None:
        """Send the final weights and end the run with them."""
        assert self.lease is not None
        digest = sha256_file(file)
        self.client.upload(f"{API}/runs/{self.lease.run_id}/blobs/{digest}", file)
        size = len(CLASSES)
        end = RunEnd(
            fence=self.lease.fence,
            state="completed",
            digest=digest,
            metrics={"val_accuracy": accuracy, "val_loss": 1 - accuracy},
            confusion=[[9 if i == j else 1 for j in range(size)] for i in range(size)],
        )
        self.client.post(f"{self.path}/end", end)

    def fail(self, reason: str) -> None:
        """End the run without weights."""
        assert self.lease is not None
        self.client.post(f"{self.path}/end", RunEnd(fence=self.lease.fence, state="failed", reason=reason))


@dataclass
class CommandWorld:
    """A gateway, an admin who is logged in, and hospitals with data."""

    stack: Stack
    sites: tuple[str, ...]
    _clients: list[GatewayClient] = field(default_factory=list)

    @classmethod
    def start(cls, folder: Path, sites: tuple[str, ...] = ("north", "south")) -> "CommandWorld":
        """Start the gateway, log in, make a study and let the hospitals join; end it with `stop`."""
        world = cls(Stack(folder, mlflow=False), sites)
        try:
            password = world.stack.start_gateway()
            assert password is not None
            world.stack.login(password)
            words = ["--task", "image-folder", "--classes", ",".join(CLASSES), "--option", "image_size=32"]
            world.stack.admin("studies", "create", STUDY, *words, "--default", "rounds=2")
            for number, site in enumerate(sites):
                make_phantoms(world.stack.site_folder(site) / "data", PER_CLASS, number)
                fix_split(world.stack.site_folder(site) / "state", site)
                world.stack.join(site, STUDY)
        except BaseException:
            world.stop()
            raise
        return world

    def stop(self) -> None:
        """Close the connections and end the gateway."""
        for client in self._clients:
            client.close()
        self.stack.stop()

    def aggregator(self) -> Aggregator:
        """The aggregator's part."""
        token = (self.stack.gateway_state / "secrets" / "server-token").read_text().strip()
        self._clients.append(GatewayClient(self.stack.url, self.stack.trust(), token))
        return Aggregator(self._clients[-1])

    def ready_run(self, *words: str) -> str:
        """A run that all hospitals have agreed to; returns its id."""
        request = self.stack.admin_json("request", STUDY, *words)
        run_id = str(self.stack.admin_json("approve", request["id"])["run_id"])
        for site in self.sites:
            self.agree(site, run_id)
        return run_id

    def agree(self, site: str, run_id: str) -> None:
        """Sign a hospital's consent with its own key, without reading its data, which takes a trainer's start."""
        settings = Settings(state_dir=self.stack.site_folder(site) / "state")
        with Site.open(settings) as opened:
            grant(opened, opened.gateway.run(run_id), person="Dr. Trial", check=DataCheck("0" * 64, 40, {}, {}))

    def completed_run(self, file: Path, accuracy: float) -> int:
        """Bring a run to its end with these weights; returns the number of the version."""
        self.ready_run("--rounds", "1")
        aggregator = self.aggregator()
        run_id = aggregator.start()
        aggregator.close_round(1, accuracy, self.sites, {})
        aggregator.complete(file, accuracy)
        return int(self.stack.admin_json("show", run_id)["version"])


def made_weights(path: Path, value: float) -> Path:
    """Weights of no particular model."""
    write_weights(path, {"layer.weight": np.full((4, 3), value, dtype=np.float32)})
    return path


class Typist:
    """A person at a terminal: a command on a pseudo-terminal of its own, typed at and read."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the command; end it with `close`."""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:  # pragma: no cover - the child's side
            os.execvpe(argv[0], list(argv), {**env, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "200"})  # noqa: S606 - no shell is meant
        self.text = ""
        self._raw = b""
        self._read_to = 0

    def expect(self, words: str, deadline_s: float = ANSWER_DEADLINE_S) -> str:
        """Wait until the words appear after what was expected before; returns what came up to them."""
        end = time.monotonic() + deadline_s
        while words not in self.text[self._read_to :]:
            left = end - time.monotonic()
            assert left > 0, f"{words!r} did not appear in:\n{self.text}"
            if not self._read(left):
                assert words in self.text[self._read_to :], f"{words!r} did not appear before the end of:\n{self.text}"
        start = self._read_to
        self._read_to = self.text.index(words, start) + len(words)
        return self.text[start : self._read_to]

    def type(self, line: str) -> None:
        """Type a line and press return."""
        os.write(self._terminal, f"{line}\n".encode())

    def end(self, deadline_s: float = ANSWER_DEADLINE_S) -> int:
        """Wait for the command's end; returns its exit code."""
        end = time.monotonic() + deadline_s
        while self._read(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End the command if it is still there."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        os.close(self._terminal)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._terminal], [], [], timeout_s)[0]:
            return True
        try:
            piece = os.read(self._terminal, 65536)
        except OSError:  # Linux says so at a terminal's end
            return False
        self._raw += piece  # as a whole: a piece may end within a letter or between \r and \n
        self.text = self._raw.decode(errors="replace").replace("\r\n", "\n")
        return bool(piece)

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def least_seconds(command: Sequence[str], env: Mapping[str, str], tries: int = 3) -> float:
    """Processor seconds that a command takes at least: what it takes by the clock on a machine with nothing else to do."""
    took = []
    for _ in range(tries):
        before = os.times()
        subprocess.run(command, env=dict(env), check=True, capture_output=True, timeout=ANSWER_DEADLINE_S)
        after = os.times()
        took.append(after.children_user - before.children_user + after.children_system - before.children_system)
    return min(took)


def value_of(text: str, name: str) -> Any:
    """A field's value in a list of names and values."""
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return line[len(name) :].strip()
    raise AssertionError(f"{name!r} is not in:\n{text}")
