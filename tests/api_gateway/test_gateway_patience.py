"""Slow peers on real sockets: who holds a connection is cut off, a slow hospital and a quiet event stream are not."""

import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from gateway_world import Hospital, World, running_gateway
from queue_world import Scene
from waiting import DEADLINE_S

from medhive.queues import MANIFEST_HEADER, manifest_to_header
from medhive.version import PROTOCOL, PROTOCOL_HEADER
from medhive.wire import API, RunAnswer

HEAD_S, WINDOW_S, WINDOW_BYTES = 1.0, 1.0, 2000
STEP_S = 0.1  # between two pieces of what arrives slowly
LONG_S = 20.0  # by when a cut must be seen on a busy machine


class Peer:
    """A TLS connection that sends exactly what it is told to."""

    def __init__(self, world: World) -> None:
        self.began = time.monotonic()
        plain = socket.create_connection(("127.0.0.1", world.gateway.port), timeout=LONG_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = world.gateway.trust.context().wrap_socket(plain, server_hostname="localhost")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def drip(self, data: bytes, piece: int = 1) -> None:
        """Send piece by piece; ends quietly when nobody takes them any more."""
        for start in range(0, len(data), piece):
            try:
                self.socket.sendall(data[start : start + piece])
            except OSError:
                return
            time.sleep(STEP_S)

    def heard(self) -> bytes:
        """Everything until the other side ends the connection."""
        said = b""
        try:
            while piece := self.socket.recv(65536):
                said += piece
        except (ConnectionResetError, ssl.SSLError):
            pass
        return said

    def answer(self) -> tuple[int, bytes]:
        """The next answer, which says its length."""
        said = b""
        while b"\r\n\r\n" not in said:
            said += self._more()
        head, _, body = said.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields[b"content-length"]):
            body += self._more()
        return int(head.split()[1]), body

    def _more(self) -> bytes:
        piece = self.socket.recv(65536)
        assert piece, "the connection was cut before the end of the answer"
        return piece


def head(method: str, path: str, length: int | None = None, *fields: str, root: str = API) -> bytes:
    lines = [f"{method} {root}{path} HTTP/1.1", "Host: localhost", f"{PROTOCOL_HEADER}: {PROTOCOL}", *fields]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def bearer(hospital: Hospital) -> str:
    return f"Authorization: {hospital.http.headers['Authorization']}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A gateway with little patience."""
    folder = tmp_path_factory.mktemp("patience")
    limits = {"head_s": HEAD_S, "body_window_s": WINDOW_S, "body_window_bytes": WINDOW_BYTES}
    with running_gateway(folder / "state", **{name: str(value) for name, value in limits.items()}) as gateway:
        made = World(gateway, folder)
        yield made
        made.close()


@pytest.fixture(scope="module")
def uploader(world: World) -> tuple[Hospital, RunAnswer]:
    """A hospital that may send blobs."""
    hospital = world.hospital()
    run = world.ready(world.study(hospital), hospital)
    world.started(run)
    return hospital, run


def test_who_says_nothing_is_cut_off(world: World) -> None:
    with Peer(world) as peer:
        assert peer.heard() == b""
        assert HEAD_S / 2 < time.monotonic() - peer.began < LONG_S


def test_a_head_that_never_ends_is_cut_off_though_it_goes_on(world: World) -> None:
    with Peer(world) as peer:
        peer.drip(b"GET /health HTTP/1.1\r\n" + b"X-More: 1\r\n" * 100)
        assert peer.heard() == b""
        assert time.monotonic() - peer.began < LONG_S
    assert "http.no-head-in-time" in world.gateway.log


@pytest.mark.parametrize("line", [b"X-More: %s\r\n" % (b"1" * 8000), b"1" * 8000], ids=["fields", "one field"])
def test_a_head_without_end_is_cut_off_before_it_takes_memory(world: World, line: bytes) -> None:
    with Peer(world) as peer:
        peer.socket.sendall(b"GET /health HTTP/1.1\r\nX-First: ")
        sent = 0
        with suppress(OSError):
            while sent < 100 * 2**20:
                peer.socket.sendall(line)
                sent += len(line)
    assert sent < 20 * 2**20, "what lies in the buffers of two sockets beside the limit"
    assert "http.head-too-long" in world.gateway.log


