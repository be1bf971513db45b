"""The hospital's image in a real engine: what it holds, what it may do, how it fails, and that it takes part.

The coordinator runs as processes of this machine; the containers reach it through the host's network.
"""

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import own_task
import pytest
from stack import Stack, wait_until

from fl_client.container.exits import Exit
from fl_client.tasks.phantoms import CLASSES, make_phantoms

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]

ROOT: Final = Path(__file__).parents[2]
IMAGE: Final = "fl-client"
BUILD_DEADLINE_S: Final = 1800.0
DEADLINE_S: Final = 240.0
STOP_S: Final = 5.0
USER: Final = 10001
TOKEN: Final = "mh2." + "A" * 43 + "." + "A" * 43 + ".pinned"
STUDY: Final = "brain-mri"
HARDENED: Final = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")  # noqa: S108
PACKAGES: Final = Path(__file__).with_name("hospital_packages.txt")
OF_A_GPU_BUILD: Final = re.compile(r"nvidia-|cuda-|triton$")


def docker(*words: str, check: bool = True, deadline_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
    """One docker command, run to its end."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=deadline_s, check=False)
    assert not check or done.returncode == 0, f"docker {' '.join(words)}:\n{done.stderr}{done.stdout}"
    return done


@pytest.fixture(scope="module")
def image(engine: object) -> str:
    """The image, built as docs/hospital-container.md says."""
    file = ROOT / "services" / "fl-client" / "Dockerfile"
    docker("build", "-q", "-t", IMAGE, "-f", str(file), str(ROOT), deadline_s=BUILD_DEADLINE_S)
    return IMAGE


@pytest.fixture
def volume() -> Iterator[str]:
    """A fresh named volume; whatever container still uses it at the end goes with it."""
    name = docker("volume", "create").stdout.strip()
    yield name
    for container in docker("ps", "--all", "--quiet", "--filter", f"volume={name}").stdout.split():
        docker("rm", "--force", container)
    docker("volume", "rm", "--force", name)


Start = Callable[..., str]


@pytest.fixture
def start(image: str) -> Iterator[Start]:
    """Starts containers in the background, each removed at the test's end."""
    started: list[str] = []

    def begin(*words: str, command: tuple[str, ...] = ()) -> str:
        started.append(
            docker("run", "--detach", "--network", "host", *HARDENED, *words, image, *command).stdout.strip()
        )
        return started[-1]

    yield begin
    for container in started:
        docker("rm", "--force", container, check=False)


def once(
    image: str, *words: str, command: tuple[str, ...] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a container to its end, as hardened as the compose file has it."""
    return docker("run", "--rm", *HARDENED, *words, image, *command, check=check)


def log_of(container: str) -> str:
    """All that a container has printed."""
    done = docker("logs", container)
    return done.stdout + done.stderr


def wait_for(container: str, words: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until a container has printed these words."""

    def alive() -> None:
        state = docker("inspect", "-f", "{{.State.Running}}", container).stdout.strip()
        assert state == "true", log_of(container)

    wait_until(lambda: words in log_of(container), f"{words!r} in the container's log", deadline_s, alive)


def stopped_in(container: str) -> tuple[float, int]:
    """Seconds that `docker stop` took, and the exit code."""
    began = time.monotonic()
    docker("stop", "--time", "20", container)
    return time.monotonic() - began, int(docker("inspect", "-f", "{{.State.ExitCode}}", container).stdout)


class SiteCompose:
    """deploy/compose.site.yaml as a project of its own; all of it is removed with the block."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._project = f"medhive-site-{secrets.token_hex(4)}"

    def command(self, *words: str, check: bool = True) -> str:
        """What a compose command prints, errors included."""
        file = ROOT / "deploy" / "compose.site.yaml"
        argv = ["docker", "compose", "--project-name", self._project, "--file", str(file), *words]
        environment = {**os.environ, **self._given}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout if check else done.stdout + done.stderr

    def __enter__(self) -> "SiteCompose":
        return self

    def __exit__(self, *_: object) -> None:
        self.command("down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made images that everybody on the machine may read, as a hospital's folder."""
    folder = make_phantoms(tmp_path_factory.mktemp("scans") / "data", 10, 1)
    for each in (folder, *folder.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    return folder


# ---- what it holds ---------------------------------------------------------------------------------------------------


def test_the_image_holds_only_its_own_packages(image: str) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))"
    names = json.loads(once(image, "--entrypoint", "python", command=("-P", "-c", code)).stdout)
    found = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    expected = {line for line in PACKAGES.read_text().splitlines() if not line.startswith("#")}
    assert {name for name in found if not OF_A_GPU_BUILD.match(name)} == expected


def test_the_image_describes_itself_and_holds_no_compiler(image: str) -> None:
    config = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.title"] == "MedHive hospital"
    assert "health.py" in config["Healthcheck"]["Test"][-1]
    assert not config.get("Volumes"), "a volume without a name would hide that none was given"
    script = "command -v gcc cc make nvcc; find /opt/medhive -name pip -o -path '*/torch/include'"
    assert once(image, "--entrypoint", "sh", command=("-c", f"{script}; true")).stdout == ""


def test_it_runs_without_any_right(image: str) -> None:
    script = "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /opt/x /data/x /x 2>&1"
    done = once(image, "--entrypoint", "sh", command=("-c", script), check=False)
    said = done.stdout.split()
    assert said[:5] == [str(USER), "CapEff:", "0" * 16, "NoNewPrivs:", "1"]
    assert done.stdout.count("Read-only file system") == 3


# ---- the command line --------------------------------------------------------------------------------------------------


def test_it_checks_data_before_joining_and_without_a_state(image: str, scans: Path) -> None:
    done = once(image, "-v", f"{scans}:/data:ro", command=("check-data", "--task", "image-folder", "--json"))
    found = json.loads(done.stdout)
    assert found["path"] == "/data"
    assert set(found["classes"]) == set(CLASSES)
    assert found["examples"] == 10 * len(CLASSES)


@pytest.fixture
def own_image(image: str, tmp_path: Path) -> Iterator[str]:
    """The image with the documented task of one's own, built of its Dockerfile."""
    name = f"{image}-survival"
    docker("build", "-q", "-t", name, str(own_task.image_context(tmp_path)), deadline_s=BUILD_DEADLINE_S)
    yield name
    docker("rmi", "--force", name)


def test_a_task_of_ones_own_is_a_layer_on_top(image: str, own_image: str, tmp_path: Path) -> None:
    own_task.write_patients(tmp_path / "tables" / "patients.csv", seed=0)
    (tmp_path / "tables").chmod(0o755)
    mounts = ("-v", f"{tmp_path}/tables:/data:ro", "-v", f"{own_task.SOURCE}/study.json:/study.json:ro")
    check = ("check-data", "--study-file", "/study.json", "--json")
    found = json.loads(once(own_image, *mounts, command=check).stdout)
    assert found["examples"] == sum(found["classes"].values()) == 400
    assert found["reasons"] == {"not-a-number": 1}
    missing = once(image, *mounts, command=check, check=False)
    assert (missing.returncode, "No task 'survival' is installed here" in missing.stderr) == (1, True)
    assert json.loads(docker("image", "inspect", own_image).stdout)[0]["Config"]["User"] == f"{USER}:{USER}"


def test_a_wrong_command_line_says_what_is_wrong(image: str) -> None:
    done = once(image, command=("-v", "/a:/data"), check=False)
    assert done.returncode == Exit.WRONG_USE
    assert "-v stands after the image's name" in done.stderr
    assert once(image, command=("--version",)).stdout.startswith("medhive-site ")


# ---- what a person must put right ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the host that belongs to another user, root, who alone may use it."""
    folder = tmp_path / "roots"
    folder.mkdir(mode=0o700)
    (folder / "1.png").write_bytes(b"x")
    return folder


SETTINGS: Final = (
    "-e",
    "SERVER_ADDRESS=https://localhost:9",
    "-e",
    "CLIENT_ID=hospital-a",
    "-e",
    f"JOIN_TOKEN={TOKEN}",
)
GOOD_DATA: Final = ("-v", "{scans}:/data:ro")
GOOD_STATE: Final = ("-v", "{volume}:/state")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        pytest.param((*GOOD_DATA, *GOOD_STATE), Exit.SETTING, "CLIENT_ID, JOIN_TOKEN: missing", id="settings"),
        pytest.param(
            (*GOOD_DATA, *GOOD_STATE, *SETTINGS, "-e", "JOIN_TOKEN=mh2.no"),
            Exit.INVITE,
            "join token is not one",
            id="token",
        ),
        pytest.param((*GOOD_STATE, *SETTINGS), Exit.DATA, "The data folder /data is empty", id="no-data"),
        pytest.param(
            ("-v", "{folder}:/data:ro", *GOOD_STATE, *SETTINGS),
            Exit.DATA,
            "cannot be read by this container's user 10001",
            id="rights",
        ),
        pytest.param((*GOOD_DATA, *SETTINGS), Exit.STATE, "The state folder /state is read-only", id="no-volume"),
        pytest.param((*GOOD_DATA, "-v", "{volume}:/state:ro", *SETTINGS), Exit.STATE, "without :ro", id="read-only"),
        pytest.param((*GOOD_DATA, "-v", "{folder}:/state", *SETTINGS), Exit.STATE, "chown -R 10001", id="anothers"),
        pytest.param(
            (*GOOD_DATA, "--tmpfs", "/state:size=512k,mode=0700,uid=10001", *SETTINGS),
            Exit.DISK_FULL,
            "is full",
            id="full",
        ),
    ],
)
def test_each_thing_to_put_right_has_its_sentence_and_exit_code(  # noqa: PLR0917 - fixtures and parameters
    image: str, scans: Path, volume: str, folder: Path, words: tuple[str, ...], code: Exit, says: str
) -> None:
    given = [word.format(scans=scans, volume=volume, folder=folder) for word in words]
    done = once(image, *given, check=False)
    assert says in done.stderr
    assert f"[exit code {int(code)}]" in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr


