"""A real gateway process over TLS on loopback, on SQLite or PostgreSQL, and the people and hospitals of its tests."""

import base64
import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from waiting import DEADLINE_S, until

from medhive import __version__
from medhive.client import GatewayClient, Trust
from medhive.consent import Consent, ConsentBody
from medhive.packing import write_weights
from medhive.signing import SigningKey, canonical_json, sign
from medhive.version import PROTOCOL, PROTOCOL_HEADER
from medhive.wire import (
    API,
    CoordinatorAnswer,
    Decision,
    DecisionBody,
    Join,
    JoinAnswer,
    JoinProof,
    Lease,
    RunAnswer,
    VersionAnswer,
)

CLASSES = ("glioma", "notumor")
PROGRAMS = ("initdb", "pg_ctl", "postgres")


# ---- PostgreSQL ----------------------------------------------------------------------------------------------------


def missing_postgres() -> str | None:
    """Why there can be no PostgreSQL server here; None when there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"PostgreSQL's {', '.join(missing)} not found on this machine" if missing else None


def _unprivileged() -> list[str]:
    """PostgreSQL refuses to run as root: the words before its commands that make it somebody else."""
    if os.geteuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


@contextmanager
def postgres_server() -> Iterator[str]:
    """A server of its own on a Unix socket; yields the URL of an empty database."""
    # Not pytest's folder: that is root's alone, and the server is not root.
    with tempfile.TemporaryDirectory(prefix="medhive-postgres-") as name:
        folder, words = Path(name), _unprivileged()
        if words:
            user = int(words[1].partition("=")[2])
            os.chown(folder, user, int(words[2].partition("=")[2]))
        data = folder / "data"
        quiet: dict[str, Any] = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "cwd": folder,
        }
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": name}
        create = ["initdb", "-D", str(data), "-U", "medhive", "--auth=trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*words, *create], **quiet, env=environment, check=True)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        control = [*words, "pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log")]
        subprocess.run([*control, "-o", options, "start"], **quiet, env=environment, check=True)
        try:
            yield f"postgresql://medhive@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet, env=environment, check=True)


# ---- the process ---------------------------------------------------------------------------------------------------


@dataclass
class GatewayProcess:
    """`medhive-gateway serve` as its own process."""

    state_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: "subprocess.Popen[str] | None" = None
    password: str | None = None
    output: list[str] = field(default_factory=list)

    def start(self) -> "GatewayProcess":
        """Start, and wait until it answers."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDHIVE_")}
        environment |= {
            "MEDHIVE_GATEWAY_STATE_DIR": str(self.state_dir),
            "MEDHIVE_GATEWAY_PORT": str(self.port),
            "MEDHIVE_GATEWAY_COORDINATOR_NAME": "Test coordinator",
            **self.environment,
        }
        log = self.state_dir.with_suffix(".log").open("a")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api_gateway", "serve"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._read_announcement()
        until(self._answers, "the gateway's /health")
        return self

    def _read_announcement(self) -> None:
        assert self.process and self.process.stdout
        self.output = []
        for line in self.process.stdout:
            self.output.append(line.strip())
            if line.startswith("address: "):
                self.port = int(line.rpartition(":")[2])
            if line.startswith("admin password: "):
                self.password = line.partition(": ")[2].strip()
            if line.startswith("newest versions: "):
                break
        assert self.port, f"the gateway did not start: {self.log}"

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return self.state_dir.with_suffix(".log").read_text()

    def _answers(self) -> bool:
        assert self.process and self.process.poll() is None, f"the gateway ended: {self.log}"
        try:
            return httpx.get(f"{self.url}/health", verify=self.trust.context(), timeout=5.0).is_success
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://localhost:{self.port}"

    @property
    def ca_pem(self) -> str:
        """Its CA."""
        return (self.state_dir / "tls" / "ca.crt").read_text()

    @property
    def trust(self) -> Trust:
        """Trust in its CA alone."""
        return Trust(ca_pem=self.ca_pem)

    @property
    def server_token(self) -> str:
        """The aggregator's token."""
        return (self.state_dir / "secrets" / "server-token").read_text().strip()

    def client(self, token: str | None = None) -> GatewayClient:
        """A connection."""
        return GatewayClient(self.url, self.trust, token)

    def http(self, token: str | None = None) -> httpx.Client:
        """A bare connection, for what the client would never send."""
        headers = {PROTOCOL_HEADER: str(PROTOCOL)} | ({"Authorization": f"Bearer {token}"} if token else {})
        return httpx.Client(base_url=self.url + API, verify=self.trust.context(), headers=headers, timeout=30.0)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process
        self.process.kill()
        self._collect()

    def stop(self) -> int:
        """End it politely; returns its exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self._collect()

    def _collect(self) -> int:
        assert self.process and self.process.stdout
        code = self.process.wait(DEADLINE_S)
        self.process.stdout.close()
        return code


@contextmanager
def running_gateway(state_dir: Path, **settings: str) -> Iterator[GatewayProcess]:
    """A gateway that is gone afterwards. `settings` are names without their prefix, in small letters."""
    environment = {f"MEDHIVE_GATEWAY_{name.upper()}": value for name, value in settings.items()}
    gateway = GatewayProcess(state_dir, environment)
    try:
        yield gateway.start()
    finally:
        if gateway.process and gateway.process.poll() is None:
            gateway.stop()


# ---- hospitals -----------------------------------------------------------------------------------------------------


@dataclass
class Hospital:
    """A site with its keys and its machine's connection."""

    site: str
    client: GatewayClient
    http: httpx.Client
    key: SigningKey
    node_key: ec.EllipticCurvePrivateKey
    coordinator: CoordinatorAnswer

    def consent_body(self, run: RunAnswer, decision: str = "granted", **changes: Any) -> ConsentBody:
        """What this site would sign."""
        now = datetime.now(UTC)
        values = {
            "decision": decision,
            "coordinator_key_id": self.coordinator.key_id,
            "site": self.site,
            "run_id": run.id,
            "spec_hash": run.spec_hash,
            "dataset_fingerprint": "0" * 64,
            "max_rounds": run.rounds,
            "issued_at": now,
            "expires_at": now + timedelta(days=7),
            "nonce": secrets.token_hex(16),
            "person": "Dr. Test",
        }
        return ConsentBody.model_validate(values | changes)

    def consent(self, run: RunAnswer, decision: str = "granted", **changes: Any) -> Consent:
        """The same, signed."""
        return sign(self.consent_body(run, decision, **changes), self.key)

    def answer(self, run: RunAnswer, decision: str = "granted", **changes: Any) -> Any:
        """Send it."""
        where = "withdraw" if decision == "withdrawn" else "consents"
        return self.client.post(f"{API}/runs/{run.id}/{where}", self.consent(run, decision, **changes))

    def decision(self, about: VersionAnswer, decision: str, **changes: Any) -> Decision:
        """A signed decision on a version."""
        values = {
            "site": self.site,
            "study": about.study,
            "version": about.version,
            "digest": about.digest,
            "decision": decision,
            "person": "Dr. Test",
            "issued_at": datetime.now(UTC),
        }
        return sign(DecisionBody.model_validate(values | changes), self.key)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self.http.close()


