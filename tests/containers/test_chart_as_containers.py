"""The Helm chart's pods, started as containers: this file plays the kubelet, as far as an engine without a cluster can.

It reads what the chart renders and does what it says: containers that prepare a pod before its own, the variables, the user,
the read-only root, the limits, and volumes as a storage driver hands them over (the root's, open to the group 10001 alone).
What Services do, names on one network do. Not played: policies, scheduling, upgrades.
"""

import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

import pytest
from helm_chart import Document, documents_of, main_of, pod_of, render, volume_of
from stack import wait_until

from fl_client.tasks.phantoms import CLASSES, make_phantoms

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]

ROOT: Final = Path(__file__).parents[2]
IMAGES: Final = {
    "api-gateway": "services/api-gateway/Dockerfile",
    "fl-server": "services/fl-server/Dockerfile",
    "mlflow": "services/mlflow/Dockerfile",
    "proxy": "deploy/proxy/Dockerfile",
    "fl-client": "services/fl-client/Dockerfile",
}
BUILD_DEADLINE_S: Final = 1800.0
DEADLINE_S: Final = 600.0
GROUP: Final = "10001"
PUBLIC: Final = "medhive.example.org"
STUDY: Final = "brain-mri"
# Of its own, so that no other test's images are replaced.
TAG: Final = "0.1.0-chart"
VALUES: Final[dict[str, Any]] = {
    "image": {"tag": TAG},
    "coordinator": {"publicAddress": f"{PUBLIC}:8443"},
    "site": {
        "enabled": True,
        "serverAddresses": [f"https://{PUBLIC}:8443"],
        "clientId": "hospital-a",
        "joinToken": {"existingSecret": "invite"},
        "data": {"existingClaim": "scans"},
    },
}
PROBE: Final = """
import socket, ssl, sys, urllib.request
kind, host, port, path = sys.argv[1:]
if kind == "tcpSocket":
    socket.create_connection((host, int(port)), 5).close()
else:
    context = ssl._create_unverified_context()  # as the kubelet does
    urllib.request.urlopen(f"https://{host}:{port}{path}", timeout=5, context=context).close()
"""


def docker(*words: str, check: bool = True, text: str | None = None, deadline_s: float = DEADLINE_S) -> str:
    """One docker command, run to its end; returns what it printed."""
    done = subprocess.run(
        ["docker", *words], input=text, capture_output=True, text=True, timeout=deadline_s, check=False
    )
    assert not check or done.returncode == 0, f"docker {' '.join(words)}:\n{done.stderr}{done.stdout}"
    return done.stdout if check else done.stdout + done.stderr


def options_of(pod: Document, container: Document) -> list[str]:
    """What the pod's and the container's security and limits are for an engine."""
    whole, own = pod["securityContext"], container["securityContext"]
    options = ["--user", f"{whole['runAsUser']}:{whole['runAsGroup']}", "--group-add", str(whole["fsGroup"])]
    options += ["--cap-drop", *own["capabilities"]["drop"]]
    options += ["--read-only"] if own["readOnlyRootFilesystem"] else []
    options += [] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
    memory = container["resources"]["limits"]["memory"]
    return [*options, "--memory", memory.replace("Gi", "g").replace("Mi", "m")]