def test_it_waits_for_a_coordinator_that_is_not_up_and_stops_at_once(start: Start, scans: Path, volume: str) -> None:
    container = start("-v", f"{scans}:/data:ro", "-v", f"{volume}:/state", *SETTINGS)
    wait_for(container, "the coordinator is not up yet, waiting for it")
    health = json.loads(docker("inspect", container).stdout)[0]["Config"]["Healthcheck"]["Test"][1:]
    assert "waiting for the coordinator" in docker("exec", container, *health).stdout
    seconds, code = stopped_in(container)
    assert (code, log_of(container).count("waiting for it")) == (Exit.STOPPED, 1)
    assert seconds < STOP_S


# ---- by its compose file --------------------------------------------------------------------------------------------


def test_its_compose_file_starts_one_hospital(image: str, scans: Path) -> None:
    """Against a coordinator that is not up: what the container may do, and that its command line answers."""
    del image  # built under the name that the file takes
    given = {"SERVER_ADDRESS": "https://127.0.0.1:9", "CLIENT_ID": "hospital-a", "JOIN_TOKEN": TOKEN}
    with SiteCompose({**given, "DATA_FOLDER": str(scans)}) as compose:
        compose.command("up", "--detach")
        container = compose.command("ps", "--quiet", "site").strip()
        wait_for(container, "the coordinator is not up yet, waiting for it")
        (told,) = json.loads(docker("inspect", container).stdout)
        host = told["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"]) == (
            True,
            ["ALL"],
            ["no-new-privileges:true"],
        )
        assert (host["RestartPolicy"]["Name"], host["Memory"]) == ("unless-stopped", 8 * 2**30)
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}
        assert {item["Destination"]: item["RW"] for item in told["Mounts"]} == {"/data": False, "/state": True}
        assert "has not joined" in compose.command("exec", "-T", "site", "medhive-site", "status", check=False)
        assert stopped_in(container)[0] < STOP_S