def join_body(
    coordinator: CoordinatorAnswer,
    name: str,
    token: str,
    key: SigningKey,
    node_key: ec.EllipticCurvePrivateKey,
    **changes: Any,
) -> Join:
    """A site's join, with any field of the proof changed before it is signed."""
    invite = SigningKey.from_seed(base64.urlsafe_b64decode(token.split(".")[1] + "="))
    pem = node_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    values = {
        "site": name,
        "invite_public_key": invite.public.text,
        "coordinator_key_id": coordinator.key_id,
        "node_public_key": pem.decode(),
        "consent_public_key": key.public.text,
        "issued_at": datetime.now(UTC),
    }
    proof = JoinProof.model_validate(values | changes)
    message = proof.DOMAIN.encode() + b"\0" + canonical_json(proof.body())
    signature = node_key.sign(message, ec.ECDSA(hashes.SHA384()))
    return Join(
        protocol=PROTOCOL,
        software=__version__,
        invite_signature=invite.sign(proof.INVITE_DOMAIN, proof.body()),
        proof=sign(proof, key),
        node_signature=base64.b64encode(signature).decode(),
    )


# ---- everybody together --------------------------------------------------------------------------------------------


class World:
    """A gateway, its admin, its aggregator, and as many hospitals as a test wants."""

    def __init__(self, gateway: GatewayProcess, folder: Path) -> None:
        """Log the admin in."""
        assert gateway.password, "the gateway had been started before"
        self.gateway = gateway
        self.folder = folder
        self.admin_token = self.login("admin", gateway.password)
        self.admin = gateway.client(self.admin_token)
        self.server = gateway.client(gateway.server_token)
        self.coordinator = CoordinatorAnswer.model_validate(self.admin.get(f"{API}/coordinator"))
        self._numbers = itertools.count(1)
        self._open: list[Any] = [self.admin, self.server]

    def login(self, name: str, password: str) -> str:
        """A person's token."""
        with self.gateway.client() as client:
            return str(client.post(f"{API}/login", {"username": name, "password": password})["token"])

    def close(self) -> None:
        """Close every connection."""
        for each in self._open:
            each.close()

    def name(self, what: str) -> str:
        """A name that nothing has yet."""
        return f"{what}-{next(self._numbers)}"

    def invite(self, site: str, studies: tuple[str, ...] = (), **more: Any) -> str:
        """A JOIN_TOKEN."""
        body = {"site": site, "studies": list(studies), **more}
        return str(self.admin.post(f"{API}/invites", body)["token"])

    def hospital(self, *studies: str, **more: Any) -> Hospital:
        """A site that has joined."""
        site = self.name("site")
        token = self.invite(site, studies, **more)
        key, node_key = SigningKey.generate(), ec.generate_private_key(ec.SECP384R1())
        with self.gateway.client() as client:
            body = join_body(self.coordinator, site, token, key, node_key)
            answer = JoinAnswer.model_validate(client.post(f"{API}/join", body))
        bearer = answer.token.token
        hospital = Hospital(
            site, self.gateway.client(bearer), self.gateway.http(bearer), key, node_key, answer.coordinator
        )
        self._open.append(hospital)
        return hospital

    def study(self, *members: Hospital, **defaults: Any) -> str:
        """A study with these members."""
        name = self.name("study")
        body = {
            "name": name,
            "task": "image-folder",
            "data": {"classes": list(CLASSES)},
            "defaults": {"rounds": 2, "min_sites": 1, **defaults},
            "members": [member.site for member in members],
        }
        self.admin.post(f"{API}/studies", body)
        return name

    def asked(self, study: str, **options: Any) -> RunAnswer:
        """A run that waits for consents."""
        request = self.admin.post(f"{API}/requests", {"study": study, "options": options})
        approved = self.admin.post(f"{API}/requests/{request['id']}/approve", {"reason": ""})
        return self.run(approved["run_id"])

    def run(self, run_id: str) -> RunAnswer:
        """A run as the admin sees it."""
        return RunAnswer.model_validate(self.admin.get(f"{API}/runs/{run_id}"))

    def ready(self, study: str, *hospitals: Hospital, **options: Any) -> RunAnswer:
        """A run that its hospitals have consented to."""
        run = self.asked(study, **options)
        for hospital in hospitals:
            hospital.answer(run)
        return self.run(run.id)

    def lease(self, run: RunAnswer) -> Lease:
        """The lease on this run, whatever else is waiting."""

        def look() -> Lease | None:
            answer = self.server.post(f"{API}/server/lease", {"holder": "test"})
            lease = Lease.model_validate(answer) if answer else None
            return lease if lease and lease.run_id == run.id else None

        return until(look, f"the lease on {run.id}")

    def started(self, run: RunAnswer) -> Lease:
        """The lease on a run that goes on."""
        lease = self.lease(run)
        self.server.post(f"{API}/server/runs/{run.id}/start", {"fence": lease.fence})
        return lease

    def weights(self, seed: int = 0, size: int = 100) -> tuple[Path, str]:
        """A packed model and its digest."""
        values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        path = self.folder / f"weights-{seed}-{size}.safetensors"
        digest = write_weights(path, {"layer": values})
        return path, digest

    def complete(self, run: RunAnswer, lease: Lease, digest: str, **more: Any) -> RunAnswer:
        """End a run well."""
        body = {"fence": lease.fence, "state": "completed", "digest": digest, **more}
        return RunAnswer.model_validate(self.server.post(f"{API}/server/runs/{run.id}/end", body))

    def released(self, study: str, *hospitals: Hospital, seed: int = 0, size: int = 100, **more: Any) -> VersionAnswer:
        """A whole run in short; returns the version that it made."""
        run = self.ready(study, *hospitals)
        lease = self.started(run)
        path, digest = self.weights(seed, size)
        self.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
        number = self.complete(run, lease, digest, **more).version
        return VersionAnswer.model_validate(self.admin.get(f"{API}/studies/{study}/versions/{number}"))
