"""The main job through real containers: `docker compose up`, three hospitals by `docker run`, from request to use."""

import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from compose import BUILD_DEADLINE_S, DEADLINE_S, HARDENED, ROOT, Compose, run
from stack import wait_until

from fl_client.tasks.phantoms import CLASSES, make_phantoms

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]

SITES = ("hospital-a", "hospital-b", "hospital-c")
STUDY = "brain-mri"
IMAGES_PER_CLASS = 30
REAL = Path(os.environ["MEDHIVE_TEST_DATA"]) / "brain_mri" if os.environ.get("MEDHIVE_TEST_DATA") else None
SERVICES = ("gateway", "fl-server", "mlflow", "proxy")


@pytest.fixture(scope="module")
def compose(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The coordinator, with three hospitals that have joined."""
    folder = tmp_path_factory.mktemp("compose")
    with Compose(folder) as compose:
        compose.command("build", "--quiet", deadline_s=BUILD_DEADLINE_S)
        run(
            "docker",
            "build",
            "-q",
            "-t",
            "fl-client",
            "-f",
            "services/fl-client/Dockerfile",
            ".",
            deadline_s=BUILD_DEADLINE_S,
        )
        compose.up()
        compose.login()
        for number, site in enumerate(SITES, 1):
            give_scans(folder / site, number)
            compose.hospital(site, readable(folder / site))
        members = [word for site in SITES for word in ("--member", site)]
        compose.admin(
            "studies", "create", STUDY, "--task", "image-folder", "--classes", ",".join(CLASSES), *members,
            "--option", "image_size=32",
        )  # fmt: skip
        for site in SITES:
            compose.wait_for_log(site, "connected to the fleet")
        yield compose


def give_scans(folder: Path, number: int) -> None:
    """A hospital's images: real ones where there are any, no two hospitals the same, else made ones."""
    if REAL is None:
        make_phantoms(folder, IMAGES_PER_CLASS, number)
        return
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for image in sorted((REAL / name).iterdir())[number :: len(SITES)][:IMAGES_PER_CLASS]:
            shutil.copy(image, folder / name)


def readable(folder: Path) -> Path:
    """Scans as a hospital mounts them: readable for the container's own user."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def agree(compose: Compose, *, rounds: int, local_epochs: int = 1, sites: tuple[str, ...] = SITES) -> str:
    """From the request to all consents; returns the run's name."""
    request = compose.site_json(
        sites[0], "request", STUDY, "--rounds", str(rounds), "--local-epochs", str(local_epochs), "--min-sites", "2",
        "--person", "Dr. Noor",
    )  # fmt: skip
    compose.admin("approve", request["id"])
    run_id = str(compose.admin_json("show", request["id"])["run_id"])
    for site in sites[1:]:
        compose.site(site, "consent", run_id, "--person", "Dr. Berg", "--yes")
    return run_id


def test_three_hospitals_train_and_use_a_model(compose: Compose) -> None:
    run_id = agree(compose, rounds=2, local_epochs=3)
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert [len(item["sites"]) for item in done["rounds_done"] if item["number"]] == [3, 3]
    for site in SITES:
        compose.wait_for_log(site, f"version 1 of {STUDY} has arrived")
    compose.site(SITES[0], "accept", "1", "--study", STUDY, "--person", "Dr. Noor", "--reason", "good on our own data")
    predictions = compose.site_json(SITES[0], "predict", "/data/glioma", "--study", STUDY)
    assert len(predictions) == IMAGES_PER_CLASS
    decisions = compose.admin_json("models", STUDY)[-1]["decisions"]
    assert [item["site"] for item in decisions if item["state"] == "accepted"] == [SITES[0]]
    check_tracking(compose, run_id)
    assert compose.admin_json("audit", "verify")["right"]


def test_the_images_were_real(compose: Compose) -> None:
    if REAL is None:
        pytest.skip("MEDHIVE_TEST_DATA names no folder with real data: the main job here ran on made images")
    known = {image.name for name in CLASSES for image in (REAL / name).iterdir()}
    held = run("docker", "exec", compose.hospitals[SITES[0]], "find", "/data", "-type", "f").split()
    assert len(held) == IMAGES_PER_CLASS * len(CLASSES)
    assert {Path(path).name for path in held} <= known


def check_tracking(compose: Compose, run_id: str) -> None:
    """An analyst finds the run in MLflow, on this machine alone and with a login."""
    address = f"http://127.0.0.1:{compose.mlflow_port}"
    search = {"experiment_ids": [str(n) for n in range(5)], "max_results": 50}

    def runs(auth: tuple[str, str] | None) -> httpx.Response:
        # A page's own script asks like this, and names where it came from.
        headers = {"Origin": address}
        return httpx.post(
            f"{address}/ajax-api/2.0/mlflow/runs/search", json=search, auth=auth, headers=headers, timeout=60
        )

    assert runs(None).status_code == 401
    assert runs(("admin", "wrong-password")).status_code == 401
    login = ("admin", compose.password())

    def tracked() -> bool:
        found = runs(login).json().get("runs", [])
        return any(item["info"]["run_name"] == run_id and item["info"]["status"] == "FINISHED" for item in found)

    wait_until(tracked, f"{run_id} in MLflow", DEADLINE_S)
    behind_the_door = httpx.get(
        f"https://127.0.0.1:{compose.port}/mlflow/", auth=login, verify=unverified(), timeout=60
    )
    assert "<title>MLflow</title>" in behind_the_door.text
    created = httpx.post(f"{address}/api/2.0/mlflow/experiments/create", json={"name": "x"}, auth=login, timeout=60)
    assert created.status_code == 403, "people may look, only the aggregator may write"


def unverified() -> ssl.SSLContext:
    """For looks at what is refused; who answers does not matter there."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/register-node",
     "/v1/fleet/..%2fcontrol/start-run", "/metrics", "/internal/mlflow-access", "/blobs-of-the-gateway/"],
)  # fmt: skip
def test_what_is_not_for_hospitals_ends_at_the_door(compose: Compose, path: str) -> None:
    answer = httpx.post(f"https://127.0.0.1:{compose.port}{path}", content=b"x", verify=unverified(), timeout=30)
    assert answer.status_code in {400, 404}


def test_a_hospital_reaches_nothing_but_the_door(compose: Compose) -> None:
    """From a client's network every other service's address and port is closed."""
    script = (
        "import socket, sys\n"
        "for place in sys.argv[1:]:\n"
        "    host, port = place.rsplit(':', 1)\n"
        "    try:\n"
        "        socket.create_connection((host, int(port)), 3).close()\n"
        "        print('open', place)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    places = [f"{address_of(compose, service)}:{port}" for service, ports in
              {"gateway": (8000,), "fl-server": (9092, 9093), "mlflow": (5000,)}.items() for port in ports]  # fmt: skip
    found = run("docker", "exec", compose.hospitals[SITES[0]], "python", "-c", script, *places)
    assert found == ""


def test_beside_the_gate_the_superlink_listens_to_nobody(compose: Compose) -> None:
    """The proxy shares a network with the aggregator: it reaches the gate, and not the SuperLink behind it."""
    address = address_of(compose, "fl-server")
    look = "exec 3<>/dev/tcp/{}/{}"
    proxy = compose.container("proxy")
    assert code("docker", "exec", proxy, "bash", "-c", look.format(address, 9093)) == 0
    assert code("docker", "exec", proxy, "bash", "-c", look.format(address, 9092)) != 0


def code(*words: str) -> int:
    return subprocess.run(words, capture_output=True, check=False, timeout=DEADLINE_S).returncode


def address_of(compose: Compose, service: str) -> str:
    found = json.loads(run("docker", "inspect", compose.container(service)))[0]["NetworkSettings"]["Networks"]
    return str(next(network["IPAddress"] for name, network in found.items() if not name.endswith("_edge")))


def test_prometheus_reads_every_service_at_the_proxy(compose: Compose) -> None:
    """As the document says it: on the network of metrics, over TLS with the coordinator's CA and the proxy's name."""
    script = (
        "import ssl, sys, urllib.request\n"
        "context = ssl.create_default_context(cadata=sys.stdin.read())\n"
        "for name in sys.argv[1:]:\n"
        "    page = urllib.request.urlopen('https://proxy:9464/' + name, context=context, timeout=20)\n"
        "    print(page.read().decode())\n"
    )
    search = f"http://127.0.0.1:{compose.mlflow_port}/ajax-api/2.0/mlflow/experiments/search"
    asked = httpx.post(search, json={"max_results": 5}, auth=("admin", compose.password()), timeout=60)
    assert asked.is_success, "so that MLflow has something to count"
    network = f"{compose.name}_metrics"
    done = subprocess.run(
        ["docker", "run", "--rm", "-i", "--network", network, "medhive/mlflow:0.1.0", "python", "-c", script, *SERVICES],
        input=run("docker", "exec", compose.container("gateway"), "cat", "/state/tls/ca.crt"),
        capture_output=True, text=True, check=True, timeout=DEADLINE_S,
    )  # fmt: skip
    shown = set(re.findall(r"(?m)^# HELP (\w+)", done.stdout))
    document = (ROOT / "docs" / "monitoring.md").read_text("utf-8").split("\n### hospital")[0]
    assert set(re.findall(r"`((?:medhive|mlflow)_[a-z0-9_]+)`", document.split("# What there is")[1])) <= shown
    members = json.loads(run("docker", "network", "inspect", network))[0]["Containers"]
    assert len(members) == 1, "the proxy alone"


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_may_do_little(compose: Compose, service: str) -> None:
    found = json.loads(run("docker", "inspect", compose.container(service)))[0]
    host = found["HostConfig"]
    assert found["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["Memory"] > 0
    assert host["LogConfig"]["Config"]["max-size"] == "10m"
    published = {
        port for bindings in (host["PortBindings"] or {}).values() for port in [tuple(b.values()) for b in bindings]
    }
    assert bool(published) == (service == "proxy")


@pytest.mark.parametrize(
    ("variable", "file", "said"),
    [("TLS_CERT_FILE", "/own/missing.crt", "cannot read /own/missing.crt"),
     ("TLS_KEY_FILE", "/handout/ca.crt", "does not start with /handout/proxy.crt and /handout/ca.crt")],
)  # fmt: skip
def test_a_proxy_that_cannot_serve_names_the_variable(compose: Compose, variable: str, file: str, said: str) -> None:
    words = ("docker", "run", "--rm", *HARDENED, "--volume", f"{compose.name}_handout-proxy:/handout:ro")
    done = subprocess.run(
        [*words, "--env", f"{variable}={file}", "medhive/proxy:0.1.0"],
        capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert said in last and variable in last


@pytest.mark.parametrize("service", ["gateway", "fl-server", "mlflow"])
def test_each_image_holds_only_its_own_packages(compose: Compose, service: str) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))"
    names = json.loads(compose.command("exec", "--no-TTY", service, "python", "-P", "-c", code))
    lines = Path(__file__).with_name(f"{service}_packages.txt").read_text("utf-8").splitlines()
    assert sorted(re.sub(r"[-_.]+", "-", name).lower() for name in names) == [
        line for line in lines if not line.startswith("#")
    ]
    assert not {"torch", "monai", "ray"} & set(lines)


@pytest.mark.parametrize("service", SERVICES)
def test_each_image_describes_itself(compose: Compose, service: str) -> None:
    labels = json.loads(run("docker", "inspect", compose.container(service)))[0]["Config"]["Labels"]
    described = {
        name: labels.get(f"org.opencontainers.image.{name}", "") for name in ("title", "description", "version")
    }
    assert described["title"].startswith("MedHive ") and described["description"] and described["version"] == "0.1.0"


def test_secrets_are_with_their_service_alone(compose: Compose) -> None:
    """The CA's key never leaves the gateway, the coordinator's key goes to the aggregator alone."""
    held = {
        service: run("docker", "exec", compose.container(service), "sh", "-c", "ls /handout").split()
        for service in ("fl-server", "mlflow", "proxy")
    }
    assert not any("ca.key" in names for names in held.values())
    assert [service for service, names in held.items() if "coordinator.key" in names] == ["fl-server"]
    assert [service for service, names in held.items() if "mlflow-writer" in names] == ["fl-server", "mlflow"]
    password, token = (
        compose.password(),
        run("docker", "exec", compose.container("fl-server"), "cat", "/handout/server-token"),
    )
    for service in SERVICES:
        text = run("docker", "inspect", compose.container(service))
        assert password not in text
        assert token.strip() not in text


@pytest.mark.parametrize("service", ["gateway", "fl-server", "proxy", "mlflow"])
def test_a_killed_container_costs_a_run_nothing(compose: Compose, service: str) -> None:
    run_id = agree(compose, rounds=3)
    compose.wait_for_log(SITES[0], f"{run_id} round 1/3 done")
    run("docker", "kill", compose.container(service))
    run("docker", "start", compose.container(service))
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert all(not site["dropped"] for item in done["rounds_done"] for site in item["sites"])


def test_a_killed_hospital_goes_on_as_the_same_site(compose: Compose) -> None:
    """`docker rm` and a new `docker run` on the same volume, without a new invite."""
    site = SITES[1]
    run_id = agree(compose, rounds=3)
    compose.wait_for_log(site, f"{run_id} round 1/3 done")
    run("docker", "rm", "--force", compose.hospitals[site])
    compose.start_hospital(site, compose.folder / site)
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert all(not item["dropped"] for entry in done["rounds_done"] for item in entry["sites"])


def test_a_partitioned_hospital_comes_back(compose: Compose) -> None:
    """Its round waits for it, and its work counts."""
    site = SITES[2]
    run_id = agree(compose, rounds=3)
    compose.wait_for_log(site, f"{run_id} round 1/3 done")
    run("docker", "network", "disconnect", "bridge", compose.hospitals[site])
    try:
        compose.wait_for_log(site, "the gateway does not answer")
        compose.wait_for_log(site, "the fleet does not answer")
    finally:
        run("docker", "network", "connect", "bridge", compose.hospitals[site])
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert all(not item["dropped"] for entry in done["rounds_done"] for item in entry["sites"])
    assert "connected to the fleet again after" in compose.logs(site)


def test_another_key_and_another_ca_take_over_in_a_run(compose: Compose) -> None:
    """By the commands of docs/deployment.md; the hospitals' containers go on, and nobody is left out."""
    before = {site: len(compose.logs(site)) for site in SITES}
    renew = ("exec", "--no-TTY", "gateway", "medhive-gateway", "renew")
    run_id = agree(compose, rounds=4)
    compose.wait_for_log(SITES[0], f"{run_id} round 1/4 done")
    assert "has named it its successor" in compose.command(*renew, "key")
    compose.wait_for_log(SITES[0], f"{run_id} round 2/4 done")
    assert "no other is trusted" in compose.command(*renew, "ca", "--at-once")
    wait_until(compose.can_log_in, "a login by the new CA", DEADLINE_S)
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert all(not site["dropped"] for item in done["rounds_done"] for site in item["sites"])
    version = compose.admin_json("models", STUDY)[-1]["version"]
    for site in SITES:
        compose.wait_for_log(site, f"version {version} of {STUDY} has arrived")
        said = compose.logs(site)[before[site] :]
        assert "task.refused" not in said and "bad-signature" not in said, said
    assert compose.admin_json("audit", "verify")["right"]


def test_a_queue_goes_through_the_door(compose: Compose) -> None:
    """Each hospital trains when it likes, uploads through the proxy, and downloads the average."""
    before = compose.admin_json("models", STUDY)[-1]["version"]
    compose.admin("studies", "queue", STUDY, "--capacity", str(len(SITES)), "--local-epochs", "1")
    queue = compose.admin_json("queue", "status", STUDY)["queue_id"]
    for site in SITES:
        compose.site(site, "consent", queue, "--person", "Dr. Berg", "--yes")
        compose.site(site, "train", STUDY, "--upload")

    def averaged() -> bool:
        status = compose.admin_json("queue", "status", STUDY)
        return status["newest_version"] == before + 1 and status["queue_size"] == 0

    wait_until(averaged, "the average", DEADLINE_S)
    assert f"_FinalGlobal_v{before + 1}.safetensors" in compose.site(SITES[0], "download", STUDY)


def test_a_token_in_the_environment_opens_the_tunnel(compose: Compose, tmp_path: Path) -> None:
    """With a stand-in for ngrok's agent, which passes TLS on to the proxy."""
    agent, override = tmp_path / "ngrok", tmp_path / "agent.yaml"
    agent.write_text("#!/opt/medhive/bin/python\n" + (ROOT / "tests" / "support" / "ngrok_agent.py").read_text("utf-8"))
    agent.chmod(0o755)
    service = {"volumes": [f"{agent}:/agent:ro"], "environment": {"MEDHIVE_TUNNEL_AGENT": "/agent"}}
    override.write_text(json.dumps({"services": {"tunnel": service}}))
    token = secrets.token_urlsafe(24)
    files = (*compose.files, str(override))
    tunnel = Compose(
        tmp_path, files, None, compose.name, compose.port, compose.mlflow_port, more={"NGROK_AUTHTOKEN": token}
    )
    try:
        tunnel.command("up", "--detach", "--no-build")
        tunnel.wait_healthy("tunnel")
        address = tunnel.admin_json("tunnel")["address"]
        assert address in tunnel.command("logs", "--no-color", "tunnel")
        # From where the tunnel's other end stands in; what its certificate says is looked at elsewhere.
        unverified = "context=ssl._create_unverified_context()"
        ask = f"import ssl, urllib.request as u; print(u.urlopen('{address}/health', {unverified}).status)"
        assert tunnel.command("exec", "--no-TTY", "tunnel", "python", "-c", ask).strip() == "200"
        assert token not in tunnel.command("logs", "--no-color", "tunnel") + run(
            "docker", "top", tunnel.container("tunnel")
        )
        run("docker", "stop", "--time", "5", tunnel.container("tunnel"))
        state = json.loads(run("docker", "inspect", tunnel.container("tunnel")))[0]["State"]
        assert state["ExitCode"] == 0, "it had to be killed"
    finally:
        tunnel.command("rm", "--stop", "--force", "tunnel")


def test_a_second_up_after_down_keeps_everything(compose: Compose) -> None:
    before = compose.admin_json("models", STUDY)
    compose.command("down", "--timeout", "5")
    compose.up()
    assert "admin password" not in compose.command("logs", "--no-color", "gateway")
    assert compose.admin_json("models", STUDY) == before
    run_id = agree(compose, rounds=1)
    assert compose.ended(run_id)["state"] == "completed"


def test_every_service_stops_within_five_seconds(compose: Compose) -> None:
    for service in SERVICES:
        container = compose.container(service)
        run("docker", "stop", "--time", "5", container)
        state = json.loads(run("docker", "inspect", container))[0]["State"]
        assert state["ExitCode"] == 0, f"{service} had to be killed"
    compose.up()


def test_a_backup_goes_on_in_an_empty_coordinator_with_the_same_hospitals(compose: Compose, tmp_path: Path) -> None:
    """Everything of the coordinator is destroyed; hospitals keep what they have, and meet the one that they knew."""
    file = tmp_path / "coordinator.backup"
    before = compose.admin_json("models", STUDY)
    compose.make("backup", f"FILE={file}")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert "is there already" in compose.make("backup", f"FILE={file}", check=False)
    assert "the coordinator runs" in compose.make("restore", f"FILE={file}", check=False)
    compose.command("down", "--volumes", "--timeout", "5")
    damaged = tmp_path / "damaged.backup"
    damaged.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "damaged" in compose.make("restore", f"FILE={damaged}", check=False)

    assert "restored" in compose.make("restore", f"FILE={file}")
    compose.up()
    assert compose.admin_json("models", STUDY) == before
    run_id = agree(compose, rounds=1)
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    assert [len(item["sites"]) for item in done["rounds_done"] if item["number"]] == [3]
    assert compose.admin_json("audit", "verify")["right"]