def test_its_compose_file_asks_for_gpus_where_they_are_named_and_for_what_is_missing(scans: Path) -> None:
    given = {"SERVER_ADDRESS": "https://127.0.0.1:9", "CLIENT_ID": "hospital-a", "DATA_FOLDER": str(scans)}
    with SiteCompose(given) as compose:
        assert set(json.loads(compose.command("config", "--format", "json"))["services"]) == {"site"}
        services = json.loads(compose.command("--profile", "gpu", "config", "--format", "json"))["services"]
        (device,) = services["site-gpu"]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for name in given:
        with SiteCompose({**given, name: ""}) as compose:
            assert name in compose.command("config", check=False)


# ---- taking part ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A coordinator without MLflow on this machine, with one study."""
    with Stack(tmp_path_factory.mktemp("coordinator"), mlflow=False) as stack:
        stack.login(stack.start() or "")
        words = ["--task", "image-folder", "--classes", ",".join(CLASSES), "--option", "image_size=32"]
        stack.admin("studies", "create", STUDY, *words, "--default", "local_epochs=1")
        yield stack


def invite(stack: Stack, site: str) -> str:
    return str(stack.admin_json("invite", site, "--study", STUDY)["token"])


def test_another_coordinators_invite_is_refused(start: Start, stack: Stack, scans: Path, volume: str) -> None:
    kind, seed, _, trust = invite(stack, "careful").split(".")
    forged = f"{kind}.{seed}.{'A' * 43}.{trust}"
    words = ("-e", f"SERVER_ADDRESS={stack.url}", "-e", "CLIENT_ID=careful", "-e", f"JOIN_TOKEN={forged}")
    container = start("-v", f"{scans}:/data:ro", "-v", f"{volume}:/state", *words)
    assert docker("wait", container).stdout.strip() == str(int(Exit.AUTHORITY))
    assert "not the one that made this invite" in log_of(container)


