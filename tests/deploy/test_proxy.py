"""The proxy as its image runs it: a real nginx by the image's own script, before stand-ins of the services."""

import getpass
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import killpg
from pathlib import Path
from typing import Any

import httpx
import pytest
from stack import free_port
from waiting import DEADLINE_S, until

from api_gateway.tls import Authority

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")

SOURCE = Path(__file__).parents[2] / "deploy" / "proxy"
FOLDERS = ("handout", "opt/medhive", "tmp", "blobs", "own")
PORTS = {"world": "8443", "browser": "8080", "figures": "9464", "health": "8081"}
# How the gateway has the proxy send a file, and what it says of it.
BLOB = {
    "X-Accel-Redirect": "/blobs-of-the-gateway/ab/cd/abcd",
    "ETag": '"abcd"',
    "MedHive-Model-Version": "7",
    "MedHive-Protocol": "1",
    "MedHive-Version": "0.1.0",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, no-cache",
}
PIECE, PIECES = bytes(1024**2), 64


class Service(BaseHTTPRequestHandler):
    """Stands in for every service: notes what arrives, over which connection, and how much of a large answer is sent."""

    protocol_version = "HTTP/1.1"
    arrived: list[tuple[str, dict[str, str], Any]]
    sent: list[int]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.arrived.append((self.path, dict(self.headers), self.client_address))
        pieces = PIECES if self.path == "/download" else 0
        self.send_response(200)
        for name, value in BLOB.items() if self.path == "/download?study=lungs" else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(pieces * len(PIECE)))
        self.end_headers()
        for _ in range(pieces):
            self.sent.append(self.wfile.write(PIECE))

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@dataclass
class Proxy:
    """A proxy that serves, with a folder in the place of its container's root."""

    root: Path
    ports: dict[str, int]
    service: type[Service]
    process: "subprocess.Popen[bytes]"

    @property
    def verify(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.root / "handout" / "ca.crt"))

    @property
    def said(self) -> str:
        """What its script and nginx wrote to stderr."""
        return (self.root / "stderr").read_text()

    def at(self, place: str, **more: Any) -> httpx.Client:
        """A connection to one of its ports."""
        scheme = "http" if place in {"browser", "health"} else "https"
        return httpx.Client(
            base_url=f"{scheme}://localhost:{self.ports[place]}", verify=self.verify, timeout=60, **more
        )

    def connect(self) -> ssl.SSLSocket:
        """A bare connection to where the world comes in."""
        plain = socket.create_connection(("127.0.0.1", self.ports["world"]), 30)
        return self.verify.wrap_socket(plain, server_hostname="localhost")

    def shown(self) -> bytes:
        """The certificate that the world sees."""
        with self.connect() as connection:
            return connection.getpeercert(binary_form=True) or b""

    def serves(self) -> bool:
        assert self.process.poll() is None, f"the proxy ended: {self.said}"
        with suppress(httpx.TransportError), self.at("health") as http:
            return http.get("/").status_code == httpx.codes.NO_CONTENT
        return False

    def arrived(self, path: str) -> list[tuple[dict[str, str], Any]]:
        """Headers and connections of what arrived at this path."""
        return [(headers, peer) for at, headers, peer in self.service.arrived if at == path]


