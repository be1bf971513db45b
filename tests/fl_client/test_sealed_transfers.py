"""Weights through a tunnel that ends TLS: a man in the middle who sees everything reads none and changes none.

The gateway is a real one that knows that address as a tunnel; the hospital's side is its own connection to the gateway;
between them stands the test's own TLS, which hands every byte to the test.
"""

import contextlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from gateway_world import GatewayProcess, Hospital, World, running_gateway
from public_address import PublicCa, public_address
from queue_world import agree, open_queue, signed_manifest
from waiting import until

from fl_client.gateway import Gateway
from fl_client.identity import Keys, connect, discover, join
from fl_client.store import Store
from medhive.client import GatewayClient, introduce
from medhive.errors import BadSignature, SealBroken, SealedOnly
from medhive.packing import sha256_file
from medhive.queues import MANIFEST_HEADER, manifest_to_header
from medhive.sealing import CHUNK_BYTES, REQUEST_HEADER, SEAL_HEADER, SiteSealing
from medhive.signing import SigningKey
from medhive.version import PROTOCOL, PROTOCOL_HEADER
from medhive.wire import API, AddressTrust, RunAnswer

PART = 8 * 1024  # of what is sent to be refused: little enough to be read before the answer
WEIGHTS = 1_200_000  # float32 values: several chunks, and more than one part


class Middle:
    """Who ends TLS: keeps what passes, and may change or cut it."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.went_up: list[bytes] = []
        self.act: Callable[[bool, bytes], bytes | None] = lambda _up, piece: piece
        self._lock = threading.Lock()

    def __call__(self, up: bool, piece: bytes) -> bytes | None:
        with self._lock:
            self.seen += piece
            if up:
                self.went_up.append(piece)
            return self.act(up, piece)

    def forget(self) -> None:
        self.seen.clear()
        self.went_up.clear()
        self.act = lambda _up, piece: piece

    def reads(self, weights: bytes) -> bool:
        """Whether any of a hundred windows of 16 bytes, the first of them near the beginning, passed openly."""
        windows = (weights[at : at + 16] for at in range(1024, len(weights) - 16, len(weights) // 100))
        return any(window in self.seen for window in windows)


def after(
    bytes_passed: int, *, up: bool, then: Callable[[bytes], bytes | None]
) -> Callable[[bool, bytes], bytes | None]:
    """Do something once to what passes in this direction after so many bytes."""
    count, done = 0, False

    def act(goes_up: bool, piece: bytes) -> bytes | None:
        nonlocal count, done
        if goes_up is up and not done:
            count += len(piece)
            if count > bytes_passed:
                done = True
                return then(piece)
        return piece

    return act


@contextlib.contextmanager
def tunnel_known(file: Path, address: str) -> Iterator[None]:
    """The gateway knows, from what the tunnel's service writes, that this address is a tunnel that ends TLS."""
    file.write_text(json.dumps({"address": address, "ends_tls": True}))
    until(lambda: introduce(address).introduction.body.address_trust is AddressTrust.TUNNEL, "the tunnel is known")
    yield


def flipped(piece: bytes) -> bytes:
    return piece[:-1] + bytes([piece[-1] ^ 1])


