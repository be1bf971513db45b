"""Certificates are renewed while gateways run, once for all of them; what nobody can renew is announced in time."""

import datetime
import itertools
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from gateway_world import GatewayProcess, World, running_gateway
from prometheus_client import generate_latest
from public_address import PublicCa
from waiting import until

from api_gateway.__main__ import build
from api_gateway.admin.audit import (
    check_log,
    fetch_coordinator_key,
    fetch_countersignatures,
    fetch_rows,
    fetch_site_keys,
)
from api_gateway.monitoring import registry_of
from api_gateway.renewal import Renewal
from api_gateway.settings import Settings
from medhive.client import GatewayClient, introduce
from medhive.introduction import Introduced, introduced, new_nonce
from medhive.signing import SigningKey, VerifyKey, sign
from medhive.wire import API, AddressTrust, CountersignBody, Head

LIFE_S = 9.0  # renewed in its last third, which a busy machine must not sleep through
DAYS = LIFE_S / 86400


def shown_by(gateway: GatewayProcess) -> bytes:
    """The certificate that a new connection is shown."""
    pem = ssl.get_server_certificate(("127.0.0.1", gateway.port))
    return ssl.PEM_cert_to_DER_cert(pem)


def kept(path: Path) -> bytes:
    """The first certificate of a file."""
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(path.read_text().partition(end)[0] + end)


def test_two_gateways_renew_once_and_both_show_it(tmp_path: Path) -> None:
    state, handouts = tmp_path / "state", tmp_path / "handouts"
    (handouts / "proxy").mkdir(parents=True)
    settings = {"certificate_days": f"{DAYS:.9f}", "renewal_look_s": "0.1", "handout_dir": str(handouts)}
    with running_gateway(state, **settings) as one, running_gateway(state, **settings) as two:
        world = World(one, tmp_path)
        first = shown_by(one)
        until(lambda: shown_by(one) != first and shown_by(two) != first, "both show another certificate")
        until(lambda: shown_by(one) == shown_by(two) == kept(state / "tls" / "server.crt"), "the same one")
        until(
            lambda: (handouts / "proxy" / "proxy.crt").read_bytes() == (state / "tls" / "proxy.crt").read_bytes(),
            "it is handed out",
        )
        assert world.admin.get(f"{API}/sites") == []
        rows = world.admin.get(f"{API}/events", limit=1000)
        renewals = [row for row in rows if row["kind"] == "certificate.renewed"]
        assert renewals
        moments = [datetime.datetime.fromisoformat(row["at"]) for row in renewals]
        gaps = [(late - early).total_seconds() for early, late in itertools.pairwise(moments)]
        assert all(gap > LIFE_S / 3 for gap in gaps), gaps
        assert set(renewals[0]["data"]["certificates"]) == {"server", "proxy", "superlink", "mlflow"}
        world.close()


def test_the_end_of_an_own_certificate_is_announced_once(tmp_path: Path) -> None:
    ca = PublicCa(tmp_path / "public", days=20)
    settings = {"own_cert_file": str(ca.certificate), "renewal_look_s": "0.05"}
    with running_gateway(tmp_path / "state", **settings) as gateway:
        world = World(gateway, tmp_path)

        def announced() -> list[str]:
            rows = world.admin.get(f"{API}/events", limit=1000)
            return [row["subject"] for row in rows if row["kind"] == "certificate.ends"]

        until(announced, "the event")
        with gateway.client() as client:
            ready = client.get("/ready")
        assert ready["status"] == "degraded"
        assert [each["certificate"] for each in ready["certificates_ending"]] == ["own"]
        gateway.stop()
        gateway.start()
        password, world.gateway.password = gateway.password, None
        assert password
        before = len(gateway.log)
        until(lambda: "certificate.ends" in gateway.log[:before], "the log has it")
        rows = announced()
        assert len(rows) == 1 and rows[0].startswith("certificate own until ")
        newer = PublicCa(tmp_path / "newer", days=90)
        ca.certificate.write_bytes(newer.certificate.read_bytes())
        with gateway.client() as client:
            until(lambda: client.get("/ready")["status"] == "ready", "the new one is seen")
            assert (
                'medhive_certificate_expiry_timestamp_seconds{certificate="own"}' in client._http.get("/metrics").text
            )
        world.close()


