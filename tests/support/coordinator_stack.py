"""A real coordinator on loopback: gateway, aggregator and, where asked for, MLflow, each as its own process over TLS.

The hospitals are light: they join, consent and answer over the real fleet connection, but train with a few numbers instead
of a network, so that a whole run takes seconds.
"""

import math
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from queue_world import signed_consent, signed_manifest
from stack import free_port
from waiting import DEADLINE_S, Listener, until

from fl_client.flower import FleetClosed, FleetConnection, Inbound, RunGone
from fl_client.gateway import Gateway
from fl_client.identity import Identity, Keys, connect, join
from fl_client.store import Store
from medhive.client import GatewayClient, Trust
from medhive.consent import ConsentBody
from medhive.envelope import ContributionBody, Task, TaskBody, TaskType, from_bytes, to_bytes
from medhive.errors import MedHiveError, Unreachable
from medhive.packing import read_weights, write_weights
from medhive.queues import QueueAnswer
from medhive.signing import SigningKey, sign
from medhive.spec import StudyData
from medhive.states import FINAL_RUN_STATES, Activity
from medhive.version import PROTOCOL
from medhive.wire import (
    API,
    ActivityReport,
    InviteAnswer,
    NewInvite,
    NewRequest,
    NewStudy,
    RequestAnswer,
    RoundAnswer,
    RunAnswer,
    TokenAnswer,
    VersionAnswer,
)

ROOT = Path(__file__).parents[2]
PASSWORD = "a long password for tests"
HOLD_S = 20.0  # as a hospital's node lets its looks be held
CLASSES = ("benign", "malignant")

Found = TypeVar("Found")


@dataclass
class Process:
    """One process of the stack; its output goes to a file."""

    name: str
    argv: list[str]
    environment: Mapping[str, str]
    log: Path
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, **self.environment}
        with self.log.open("ab") as out:
            # A session of its own, so that a test can look for what it left behind.
            self.running = subprocess.Popen(
                self.argv, env=environment, stdout=out, stderr=out, cwd=self.log.parent, start_new_session=True
            )

    def kill(self) -> None:
        assert self.running is not None
        self.running.kill()
        self.running.wait()

    def stop(self, seconds: float = DEADLINE_S) -> int:
        """End it by SIGTERM; returns its exit code."""
        if self.running is None:
            return 0
        if self.running.poll() is None:
            self.running.terminate()
        return self.running.wait(seconds)

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    @property
    def has_ended(self) -> bool:
        return self.running is not None and self.running.poll() is not None