def test_a_used_invite_is_refused(start: Start, stack: Stack, scans: Path, volume: str) -> None:
    words = ("-v", f"{scans}:/data:ro", "-v", f"{volume}:/state", "-e", f"SERVER_ADDRESS={stack.url}")
    given = ("-e", "CLIENT_ID=somebody", "-e", f"JOIN_TOKEN={invite(stack, 'somebody-else')}")
    container = start(*words, *given)
    assert docker("wait", container).stdout.strip() == str(int(Exit.INVITE))
    assert "JOIN_TOKEN is refused" in log_of(container)


def test_it_takes_part_and_a_new_container_goes_on_as_the_same_hospital(
    start: Start, stack: Stack, scans: Path, volume: str
) -> None:
    mounts = ("-v", f"{scans}:/data:ro", "-v", f"{volume}:/state")
    settings = {"SERVER_ADDRESS": stack.url, "CLIENT_ID": "hospital-a", "JOIN_TOKEN": invite(stack, "hospital-a")}
    fix_split(volume)
    # After the image's name, as people write it.
    first = start(*mounts, command=tuple(word for pair in settings.items() for word in ("-e", "=".join(pair))))
    wait_for(first, "hospital-a has joined Coordinator.")
    wait_for(first, "connected to the fleet")
    assert "training on the CPU" in log_of(first)
    assert site_json(first, "status")["site"] == "hospital-a"
    site_json(first, "settings", "--cpu-threads", "1")
    version = one_run(first, stack)
    assert version == 1
    keys = docker("exec", first, "sha256sum", "/state/keys/consent.pem", "/state/keys/node.pem").stdout
    assert stopped_in(first)[1] == Exit.STOPPED
    docker("rm", first)

    second = start(*mounts, "-e", f"SERVER_ADDRESS={stack.url}", "-e", "JOIN_TOKEN=no-longer-needed")
    wait_for(second, "JOIN_TOKEN is ignored")
    wait_for(second, "connected to the fleet")
    assert docker("exec", second, "sha256sum", "/state/keys/consent.pem", "/state/keys/node.pem").stdout == keys
    assert site_json(second, "status")["undecided"] == [f"{STUDY}/1"]
    seconds, code = stopped_in(second)
    assert code == Exit.STOPPED
    assert seconds < STOP_S
    assert settings["JOIN_TOKEN"] not in log_of(second)


def test_a_disk_that_fills_up_ends_the_hospital_with_its_sentence(start: Start, stack: Stack, scans: Path) -> None:
    words = ("-e", f"SERVER_ADDRESS={stack.url}", "-e", "CLIENT_ID=tight", "-e", f"JOIN_TOKEN={invite(stack, 'tight')}")
    container = start("-v", f"{scans}:/data:ro", "--tmpfs", "/state:size=8m,mode=0700,uid=10001", *words)
    wait_for(container, "connected to the fleet")
    # It ends as soon as it notices, perhaps before this command does.
    docker("exec", container, "sh", "-c", "cat /dev/zero > /state/filler", check=False)
    assert docker("wait", container).stdout.strip() == str(int(Exit.DISK_FULL))
    assert "The disk that holds /state is full; free some space." in log_of(container)
    assert f"[exit code {int(Exit.DISK_FULL)}]" in log_of(container)


def fix_split(volume: str) -> None:
    """Give a hospital its secret before it joins, so that a few images fall into the same parts in every run of the test."""
    code = (
        "import hashlib, os; os.mkdir('/state/keys', 0o700); "
        "file = os.open('/state/keys/data.secret', os.O_CREAT | os.O_WRONLY, 0o600); "
        "os.write(file, hashlib.sha256(b'hospital-a').digest())"
    )
    once(IMAGE, "-v", f"{volume}:/state", "--entrypoint", "python", command=("-c", code))


def site_json(container: str, *words: str) -> Any:
    """`docker exec CONTAINER medhive-site ... --json`, read."""
    return json.loads(docker("exec", container, "medhive-site", *words, "--json").stdout)


def one_run(container: str, stack: Stack) -> int:
    """A run of this hospital alone, from the request to the version that arrives in its volume."""
    words = ["--rounds", "1", "--min-sites", "1", "--person", "Dr. Adler"]
    request = site_json(container, "request", STUDY, *words)
    run_id = stack.admin_json("approve", request["id"])["run_id"]
    run = stack.wait_for_run(run_id, 600)
    assert run["state"] == "completed", run
    wait_for(container, f"version {run['version']} of {STUDY} has arrived")
    listed = docker("exec", container, "ls", f"/state/models/{STUDY}").stdout
    assert f"hospital-a_FinalGlobal_v{run['version']}.safetensors" in listed
    return int(run["version"])
