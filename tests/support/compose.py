"""A coordinator as users start it: docker-compose.yml under a name and ports of its own, and hospitals by `docker run`."""

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from public_address import PublicCa
from stack import free_port, wait_until

ROOT: Final = Path(__file__).parents[2]
BUILD_DEADLINE_S: Final = 2400.0
DEADLINE_S: Final = 300.0
# The engine gives this name the address of its own host: hospitals come in through the published port, as from outside.
HOST: Final = "host.docker.internal"
IN_CONTAINERS: Final = 10001  # the images' own user
HARDENED: Final = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")  # noqa: S108


def run(*words: str, env: Mapping[str, str] | None = None, check: bool = True, deadline_s: float = DEADLINE_S) -> str:
    """One command, run to its end; returns its standard output."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    assert not check or done.returncode == 0, f"{' '.join(words)}:\n{done.stderr[-6000:]}{done.stdout[-6000:]}"
    return done.stdout


class OwnTls:
    """A certificate for `HOST` of a CA made for the test: certs/ and private/ in `folder`, as users lay them out."""

    def __init__(self, folder: Path) -> None:
        ca = PublicCa(folder / "ca", name=HOST)
        self.folder = folder / "tls"
        for file, place in ((ca.certificate, "certs/tls.crt"), (ca.key, "private/tls.key")):
            (self.folder / place).parent.mkdir(parents=True)
            shutil.copy(file, self.folder / place)
            os.chown(self.folder / place, IN_CONTAINERS, IN_CONTAINERS)
        ca.file.chmod(0o644)
        self.ca_file = ca.file

    @property
    def trusted(self) -> tuple[str, ...]:
        """How a hospital's container is told to trust it."""
        return ("--volume", f"{self.ca_file}:/ca.crt:ro", "--env", "EXTRA_CA_FILE=/ca.crt")


