"""A real gateway process and hospitals before it, with the test itself in the aggregator's place.

The fleet is a loopback in memory: Flower's side has contract tests of its own. All else is real: TLS, signatures, blobs,
the trainer child.
"""

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

from site_data import fix_split
from stack import Stack

from fl_client.events import NodeEvent
from fl_client.flower import FleetClosed, Inbound, NodeRevoked
from fl_client.identity import JoinOutcome
from fl_client.limits import Limits
from fl_client.node import Node
from fl_client.settings import Settings
from fl_client.site import Site, join_site
from fl_client.trainer import Trainer
from medhive.client import GatewayClient
from medhive.envelope import Contribution, ContributionBody, Task, TaskBody, TaskType, from_bytes, to_bytes
from medhive.packing import sha256_file
from medhive.signing import SigningKey, sign
from medhive.spec import StudyData
from medhive.version import PROTOCOL
from medhive.wire import API, Lease, RunAnswer

DEADLINE_S = 240.0
Event = TypeVar("Event", bound=NodeEvent)


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something another thread or process does."""
    until = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what} did not happen within {deadline_s} s")
        time.sleep(0.02)


class Loopback:
    """A fleet connection whose other end is the test. `refuse` makes the next calls raise it."""

    def __init__(self) -> None:
        self.inbound: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self.replies: dict[str, bytes] = {}
        self.confirmed: list[str] = []
        self.on_confirm: Callable[[Inbound], None] = lambda _inbound: None
        self.revoked = threading.Event()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        self._closed.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, _hold_s: float) -> Inbound | None:
        if self._closed.is_set():
            raise FleetClosed("closed")
        if self.revoked.is_set():
            raise NodeRevoked("revoked")
        try:
            return self.inbound.get_nowait()
        except queue.Empty:
            return None

    def confirm(self, inbound: Inbound) -> None:
        self.on_confirm(inbound)
        self.confirmed.append(inbound.message_id)

    def reply(self, inbound: Inbound, payload: bytes) -> bool:
        if self._closed.is_set():
            raise FleetClosed("closed")
        self.replies[inbound.message_id] = payload
        return True

    def close(self) -> None:
        self._closed.set()


@dataclass
class Running:
    """A node on a thread of its own, its fleet, and what it said."""

    node: Node
    fleet: Loopback
    events: list[NodeEvent] = field(default_factory=list)
    error: BaseException | None = None

    def all(self, kind: type[Event]) -> list[Event]:
        """The events of a kind so far."""
        return [event for event in list(self.events) if isinstance(event, kind)]

    def wait(self, kind: type[Event], deadline_s: float = DEADLINE_S, count: int = 1) -> Event:
        """Wait for so many events of a kind; returns the last of them."""
        wait_for(lambda: len(self.all(kind)) >= count, f"{kind.__name__} (said: {self.events})", deadline_s)
        return self.all(kind)[count - 1]

    def send(self, envelope: Task | bytes) -> str:
        """Hand a message to the node; returns its id."""
        payload = envelope if isinstance(envelope, bytes) else to_bytes(envelope)
        message_id = secrets.token_hex(8)
        self.fleet.inbound.put(Inbound(message_id, 1, payload, time.time(), 3600.0, "train"))
        return message_id

    def answer(self, message_id: str, deadline_s: float = DEADLINE_S) -> Contribution:
        """Wait for the answer to a message."""
        wait_for(lambda: message_id in self.fleet.replies, f"an answer (said: {self.events})", deadline_s)
        return from_bytes(Contribution, self.fleet.replies[message_id])

    def ask(self, envelope: Task) -> ContributionBody:
        """Send a task and wait for the body of its answer."""
        return self.answer(self.send(envelope)).body


@contextmanager
def running(site: Site, fleet: Loopback | None = None, trainer: Trainer | None = None) -> Iterator[Running]:
    """Run a site's node until the block ends; a warm trainer may be lent to it."""
    loopback = fleet or Loopback()
    events: list[NodeEvent] = []
    node = Node(site, events.append, trainer, open_fleet=lambda _site, _on_outage: loopback)
    run = Running(node, loopback, events)

    def serve() -> None:
        try:
            node.run()
        except Exception as error:  # noqa: BLE001 - handed to the test
            run.error = error

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield run
    finally:
        node.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


