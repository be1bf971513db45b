"""Certificates are renewed while gateways run, once for all of them; what nobody can renew is announced in time."""

import datetime
import itertools
import ssl
from pathlib import Path

from gateway_world import GatewayProcess, World, running_gateway, until
from public_address import PublicCa

from medhive.wire import API

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
