"""A coordinator and its hospitals as real processes over TLS, for tests of what happens to a run when something goes wrong.

Nothing is mocked: every program is started as people start it. What is shortened is the data (a few dozen made images of
32 pixels) and the asking: hospitals agree by a policy that they signed, so that a run needs one HTTP request to begin.
Tests wait for what the programs say or record, never for time to pass.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
from site_data import fix_split
from stack import Program, Stack, StackError, a_moment, wait_until
from waiting import Listener

from fl_client.limits import Limits
from fl_client.policy import sign_policy
from fl_client.settings import Settings
from fl_client.site import Site
from fl_client.tasks.phantoms import CLASSES, make_phantoms
from medhive.client import GatewayClient
from medhive.errors import Unreachable
from medhive.spec import StudyData
from medhive.states import FINAL_RUN_STATES, RunState
from medhive.wire import API, EventAnswer, RoundAnswer, RunAnswer, VersionAnswer

DEADLINE_S: Final = 240.0  # generous: the machine may be busy, and nothing here is measured
SITES: Final = ("hospital-a", "hospital-b", "hospital-c")
PERSON: Final = "Dr. Adler"
IMAGES_PER_CLASS: Final = 12
MOST_ROUNDS: Final = 50
DATA: Final = StudyData(classes=CLASSES, options={"image_size": 32, "allow_missing_classes": True})
# Rounds are short here, so nothing is gained by looking seldom.
QUICK: Final = {"MEDHIVE_SITE_SLOW_POLL_S": "0.3", "MEDHIVE_SITE_SYNC_S": "2"}

Found = TypeVar("Found")


@dataclass
class World:
    """A running coordinator, its hospitals, and an admin's connection. Use `running_world`."""

    stack: Stack
    admin: GatewayClient
    password: str
    sites: list[str] = field(default_factory=list)
    _events: list[EventAnswer] = field(default_factory=list)
    _listener: Listener | None = None

    def close(self) -> None:
        """Close the connections."""
        self.admin.close()
        if self._listener:
            self._listener.close()

    # ---- hospitals

    def add_hospital(self, name: str, *studies: str) -> None:
        """Let a hospital join with made data, train on one thread, and agree by itself to runs of `studies`."""
        make_phantoms(self.stack.site_folder(name) / "data", IMAGES_PER_CLASS, seed=len(self.sites) + 1)
        fix_split(self.stack.site_folder(name) / "state", name)
        self.stack.join_with(name, self.admin.post(f"{API}/invites", {"site": name, "studies": studies})["token"])
        with self.site(name) as site:
            Limits(cpu_threads=1, device="cpu").save(site.store)
        if studies:
            self.allow(name, *studies)
        self.sites.append(name)

    def allow(self, name: str, *studies: str) -> None:
        """Put a policy in force that agrees to every run of these studies."""
        with self.site(name) as site:
            sign_policy(site, person=PERSON, studies=studies, max_rounds=MOST_ROUNDS, valid_for=timedelta(days=1))

    @contextmanager
    def site(self, name: str) -> Iterator[Site]:
        """A hospital's state folder, as its command line opens it."""
        home = self.stack.site_folder(name)
        fields = {"server_address": self.stack.url, "client_id": name}
        settings = Settings.model_validate({**fields, "data_dir": home / "data", "state_dir": home / "state"})
        site = Site.open(settings)
        try:
            yield site
        finally:
            site.close()

    def state(self, name: str) -> Path:
        """A hospital's state folder."""
        return self.stack.site_folder(name) / "state"

    def connect(self, name: str) -> Program:
        """Start `medhive-site run` and wait until it can be given work."""
        before = len(self.log(name))
        program = self.stack.start_site(name)
        program.wait_for("connected to the fleet", after=before)
        return program

    def trainer(self, name: str) -> psutil.Process:
        """A hospital's trainer child, once there is one."""

        def child() -> psutil.Process | None:
            for one in psutil.Process(self.stack.programs[name].pid).children():
                with suppress(psutil.NoSuchProcess):  # the one before it, that the node has not noticed yet
                    if "fl_client.child" in one.cmdline():
                        return one
            return None

        return self.wait(child, f"the trainer of {name}")

    @contextmanager
    def held(self, name: str) -> Iterator[psutil.Process]:
        """Stop a hospital's trainer in its tracks until the block ends: a training that takes long."""
        trainer = self.trainer(name)
        trainer.suspend()
        try:
            yield trainer
        finally:
            with suppress(psutil.NoSuchProcess):
                trainer.resume()

    @contextmanager
    def held_in_round(self, run_id: str, number: int, site: str, other: str) -> Iterator[psutil.Process]:
        """Hold a hospital's trainer still from before a round (2 or later) begins until the block ends.

        The study must have its version 0, which all hospitals make together. The round before is kept open by holding
        `other`, until `site` has answered it and can be held without a race.
        """
        if number > 2:
            self.event(run_id, "round.closed", round=number - 2)
        with self.held(other):
            self.accepted(run_id, number - 1, site)
            trainer = self.trainer(site)
            trainer.suspend()
        try:
            self.event(run_id, "round.closed", round=number - 1)
            yield trainer
        finally:
            with suppress(psutil.NoSuchProcess):
                trainer.resume()

    def accepted(self, run_id: str, number: int, site: str) -> None:
        """Wait until the aggregator has taken a hospital's answer to a round."""
        bound = {"run_id": run_id, "round": number, "site": site, "task": "train"}
        self.wait(lambda: self.said("contribution.accepted", **bound), f"the answer of {site} to round {number}")

    # ---- the coordinator's keys

    def renew(self, *words: str) -> None:
        """`medhive-gateway renew ...` beside the gateway; the admin comes anew, and trusts what there is then."""
        self.stack.run(["medhive-gateway", "renew", *words], self.stack.gateway_env())
        self.admin.close()
        self.admin = self.wait(lambda: logged_in(self.stack, self.password), "the admin's login")
        self.stack.login(self.password)

    # ---- studies and runs

    def study(self, name: str, *members: str, **options: Any) -> None:
        """Make a study; `members` (all hospitals when left out) then agree to its runs by themselves."""
        body = {
            "name": name,
            "task": "image-folder",
            "data": DATA.model_copy(update={"options": {**DATA.options, **options}}).model_dump(mode="json"),
            "members": members or self.sites,
        }
        self.admin.post(f"{API}/studies", body)
        for member in members or self.sites:
            self.allow(member, *self._studies_of(member))

    def _studies_of(self, site: str) -> list[str]:
        return [item["name"] for item in self.admin.get(f"{API}/studies") if site in item["members"]]

    def warm_up(self, study: str) -> None:
        """One short run: it makes the study's version 0, so that later runs can start from there and begin at once."""
        self.completed(self.begin(study, rounds=1, local_epochs=1))

    def begin(self, study: str, base_version: int | None = None, **options: Any) -> str:
        """Ask for a run, approve it, and wait until the hospitals have agreed; returns its id."""
        chosen = {"local_epochs": 2, "batch_size": 16, "min_sites": 2, "deadline_s": 600, **options}
        body = {"study": study, "options": chosen, "base_version": base_version}
        request = self.admin.post(f"{API}/requests", body)
        run_id = str(self.admin.post(f"{API}/requests/{request['id']}/approve", {"reason": ""})["run_id"])
        self.event(run_id, "run.ready")
        return run_id

    def run(self, run_id: str) -> RunAnswer:
        """A run, as an admin sees it."""
        return RunAnswer.model_validate(self.admin.get(f"{API}/runs/{run_id}"))

    def rounds(self, run_id: str) -> list[RoundAnswer]:
        """The training rounds of a run."""
        rows = [RoundAnswer.model_validate(row) for row in self.admin.get(f"{API}/runs/{run_id}/rounds")]
        return [row for row in rows if row.number > 0]

    def ended(self, run_id: str) -> RunAnswer:
        """Wait for a run's end."""

        def look() -> RunAnswer | None:
            run = self.run(run_id)
            return run if run.state in FINAL_RUN_STATES else None

        return self.hear(look, f"the end of {run_id}")

    def completed(self, run_id: str) -> VersionAnswer:
        """Wait for a run's end, which must be a version; returns it."""
        run = self.ended(run_id)
        assert (run.state, run.reason) == (RunState.COMPLETED, ""), self.tails()
        row = self.admin.get(f"{API}/studies/{run.study}/versions/{run.version}")
        return VersionAnswer.model_validate(row)

    def digests(self, run_id: str) -> list[str | None]:
        """SHA-256 of the global weights after each round."""
        return [item.weights_digest for item in self.rounds(run_id)]

    # ---- what happened

    def events(self) -> Sequence[EventAnswer]:
        """The whole event log so far, in order."""
        while True:
            after = self._events[-1].number if self._events else 0
            rows = [EventAnswer.model_validate(row) for row in self.admin.get(f"{API}/events", after=after, limit=500)]
            if not rows:
                return self._events
            self._events += rows

    def find(self, run_id: str, kind: str, **data: Any) -> EventAnswer | None:
        """The first event of a run of this kind whose facts include `data`."""
        for event in self.events():
            if (event.run_id, event.kind) == (run_id, kind) and data.items() <= {
                "site": event.site,
                **event.data,
            }.items():
                return event
        return None

    def event(self, run_id: str, kind: str, **data: Any) -> EventAnswer:
        """Wait for such an event."""
        return self.hear(lambda: self.find(run_id, kind, **data), f"{kind} {data} of {run_id}")

    def log(self, program: str) -> str:
        """All that a program has printed."""
        path = self.stack.folder / "logs" / f"{program}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def said(self, event: str, **bound: Any) -> list[dict[str, Any]]:
        """The aggregator's log lines of this name with these values."""
        whole, _, _being_written = self.log("server").rpartition("\n")
        named = [line for line in whole.splitlines() if line.startswith("{") and f'"{event}"' in line]
        lines = [json.loads(line) for line in named]
        return [line for line in lines if line.get("event") == event and bound.items() <= line.items()]

    def process_of_server(self, words: str) -> psutil.Process | None:
        """A process below `medhive-server` whose command line has these words."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.stack.programs["server"].pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if words in " ".join(process.cmdline()):
                        return process
        return None

    def hear(self, look: Callable[[], Found | None], what: str) -> Found:
        """Wait as `wait` does, for what the event log tells of: look again when it has grown."""
        self._listener = self._listener or Listener(lambda: logged_in(self.stack, self.password))
        return self.wait(self._listener.before(look), what, pause=self._listener.wait)

    def wait(
        self,
        look: Callable[[], Found | None],
        what: str,
        deadline_s: float = DEADLINE_S,
        pause: Callable[[], None] = a_moment,
    ) -> Found:
        """Wait until `look` finds something; an unreachable gateway only means "not yet"."""
        found: list[Found] = []

        def seen() -> bool:
            with suppress(Unreachable):
                value = look()
                if value:
                    found.append(value)
            return bool(found)

        try:
            wait_until(seen, what, deadline_s, pause=pause)
        except StackError as error:
            raise StackError(f"{error}\n{self.tails()}") from None
        return found[0]

    def tails(self) -> str:
        """The end of every program's log."""
        return "\n".join(f"---- {name}\n{program.tail(8)}" for name, program in self.stack.programs.items())

    # ---- ends

    def kill(self, process: psutil.Process) -> None:
        """kill -9, and wait until it is gone."""
        with suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            self.wait(lambda: not is_alive(process), f"the end of process {process.pid}")

    def kill_server(self) -> None:
        """kill -9 `medhive-server` alone, and wait until what it had started has noticed."""
        server = psutil.Process(self.stack.programs["server"].pid)
        below = server.children(recursive=True)
        self.stack.programs["server"].kill()
        self.wait(lambda: not any(is_alive(one) for one in below), "the end of the aggregator's processes")

    def kill_mlflow(self) -> None:
        """kill -9 MLflow with its own worker processes, which would go on without it."""
        below = psutil.Process(self.stack.programs["mlflow"].pid).children(recursive=True)
        self.stack.programs["mlflow"].kill()
        for process in below:
            self.kill(process)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be noticed by its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def logged_in(stack: Stack, password: str) -> GatewayClient:
    """An admin's connection, which trusts the CA of now."""
    admin = GatewayClient(stack.url, stack.trust())
    admin.use_token(admin.post(f"{API}/login", {"username": "admin", "password": password})["token"])
    return admin


@contextmanager
def running_world(folder: Path, *, sites: Sequence[str] = SITES) -> Iterator[World]:
    """A coordinator with connected hospitals; every process is ended with the block, its own children with it.

    The coordinator has an MLflow that nobody has started: it takes as long as all the others together, and few tests look
    into it.
    """
    stack = Stack(folder, extra_env={**QUICK, "OMP_NUM_THREADS": "1"})
    with stack:
        password = stack.start_gateway()
        stack.start_server()
        assert password is not None
        stack.login(password)
        world = World(stack, logged_in(stack, password), password)
        try:
            programs = []
            for name in sites:
                world.add_hospital(name)
                programs.append(stack.start_site(name))
            for program in programs:
                program.wait_for("connected to the fleet")
            yield world
        finally:
            world.close()
            _end_what_is_left(stack)


def _end_what_is_left(stack: Stack) -> None:
    """A program that was killed leaves its group behind; end each group that was started here, by its id."""
    for program in stack.programs.values():
        if program.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(program.process.pid, signal.SIGCONT)