class Scene:
    """A gateway in a tunnel, a hospital that joined through it, and a run with weights."""

    def __init__(self, gateway: GatewayProcess, folder: Path, ca: PublicCa, address: str, middle: Middle) -> None:
        self.world, self.middle, self.address, self.ca = World(gateway, folder), middle, address, ca
        self.folder = folder
        self.keys, store = Keys(folder / "keys"), Store(folder / "site.db")
        token = self.world.invite("north")
        self.identity = join((address,), token, "north", keys=self.keys, store=store, extra_ca_file=ca.file).identity
        self.gateway: Gateway = connect(self.identity, self.keys, store, ca.file)
        self.bearer = str((store.fact("token") or {})["token"])
        self.inside = Hospital(
            "north", gateway.client(self.bearer), gateway.http(self.bearer), self.keys.consent_key(),
            self.keys.node_key(), self.world.coordinator,
        )  # fmt: skip
        self.run: RunAnswer = self.world.ready(self.world.study(self.inside), self.inside)
        self.world.started(self.run)

    def given(self) -> tuple[bytes, str]:
        """Fresh weights that the coordinator has for the run's sites, and their digest."""
        path, digest = self.weights()
        self.world.server.upload(self.path(digest), path)
        return path.read_bytes(), digest

    def weights(self) -> tuple[Path, str]:
        return self.world.weights(seed=secrets.randbits(32), size=WEIGHTS)

    def path(self, digest: str) -> str:
        return f"{API}/runs/{self.run.id}/blobs/{digest}"

    def fetch(self, digest: str) -> bytes:
        target = self.folder / f"fetched-{digest}"
        self.gateway.fetch_blob(self.run.id, digest, target, 10**8)
        return target.read_bytes()

    def arrived(self, digest: str) -> bytes:
        """A blob as the aggregator reads it."""
        target = self.folder / f"arrived-{digest}"
        self.world.server.download(self.path(digest), target, digest, max_bytes=10**8)
        return target.read_bytes()

    def sealing(self, key: SigningKey | None = None) -> SiteSealing:
        answer = self.world.coordinator.sealing_key
        assert answer is not None
        return SiteSealing(
            "north", key or self.keys.consent_key(), self.identity.verify_key, answer.body.public_key, self.gateway.now
        )

    def outsider(self) -> httpx.Client:
        """Whoever has the hospital's token, at the tunnel."""
        headers = {PROTOCOL_HEADER: str(PROTOCOL), "Authorization": f"Bearer {self.bearer}"}
        verify = self.identity.trust(self.ca.file).context()
        return httpx.Client(base_url=self.address, headers=headers, verify=verify, timeout=30)

    def close(self) -> None:
        self.gateway.close()
        self.inside.close()
        self.world.close()


@pytest.fixture(scope="module")
def module_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder, middle = tmp_path_factory.mktemp("tunnel"), Middle()
    ca = PublicCa(folder / "public-ca")
    with (
        running_gateway(folder / "state", tunnel_file=str(folder / "tunnel.json")) as gateway,
        public_address(ca, gateway.port, gateway.trust.context(), middle) as address,
        tunnel_known(folder / "tunnel.json", address),
        contextlib.closing(Scene(gateway, folder, ca, address, middle)) as scene,
    ):
        yield scene


@pytest.fixture
def scene(module_scene: Scene) -> Iterator[Scene]:
    module_scene.middle.forget()
    yield module_scene
    module_scene.middle.forget()


def test_who_comes_by_the_coordinators_own_address_is_told_of_no_tunnel(scene: Scene) -> None:
    direct = scene.world.gateway.url
    assert discover((direct,), scene.identity.verify_key).address_trust is AddressTrust.PINNED
    assert discover((scene.address,), scene.identity.verify_key).address_trust is AddressTrust.TUNNEL
    content, digest = scene.given()
    target = scene.folder / "directly"
    with GatewayClient(direct, scene.world.gateway.trust, scene.bearer) as client:
        client.download(scene.path(digest), target, digest, max_bytes=10**8)
    assert target.read_bytes() == content


def test_a_tunnel_that_claims_to_be_the_coordinators_own_address_is_found_out(scene: Scene) -> None:
    """It writes another Host into every request; the nonce says where the hospital asked."""
    told, claimed = (each.removeprefix("https://").encode() for each in (scene.address, scene.world.gateway.url))
    scene.middle.act = lambda up, piece: piece.replace(told, claimed) if up else piece
    assert introduce(scene.address).introduction.body.address_trust is AddressTrust.PINNED
    assert discover((scene.address,), scene.identity.verify_key).address_trust is AddressTrust.TUNNEL


