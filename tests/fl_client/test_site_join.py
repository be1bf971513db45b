"""Joining: trust by the invite alone, keys made once and never sent, the same site for ever."""

import base64
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from site_data import TABLE
from site_world import World

from fl_client.gateway import SiteRevoked, WrongAuthority
from fl_client.identity import AlreadyJoined, Identity, Invite, NotJoined, connect, leave
from fl_client.settings import Settings
from fl_client.site import Site, join_site
from fl_client.store import Store
from medhive.errors import Conflict, Expired, InvalidInput, NotAllowed, Unreachable
from medhive.signing import SigningKey
from medhive.wire import API


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    world.study("heart", "tabular", TABLE)
    yield world
    world.close()


def test_joining_makes_keys_that_only_the_owner_reads(world: World) -> None:
    site = world.join("north", "heart")
    for file in (site.keys.node_file, site.keys.consent_file, site.keys.secret_file, site.store.path):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [study.name for study in site.gateway.studies()] == ["heart"]
    answer = site.gateway.site("north")
    assert answer.consent_public_key == site.consent_key.public.text


def test_joining_again_continues_as_the_same_site(world: World) -> None:
    site = world.join("again", "heart")
    before = site.keys.consent_file.read_bytes()
    outcome = join_site(site.settings, "not even a token is needed")
    assert not outcome.fresh
    assert outcome.identity == site.identity
    assert outcome.studies == ("heart",)
    assert site.keys.consent_file.read_bytes() == before


def test_a_join_whose_answer_was_lost_is_repeated(world: World) -> None:
    settings = world.settings("lost")
    token = world.invite("lost", "heart")
    join_site(settings, token)
    (settings.state_dir / "site.db").unlink()
    assert join_site(settings, token).fresh


def test_a_state_folder_belongs_to_one_site(world: World) -> None:
    site = world.join("owner")
    with pytest.raises(AlreadyJoined, match="owner"):
        join_site(site.settings, world.invite("other"), "other")


def test_an_invite_works_once(world: World) -> None:
    token = world.invite("once")
    join_site(world.settings("once"), token)
    with pytest.raises(Conflict):
        join_site(world.settings("twice"), token, "once")


def test_an_expired_invite_is_refused(world: World) -> None:
    token = world.invite("late", expires_in_s=0.001)
    with pytest.raises(Expired):
        join_site(world.settings("late"), token)


def test_an_invite_for_another_name_is_refused(world: World) -> None:
    with pytest.raises(NotAllowed):
        join_site(world.settings("somebody"), world.invite("else"))


def test_a_forged_secret_is_refused(world: World) -> None:
    parts = world.invite("forged").split(".")
    forged = ".".join([parts[0], "A" * len(parts[1]), *parts[2:]])
    with pytest.raises((NotAllowed, InvalidInput)):
        join_site(world.settings("forged"), forged)


def test_another_coordinator_is_not_joined(world: World) -> None:
    parts = world.invite("careful").split(".")
    parts[2] = base64.urlsafe_b64encode(SigningKey.generate().public.raw).decode().rstrip("=")
    with pytest.raises(WrongAuthority):
        join_site(world.settings("careful"), ".".join(parts))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "mh2",
        "mh2.a.b",
        "mh1." + "A" * 43 + "." + "A" * 43,
        "mh2.ä.ö.pinned",
        "mh2." + "A" * 43 + "." + "A" * 43 + ".open",
    ],
)
def test_what_is_no_invite_is_refused_without_repeating_it(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Invite.parse(token)
    assert token not in str(caught.value) or not token


def test_nobody_at_the_address_is_said_so(world: World) -> None:
    token = world.invite("alone")
    settings = world.settings("alone", server_address="https://localhost:9")
    with pytest.raises(Unreachable, match="does not answer"):
        join_site(settings, token)


def test_an_address_must_be_https() -> None:
    with pytest.raises(ValueError, match="https"):
        Settings.model_validate({"server_address": "http://coordinator.example"})


def test_a_second_address_is_used_when_the_first_is_down(world: World) -> None:
    settings = world.settings("two", server_address=f"https://localhost:9, {world.stack.url}")
    join_site(settings, world.invite("two", "heart"))
    site = world.open(settings)
    assert [study.name for study in site.gateway.studies()] == ["heart"]


def test_a_wrong_clock_is_learnt_from_the_gateway(world: World) -> None:
    site = world.join("slow-clock", "heart")
    store = Store(site.settings.state_dir / "site.db")
    store.set_fact("token", None)
    store.set_fact("clock_offset_s", -600.0)
    with connect(site.identity, site.keys, store) as gateway:
        assert gateway.studies()
        assert abs(gateway.clock_offset_s) < 5
        assert abs(gateway.now() - datetime.now(UTC)) < timedelta(seconds=5)
    assert store.fact("clock_offset_s") == 0.0


def test_a_revoked_token_is_renewed_by_signature(world: World) -> None:
    site = world.join("renewed", "heart")
    kept = site.store.fact("token")
    site.store.set_fact("token", {**kept, "token": "0" * len(kept["token"])})
    with connect(site.identity, site.keys, site.store) as gateway:
        assert gateway.studies()
    assert site.store.fact("token")["token"] != "0" * len(kept["token"])


def test_a_revoked_site_is_told_so(world: World) -> None:
    site = world.join("unwanted", "heart")
    world.admin.post(f"{API}/sites/unwanted/revoke", {"reason": "test"})
    with pytest.raises(SiteRevoked, match="no longer works with this hospital"):
        site.gateway.studies()


def test_who_has_left_cannot_come_back_with_the_same_folder(world: World) -> None:
    site = world.join("leaver", "heart")
    leave(site.identity, site.keys, site.gateway, site.store, "moving")
    with pytest.raises(AlreadyJoined, match="has left"):
        join_site(site.settings, "whatever")


def test_a_fresh_folder_is_not_joined(tmp_path: Path) -> None:
    with pytest.raises(NotJoined, match="medhive-site join"):
        Site.open(Settings.model_validate({"state_dir": tmp_path / "state"}))
    assert not (tmp_path / "state").exists()
    with pytest.raises(NotJoined):
        Identity.load(Store(tmp_path / "site.db"))
