"""A real SuperLink and superexec on loopback, with TLS and node authentication, for the tests of the Flower adapters."""

import datetime
import ipaddress
import json
import os
import secrets
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from stack import free_port
from waiting import DEADLINE_S, until

from fl_client.flower import FleetConnection
from fl_server.flower import Command, FlowerRun, SuperLink, superexec_command, superlink_command


@dataclass(frozen=True)
class Node:
    """A registered node: its id and its private key's file."""

    node_id: int
    key: Path
    public_pem: bytes


@dataclass
class FlowerStack:
    """The processes and what is needed to talk to them."""

    folder: Path
    port: int = 0
    superlink: subprocess.Popen[bytes] | None = None
    superexec: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.ca, self.cert, self.key = _make_certificates(self.folder)
        self.secret_file = self.folder / "superexec.secret"
        self.secret_file.write_bytes(secrets.token_bytes(32))
        self.tls = ssl.create_default_context(cafile=str(self.ca))
        self.control = SuperLink(address=self.address, ca=self.ca)

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start_superlink(self) -> None:
        command = superlink_command(
            port=self.port,
            database=self.folder / "superlink.db",
            cert=self.cert,
            key=self.key,
            ca=self.ca,
            secret_file=self.secret_file,
            home=self.folder / "flwr",
        )
        self.superlink = self._start(command, "superlink")
        until(self.control.is_ready, "the SuperLink answers")

    def start_superexec(self) -> None:
        command = superexec_command(
            port=self.port,
            ca=self.ca,
            secret_file=self.secret_file,
            home=self.folder / "flwr",
            round_loop="flower_loops:scripted",
        )
        self.superexec = self._start(command, "superexec")

    def _start(self, command: Command, name: str) -> subprocess.Popen[bytes]:
        environment = {**command.env, "PYTHONPATH": str(Path(__file__).parent)}
        with (self.folder / f"{name}.log").open("ab") as out:
            return subprocess.Popen(command.argv, env=environment, stdout=out, stderr=out)

    def kill_superlink(self) -> None:
        assert self.superlink is not None
        self.superlink.kill()
        self.superlink.wait()

    def kill_superexec(self) -> None:
        assert self.superexec is not None
        self.superexec.kill()
        self.superexec.wait()

    def stop(self) -> None:
        self.control.close()
        for process in (self.superexec, self.superlink):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(DEADLINE_S)

    def make_node(self) -> Node:
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        path = self.folder / f"{secrets.token_hex(4)}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Node(self.control.register_node(pem), path, pem)

    def make_seasoned_node(self) -> Node:
        """A node that has been online before: Flower takes messages for no other."""
        node = self.make_node()
        with self.connect(node):
            return node

    def connect(self, node: Node, **options: Any) -> FleetConnection:
        return FleetConnection(address=self.address, tls=self.tls, node_key=node.key, **options)

    def run_script(self, *nodes: Node, rounds: int = 1, **script: Any) -> "ScriptedRun":
        out = self.folder / f"run-{secrets.token_hex(4)}.jsonl"
        name = json.dumps({"nodes": [node.node_id for node in nodes], "rounds": rounds, "out": str(out), **script})
        number = self.control.start_run({"medhive-run": name, "medhive-fence": 7})
        return ScriptedRun(self, number, out)


@dataclass(frozen=True)
class ScriptedRun:
    """A run of `flower_loops.scripted` and the notes that it writes."""

    stack: FlowerStack
    number: int
    out: Path

    def notes(self) -> list[dict[str, Any]]:
        text = self.out.read_text("utf-8") if self.out.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may still be being written
        return [json.loads(line) for line in whole.splitlines()]

    def note(self, key: str) -> dict[str, Any]:
        """Wait for the first note that has this key."""
        return until(lambda: next((note for note in self.notes() if key in note), None), f"the run notes {key}")

    def answers(self) -> list[dict[str, Any]]:
        return [note for note in self.notes() if "node" in note]

    def end(self, seconds: float = DEADLINE_S) -> FlowerRun:
        """Wait for the SuperLink to call the run over."""

        def look() -> FlowerRun | None:
            run = self.stack.control.run(self.number)
            return run if run.phase.is_over else None

        return until(look, "the run is over", seconds)

    def kill(self) -> None:
        os.kill(self.note("started")["started"], signal.SIGKILL)


@contextmanager
def answering(connection: FleetConnection) -> Iterator[None]:
    """Answer every message with its own content, in a thread, until the block ends."""

    def serve() -> None:
        while not done.wait(0.1):
            if (inbound := connection.receive()) is not None:
                connection.confirm(inbound)
                connection.reply(inbound, b"echo " + inbound.payload)

    done = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(DEADLINE_S)


@pytest.fixture(scope="session")
def flower_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerStack]:
    """One SuperLink and superexec for all tests of a folder; a test that kills one brings it up again."""
    stack = FlowerStack(tmp_path_factory.mktemp("flower"))
    try:
        stack.start_superlink()
        stack.start_superexec()
        yield stack
    finally:
        stack.stop()


def _make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A certificate authority and a server certificate for 127.0.0.1: paths of CA, certificate, key."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MedHive test authority")])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )

    local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    ca = certificate(name, authority, True).sign(authority, hashes.SHA256())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    leaf = certificate(subject, server, False).add_extension(local, critical=False).sign(authority, hashes.SHA256())
    paths = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths
