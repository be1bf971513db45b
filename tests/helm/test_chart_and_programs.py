"""The chart beside the rest of this repository: what it sets and mounts is what programs, images and proxy use."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from helm_chart import (
    CASES,
    PORTS,
    ROOT,
    containers_of,
    documents_of,
    environment_of,
    main_of,
    of_kind,
    pod_of,
    read_yaml,
    render,
    volume_of,
    workloads,
)

from api_gateway import handouts, tunnel
from api_gateway import settings as gateway_settings
from api_gateway.state import LEAVES
from fl_client import settings as site_settings
from fl_client.container import arguments
from fl_server import settings as server_settings

DOCKERFILES: Final = {
    "tunnel": ROOT / "services" / "api-gateway" / "Dockerfile",
    "gateway": ROOT / "services" / "api-gateway" / "Dockerfile",
    "fl-server": ROOT / "services" / "fl-server" / "Dockerfile",
    "mlflow": ROOT / "services" / "mlflow" / "Dockerfile",
    "proxy": ROOT / "deploy" / "proxy" / "Dockerfile",
    "site": ROOT / "services" / "fl-client" / "Dockerfile",
}
# The others are called as their part.
IMAGES: Final = {"gateway": "medhive/api-gateway", "tunnel": "medhive/api-gateway", "site": "medhive/fl-client"}


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"chart_check_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_variables() -> dict[str, set[str]]:
    """For each component, the variables that its program reads."""
    site = {
        choice for field in site_settings.Settings.model_fields.values() for choice in _aliases(field.validation_alias)
    }
    tracking = (ROOT / "services" / "mlflow" / "serve.py").read_text("utf-8")
    entry = (ROOT / "deploy" / "proxy" / "entrypoint.sh").read_text("utf-8")
    return {
        "gateway": {gateway_settings.PREFIX + name.upper() for name in gateway_settings.Settings.model_fields},
        "tunnel": _tunnel_variables(),
        "fl-server": {server_settings.PREFIX + name.upper() for name in server_settings.ServerSettings.model_fields},
        "mlflow": {"MEDHIVE_MLFLOW_" + name for name in re.findall(r"\b_?([A-Z]+(?:_[A-Z]+)*)\b", tracking)},
        "proxy": set(re.findall(r"\$\{([A-Z_]+):-", entry)),
        # httpx, which every connection goes through, reads the one; the container's first process the other.
        "site": site | {arguments.PROXY, arguments.PROXY_FILE},
    }


def _tunnel_variables() -> set[str]:
    fields = tunnel.TunnelSettings.model_fields.items()
    return {str(field.validation_alias or tunnel.PREFIX + name.upper()) for name, field in fields}


def _aliases(alias: Any) -> list[str]:
    return [str(choice) for choice in getattr(alias, "choices", [alias])]


@pytest.mark.parametrize("case", CASES)
def test_every_variable_is_a_setting(case: str) -> None:
    known = known_variables()
    for part, workload in workloads(case).items():
        assert environment_of(workload).keys() <= known[part], part


@pytest.mark.parametrize("case", ["coordinator", "postgres", "own-tls"])
def test_the_programs_take_the_values(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = workloads(case)
    for part in ("gateway", "fl-server"):
        for name, value in environment_of(parts[part]).items():
            monkeypatch.setenv(name, str(value))
    gateway = gateway_settings.load_settings()
    assert gateway.fleet_address == "medhive.example.org:8443"
    assert gateway.public_names == ("medhive.example.org",)
    assert gateway.trusted_proxy
    server = server_settings.ServerSettings()
    assert server.gate == "0.0.0.0:9093"
    assert server.gateway_url == "https://gateway:8000"
    assert (server.mlflow_url is not None) == ("mlflow" in parts)


def test_the_tracking_server_takes_the_values(tmp_path: Path) -> None:
    for name in handouts.FILES["mlflow"]:
        (tmp_path / Path(name).name).write_text("x")
    env = {name: str(value) for name, value in environment_of(workloads("coordinator")["mlflow"]).items()}
    env = {name: value.replace("/handout", str(tmp_path)) for name, value in env.items()}
    env["MEDHIVE_MLFLOW_STATE_DIR"] = str(tmp_path / "state")
    argv = module_at(ROOT / "services" / "mlflow" / "serve.py").command(env)
    assert argv[argv.index("--port") + 1] == str(PORTS["mlflow"])
    assert "basic-auth" in argv


def test_the_hospitals_program_takes_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(workloads("site")["site"]).items():
        monkeypatch.setenv(name, value or "mh2.secret")
    settings = site_settings.Settings()
    assert settings.addresses == ("https://medhive.example.org:8443", "https://medhive-2.example.org")
    assert (settings.client_id, settings.data_dir, settings.state_dir) == (
        "hospital-a",
        Path("/data"),
        Path("/state/site"),
    )


@pytest.mark.parametrize("case", ["pacs", "gpu"])
def test_the_pull_takes_the_values(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = workloads(case)["site"]
    mounts = {mount["mountPath"] for mount in main_of(site)["volumeMounts"]}
    for name, value in environment_of(site).items():
        if name.startswith("PACS") and name.endswith("_FILE"):
            assert str(Path(value or "").parent) in mounts
        monkeypatch.setenv(name, value or "mh2.secret")
    settings = site_settings.Settings()
    assert settings.pacs_url.endswith("/dicom-web")
    assert (
        (settings.pacs_user != "")
        == (settings.pacs_password_file is not None)
        != (settings.pacs_token_file is not None)
    )


def test_gateway_and_tunnel_take_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = workloads("tunnel")
    for part in ("gateway", "tunnel"):
        for name, value in environment_of(parts[part]).items():
            monkeypatch.setenv(name, str(value))
    gateway, settings = gateway_settings.load_settings(), tunnel.TunnelSettings.load()
    assert (gateway.certificate_days, gateway.ca_days, gateway.ca_overlap_days, gateway.key_days) == (
        90,
        1000,
        60.5,
        365,
    )
    assert (settings.upstream, settings.domain, settings.protocol) == ("proxy:443", "medhive.ngrok.example", "tls")
    assert settings.token is None and settings.token_file == Path("/token/authtoken")
    # What the one writes the other reads, and cannot write; ngrok's agent and the token are on no volume that both see.
    assert gateway.tunnel_file == settings.state_dir / "tunnel.json"
    mounts = {part: {each["mountPath"]: each for each in main_of(parts[part])["volumeMounts"]} for part in parts}
    claims = [volume_of(parts[part], mounts[part]["/tunnel"]["name"]) for part in ("gateway", "tunnel")]
    assert claims[0]["persistentVolumeClaim"] == claims[1]["persistentVolumeClaim"]
    assert [mounts[part]["/tunnel"]["subPath"] for part in ("gateway", "tunnel")] == ["tunnel", "tunnel"]
    assert mounts["gateway"]["/tunnel"]["readOnly"] is True
    assert "emptyDir" in volume_of(parts["tunnel"], mounts["tunnel"]["/tunnel/agent"]["name"])
    assert volume_of(parts["tunnel"], "token")["secret"]["items"] == [{"key": "token", "path": "authtoken"}]
    assert main_of(parts["tunnel"])["args"] == ["medhive-gateway", "tunnel"]


def test_the_ports_are_those_of_the_images() -> None:
    for part, workload in workloads("coordinator").items():
        exposed = re.findall(r"(?m)^EXPOSE (.+)$", DOCKERFILES[part].read_text("utf-8"))
        declared = [str(port["containerPort"]) for port in main_of(workload)["ports"]]
        assert " ".join(declared) in exposed, part
        assert declared[0] == str(PORTS[part])


def test_the_images_are_those_that_are_built() -> None:
    for part, workload in workloads("both").items():
        dockerfile = DOCKERFILES[part].read_text("utf-8")
        assert "10001:10001" in dockerfile
        for container in containers_of(workload):
            assert container["image"].partition(":")[0] == IMAGES.get(part, f"medhive/{part}")


def test_services_have_the_names_in_their_certificates() -> None:
    services = {each["metadata"]["name"] for each in of_kind("coordinator", "Service")}
    assert services == set(LEAVES.values())


@pytest.mark.parametrize("part", ["fl-server", "mlflow", "proxy"])
def test_what_is_waited_for_and_used_is_what_the_gateway_hands_out(part: str) -> None:
    workload = workloads("coordinator")[part]
    given = {Path(name).name for name in handouts.FILES[part]}
    script = pod_of(workload)["initContainers"][0]["command"][-1]
    awaited = re.search(r"in (.+); do", script)
    assert awaited
    assert set(awaited[1].split()) <= given
    values = [value for value in environment_of(workload).values() if value and value.startswith("/handout/")]
    assert {Path(value).name for value in values} <= set(awaited[1].split())


def test_the_proxy_sends_the_bytes_from_where_the_gateway_points() -> None:
    prefix = environment_of(workloads("coordinator")["gateway"])["MEDHIVE_GATEWAY_ACCEL_PREFIX"]
    configuration = (ROOT / "deploy" / "proxy" / "nginx.conf.in").read_text("utf-8")
    place = re.search(rf"location {prefix}/ {{\s+internal;\s+alias (\S+)/;", configuration)
    assert place
    mounts = {part: main_of(workloads("coordinator")[part])["volumeMounts"] for part in ("proxy", "gateway")}
    read = next(mount for mount in mounts["proxy"] if mount["name"] == "blobs")
    written = next(mount for mount in mounts["gateway"] if mount["name"] == "blobs")
    assert (read["mountPath"], read["readOnly"]) == (place[1], True)
    assert read["subPath"] == written["subPath"]
    state = environment_of(workloads("coordinator")["gateway"])["MEDHIVE_GATEWAY_STATE_DIR"]
    assert written["mountPath"] == f"{state}/blobs"


@pytest.mark.parametrize("part", ["fl-server", "site"])
def test_a_liveness_that_is_a_command_is_the_images_own_check(part: str) -> None:
    command = main_of(workloads("both")[part])["livenessProbe"]["exec"]["command"]
    assert ", ".join(f'"{word}"' for word in command) in DOCKERFILES[part].read_text("utf-8")


def test_the_examples_of_the_guide_can_be_installed() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    examples = re.findall(r"(?ms)^```yaml\n(.+?)^```", guide)
    assert examples
    for example in examples:
        assert documents_of(render(read_yaml(example)))