@dataclass
class Node:
    """One machine of a cluster: its network, its volumes, its pods."""

    scans: Path
    secrets: Mapping[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"chart-{uuid.uuid4().hex[:8]}")
    volumes: set[str] = field(default_factory=set)
    making: Lock = field(default_factory=Lock)

    def container(self, part: str) -> str:
        """The name of a pod's own container."""
        return f"{self.name}-{part}"

    def start(self, part: str, workload: Document) -> None:
        """Prepare a pod, then start its service."""
        pod = pod_of(workload)
        for number, first in enumerate(pod.get("initContainers", [])):
            docker("run", "--rm", "--name", f"{self.container(part)}-{number}", *self._words(workload, first))
        aliases = [part, *([PUBLIC] if part == "proxy" else [])]
        named = [word for alias in aliases for word in ("--network-alias", alias)]
        docker("run", "--detach", "--name", self.container(part), *named, *self._words(workload, main_of(workload)))

    def _words(self, workload: Document, container: Document) -> list[str]:
        # Kubernetes knows no health checks of images.
        words = ["--network", self.name, "--no-healthcheck", *options_of(pod_of(workload), container)]
        for each in container.get("env", []):
            value = each.get("value")
            words += ["--env", f"{each['name']}={self.secrets['invite'] if value is None else value}"]
        for mount in container["volumeMounts"]:
            words += self._mount(volume_of(workload, mount["name"]), mount)
        command = container.get("command", [])
        return [*words, *(["--entrypoint", command[0]] if command else []), container["image"], *command[1:]]

    def _mount(self, volume: Document, mount: Document) -> list[str]:
        place = mount["mountPath"]
        if "emptyDir" in volume:
            return [
                "--tmpfs",
                f"{place}:mode=2777,gid={GROUP},size={volume['emptyDir']['sizeLimit'].removesuffix('i')}",
            ]
        claim = volume["persistentVolumeClaim"]["claimName"]
        if claim == "scans":
            return ["--volume", f"{self.scans}:{place}:ro"]
        source = "-".join([self.name, claim, *([mount["subPath"]] if "subPath" in mount else [])])
        self._make_volume(source)
        only = ",readonly" if mount.get("readOnly") else ""
        return ["--mount", f"type=volume,source={source},target={place},volume-nocopy{only}"]

    def _make_volume(self, name: str) -> None:
        script = f"chown 0:{GROUP} /v && chmod 2770 /v"
        words = ["--mount", f"type=volume,source={name},target=/v,volume-nocopy", "--entrypoint", "sh"]
        with self.making:
            if name not in self.volumes:
                self.volumes.add(name)
                docker("volume", "create", name)
                docker("run", "--rm", "--user", "0", *words, f"medhive/proxy:{TAG}", "-c", script)

    def well(self, part: str, container: Document, kind: str) -> bool:
        """Whether a probe passes now."""
        probe = container[f"{kind}Probe"]
        if "exec" in probe:
            words = [self.container(part), *probe["exec"]["command"]]
        else:
            how = "httpGet" if "httpGet" in probe else "tcpSocket"
            ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
            target = [how, part, ports[probe[how]["port"]], probe[how].get("path", "")]
            words = [self.container("gateway"), "python", "-c", PROBE, *target]
        return subprocess.run(["docker", "exec", *words], capture_output=True, check=False).returncode == 0

    def await_ready(self, part: str, workload: Document) -> None:
        """Wait for all three probes, as an installation does."""

        def running() -> None:
            state = docker("inspect", "--format", "{{.State.Running}}", self.container(part), check=False).strip()
            assert state == "true", docker("logs", self.container(part), check=False)

        container = main_of(workload)
        for kind in ("startup", "liveness", "readiness"):
            what = f"the {kind} probe of {part}"
            wait_until(lambda kind=kind: self.well(part, container, kind), what, DEADLINE_S, running)  # type: ignore[misc]

    def run(self, part: str, *words: str, text: str | None = None) -> str:
        """`kubectl exec`."""
        given = ["--interactive"] if text is not None else []
        return docker("exec", *given, self.container(part), *words, text=text)

    def admin(self, *words: str) -> Any:
        """`medhive-admin ... --json` in the gateway's pod, read."""
        return json.loads(self.run("gateway", "medhive-admin", *words, "--json"))

    def site(self, *words: str) -> Any:
        """`medhive-site ... --json` in the hospital's pod, read."""
        return json.loads(self.run("site", "medhive-site", *words, "--json"))

    def clear(self) -> None:
        """End and remove everything that was started."""
        named = docker("ps", "--all", "--quiet", "--filter", f"name={self.name}").split()
        if named:
            docker("rm", "--force", "--volumes", *named)
        for volume in self.volumes:
            docker("volume", "rm", "--force", volume)
        docker("network", "rm", self.name, check=False)


@pytest.fixture(scope="module")
def images(engine: object) -> None:
    """All five, with the names that the chart gives them."""
    for name, file in IMAGES.items():
        docker(
            "build", "--quiet", "--tag", f"medhive/{name}:{TAG}", "--file", file, str(ROOT), deadline_s=BUILD_DEADLINE_S
        )