@dataclass
class CoordinatorStack:
    """The coordinator's processes in one folder."""

    folder: Path
    with_mlflow: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    hospitals: dict[str, "LightHospital"] = field(default_factory=dict)
    listener: Listener | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.gateway_port, self.fleet_port, self.mlflow_port = free_port(), free_port(), free_port()
        self.metrics_port, self.mlflow_metrics_port = free_port(), free_port()
        self.state = self.folder / "gateway"
        self.gateway = self._process("gateway", ["-m", "api_gateway", "serve"], self._gateway_environment())
        self.server = self._process("server", ["-m", "fl_server", "serve"], self._server_environment())
        mlflow = [str(ROOT / "services" / "mlflow" / "serve.py")]
        environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(self.folder / "mlflow")}
        ports = {"PORT": self.mlflow_port, "METRICS_PORT": self.mlflow_metrics_port}
        environment |= {f"MEDHIVE_MLFLOW_{name}": str(port) for name, port in ports.items()}
        self.mlflow = self._process("mlflow", mlflow, environment)

    def _process(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> Process:
        return Process(name, [sys.executable, *arguments], environment, self.folder / f"{name}.log")

    def _gateway_environment(self) -> dict[str, str]:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        return {
            "MEDHIVE_GATEWAY_STATE_DIR": str(self.state),
            "MEDHIVE_GATEWAY_PORT": str(self.gateway_port),
            "MEDHIVE_GATEWAY_FLEET_ADDRESS": f"localhost:{self.fleet_port}",
            "MEDHIVE_GATEWAY_ADMIN_PASSWORD_FILE": str(password),
        }

    def _server_environment(self) -> dict[str, str]:
        tls = self.state / "tls"
        environment = {
            "STATE_DIR": str(self.folder / "server"),
            "GATEWAY_URL": self.address,
            "GATEWAY_CA_FILE": str(tls / "ca.crt"),
            "TOKEN_FILE": str(self.state / "secrets" / "server-token"),
            "COORDINATOR_KEY_FILE": str(self.state / "secrets" / "coordinator.key"),
            "TLS_CERT": str(tls / "superlink.crt"),
            "TLS_KEY": str(tls / "superlink.key"),
            "FLEET_PORT": str(self.fleet_port),
            "METRICS_PORT": str(self.metrics_port),
        }
        if self.with_mlflow:
            environment["MLFLOW_URL"] = self.mlflow_url
        return {f"MEDHIVE_SERVER_{name}": value for name, value in environment.items()} | dict(self.settings)

    @property
    def address(self) -> str:
        return f"https://localhost:{self.gateway_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def trust(self) -> Trust:
        return Trust(ca_pem=(self.state / "tls" / "ca.crt").read_text())

    def start_gateway(self) -> None:
        self.gateway.start()
        until(self._gateway_answers, "the gateway answers", 120)
        self.admin = self._logged_in()
        self.listener = self.listener or Listener(self._logged_in)

    def _logged_in(self) -> GatewayClient:
        admin = GatewayClient(self.address, self.trust)
        token = admin.post(f"{API}/login", {"username": "admin", "password": PASSWORD})
        admin.use_token(TokenAnswer.model_validate(token).token)
        return admin

    def _gateway_answers(self) -> bool:
        if not (self.state / "tls" / "ca.crt").exists() or not (self.state / "secrets" / "server-token").exists():
            return False
        try:
            with GatewayClient(self.address, self.trust) as client:
                client.get(f"{API}/coordinator")
        except (Unreachable, ValueError):
            return False
        return True

    def start_server(self) -> None:
        before = self.server.text.count("\nready")
        self.server.start()
        until(lambda: self.server.text.count("\nready") > before or self.server.has_ended, "the server is ready", 120)
        assert not self.server.has_ended, self.server.text[-4000:]

    def start_mlflow(self) -> None:
        self.mlflow.start()
        until(self._mlflow_answers, "MLflow answers", 240)  # it imports for 20 s on an idle machine

    def _mlflow_answers(self) -> bool:
        try:
            return httpx.get(f"{self.mlflow_url}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def figures(self) -> dict[str, float]:
        """What the aggregator shows to Prometheus, by name and the values of its labels."""
        page = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60).text
        samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
        return {" ".join((each.name, *each.labels.values())): each.value for each in samples}

    def stop(self) -> None:
        for hospital in self.hospitals.values():
            hospital.stop()
        if self.listener:
            self.listener.close()
        if hasattr(self, "admin"):
            self.admin.close()
        for process in (self.server, self.gateway, self.mlflow):
            process.stop()

    # ---- what people do --------------------------------------------------------------------------------------------

    def add_study(self, name: str, members: tuple[str, ...], data: StudyData | None = None, **defaults: Any) -> None:
        for member in members:
            if member not in self.hospitals:
                self.add_hospital(member)
        study = NewStudy(
            name=name,
            task="image-folder",
            data=data or StudyData(classes=CLASSES),
            defaults=defaults,
            members=members,
        )
        self.admin.post(f"{API}/studies", study)

    def add_hospital(self, name: str) -> "LightHospital":
        invite = InviteAnswer.model_validate(self.admin.post(f"{API}/invites", NewInvite(site=name)))
        folder = self.folder / "hospitals" / name
        folder.mkdir(parents=True)
        hospital = LightHospital(name, len(self.hospitals) + 1, folder)
        hospital.join(self.address, str(invite.token))
        self.hospitals[name] = hospital
        return hospital

    def request(self, study: str, base_version: int | None = None, **options: Any) -> str:
        """Ask, approve and let every member consent; returns the run's name."""
        body = NewRequest(study=study, options=options, base_version=base_version)
        request = RequestAnswer.model_validate(self.admin.post(f"{API}/requests", body))
        approved = RequestAnswer.model_validate(self.admin.post(f"{API}/requests/{request.id}/approve", {}))
        run = self.run(str(approved.run_id))
        for consent in run.consents:
            self.hospitals[consent.site].consent(run)
        return run.id

    def run(self, run_id: str) -> RunAnswer:
        return RunAnswer.model_validate(self.admin.get(f"{API}/runs/{run_id}"))

    def rounds(self, run_id: str) -> list[RoundAnswer]:
        return [RoundAnswer.model_validate(row) for row in self.admin.get(f"{API}/runs/{run_id}/rounds")]

    def ended(self, run_id: str, seconds: float = 150.0) -> RunAnswer:
        """Wait for a run's end."""

        def look() -> RunAnswer | None:
            try:
                run = self.run(run_id)
            except Unreachable:  # A test may have killed the gateway.
                return None
            return run if run.state in FINAL_RUN_STATES else None

        return self._hear(look, f"{run_id} ends", seconds)

    def reached(self, run_id: str, round_number: int, seconds: float = 150.0) -> None:
        """Wait until a round of a run is open."""

        def look() -> bool:
            try:
                return self.run(run_id).round >= round_number
            except Unreachable:
                return False

        self._hear(look, f"{run_id} reaches round {round_number}", seconds)

    def _hear(self, look: Callable[[], Found | None], what: str, seconds: float) -> Found:
        """Look until the answer is true, whenever the event log has grown."""
        assert self.listener is not None, "the gateway was not started"
        return until(self.listener.before(look), what, seconds, self.listener.wait)

    def train_up_to(self, round_number: float) -> None:
        """Let every hospital answer the rounds up to this one, and train on in those after it."""
        for hospital in self.hospitals.values():
            hospital.trains_up_to = round_number

    def version(self, study: str, number: int) -> VersionAnswer:
        return VersionAnswer.model_validate(self.admin.get(f"{API}/studies/{study}/versions/{number}"))


@dataclass
class LightHospital:
    """Joins, consents, and trains by adding seeded noise to what it was sent, `training_s` seconds long.

    In a round after `trains_up_to` it goes on training until a test raises that: a test that does something in the middle
    of a round is never too late for it.
    """

    name: str
    number: int
    folder: Path
    training_s: float = 0.0
    trains_up_to: float = math.inf
    shape: tuple[int, ...] = (64, 32)
    trained: list[tuple[str, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def join(self, address: str, token: str) -> None:
        self.keys = Keys(self.folder / "keys")
        self.store = Store(self.folder / "site.db")
        self.identity: Identity = join((address,), token, self.name, keys=self.keys, store=self.store).identity
        self.gateway: Gateway = connect(self.identity, self.keys, self.store)
        self.key: SigningKey = self.keys.consent_key()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._replies: dict[tuple[str, str, int, str], bytes] = {}

    def consent(self, run: RunAnswer, decision: Any = "granted") -> None:
        body = ConsentBody(
            decision=decision,
            coordinator_key_id=self.identity.verify_key.key_id,
            site=self.name,
            run_id=run.id,
            spec_hash=run.spec_hash,
            max_rounds=run.rounds,
            issued_at=datetime.now(UTC),
            expires_at=datetime.now(UTC) + timedelta(days=1),
            nonce=secrets.token_hex(16),
            person="Dr. Noor",
        )
        path = "withdraw" if decision == "withdrawn" else "consents"
        self.gateway.post(f"/runs/{run.id}/{path}", sign(body, self.key))

    def begin(self, queue: QueueAnswer, size: int, folder: Path) -> None:
        """Agree to a queue of a study without a model and bring initial weights of so many numbers."""
        self.agree_to(queue)
        file = folder / f"{queue.study}-zero.safetensors"
        digest = write_weights(file, {"layer": np.zeros(size, np.float32)})
        self.gateway.send_version_zero(queue.study, file, digest)

    def agree_to(self, queue: QueueAnswer) -> None:
        """Agree to a queue."""
        signed = signed_consent(queue, site=self.name, key=self.key, coordinator_key_id=self.identity.verify_key.key_id)
        self.gateway.post(f"/studies/{queue.study}/queue/consents", signed)

    def contribute(self, queue: QueueAnswer, base: VersionAnswer, examples: int, folder: Path) -> None:
        """Agree to a queue and upload a contribution to it, without training."""
        self.agree_to(queue)
        before, file = folder / f"{self.name}-base.safetensors", folder / f"{self.name}-{examples}.safetensors"
        before.unlink(missing_ok=True)
        self.gateway.fetch_version(queue.study, base.version, before, digest=base.digest, size_bytes=base.size_bytes)
        rng = np.random.default_rng([self.number, examples])
        changed = {
            name: array + rng.normal(0, 0.01, array.shape).astype(array.dtype)
            for name, array in read_weights(before).items()
        }
        write_weights(file, changed)
        manifest = signed_manifest(queue, base, file, site=self.name, key=self.key, examples=examples)
        self.gateway.send_contribution(manifest, file)

    def start(self) -> None:
        self._done.clear()
        self._thread = threading.Thread(target=self._serve, name=f"hospital-{self.name}")
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(30)
            self._thread = None
        self.gateway.close()

    def _serve(self) -> None:
        connection = FleetConnection(
            address=self.identity.fleet_url,
            tls=self.identity.tls(),
            node_key=self.keys.node_file,
            node_file=self.folder / "node.json",
        )
        closer = threading.Thread(target=self._close_when_done, args=(connection,))
        closer.start()
        try:
            with connection:
                while not self._done.is_set():
                    inbound = connection.receive(HOLD_S)
                    if inbound is None:
                        self._done.wait(0.1)  # it may not have been held
                    else:
                        connection.confirm(inbound)
                        self._answer(connection, inbound)
        except FleetClosed:
            pass
        except MedHiveError as error:
            self.errors.append(str(error))
        finally:
            self._done.set()
            closer.join()

    def _close_when_done(self, connection: FleetConnection) -> None:
        self._done.wait()
        connection.close()

    def _answer(self, connection: FleetConnection, inbound: Inbound) -> None:
        task = from_bytes(Task, inbound.payload).verify(self.identity.verify_key)
        place = (task.run_id, str(task.type), task.round, task.base_digest)
        try:
            if place not in self._replies:
                self._replies[place] = to_bytes(sign(self._patiently(task), self.key))
            connection.reply(inbound, self._replies[place])
        except RunGone:
            return
        except MedHiveError as error:
            self.errors.append(f"{task.type} {task.round}: {error}")

    def _patiently(self, task: TaskBody) -> ContributionBody:
        """Do a task, again when the gateway went away meanwhile."""
        while True:
            try:
                return self._work(task)
            except Unreachable:
                if self._done.wait(0.5):
                    raise

    def _work(self, task: TaskBody) -> ContributionBody:
        began = time.monotonic()
        content: dict[str, Any] = {}
        if task.type == TaskType.INITIALISE:
            weights = np.random.default_rng(42).standard_normal(self.shape, np.float32)
            content = self._send(task, {"weights": weights})
        elif task.type == TaskType.TRAIN:
            content = self._send(task, self._train(task)) | self._verdict(task)
        elif task.type == TaskType.EVALUATE:
            content = self._verdict(task)
        return ContributionBody(
            protocol=PROTOCOL,
            type=task.type,
            run_id=task.run_id,
            site=self.name,
            round=task.round,
            spec_hash=task.spec_hash,
            base_digest=task.base_digest,
            examples=10 * self.number,
            training_s=time.monotonic() - began,
            issued_at=datetime.now(UTC),
            **content,
        )

    def _train(self, task: TaskBody) -> dict[str, Any]:
        base = self.folder / "base.safetensors"
        self.gateway.fetch_blob(task.run_id, task.base_digest, base, task.base_size_bytes)
        self.gateway.report_activity(task.run_id, ActivityReport(round=task.round, activity=Activity.TRAINING))
        if (task.run_id, task.round) not in self.trained:
            self.trained.append((task.run_id, task.round))
            self._done.wait(self.training_s)
        while task.round > self.trains_up_to and not self._done.wait(0.05):
            pass
        rng = np.random.default_rng([self.number, task.round])
        weights = read_weights(base)
        return {
            name: value + np.float32(0.01) * rng.standard_normal(value.shape, np.float32)
            for name, value in weights.items()
        }

    def _send(self, task: TaskBody, weights: Mapping[str, Any]) -> dict[str, Any]:
        path = self.folder / f"{task.run_id}-{task.round}.safetensors"
        digest = write_weights(path, weights)
        self.gateway.send_blob(task.run_id, path, digest)
        return {"content_digest": digest, "content_size_bytes": path.stat().st_size}

    def _verdict(self, task: TaskBody) -> dict[str, Any]:
        right = min(10, 5 + task.round)
        metrics = {"val_accuracy": right / 10, "val_loss": 1 - right / 20, "train_loss": 1 / (1 + task.round)}
        return {"metrics": metrics, "confusion": [[right, 10 - right], [0, 10]]}


@contextmanager
def coordinator(folder: Path, **options: Any) -> Iterator[CoordinatorStack]:
    """A gateway that answers; everything else is started by the test and ended here."""
    stack = CoordinatorStack(folder, **options)
    try:
        stack.start_gateway()
        yield stack
    finally:
        stack.stop()


def processes_of(process: Process) -> dict[int, str]:
    """The living processes of a process's session (itself and all that it started), with their command lines."""
    assert process.running is not None
    columns = ["ps", "-e", "-ww", "-o", "pid=,sess=,stat=,args="]  # -ww: command lines are cut off otherwise
    listing = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()]
    mine = str(process.running.pid)
    return {int(pid): args for pid, session, state, args in rows if session == mine and not state.startswith("Z")}
