"""The tunnel, with a stand-in for ngrok's agent: opened, told to the gateway, lost, opened again; its token seen nowhere."""

import base64
import json
import os
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_world import GatewayProcess, World, running_gateway
from public_address import PublicCa, public_address
from waiting import DEADLINE_S, until

from api_gateway.tunnel import TunnelSettings
from medhive.client import GatewayClient, Trust
from medhive.errors import InvalidInput
from medhive.introduction import introduced
from medhive.signing import VerifyKey
from medhive.wire import API, AddressTrust, CoordinatorAnswer

AGENT = Path(__file__).parents[1] / "support" / "ngrok_agent.py"
TOKEN = "2abcdefTOKENofNgrokThatNobodyMaySee"


class TunnelService:
    """`medhive-gateway tunnel` as a process of its own, with the stand-in as its agent."""

    def __init__(self, folder: Path, upstream: str, **settings: str) -> None:
        self.folder = folder
        self.orders = folder / "agent" / "orders"
        self.orders.mkdir(parents=True)
        agent = folder / "ngrok"
        agent.write_text(f"#!{sys.executable}\n" + AGENT.read_text())
        agent.chmod(0o700)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEDHIVE_", "NGROK_"))}
        names = {"state_dir": str(folder), "upstream": upstream, "agent": str(agent)} | settings
        environment = {f"MEDHIVE_TUNNEL_{name.upper()}": value for name, value in names.items()}
        self.log = folder / "log"
        self.environment = kept | environment | {"NGROK_AUTHTOKEN": TOKEN}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "TunnelService":
        argv = [sys.executable, "-m", "api_gateway", "tunnel"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log)
        return self

    def address(self) -> str | None:
        file = self.folder / "tunnel.json"
        found = json.loads(file.read_text()) if file.exists() else {"address": None}
        return str(found["address"]) if found["address"] else None

    def agent_pid(self) -> int:
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def stop(self) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    file = tmp_path / "tunnel" / "tunnel.json"
    with running_gateway(tmp_path / "state", tunnel_file=str(file)) as gateway:
        yield gateway


def told(world: World) -> list[tuple[str, str]]:
    rows = world.admin.get(f"{API}/events", limit=1000)
    return [(row["kind"], row["subject"]) for row in rows if row["kind"].startswith("tunnel.")]


def shown_to_admins(world: World, tmp_path: Path) -> dict[str, str]:
    """What `medhive-admin tunnel` says."""
    password, ca = tmp_path / "password", tmp_path / "ca.crt"
    password.write_text(str(world.gateway.password))
    ca.write_text(world.gateway.ca_pem)
    environment = {**os.environ, "MEDHIVE_ADMIN_CONFIG": str(tmp_path / "admin.json")}
    words = ["login", world.gateway.url, "--username", "admin", "--password-file", str(password), "--ca-file", str(ca)]
    admin = [sys.executable, "-m", "api_gateway.admin"]
    subprocess.run([*admin, *words], env=environment, check=True, capture_output=True)
    shown = subprocess.run([*admin, "tunnel", "--json"], env=environment, check=True, capture_output=True)
    return dict(json.loads(shown.stdout))


def test_a_tunnel_passes_tls_on_and_is_opened_again_when_it_is_lost(gateway: GatewayProcess, tmp_path: Path) -> None:
    world = World(gateway, tmp_path)
    service = TunnelService(tmp_path / "tunnel", f"localhost:{gateway.port}").start()
    try:
        first = until(service.address, "the tunnel")
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] == first, "the gateway knows it")
        token = world.invite("north")
        assert token.split(".")[3] == AddressTrust.PINNED
        with GatewayClient(first, gateway.trust) as client:
            answer = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator", nonce="00"))
        key = VerifyKey(base64.urlsafe_b64decode(token.split(".")[2] + "="))
        assert introduced(answer, key, "00").fleet_address == first.removeprefix("https://")
        assert shown_to_admins(world, tmp_path) == {"address": first, "address_trust": "pinned"}
        (service.orders / "lose").touch()
        second = until(lambda: service.address() not in (None, first) and service.address(), "another address")
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] == second, "the gateway knows it")
        os.kill(service.agent_pid(), signal.SIGKILL)
        third = until(lambda: service.address() not in (None, first, second) and service.address(), "a third")
        with GatewayClient(str(third), gateway.trust) as client:
            assert client.get("/health")["status"] == "alive"
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] == third, "the gateway knows it")
        assert service.stop() == 0
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] is None, "its end")
        until(lambda: told(world)[-1][0] == "tunnel.lost", "the log has it")
        kinds = told(world)
        assert [kind for kind in kinds if kind[0] == "tunnel.opened"] == [
            ("tunnel.opened", f"tunnel {each}") for each in (first, second, third)
        ]
        assert kinds[-1] == ("tunnel.lost", f"tunnel {third}")
        calls = [json.loads(line) for line in (service.orders / "calls").read_text().splitlines()]
        assert TOKEN not in json.dumps(calls) and TOKEN not in service.log.read_text()
        assert first in service.log.read_text()
        assert stat.S_IMODE((service.folder / "agent" / "ngrok.yml").stat().st_mode) == 0o600
    finally:
        if service.process and service.process.poll() is None:
            service.stop()
        world.close()