@dataclass
class Compose:
    """One project; `down` removes all of it.

    Args:
        own_tls: a certificate of the coordinator's own, as `TLS_DIR`, which hospitals trust by `EXTRA_CA_FILE`.
        more: further settings, as in `.env`.
    """

    folder: Path
    files: tuple[str, ...] = ("docker-compose.yml",)
    own_tls: "OwnTls | None" = None
    name: str = field(default_factory=lambda: f"medhive-test-{secrets.token_hex(4)}")
    port: int = field(default_factory=free_port)
    mlflow_port: int = field(default_factory=free_port)
    hospitals: dict[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.hospitals.values():
            run("docker", "rm", "--force", "--volumes", name, check=False)
        self.command("down", "--volumes", "--timeout", "5", check=False)
        for name in self.hospitals.values():
            run("docker", "volume", "rm", "--force", f"{name}-state", check=False)

    @property
    def url(self) -> str:
        """The address that hospitals are told."""
        return f"https://{HOST}:{self.port}"

    def command(self, *words: str, check: bool = True, deadline_s: float = DEADLINE_S) -> str:
        """`docker compose ...` of this project."""
        return run("docker", "compose", *words, env=self.environment, check=check, deadline_s=deadline_s)

    @property
    def environment(self) -> dict[str, str]:
        """What makes every `docker compose`, and `make`, mean this project."""
        named = {"COMPOSE_PROJECT_NAME": self.name, "COMPOSE_FILE": os.pathsep.join(self.files)}
        own = {"TLS_DIR": str(self.own_tls.folder)} if self.own_tls else {}
        return {
            **named,
            **own,
            **self.more,
            "PUBLIC_NAME": HOST,
            "PORT": str(self.port),
            "MLFLOW_PORT": str(self.mlflow_port),
        }

    def make(self, *words: str, check: bool = True) -> str:
        """`make ...`; returns all that it printed."""
        done = subprocess.run(
            ["make", "--no-print-directory", *words], cwd=ROOT, env={**os.environ, **self.environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == check, done.stdout
        return done.stdout

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.command("ps", "--all", "--quiet", service).strip()

    def up(self) -> None:
        """`docker compose up -d`, and wait until all are healthy."""
        self.command("up", "--detach", "--no-build")
        for service in ("gateway", "fl-server", "mlflow", "proxy"):
            self.wait_healthy(service)

    def wait_healthy(self, service: str) -> None:
        """Wait until the engine finds a service healthy."""
        container = self.container(service)
        look = ("docker", "inspect", "--format", "{{.State.Health.Status}}", container)
        wait_until(lambda: run(*look).strip() == "healthy", f"{service} is healthy", DEADLINE_S)

    def password(self) -> str:
        """The first admin's, as the gateway's log shows it once."""
        found = re.search(r"admin password: (\S+)", self.command("logs", "--no-color", "gateway"))
        assert found, "the log holds the first admin's password"
        return found.group(1)

    def admin(self, *words: str, check: bool = True) -> str:
        """`docker compose exec gateway medhive-admin ...`."""
        return self.command("exec", "--no-TTY", "gateway", "medhive-admin", *words, check=check)

    def admin_json(self, *words: str) -> Any:
        """The same with `--json`, read."""
        return json.loads(self.admin(*words, "--json"))

    def login(self) -> None:
        """Log the engineer in, with the password from the log."""
        done = self._login()
        assert done.returncode == 0, done.stderr + done.stdout

    def can_log_in(self) -> bool:
        """Whether that is possible by now: within a second the gateway shows a certificate of the CA that there is now."""
        return self._login().returncode == 0

    def _login(self) -> "subprocess.CompletedProcess[str]":
        words = ("docker", "exec", "--interactive", self.container("gateway"), "medhive-admin", "login")
        return subprocess.run(
            [*words, "https://localhost:8000", "--username", "admin", "--password-file", "/dev/stdin",
             "--ca-file", "/state/tls/ca.crt"],
            input=self.password(), capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip

    def hospital(self, site: str, data: Path) -> str:
        """Invite a hospital and start it, as the README says; returns the container's name."""
        token = self.admin_json("invite", site)["token"]
        self.hospitals[site] = f"{self.name}-{site}"
        self.start_hospital(site, data, ("--env", f"JOIN_TOKEN={token}"))
        return self.hospitals[site]

    def start_hospital(self, site: str, data: Path, more: tuple[str, ...] = ()) -> None:
        """`docker run fl-client` on a hospital's volume."""
        name = self.hospitals[site]
        trusts = self.own_tls.trusted if self.own_tls else ()
        run(
            "docker", "run", "--detach", "--name", name, "--add-host", f"{HOST}:host-gateway", *HARDENED,
            "--env", f"SERVER_ADDRESS={self.url}", "--env", f"CLIENT_ID={site}", *trusts, *more,
            "--volume", f"{data}:/data:ro", "--volume", f"{name}-state:/state", "fl-client",
        )  # fmt: skip

    def site(self, site: str, *words: str) -> str:
        """`docker exec HOSPITAL medhive-site ...`."""
        return run("docker", "exec", self.hospitals[site], "medhive-site", *words)

    def site_json(self, site: str, *words: str) -> Any:
        """The same with `--json`, read."""
        return json.loads(self.site(site, *words, "--json"))

    def logs(self, site: str) -> str:
        """All that a hospital's container has said."""
        words = ("docker", "logs", self.hospitals[site])
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return done.stdout

    def wait_for_log(self, site: str, words: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait until a hospital's container has said these words."""
        wait_until(lambda: words in self.logs(site), f"{words!r} in {site}'s log", deadline_s)

    def ended(self, run_id: str, deadline_s: float = 900.0) -> dict[str, Any]:
        """Wait for a run's end; returns the run."""
        last: dict[str, Any] = {}

        def over() -> bool:
            text = self.admin("show", run_id, "--json", check=False)
            last.update(json.loads(text) if text.startswith("{") else {})
            return last.get("state") in {"completed", "failed", "cancelled", "expired"}

        wait_until(over, f"the end of {run_id}", deadline_s)
        return last
