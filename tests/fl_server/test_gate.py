"""The gate before the SuperLink: a real nginx, before a real SuperLink's TLS."""

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from stack import free_port
from waiting import DEADLINE_S, until

from fl_server.gate import FLEET_PATHS, Gate, NginxMissing

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


class Answers(BaseHTTPRequestHandler):
    """Says which path arrived, as the SuperLink would see it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = f"{self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from api_gateway.tls import Authority  # noqa: PLC0415 - the certificates are the gateway's to make

    folder = tmp_path_factory.mktemp("tls")
    Authority.open(folder, "Coordinator").ensure_leaf(folder, "superlink", (), datetime.now(UTC))
    return folder


@pytest.fixture(scope="module")
def client(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "superlink.crt", certificates / "superlink.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    figures = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=figures.serve_forever, daemon=True).start()
    port = free_port()
    gate = gate_before(server.server_address[1], port, certificates, tmp_path_factory.mktemp("gate"))
    assert "/metrics" not in gate.configuration()
    gate = replace(gate, metrics_port=figures.server_address[1])
    command = gate.command()
    process = subprocess.Popen(command.argv, env=command.env)
    verify = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    try:
        with httpx.Client(base_url=f"https://localhost:{port}", verify=verify, timeout=60) as http:
            until(lambda: answers(http), "the gate answers")
            yield http
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
        for each in (server, figures):
            each.shutdown()
            each.server_close()


def gate_before(superlink_port: int, port: int, certificates: Path, folder: Path) -> Gate:
    return Gate(
        address=f"127.0.0.1:{port}",
        superlink_port=superlink_port,
        certificate=certificates / "superlink.crt",
        key=certificates / "superlink.key",
        ca=certificates / "ca.crt",
        folder=folder,
    )


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/").status_code == httpx.codes.NOT_FOUND
    except httpx.TransportError:
        return False


def test_the_paths_of_nodes_go_through(client: httpx.Client) -> None:
    for path in FLEET_PATHS:
        answer = client.post(f"/v1/fleet/{path}", content=b"x" * 1000)
        assert answer.text == f"/v1/fleet/{path} 1000"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/health",
        "/v1/fleet/register-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
        "//v1/control/start-run",
        "/v1/fleet/..;/control/start-run",
        "/V1/FLEET/pull-messages",
    ],
)
def test_every_other_path_ends_at_the_gate(client: httpx.Client, path: str) -> None:
    assert client.post(path, content=b"x").status_code in {400, 404}


def test_the_page_of_figures_can_be_read_and_nothing_beside_it(client: httpx.Client) -> None:
    assert client.get("/metrics").text == "/metrics 0"
    assert client.post("/metrics", content=b"x").status_code == 403
    assert client.get("/metrics/").status_code == 404


def test_a_message_above_a_mebibyte_is_refused(client: httpx.Client) -> None:
    assert client.post("/v1/fleet/push-messages", content=bytes(2**20 + 1)).status_code == 413


def test_only_post_goes_through(client: httpx.Client) -> None:
    assert client.get("/v1/fleet/pull-messages").status_code == 403


def test_without_nginx_the_variable_is_named(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NginxMissing, match="MEDHIVE_SERVER_GATE"):
        gate_before(1, 2, certificates, tmp_path).command()