def lay_out(root: Path) -> dict[str, int]:
    """Lay out what the image and the gateway hold, with paths, ports and user changed to a test's; returns the ports."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    ports = {name: free_port() for name in PORTS}
    for name in ("entrypoint.sh", "nginx.conf.in"):
        text = re.sub(rf"(?<=[\s=-])/(?=({'|'.join(FOLDERS)})/)", f"{root}/", (SOURCE / name).read_text("utf-8"))
        for place, port in PORTS.items():
            text = re.sub(rf"listen (127\.0\.0\.1:)?{port}\b", f"listen 127.0.0.1:{ports[place]}", text)
        text = text.replace("daemon off;", f"daemon off;\nuser {getpass.getuser()};").replace("LOOK_S=2", "LOOK_S=0.1")
        (root / "opt" / "medhive" / name).write_text(text)
    certify(root, "handout", "proxy", "proxy")
    certify(root, "handout", "service", "gateway", "fl-server", "mlflow")
    certify(root, "own", "tls", "proxy")
    (root / "handout" / "mlflow-reader").write_text("password")
    return ports


def certify(root: Path, folder: str, leaf: str, *names: str) -> None:
    Authority.open(root / "handout", "Coordinator").ensure_leaf(root / folder, leaf, names, datetime.now(UTC))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    root = tmp_path_factory.mktemp("proxy")
    ports = lay_out(root)
    service = type("Noting", (Service,), {"arrived": [], "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), service)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(root / "handout" / "service.crt", root / "handout" / "service.key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ("GATEWAY_ADDRESS", "FLEET_ADDRESS", "MLFLOW_ADDRESS", "MLFLOW_METRICS_ADDRESS")
    env = dict.fromkeys(names, f"localhost:{server.server_address[1]}")
    env |= {"TLS_CERT_FILE": f"{root}/own/tls.crt", "TLS_KEY_FILE": f"{root}/own/tls.key"}
    with (root / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", str(root / "opt/medhive/entrypoint.sh")],
            env=env | {"PATH": "/usr/sbin:/usr/bin:/bin"}, stdout=subprocess.DEVNULL, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
    made = Proxy(root, ports, service, process)
    try:
        until(made.serves, "the proxy serves")
        yield made
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
        with suppress(ProcessLookupError):  # what a script that failed has left
            killpg(process.pid, signal.SIGKILL)
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("place", "path"), [("world", "/mlflow/"), ("browser", "/")])
def test_who_logs_in_to_mlflow_is_known_by_his_own_address(proxy: Proxy, place: str, path: str) -> None:
    """Failed logins are counted by it: who could choose it could try passwords without an end, or shut others out."""
    before = len(proxy.arrived("/internal/mlflow-access"))
    with proxy.at(place, headers={"X-Forwarded-For": "203.0.113.7"}) as http:
        assert http.get(path).status_code == httpx.codes.OK
    [(headers, _)] = proxy.arrived("/internal/mlflow-access")[before:]
    assert headers["X-Forwarded-For"] == "127.0.0.1"


def test_messages_of_nodes_share_connections_to_the_aggregator(proxy: Proxy) -> None:
    path = "/v1/fleet/pull-messages"
    for _ in range(5):
        with proxy.at("world") as http:
            assert http.post(path, content=b"x").status_code == httpx.codes.OK
    peers = {peer for _, peer in proxy.arrived(path)}
    assert len(peers) <= 2, "one for each of nginx's two workers"


def test_what_a_slow_hospital_has_not_fetched_yet_lies_nowhere(proxy: Proxy) -> None:
    """In memory, which is where a container's /tmp is, a few of them would take all that the proxy may have."""
    with proxy.connect() as connection:
        connection.sendall(b"GET /download HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        looks: list[int] = []

        def stands_still() -> bool:
            looks.append(len(proxy.service.sent))
            return looks[-1] > 0 and looks[-10:].count(looks[-1]) == 10

        until(stands_still, "the service waits for the reader, or has sent all")
        received = sum(iter(lambda: len(connection.recv(len(PIECE))), 0))
    assert received > PIECES * len(PIECE)
    assert "temporary file" not in proxy.said


def test_a_file_that_the_proxy_sends_goes_with_what_the_gateway_says_of_it(proxy: Proxy) -> None:
    file = proxy.root / "blobs" / "ab" / "cd" / "abcd"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    with proxy.at("world") as http:
        answer = http.get("/download?study=lungs")
        rest = http.get("/download?study=lungs", headers={"Range": "bytes=3-"})
    assert (answer.content, rest.status_code, rest.content) == (b"weights", 206, b"ghts")
    said = {name: value for name, value in BLOB.items() if not name.startswith("X-Accel")}
    assert {name: answer.headers.get_list(name) for name in said} == {name: [value] for name, value in said.items()}
    assert "max-age" in answer.headers["Strict-Transport-Security"]


def test_an_own_certificate_that_cannot_be_read_leaves_the_former_shown(proxy: Proxy) -> None:
    former, file = proxy.shown(), proxy.root / "own" / "tls.crt"
    file.unlink()
    until(lambda: proxy.serves() and f"cannot read {file}" in proxy.said, "the proxy says so")
    assert proxy.shown() == former
    certify(proxy.root, "own", "tls", "proxy")
    until(lambda: proxy.serves() and proxy.shown() != former, "the new certificate")
    assert proxy.said.count(f"cannot read {file}") == 1, "it is said once"