def test_where_the_plan_has_no_tls_tunnel_ngrok_ends_tls_and_it_is_said(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    world = World(gateway, tmp_path)
    service = TunnelService(tmp_path / "tunnel", f"localhost:{gateway.port}", domain="medhive.example.org")
    (service.orders / "plan").write_text("free")
    service.start()
    try:
        assert until(service.address, "the tunnel") == "https://medhive.example.org"
        until(lambda: world.admin.get(f"{API}/tunnel")["address_trust"] == "tunnel", "the gateway knows it")
        assert world.invite("north").split(".")[3] == AddressTrust.TUNNEL
        assert "TLS ends at ngrok, which reads what passes" in service.log.read_text()
        assert service.stop() == 0
        forced = TunnelService(tmp_path / "forced", f"localhost:{gateway.port}", protocol="tls")
        (forced.orders / "plan").write_text("free")
        (forced.folder / "tunnel.json").write_text('{"address": "https://of.one.that.was.killed", "ends_tls": false}')
        forced.start()
        until(lambda: "cannot be opened" in forced.log.read_text(), "the refusal")
        assert forced.address() is None
        assert forced.stop() == 0
        said = forced.log.read_text()
        assert "not in your plan" in said and TOKEN not in said
    finally:
        if service.process and service.process.poll() is None:
            service.stop()
        world.close()


def test_a_hospital_that_comes_through_such_a_tunnel_is_told_so(gateway: GatewayProcess, tmp_path: Path) -> None:
    """The public certificate is that of a CA made for this test."""
    world, ca = World(gateway, tmp_path), PublicCa(tmp_path / "ca")
    file = tmp_path / "tunnel" / "tunnel.json"
    file.parent.mkdir()
    with public_address(ca, gateway.port, gateway.trust.context()) as address:
        file.write_text(json.dumps({"address": address, "ends_tls": True}))
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] == address, "the gateway knows it")
        with GatewayClient(address, Trust(ca_pem=ca.authority.pem)) as client:
            answer = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator", nonce="11"))
        found = introduced(answer, VerifyKey.from_text(world.coordinator.public_key), "11")
        assert found.address_trust is AddressTrust.TUNNEL
        assert found.fleet_address == address.removeprefix("https://")
        file.write_text("no tunnel service wrote this")
        until(lambda: world.admin.get(f"{API}/tunnel")["address"] is None, "nonsense counts as none")
    world.close()


def test_the_proxys_certificate_carries_the_tunnels_name(gateway: GatewayProcess, tmp_path: Path) -> None:
    certificate = tmp_path / "state" / "tls" / "proxy.crt"
    before = certificate.read_bytes()
    file = tmp_path / "tunnel" / "tunnel.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"address": "https://here.example.org", "ends_tls": False}))
    until(lambda: certificate.read_bytes() != before, "a new certificate")
    names = ssl._ssl._test_decode_cert(str(certificate))["subjectAltName"]  # type: ignore[attr-defined]
    assert ("DNS", "here.example.org") in names
    with httpx.Client(verify=gateway.trust.context(), timeout=60) as client:
        assert client.get(f"{gateway.url}{API}/tunnel").status_code == 401


def test_without_a_token_it_says_so_and_ends_well(tmp_path: Path) -> None:
    service = TunnelService(tmp_path / "tunnel", "localhost:1")
    del service.environment["NGROK_AUTHTOKEN"]
    process = service.start().process
    assert process and process.wait(DEADLINE_S) == 0
    assert service.log.read_text() == "no tunnel: NGROK_AUTHTOKEN is not set\n"
    service.environment["NGROK_AUTHTOKEN_FILE"] = str(tmp_path / "missing")
    process = service.start().process
    assert process and process.wait(DEADLINE_S) == 1
    assert "NGROK_AUTHTOKEN_FILE names" in service.log.read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [("MEDHIVE_TUNNEL_PROTOCOL", "ftp"), ("MEDHIVE_TUNNEL_UPSTREAM", "proxy"), ("MEDHIVE_TUNNEL_DOMAIN", "a b"),
     ("NGROK_AUTHTOKEN_FILE", "/nothing/here")],
)  # fmt: skip
def test_a_wrong_setting_of_the_tunnel_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=name):
        TunnelSettings.load().read_token()