@pytest.fixture
def node(images: None, tmp_path: Path) -> Iterator[Node]:
    """A node with a hospital's made images."""
    scans = make_phantoms(tmp_path / "scans", 10, 1)
    for each in (scans, *scans.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    node = Node(scans)
    docker("network", "create", node.name)
    yield node
    node.clear()


def chart() -> dict[str, Document]:
    """Component to workload."""
    found = [each for each in documents_of(render(VALUES)) if each["kind"] in ("Deployment", "StatefulSet")]
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in found}


def log_in(node: Node) -> None:
    """As the chart's notes say, but from inside."""
    (line,) = [line for line in docker("logs", node.container("gateway")).splitlines() if "admin password:" in line]
    password = line.rpartition(" ")[2]
    node.run("gateway", "sh", "-c", "umask 077 && cat > /tmp/password", text=password)
    words = ["--username", "admin", "--password-file", "/tmp/password", "--ca-file", "/state/gateway/tls/ca.crt"]  # noqa: S108
    node.run("gateway", "medhive-admin", "login", f"https://{PUBLIC}:8443", *words)


def test_the_pods_start_and_a_hospital_takes_part(node: Node) -> None:
    parts = chart()
    coordinator = [part for part in parts if part != "site"]
    # All at once, as Kubernetes does: the others wait for what the gateway hands out.
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: node.start(part, parts[part]), sorted(coordinator, key="gateway".__eq__)))
    for part in coordinator:
        node.await_ready(part, parts[part])
    log_in(node)
    words = ["--task", "image-folder", "--classes", ",".join(CLASSES), "--option", "image_size=32"]
    node.admin("studies", "create", STUDY, *words, "--default", "local_epochs=1")
    node.secrets = {"invite": node.admin("invite", "hospital-a", "--study", STUDY)["token"]}

    node.start("site", parts["site"])
    node.await_ready("site", parts["site"])
    health = main_of(parts["site"])["livenessProbe"]["exec"]["command"]
    wait_until(lambda: "connected to the" in node.run("site", *health), "a connected hospital", DEADLINE_S)
    node.site("settings", "--cpu-threads", "1")
    request = node.site("request", STUDY, "--rounds", "1", "--min-sites", "1", "--person", "Dr. Adler")
    run = node.admin("approve", request["id"])["run_id"]
    wait_until(lambda: node.admin("show", run)["state"] in ("completed", "failed"), "the run's end", DEADLINE_S)
    assert node.admin("show", run)["state"] == "completed"
    # The bytes came through the proxy, from the volume that it shares with the gateway.
    file = f"/state/site/models/{STUDY}/hospital-a_FinalGlobal_v1.safetensors"
    arrived = ["docker", "exec", node.container("site"), "test", "-s", file]
    wait_until(lambda: not subprocess.run(arrived, check=False).returncode, "the version's arrival", DEADLINE_S)

    restarted(node, parts["gateway"])
    closed(node)


def restarted(node: Node, gateway: Document) -> None:
    """A new pod on the old volumes goes on, with the same keys and no new password."""
    before = node.run("gateway", "sha256sum", "/state/gateway/tls/ca.crt", "/state/gateway/secrets/coordinator.key")
    docker("rm", "--force", node.container("gateway"))
    node.start("gateway", gateway)
    node.await_ready("gateway", gateway)
    assert (
        node.run("gateway", "sha256sum", "/state/gateway/tls/ca.crt", "/state/gateway/secrets/coordinator.key")
        == before
    )
    assert "admin password" not in docker("logs", node.container("gateway"), check=False)


def closed(node: Node) -> None:
    """Keys are their owner's alone, on volumes that a group shares too."""
    for part, folder in (("gateway", "/state/gateway"), ("fl-server", "/state/server"), ("site", "/state/site")):
        # 2700 where the volume's own bit, by which what is made in it gets its group, was inherited.
        assert node.run(part, "stat", "--format", "%a %u", folder).split() in (["700", "10001"], ["2700", "10001"]), (
            part
        )
    for part, key in (("gateway", "/state/gateway/tls/ca.key"), ("site", "/state/site/keys/consent.pem")):
        assert node.run(part, "stat", "--format", "%a %u", key).split() == ["600", "10001"], part
    assert node.run("fl-server", "sh", "-c", "touch /handout/x 2>&1 || true").strip().endswith("Read-only file system")