def test_the_rest_of_a_body_that_nobody_reads_is_no_way_to_stay(world: World) -> None:
    """Refused by its head alone, it goes on and on."""
    with Peer(world) as peer:
        peer.socket.sendall(head("POST", "/nowhere", 100_000))
        assert peer.answer()[0] == 404
        peer.drip(b"x" * 100)
        assert peer.heard() == b""
        assert time.monotonic() - peer.began < LONG_S


def test_a_body_that_drips_is_refused_with_a_reason(world: World) -> None:
    with Peer(world) as peer:
        peer.socket.sendall(head("POST", "/login", 5000, "Content-Type: application/json"))
        sender = threading.Thread(target=peer.drip, args=(b" " * 100,))
        sender.start()
        status, body = peer.answer()
        peer.heard()
        sender.join()
    problem = json.loads(body)
    assert status == 408 and problem["type"] == "urn:medhive:error:too-slow"
    assert str(WINDOW_BYTES) in problem["detail"]


def test_a_thin_but_honest_line_brings_its_blob(world: World, uploader: tuple[Hospital, RunAnswer]) -> None:
    """It takes several windows, and brings enough in each: every piece is enough, as this machine may pause between two."""
    hospital, run = uploader
    piece = WINDOW_BYTES + 500
    data = b"thin" * (10 * piece)
    path = f"/runs/{run.id}/blobs/{hashlib.sha256(data).hexdigest()}"
    with Peer(world) as peer:
        peer.socket.sendall(head("PUT", path, len(data), bearer(hospital)))
        peer.drip(data, piece)
        assert time.monotonic() - peer.began > 3 * WINDOW_S
        assert peer.answer()[0] == 201
    assert hospital.http.get(path).content == data


def test_a_blob_that_stalled_goes_on_where_it_stopped(
    world: World, uploader: tuple[Hospital, RunAnswer], tmp_path: Path
) -> None:
    hospital, run = uploader
    data = b"stalled" * 1000
    digest = hashlib.sha256(data).hexdigest()
    path = f"/runs/{run.id}/blobs/{digest}"
    with Peer(world) as peer:
        peer.socket.sendall(head("PUT", path, len(data), bearer(hospital)) + data[:4096])
        assert peer.answer()[0] == 408
    assert hospital.http.head(path).headers["Upload-Offset"] == "4096"
    source = tmp_path / "blob"
    source.write_bytes(data)
    assert hospital.client.upload(f"{API}{path}", source) == len(data) - 4096
    assert hospital.http.get(path).content == data


def test_an_upload_to_a_queue_that_stalled_goes_on_where_it_stopped(world: World) -> None:
    scene = Scene.made(world, hospitals=1)
    hospital, file = scene.hospitals[0], scene.weights(1)
    manifest = manifest_to_header(scene.manifest(hospital, file))
    fields, data = (bearer(hospital), f"{MANIFEST_HEADER}: {manifest}"), file.read_bytes()
    with Peer(world) as peer:
        peer.socket.sendall(head("POST", "/upload", len(data), *fields, root="") + data[:1024])
        status, body = peer.answer()
    assert (status, json.loads(body)["type"]) == (408, "urn:medhive:error:too-slow")
    assert scene.contributions() == []
    sent = hospital.client.upload("/upload", file, method="POST", headers={MANIFEST_HEADER: manifest})
    assert sent == len(data) - 1024
    assert [str(row.state) for row in scene.contributions()] == ["waiting"]


def test_a_kept_connection_may_rest_between_two_requests(world: World) -> None:
    with Peer(world) as peer:
        for _ in range(2):
            peer.socket.sendall(head("GET", "/coordinator"))
            assert peer.answer()[0] == 200
            time.sleep(2 * HEAD_S)


def test_a_quiet_event_stream_is_left_alone(world: World) -> None:
    after = world.admin.get(f"{API}/events/head")["body"]["number"]
    heard: list[str] = []

    def listen() -> None:
        with world.gateway.client(world.admin_token) as client:
            for row in client.events(after):
                heard.append(row["kind"])
                return

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(3 * max(HEAD_S, WINDOW_S))
    assert listener.is_alive()
    world.study()
    listener.join(DEADLINE_S)
    assert heard == ["study.created"]