def test_the_middle_reads_no_weights_and_both_ways_arrive_whole(scene: Scene) -> None:
    assert scene.identity.address_trust == AddressTrust.TUNNEL
    content, digest = scene.given()
    assert scene.fetch(digest) == content
    update, own = scene.weights()
    scene.gateway.send_blob(scene.run.id, update, own)
    assert scene.arrived(own) == update.read_bytes()
    seen = scene.middle
    assert len(seen.seen) > len(content) + update.stat().st_size and scene.path(digest).encode() in seen.seen
    assert not seen.reads(content) and not seen.reads(update.read_bytes())


def test_a_queue_is_sealed_both_ways(scene: Scene) -> None:
    """The newest model comes down, a contribution goes up and is averaged from, and the middle reads neither."""
    world, study = scene.world, scene.world.study(scene.inside)
    base = world.released(study, scene.inside, seed=secrets.randbits(32), size=WEIGHTS)
    queue = open_queue(world, study, min_sites=1)
    agree(scene.inside, queue)
    scene.middle.forget()
    model, update = scene.folder / "newest", scene.weights()[0]
    scene.gateway.fetch_version(study, base.version, model, digest=base.digest, size_bytes=base.size_bytes)
    assert sha256_file(model) == base.digest
    manifest = signed_manifest(queue, base, update, site="north", key=scene.keys.consent_key())
    scene.gateway.send_contribution(manifest, update)
    assert len(scene.middle.seen) > base.size_bytes + update.stat().st_size
    assert not scene.middle.reads(model.read_bytes()) and not scene.middle.reads(update.read_bytes())
    kept = world.admin.get(f"{API}/studies/{study}/queue/contributions")
    assert [(row["state"], row["digest"]) for row in kept] == [("waiting", sha256_file(update))]
    # What would be seen if it were not sealed is not taken: the test can tell.
    again = signed_manifest(queue, base, model, site="north", key=scene.keys.consent_key())
    with scene.outsider() as http:
        headers = {MANIFEST_HEADER: manifest_to_header(again), "Content-Range": f"bytes 0-{PART - 1}/{base.size_bytes}"}
        sent = http.post("/upload", content=model.read_bytes()[:PART], headers=headers)
        taken = http.get("/download", params={"study": study})
    assert [answer.json()["type"].rpartition(":")[2] for answer in (sent, taken)] == ["sealed-only"] * 2
    assert scene.middle.reads(model.read_bytes())


def test_an_old_hospital_hears_what_to_do_and_nothing_of_its_update_leaves(scene: Scene) -> None:
    content, digest = scene.given()
    update, own = scene.weights()
    with GatewayClient(scene.address, scene.identity.trust(scene.ca.file), scene.bearer) as old:
        with pytest.raises(SealedOnly, match="upgrade MedHive at the hospital"):
            old.download(scene.path(digest), scene.folder / "old", digest, max_bytes=10**8)
        with pytest.raises(SealedOnly, match="403 to HEAD"):  # the way on which nothing is sent yet has no words
            old.upload(scene.path(own), update)
    assert not scene.middle.reads(content) and not scene.middle.reads(update.read_bytes())
    # What would be seen if it were sent: the test can tell.
    with scene.outsider() as http:
        assert http.put(scene.path(own), content=update.read_bytes()[:PART]).status_code == 403
    assert scene.middle.reads(update.read_bytes())


def test_a_cut_line_is_gone_on_with_from_the_last_whole_chunk(scene: Scene) -> None:
    content, digest = scene.given()
    scene.middle.act = after(3 * CHUNK_BYTES, up=False, then=lambda _piece: None)
    assert scene.fetch(digest) == content
    asked = re.findall(rb"GET " + re.escape(scene.path(digest).encode()), b"".join(scene.middle.went_up))
    assert len(asked) == 2
    update, own = scene.weights()
    scene.middle.act = after(2 * CHUNK_BYTES, up=True, then=lambda _piece: None)
    scene.gateway.send_blob(scene.run.id, update, own)
    assert scene.arrived(own) == update.read_bytes()
    assert not scene.middle.reads(content) and not scene.middle.reads(update.read_bytes())


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_changed_bit_is_refused_and_an_honest_line_goes_on(scene: Scene, way: str) -> None:
    content, digest = scene.given()
    update, own = scene.weights()
    scene.middle.act = after(2 * CHUNK_BYTES, up=way == "up", then=flipped)
    with pytest.raises(SealBroken):
        scene.fetch(digest) if way == "down" else scene.gateway.send_blob(scene.run.id, update, own)
    if way == "down":
        kept = (scene.folder / f"fetched-{digest}.part").read_bytes()
        assert kept and content.startswith(kept)
        assert scene.fetch(digest) == content
    else:
        scene.gateway.send_blob(scene.run.id, update, own)
        assert scene.arrived(own) == update.read_bytes()