class World:
    """The coordinator, and what an admin and the aggregator do there."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.stack = Stack(folder, mlflow=False, extra_env=environment)
        self.folder = folder
        self.password = self.stack.start_gateway()
        self.admin = GatewayClient(self.stack.url, self.stack.trust())
        login = self.admin.post(f"{API}/login", {"username": "admin", "password": self.password})
        self.admin.use_token(login["token"])
        token = (self.stack.gateway_state / "secrets" / "server-token").read_text().strip()
        self.server = GatewayClient(self.stack.url, self.stack.trust(), token)
        self.key = SigningKey.load(self.stack.gateway_state / "secrets" / "coordinator.key")
        self._sites: list[Site] = []

    def close(self) -> None:
        for site in self._sites:
            site.close()
        self.admin.close()
        self.server.close()
        self.stack.stop()

    # ---- hospitals

    def settings(self, name: str, data: Path | None = None, **more: Any) -> Settings:
        home = self.folder / "hospitals" / name
        fields = {"server_address": self.stack.url, "client_id": name, "state_dir": home / "state"}
        paces = {"fast_poll_s": 0.02, "slow_poll_s": 0.05, "sync_s": 0.5}
        return Settings.model_validate({**fields, "data_dir": data or home / "data", **paces, **more})

    def invite(self, name: str, *studies: str, **more: Any) -> str:
        answer = self.admin.post(f"{API}/invites", {"site": name, "studies": list(studies), **more})
        return str(answer["token"])

    def join(self, name: str, *studies: str, data: Path | None = None, **more: Any) -> Site:
        """Invite a hospital and let it join."""
        settings = self.settings(name, data)
        fix_split(settings.state_dir, name)
        outcome: JoinOutcome = join_site(settings, self.invite(name, *studies, **more))
        assert outcome.fresh
        return self.open(settings)

    def open(self, settings: Settings) -> Site:
        site = Site.open(settings)
        Limits(cpu_threads=1, device="cpu").save(site.store)
        self._sites.append(site)
        return site

    # ---- studies and runs

    def study(self, name: str, task: str, data: StudyData, **defaults: Any) -> str:
        body = {"name": name, "task": task, "data": data.model_dump(mode="json"), "defaults": defaults}
        self.admin.post(f"{API}/studies", body)
        return name

    def run(self, study: str, **options: Any) -> RunAnswer:
        """Request and approve a run."""
        request = self.admin.post(f"{API}/requests", {"study": study, "options": options})
        return self.approve(request["id"])

    def approve(self, request_id: str) -> RunAnswer:
        answer = self.admin.post(f"{API}/requests/{request_id}/approve", {"reason": ""})
        return self.look(answer["run_id"])

    def look(self, run_id: str) -> RunAnswer:
        return RunAnswer.model_validate(self.admin.get(f"{API}/runs/{run_id}"))

    # ---- the aggregator's part

    def lease(self, run: RunAnswer) -> Lease:
        """Take a ready run and start it."""
        wait_for(lambda: self.look(run.id).state == "ready", f"{run.id} being ready (is {self.look(run.id)})")
        # Runs that earlier tests have left behind lose their leases and are offered again.
        while True:
            lease = Lease.model_validate(self.server.post(f"{API}/server/lease", {"holder": "test"}))
            if lease.run_id == run.id:
                break
        self.server.post(f"{API}/server/runs/{run.id}/start", {"fence": lease.fence})
        return lease

    def put(self, run: RunAnswer, file: Path) -> str:
        """Store weights as a blob of the run."""
        digest = sha256_file(file)
        self.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", file)
        return digest

    def fetch(self, run: RunAnswer, digest: str, destination: Path) -> Path:
        """Fetch what a site has sent."""
        self.server.download(f"{API}/runs/{run.id}/blobs/{digest}", destination, digest, max_bytes=2**31)
        return destination

    def task(self, run: RunAnswer, to: str, kind: TaskType, number: int = 0, /, **fields: Any) -> Task:
        """A signed task."""
        key = fields.pop("key", self.key)
        values = {
            "protocol": PROTOCOL,
            "type": kind,
            "run_id": run.id,
            "study": run.study,
            "site": to,
            "round": number,
            "rounds": run.rounds,
            "spec_hash": run.spec_hash,
            "deadline_s": 600.0,
            "issued_at": datetime.now(UTC),
            "nonce": secrets.token_hex(16),
        }
        return sign(TaskBody.model_validate({**values, **fields}), key)

    def close_round(self, run: RunAnswer, lease: Lease, number: int, digest: str) -> None:
        """Report a round as closed."""
        now = datetime.now(UTC).isoformat()
        body = {"fence": lease.fence, "state": "closed", "opened_at": now, "closed_at": now, "weights_digest": digest}
        self.server.put(f"{API}/server/runs/{run.id}/rounds/{number}", body)

    def end(self, run: RunAnswer, lease: Lease, digest: str | None, state: str = "completed", **fields: Any) -> None:
        """Report the end of a run."""
        body = {"fence": lease.fence, "state": state, "digest": digest, **fields}
        self.server.post(f"{API}/server/runs/{run.id}/end", body)


def later(hours: float) -> datetime:
    """A moment from now."""
    return datetime.now(UTC) + timedelta(hours=hours)
