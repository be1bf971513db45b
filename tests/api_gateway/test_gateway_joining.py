"""Invites and joins: one use, one site, one coordinator, both keys; whoever has not all of it stays outside and is named."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from gateway_world import World, join_body, running_gateway

from api_gateway import accounts
from api_gateway.__main__ import build
from api_gateway.auth import WINDOW, count_failure, hash_password, password_fits, require_not_throttled
from api_gateway.db import Base, Database
from api_gateway.settings import Settings
from api_gateway.work import Call
from medhive import __version__
from medhive.errors import (
    BadSignature,
    ClockSkew,
    Conflict,
    Expired,
    IllegalTransition,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    TooManyAttempts,
)
from medhive.signing import SigningKey, sign
from medhive.version import OLDEST_PROTOCOL, PROTOCOL, PROTOCOL_HEADER, SOFTWARE_HEADER
from medhive.wire import API, Join, LeaveBody, Login, SiteTokenProof

JSON = {"Content-Type": "application/json"}


class Applicant:
    """A hospital that wants to join."""

    def __init__(self, world: World, **invite: Any) -> None:
        self.world = world
        self.site = world.name("site")
        self.token = world.invite(self.site, **invite)
        self.key = SigningKey.generate()
        self.node_key = ec.generate_private_key(ec.SECP384R1())

    def body(self, **changes: Any) -> Join:
        return join_body(self.world.coordinator, self.site, self.token, self.key, self.node_key, **changes)

    def send(self, body: Join) -> Any:
        with self.world.gateway.client() as client:
            return client.post(f"{API}/join", body)


@pytest.fixture
def applicant(world: World) -> Applicant:
    return Applicant(world)


def refusals(world: World, site: str) -> list[dict[str, Any]]:
    """The events about refused joins of this site."""
    head = world.admin.get(f"{API}/events/head")["body"]["number"]
    rows = world.admin.get(f"{API}/events", after=max(0, head - 50), limit=100)
    return [row for row in rows if row["kind"] == "join.refused" and row["subject"] == f"site {site}"]


def test_a_lost_answer_may_be_asked_for_again(applicant: Applicant) -> None:
    body = applicant.body()
    first, second = applicant.send(body), applicant.send(body)
    assert first["site"] == second["site"] == applicant.site
    assert first["token"]["token"] != second["token"]["token"]


def test_a_used_invite_is_refused(applicant: Applicant) -> None:
    applicant.send(applicant.body())
    applicant.key = SigningKey.generate()
    with pytest.raises(Conflict, match="used already"):
        applicant.send(applicant.body())
    event = refusals(applicant.world, applicant.site)[-1]
    assert event["data"] == {"cause": "conflict", "source_address": "127.0.0.1"}
    assert event["site"] is None


def test_an_expired_invite_is_refused(world: World) -> None:
    applicant = Applicant(world, expires_in_s=0.001)
    with pytest.raises(Expired, match="expired"):
        applicant.send(applicant.body())


def test_a_forged_invite_is_refused(applicant: Applicant) -> None:
    prefix, _, *rest = applicant.token.split(".")
    own = applicant.body()
    applicant.token = ".".join([prefix, "A" * 43, *rest])
    with pytest.raises(NotAllowed, match="unknown"):
        applicant.send(applicant.body())
    with pytest.raises(BadSignature):
        applicant.send(own.model_copy(update={"invite_signature": applicant.body().invite_signature}))


def test_an_invite_is_never_sent(applicant: Applicant) -> None:
    assert applicant.token.split(".")[1] not in applicant.body().model_dump_json()


def test_an_invite_for_another_site_is_refused(applicant: Applicant) -> None:
    with pytest.raises(NotAllowed, match="another site"):
        applicant.send(applicant.body(site=applicant.world.name("other")))


def test_a_withdrawn_invite_is_refused(applicant: Applicant) -> None:
    world = applicant.world
    number = next(row["id"] for row in world.admin.get(f"{API}/invites") if row["site"] == applicant.site)
    world.admin.delete(f"{API}/invites/{number}")
    with pytest.raises(NotAllowed):
        applicant.send(applicant.body())
    with pytest.raises(NotFound):
        world.admin.delete(f"{API}/invites/{number}")


def test_a_second_site_of_the_same_name_is_refused(applicant: Applicant) -> None:
    second = applicant.world.invite(applicant.site)
    applicant.send(applicant.body())
    applicant.token, applicant.key = second, SigningKey.generate()
    with pytest.raises(Conflict, match="joined already"):
        applicant.send(applicant.body())
    with pytest.raises(Conflict, match="joined already"):
        applicant.world.invite(applicant.site)


@pytest.mark.parametrize(
    ("protocol", "side"), [(PROTOCOL + 1, "upgrade the coordinator"), (OLDEST_PROTOCOL - 1, "upgrade the hospital")]
)
def test_another_protocol_says_which_side_to_upgrade(applicant: Applicant, protocol: int, side: str) -> None:
    with pytest.raises(IncompatibleVersion, match=rf"\(MedHive {__version__}\) speaks protocol {protocol}.*{side}"):
        applicant.send(applicant.body().model_copy(update={"protocol": protocol}))


def test_the_header_says_the_version_too(world: World) -> None:
    newer = {PROTOCOL_HEADER: str(PROTOCOL + 1)}
    with world.gateway.http() as http:
        answer = http.get("/studies", headers=newer)
        assert answer.status_code == 426 and "upgrade the coordinator" in answer.json()["detail"]
        assert http.get("/studies", headers={PROTOCOL_HEADER: "one"}).status_code == 422
        root = world.gateway.url
        assert http.get(f"{root}/download", headers=newer).status_code == 426
        assert http.post(f"{root}/upload", headers=newer).status_code == 426
        # Whoever does not fit still learns from it which side to upgrade, in words of its own.
        assert http.get("/coordinator", headers=newer).json()["protocol"] == PROTOCOL
        del http.headers[PROTOCOL_HEADER]
        assert http.get("/coordinator").status_code == 200
        assert http.post("/login", json={}).status_code == 422
        assert http.post(f"{root}/upload").status_code == 422, "of other programs, which have no version"


def test_the_version_that_a_hospital_has_now_is_known_to_admins_and_to_the_aggregator(world: World) -> None:
    hospital = world.hospital()

    def known() -> tuple[Any, ...]:
        site = world.admin.get(f"{API}/sites/{hospital.site}")
        with world.gateway.client(world.gateway.server_token) as server:
            node = next(row for row in server.get(f"{API}/server/nodes") if row["site"] == hospital.site)
        assert (site["software"], site["protocol"]) == (node["software"], node["protocol"])
        return site["software"], site["protocol"]

    assert known() == (__version__, PROTOCOL)
    hospital.http.get("/studies", headers={SOFTWARE_HEADER: "0.0.9"})
    assert known() == ("0.0.9", PROTOCOL), "at once: another version is no matter of how lately it was seen"
    refused = hospital.http.get(
        "/studies", headers={PROTOCOL_HEADER: str(OLDEST_PROTOCOL - 1), SOFTWARE_HEADER: "0.0.8"}
    )
    assert refused.status_code == 426
    assert f"the caller (MedHive 0.0.8) speaks protocol {OLDEST_PROTOCOL - 1}" in refused.json()["detail"]
    hospital.client.get(f"{API}/studies")
    assert known() == (__version__, PROTOCOL)


def test_both_keys_must_sign(applicant: Applicant) -> None:
    body = applicant.body()
    other = ec.generate_private_key(ec.SECP384R1())
    forged = join_body(applicant.world.coordinator, applicant.site, applicant.token, applicant.key, other)
    with pytest.raises(BadSignature, match="node key"):
        applicant.send(body.model_copy(update={"node_signature": forged.node_signature}))
    with pytest.raises(BadSignature):
        applicant.send(applicant.body(consent_public_key=SigningKey.generate().public.text))
    applicant.node_key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(InvalidInput, match="P-384"):
        applicant.send(applicant.body())


def test_a_join_for_another_coordinator_is_refused(applicant: Applicant) -> None:
    with pytest.raises(BadSignature, match="another coordinator"):
        applicant.send(applicant.body(coordinator_key_id="0" * 16))


def test_a_clock_off_by_ten_minutes_is_told_the_time(applicant: Applicant) -> None:
    with pytest.raises(ClockSkew, match="set it right") as caught:
        applicant.send(applicant.body(issued_at=datetime.now(UTC) - timedelta(minutes=10)))
    assert abs(datetime.fromisoformat(caught.value.data["server_time"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_fresh_token_for_a_signature_once(world: World) -> None:
    hospital = world.hospital()
    proof = SiteTokenProof(
        site=hospital.site,
        coordinator_key_id=world.coordinator.key_id,
        issued_at=datetime.now(UTC),
        nonce="0" * 32,
    )
    signed = sign(proof, hospital.key)
    with world.gateway.client() as client:
        token = client.post(f"{API}/site-token", signed)["token"]
        client.use_token(token)
        assert client.get(f"{API}/sites")[0]["name"] == hospital.site
        with pytest.raises(BadSignature, match="used already"):
            client.post(f"{API}/site-token", signed)
        with pytest.raises(BadSignature):
            client.post(f"{API}/site-token", sign(proof, SigningKey.generate()))
        late = proof.model_copy(update={"issued_at": datetime.now(UTC) - timedelta(minutes=10), "nonce": "1" * 32})
        with pytest.raises(ClockSkew):
            client.post(f"{API}/site-token", sign(late, hospital.key))


def test_a_revoked_site_can_do_nothing_more(world: World) -> None:
    hospital = world.hospital()
    study = world.study(hospital)
    run = world.ready(study, hospital)
    lease = world.started(run)
    world.admin.post(f"{API}/sites/{hospital.site}/revoke", {"reason": "left the federation"})
    with pytest.raises(NotAuthenticated):
        hospital.client.get(f"{API}/studies")
    proof = SiteTokenProof(
        site=hospital.site, coordinator_key_id=world.coordinator.key_id, issued_at=datetime.now(UTC), nonce="2" * 32
    )
    with world.gateway.client() as client, pytest.raises(NotAllowed) as caught:
        client.post(f"{API}/site-token", sign(proof, hospital.key))
    assert caught.value.data["state"] == "revoked"
    seen = world.server.post(f"{API}/server/runs/{run.id}/heartbeat", {"fence": lease.fence})
    assert [consent["state"] for consent in seen["consents"]] == ["withdrawn"]
    nodes = {node["site"]: node["wanted"] for node in world.server.get(f"{API}/server/nodes")}
    assert nodes[hospital.site] is False
    with pytest.raises(IllegalTransition):
        world.admin.post(f"{API}/sites/{hospital.site}/revoke", {"reason": ""})
    with pytest.raises(Conflict):
        world.invite(hospital.site)


def test_a_site_leaves_by_itself_only(world: World) -> None:
    one, two = world.hospital(), world.hospital()
    now = datetime.now(UTC)
    mine = LeaveBody(site=one.site, coordinator_key_id=one.coordinator.key_id, reason="done", issued_at=now)
    with pytest.raises(MedHiveError):
        one.client.post(f"{API}/sites/{two.site}/leave", sign(mine.model_copy(update={"site": two.site}), one.key))
    # Its token is not enough: it may have been read on its way.
    with pytest.raises(BadSignature):
        one.client.post(f"{API}/sites/{one.site}/leave", sign(mine, two.key))
    with pytest.raises(ClockSkew):
        old = mine.model_copy(update={"issued_at": now - timedelta(hours=1)})
        one.client.post(f"{API}/sites/{one.site}/leave", sign(old, one.key))
    assert one.client.post(f"{API}/sites/{one.site}/leave", sign(mine, one.key))["state"] == "left"
    with pytest.raises(NotAuthenticated):
        one.client.get(f"{API}/sites")


def test_connects_and_disconnects_are_events_with_an_address(world: World) -> None:
    hospital = world.hospital()
    for online in (True, True, False):
        world.server.put(f"{API}/server/nodes/{hospital.site}", {"node_id": "7", "online": online})
    rows = world.admin.get(f"{API}/events", after=0, limit=1000)
    head = world.admin.get(f"{API}/events/head")["body"]["number"]
    if head > 1000:
        rows = world.admin.get(f"{API}/events", after=head - 900, limit=1000)
    mine = [row for row in rows if row["site"] == hospital.site]
    assert [row["kind"] for row in mine][-2:] == ["site.connected", "site.disconnected"]
    assert mine[-1]["data"]["source_address"] == "127.0.0.1"


def test_invites_put_a_site_into_studies(world: World) -> None:
    study = world.study()
    hospital = world.hospital(study)
    assert world.admin.get(f"{API}/studies/{study}")["members"] == [hospital.site]
    with pytest.raises(NotFound):
        world.invite(world.name("site"), ("nothing",))


def test_too_many_refused_joins_must_wait(tmp_path: Path) -> None:
    """On a gateway of its own: this address is shut out of it for minutes."""
    with running_gateway(tmp_path / "state") as gateway, gateway.http() as http:
        world = World(gateway, tmp_path)
        applicant = Applicant(world)
        applicant.token = f"mh2.{'B' * 43}.x"
        body = applicant.body().model_dump_json()
        answers = [http.post("/join", content=body, headers=JSON).status_code for _ in range(25)]
        assert answers == [403] * 20 + [429] * 5
        assert len(refusals(world, applicant.site)) == 10
        wrong = {"username": "admin", "password": "wrong"}
        logins = [http.post("/login", json=wrong).status_code for _ in range(7)]
        assert logins == [401] * 5 + [429] * 2
        right = {"username": "admin", "password": gateway.password}
        refused = http.post("/login", json=right)
        assert refused.status_code == 429 and refused.json()["data"]["retry_after_s"] > 0
        with pytest.raises(TooManyAttempts, match="try again in"):
            world.login("admin", str(gateway.password))
        rows = world.admin.get(f"{API}/events", limit=1000)
        assert sum(row["kind"] == "login.failed" for row in rows) == 5
        world.close()


def test_who_has_to_wait_for_seconds_is_not_told_of_zero_minutes(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'attempts.db'}")
    Base.metadata.create_all(database.engine)
    began, keys = datetime.now(UTC), (("login@192.0.2.1", 1),)
    count_failure(database, began, keys)
    with database.read() as session, pytest.raises(TooManyAttempts, match=r"again in 1 min\.") as refused:
        require_not_throttled(session, began + WINDOW - timedelta(seconds=5.4), keys)
    assert refused.value.data["retry_after_s"] == 6
    database.close()


def test_a_password_that_was_changed_while_it_was_checked_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is slow, and waits for others' checks: whoever changes a stolen password meanwhile shuts the thief out."""
    gateway, stolen = build(Settings(state_dir=tmp_path / "state"))
    call = Call(gateway, None, "192.0.2.1")

    def change(hashed: str | None, password: str) -> bool:
        fits = password_fits(hashed, password)
        with gateway.system_write() as work:
            accounts.set_password(work, "admin", hash_password("a new and long one"), None)
        return fits

    with monkeypatch.context() as patched:
        patched.setattr("api_gateway.auth.password_fits", change)
        with pytest.raises(NotAuthenticated):
            accounts.login(call, Login(username="admin", password=str(stolen)))
    assert accounts.login(call, Login(username="admin", password="a new and long one")).role == "admin"
    gateway.database.close()