def test_an_answer_of_the_middles_own_is_refused_at_once(scene: Scene) -> None:
    """It may have a seal from an earlier transfer, and make bytes for the key that the hospital has sent."""
    content, digest = scene.given()
    headers, opener_of = scene.sealing().ask(scene.path(digest), 0)
    with scene.outsider() as http:
        honest = http.get(scene.path(digest), headers=headers)
        other, _ = scene.sealing().ask(scene.path(digest), 0)
        swapped = http.get(scene.path(digest), headers=other)
    assert b"".join(opener_of(honest.headers[SEAL_HEADER]).opened([honest.content])) == content
    with pytest.raises(SealBroken, match="another transfer"):
        opener_of(swapped.headers[SEAL_HEADER])
    with pytest.raises(SealBroken, match="changed or cut"):
        list(opener_of(honest.headers[SEAL_HEADER]).opened([swapped.content]))


def test_parts_cannot_be_played_again_or_elsewhere(scene: Scene) -> None:
    update, own = scene.weights()
    size = update.stat().st_size
    with update.open("rb") as file, scene.outsider() as http:
        headers, body = scene.sealing().part(scene.path(own), file, 0, PART)
        headers["Content-Range"] = f"bytes 0-{PART - 1}/{size}"
        assert http.put(scene.path(own), headers=headers, content=body).status_code == 200
        again = http.put(scene.path(own), headers=headers, content=body)
        assert (again.status_code, again.json()["data"]["offset"]) == (409, PART)
        moved = {**headers, "Content-Range": f"bytes {PART}-{2 * PART - 1}/{size}"}
        assert http.put(scene.path(own), headers=moved, content=body).json()["type"].endswith("seal-broken")
        elsewhere = http.put(scene.path("f" * 64), headers=headers, content=body)
        assert elsewhere.json()["type"].endswith("seal-broken")
    scene.gateway.send_blob(scene.run.id, update, own)
    assert scene.arrived(own) == update.read_bytes()


def test_a_stolen_token_reads_and_writes_nothing(scene: Scene) -> None:
    _, digest = scene.given()
    update, own = scene.weights()
    thief = scene.sealing(SigningKey.generate())
    with scene.outsider() as http:
        assert http.get(scene.path(digest)).json()["type"].endswith("sealed-only")
        headers, _ = thief.ask(scene.path(digest), 0)
        assert http.get(scene.path(digest), headers=headers).json()["type"].endswith("bad-signature")
        with update.open("rb") as file:
            seal, body = thief.part(scene.path(own), file, 0, PART)
        where = {"Content-Range": f"bytes 0-{PART - 1}/{update.stat().st_size}"}
        answer = http.put(scene.path(own), headers={**seal, **where}, content=body)
        assert answer.json()["type"].endswith("bad-signature")
        assert http.head(scene.path(own), headers={SEAL_HEADER: "wanted"}).headers["Upload-Offset"] == "0"
        assert http.get(scene.path(digest), headers={REQUEST_HEADER: "nonsense"}).status_code == 400


def test_another_coordinators_sealing_key_is_not_sealed_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = SigningKey.generate().public
    monkeypatch.setattr(type(scene.identity), "verify_key", property(lambda _self: stranger))
    update, own = scene.weights()
    store = Store(scene.folder / "site.db")
    with connect(scene.identity, scene.keys, store, scene.ca.file) as gateway, pytest.raises(BadSignature):
        gateway.send_blob(scene.run.id, update, own)
    assert not scene.middle.reads(update.read_bytes())