def test_an_own_certificate_that_cannot_be_read_holds_up_nothing_else(tmp_path: Path) -> None:
    """Its renewed file may have been laid down for another user; key, hand-outs and figures go on."""
    handout = tmp_path / "handouts" / "fl-server"
    handout.mkdir(parents=True)
    own = PublicCa(tmp_path / "public", days=90).certificate
    gateway, _ = build(Settings(state_dir=tmp_path / "state", own_cert_file=own, handout_dir=handout.parent))
    figures = registry_of(gateway, lambda: "ok")
    try:
        assert b'{certificate="own"}' in generate_latest(figures)
        own.unlink()
        former = gateway.key.public.key_id
        Renewal(gateway).renew_key()
        assert gateway.key.public.key_id != former
        assert SigningKey.load(handout / "coordinator.key").public.key_id == gateway.key.public.key_id
        assert gateway.state.address_trust is AddressTrust.PUBLIC
        page = generate_latest(figures)
        assert b'{certificate="ca"}' in page and b'{certificate="own"}' not in page
    finally:
        gateway.database.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """The settings of a database that no gateway has seen."""
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("empty_postgres")}


def renew(gateway: GatewayProcess, *words: str) -> None:
    """`medhive-gateway renew` as a process of its own, beside those that serve."""
    environment = {**os.environ, **gateway.environment, "MEDHIVE_GATEWAY_STATE_DIR": str(gateway.state_dir)}
    command = [sys.executable, "-m", "api_gateway", "renew", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def meet(gateway: GatewayProcess, known: VerifyKey) -> Introduced:
    """Let it introduce itself to somebody who knows this key."""
    nonce = new_nonce(gateway.url)
    return introduced(introduce(gateway.url, nonce), known, nonce)


def audited(client: GatewayClient, known: VerifyKey) -> list[str]:
    """What `audit verify` finds wrong, for an admin who logged in when the coordinator had this key."""
    signatures, keys = fetch_countersignatures(client), fetch_site_keys(client)
    head = Head.model_validate(client.get(f"{API}/events/head"))
    rows = list(fetch_rows(client))
    findings = check_log(rows, head, fetch_coordinator_key(client, known), signatures, keys)
    assert len(findings) == 3
    return [f"{item.what}: {item.detail}" for item in findings if not item.right]


def test_two_gateways_go_over_to_another_key_and_ca(database: dict[str, str], tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_gateway(state, **database) as one, running_gateway(state, **database) as two:
        world = World(one, tmp_path)
        known = VerifyKey.from_text(world.coordinator.public_key)
        hospital = world.hospital()
        head = Head.model_validate(hospital.client.get(f"{API}/events/head")).body
        seen = CountersignBody(site=hospital.site, number=head.number, hash=head.hash, seen_at=head.at)
        hospital.client.post(f"{API}/events/countersign", sign(seen, hospital.key))
        renew(one, "key")
        present = meet(one, known).key
        assert present != known and meet(two, known).key == present
        assert audited(world.admin, known) == []
        renew(one, "ca")
        assert len(meet(two, known).authorities) == len(meet(one, known).authorities) == 2
        renew(two, "ca", "--at-once")
        authorities = meet(two, known).authorities
        assert authorities == meet(one, known).authorities and len(authorities) == 1
        ca = x509.load_pem_x509_certificate(authorities[0].encode())
        for gateway in (one, two):
            x509.load_der_x509_certificate(shown_by(gateway)).verify_directly_issued_by(ca)
        with one.client(world.admin_token) as admin:
            until(lambda: any(row.kind == "coordinator.ca-dropped" for row in fetch_rows(admin)), "the log has it")
            told = [row.kind for row in fetch_rows(admin) if row.kind.startswith(("coordinator.ca", "coordinator.key"))]
            assert told == [
                "coordinator.key-changed", "coordinator.ca-announced", "coordinator.ca-changed", "coordinator.ca-dropped"
            ]  # fmt: skip
            assert audited(admin, known) == []
        world.close()
