"""A coordinator that shows a public certificate: trusted by the roots of the system, known by its key alone.

The public CA is one made for the test, given by SSL_CERT_FILE as the system's roots, or by EXTRA_CA_FILE.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from public_address import PublicCa, public_address
from site_data import TABLE
from site_world import World

from fl_client.gateway import WrongAuthority
from fl_client.identity import discover
from fl_client.site import join_site
from medhive.client import GatewayClient, Trust
from medhive.errors import Unreachable
from medhive.signing import SigningKey
from medhive.wire import API, AddressTrust


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> PublicCa:
    return PublicCa(tmp_path_factory.mktemp("public-ca"))


@pytest.fixture(scope="module")
def world(ca: PublicCa, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = {"MEDHIVE_GATEWAY_OWN_CERT_FILE": str(ca.certificate)}
    world = World(tmp_path_factory.mktemp("world"), **settings)
    world.study("heart", "tabular", TABLE)
    yield world
    world.close()


@pytest.fixture(scope="module")
def address(ca: PublicCa, world: World) -> Iterator[str]:
    with public_address(ca, world.stack.ports["gateway"], world.stack.trust().context()) as address:
        yield address


def test_the_invite_says_that_the_address_is_public(world: World) -> None:
    assert world.invite("said").split(".")[3] == "public"


@pytest.mark.parametrize("way", ["system", "extra"])
def test_a_hospital_trusts_the_public_roots(
    world: World, ca: PublicCa, address: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"extra_ca_file": ca.file} if way == "extra" else {}
    if way == "system":
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    settings = world.settings(f"north-{way}", server_address=address, **more)
    outcome = join_site(settings, world.invite(f"north-{way}", "heart"))
    assert outcome.studies == ("heart",)
    assert outcome.identity.address_trust is AddressTrust.PUBLIC
    with world.open(settings) as site:
        assert site.identity.address_trust == AddressTrust.PUBLIC
        assert [study.name for study in site.gateway.studies()] == ["heart"]


def test_without_the_roots_nothing_is_sent(
    world: World, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = tmp_path / "nobody.pem"
    nobody.write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(nobody))
    settings = world.settings("careful", server_address=address)
    with pytest.raises(Unreachable, match="certificate"):
        join_site(settings, world.invite("careful"))


def test_a_certificate_that_is_trusted_does_not_make_a_coordinator(
    world: World, ca: PublicCa, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another coordinator behind a perfectly valid public certificate, asked with the invite of one that is not there."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    parts = world.invite("lured", "heart").split(".")
    parts[2] = base64.urlsafe_b64encode(SigningKey.generate().public.raw).decode().rstrip("=")
    with pytest.raises(WrongAuthority):
        join_site(world.settings("lured", server_address=address), ".".join(parts))
    states = {site["name"]: site["state"] for site in world.admin.get(f"{API}/sites")}
    assert states["lured"] == "invited"


def test_a_pinned_coordinator_is_not_trusted_by_public_roots(
    ca: PublicCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    world = World(tmp_path)
    try:
        with public_address(ca, world.stack.ports["gateway"], world.stack.trust().context()) as address:
            token = world.invite("pinned")
            assert token.split(".")[3] == "pinned"
            with pytest.raises(Unreachable, match="certificate"):
                join_site(world.settings("pinned", server_address=address), token)
            key = discover((address,), world.key.public).key
            assert base64.urlsafe_b64encode(key.raw).decode().rstrip("=") == token.split(".")[2]
            with GatewayClient(address, Trust(ca_pem=ca.authority.pem)) as client:
                assert client.get(f"{API}/coordinator")["introduction"]["body"]["address_trust"] == "pinned"
    finally:
        world.close()


def test_a_hospital_follows_its_coordinator_to_another_address(
    ca: PublicCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined with MedHive's CA; then the coordinator shows a public certificate elsewhere, and Flower moves with it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    world = World(tmp_path)
    try:
        world.study("heart", "tabular", TABLE)
        site = world.join("mover", "heart")
        assert not site.greet()
        assert site.identity.address_trust == AddressTrust.PINNED
        world.stack.stop()
        world.stack.extra_env = {"MEDHIVE_GATEWAY_OWN_CERT_FILE": str(ca.certificate)}
        world.stack.ports["fleet"] += 1
        world.stack.start_gateway()
        with public_address(ca, world.stack.ports["gateway"], world.stack.trust().context()) as address:
            moved = world.open(world.settings("mover", server_address=address))
            assert moved.greet()
            assert moved.identity.fleet_address == f"localhost:{world.stack.ports['fleet']}"
            assert [study.name for study in moved.gateway.studies()] == ["heart"]
            later = world.open(world.settings("mover", server_address=""))
            assert later.identity == moved.identity
            assert [study.name for study in later.gateway.studies()] == ["heart"]
    finally:
        world.close()


def test_a_hospital_does_not_follow_anybody_else(
    world: World, address: str, ca: PublicCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of another coordinator, with a certificate that is perfectly valid."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    own = World(tmp_path)
    try:
        site = own.join("loyal")
        lured = own.open(own.settings("loyal", server_address=address))
        with pytest.raises(WrongAuthority, match="check SERVER_ADDRESS"):
            lured.greet()
        with pytest.raises(WrongAuthority, match="check SERVER_ADDRESS"):
            own.open(own.settings("loyal", server_address=f"{address},https://localhost:9")).gateway.studies()
        assert own.open(own.settings("loyal", server_address="")).identity == site.identity
        own.study("heart", "tabular", TABLE)
        other_first = {"server_address": f"{address},{own.stack.url}"}
        passing = own.open(own.settings("loyal", **other_first))
        assert passing.gateway.studies() == [] and passing.gateway.address == own.stack.url
        assert join_site(own.settings("late", **other_first), own.invite("late", "heart")).studies == ("heart",)
    finally:
        own.close()
