"""The way to the gateway, before there is trust and while a proxy stands in for a gateway that is away."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medhive import client, errors
from medhive.client import KNOWN_ERRORS, GatewayClient, RemoteError, Trust, introduce
from medhive.errors import (
    DigestMismatch,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    NoSpace,
    Unavailable,
    Unreachable,
)
from medhive.signing import SigningKey, sign
from medhive.version import OLDEST_PROTOCOL, PROTOCOL, PROTOCOL_HEADER, SOFTWARE_HEADER
from medhive.wire import API, AddressTrust, CoordinatorAnswer, IntroductionBody

NOW = datetime(2026, 11, 1, tzinfo=UTC)
BODY = IntroductionBody(
    authorities=("PEM",), address_trust=AddressTrust.PINNED, fleet_address="here:1", nonce="", issued_at=NOW
)
SELF = CoordinatorAnswer(
    name="Here", version="1.0", protocol=1, oldest_protocol=1, key_id="0" * 16, public_key="key", ca_certificate="PEM",
    time=NOW, introduction=sign(BODY, SigningKey.generate()),
)  # fmt: skip
HTML = b"<html><body>It works!</body></html>"


class Stranger(BaseHTTPRequestHandler):
    """Answers everything with what its server was told to say."""

    server: "Address"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.resumable else 0
        body = self.server.body[start:]
        self.send_response(416 if start and not body else 206 if start else self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class Address(ThreadingHTTPServer):
    """A server on loopback that says one thing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Stranger)
        self.status, self.body, self.headers = 200, b"", dict[str, str]()
        self.resumable = False
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def address() -> Iterator[Address]:
    with Address() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_address_says_who_it_is_and_is_told_nothing(address: Address) -> None:
    address.body = SELF.model_dump_json().encode()
    assert introduce(address.url) == SELF
    [(path, headers)] = address.asked
    assert path == f"{API}/coordinator?nonce=" and "Authorization" not in headers


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {}, HTML),
        (200, {}, b"{}"),
        (200, {}, b""),
        (404, {}, SELF.model_dump_json().encode()),
        (302, {"Location": "/elsewhere"}, b""),
        (200, {}, SELF.model_dump_json().encode() + b" " * client.MAX_INTRODUCTION_BYTES),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(SELF.model_dump_json().encode())),
    ],
    ids=["a page", "other JSON", "nothing", "an error", "a way on", "too much", "packed"],
)
def test_whoever_is_no_coordinator_is_told_apart(
    address: Address, status: int, headers: dict[str, str], body: bytes
) -> None:
    address.status, address.headers, address.body = status, headers, body
    with pytest.raises(InvalidInput, match="does not answer as a MedHive coordinator"):
        introduce(address.url)
    assert len(address.asked) == 1


def test_an_introduction_has_an_end(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "INTRODUCTION_S", -1.0)
    address.body = SELF.model_dump_json().encode()
    with pytest.raises(InvalidInput):
        introduce(address.url)


def test_nobody_at_the_address_is_said() -> None:
    with pytest.raises(Unreachable, match="https://localhost:9 does not answer"):
        introduce("https://localhost:9")
    with pytest.raises(InvalidInput):
        introduce("https://local\x00host")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_whose_gateway_is_away_is_waited_for(address: Address, status: int) -> None:
    address.status, address.body = status, HTML
    with pytest.raises(Unavailable, match=f"answers {status}"):
        introduce(address.url)
    with GatewayClient(address.url, Trust()) as gateway, pytest.raises(Unavailable) as caught:
        gateway.get(f"{API}/sites")
    assert isinstance(caught.value, Unreachable) and caught.value.data["status"] == status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_download_to_a_full_disk_is_named(address: Address, tmp_path: Path) -> None:
    address.body = HTML
    (tmp_path / "model.part").symlink_to("/dev/full")
    with GatewayClient(address.url, Trust()) as gateway, pytest.raises(NoSpace, match="disk is full"):
        gateway.download(f"{API}/x", tmp_path / "model", "0" * 64, max_bytes=len(HTML))


def test_another_page_than_a_problem_is_nobodys_named_error(address: Address) -> None:
    address.status, address.body = 500, HTML
    with GatewayClient(address.url, Trust()) as gateway, pytest.raises(RemoteError):
        gateway.get(f"{API}/sites")


@pytest.mark.parametrize("spoilt", [bytes(5), HTML * 2], ids=["not written", "of something longer"])
def test_a_part_that_an_earlier_life_left_spoilt_is_fetched_again(
    address: Address, tmp_path: Path, spoilt: bytes
) -> None:
    address.body, address.resumable = HTML, True
    digest = hashlib.sha256(HTML).hexdigest()
    (tmp_path / "model.part").write_bytes(spoilt)
    with GatewayClient(address.url, Trust()) as gateway:
        gateway.download("/blob", tmp_path / "model", digest, max_bytes=100)
        assert (tmp_path / "model").read_bytes() == HTML
        (tmp_path / "other.part").write_bytes(HTML[:5])
        with pytest.raises(DigestMismatch):
            gateway.download("/blob", tmp_path / "other", "0" * 64, max_bytes=100)
    assert not (tmp_path / "other.part").exists()


def test_the_client_knows_every_error_of_the_core() -> None:
    named = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MedHiveError)}
    assert set(KNOWN_ERRORS.values()) == named
    assert len({kind.code for kind in named}) == len(named)


@pytest.mark.parametrize(
    ("protocol", "side"), [(PROTOCOL + 1, "this program"), (OLDEST_PROTOCOL - 1, "the coordinator")]
)
def test_a_coordinator_of_another_version_is_named_with_it_whatever_its_own_words(
    address: Address, protocol: int, side: str
) -> None:
    address.status, address.body = 426, b'{"type": "urn:medhive:incompatible-version", "detail": "in its own words"}'
    address.headers = {PROTOCOL_HEADER: str(protocol), SOFTWARE_HEADER: "9.8.7"}
    with GatewayClient(address.url, Trust()) as gateway:
        with pytest.raises(
            IncompatibleVersion, match=rf"\(MedHive 9\.8\.7\) speaks protocol {protocol}.*upgrade {side}"
        ):
            gateway.get(f"{API}/studies")
        address.headers = {}
        with pytest.raises(IncompatibleVersion, match="in its own words"):
            gateway.get(f"{API}/studies")
