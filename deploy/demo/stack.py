"""A whole MedHive on one machine, as the real processes: what the demo, the integration tests and the benchmarks start.

Nothing here reaches into a service. It starts the programs that users start, with the environment that users set, reads
what they print, and talks to them through their own command lines. Every process is the head of its own process group and
is ended by its id, with everything that it started.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx

from medhive.client import Trust

START_DEADLINE_S: Final = 240.0  # MLflow alone imports for 20 s on an idle machine, and a test machine may be very busy
STOP_DEADLINE_S: Final = 15.0
COMMAND_DEADLINE_S: Final = 900.0
POLL_S: Final = 0.1


class StackError(RuntimeError):
    """A process ended, or did not get ready; the text holds the end of its log."""


def free_port() -> int:
    """A port of loopback that nobody listens on, below those that systems hand out by themselves in the meantime."""
    while True:
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def is_taken(port: int) -> bool:
    """Whether something listens on this port of loopback: asked before anything dearer is."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def a_moment() -> None:
    """The pause between two looks at what cannot be heard of."""
    time.sleep(POLL_S)


def wait_until(
    ready: Callable[[], bool],
    what: str,
    deadline_s: float,
    alive: Callable[[], None] | None = None,
    pause: Callable[[], None] = a_moment,
) -> None:
    """Wait for an event of another process.

    Args:
        ready: looks whether it has happened.
        what: it, in words.
        deadline_s: how long to wait.
        alive: raises when it cannot happen any more.
        pause: returns when another look is worth it.

    Raises:
        StackError: it did not happen in time.
    """
    end = time.monotonic() + deadline_s
    while not ready():
        if alive:
            alive()
        if time.monotonic() > end:
            raise StackError(f"{what} did not happen within {deadline_s:.0f} s")
        pause()


@dataclass
class Program:
    """One running program with its log file."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it; the log is appended to, so that a restart keeps what came before."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv, env=dict(self.env), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        return self

    @property
    def pid(self) -> int:
        """Process id; the program must have been started."""
        if self.process is None:
            raise StackError(f"{self.name} was not started")
        return self.process.pid

    def running(self) -> bool:
        """Whether it still runs."""
        return self.process is not None and self.process.poll() is None

    def require_running(self) -> None:
        """Raise with the end of the log when it has ended."""
        if not self.running():
            code = self.process.returncode if self.process else "none"
            raise StackError(f"{self.name} ended with exit code {code}:\n{self.tail()}")

    def text(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.text().splitlines()[-lines:])

    def wait_for(self, pattern: str, deadline_s: float = START_DEADLINE_S, after: int = 0) -> re.Match[str]:
        """Wait until its log (after a number of characters) matches; returns the match."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            match = re.search(pattern, self.text()[after:])
            if match:
                found.append(match)
            return bool(match)

        wait_until(seen, f"{pattern!r} in the log of {self.name}", deadline_s, self.require_running)
        return found[0]

    def ask_to_end(self) -> None:
        """Send it SIGTERM, if it still runs, and go on."""
        if self.process is not None and self.running():
            self.process.terminate()

    def kill(self) -> None:
        """kill -9 the program alone, as a crash would; what it started must notice by itself."""
        os.kill(self.pid, signal.SIGKILL)
        if self.process:
            self.process.wait(STOP_DEADLINE_S)

    def stop(self) -> int | None:
        """Ask it to end, then end its whole group."""
        if self.process is None:
            return None
        if self.running():
            self.ask_to_end()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_DEADLINE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(STOP_DEADLINE_S)


@dataclass
class Stack:
    """The coordinator's services and any number of hospitals below one folder.

    Each service's state, each hospital's state and the logs are sub-folders; starting again on the same folder goes on
    where the last one stopped.
    """

    folder: Path
    mlflow: bool = True
    extra_env: Mapping[str, str] = field(default_factory=dict)
    # For hospitals alone, such as the path of a task that only they have installed.
    hospitals_env: Mapping[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    show: Callable[[str], None] = lambda _line: None

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        for name in ("gateway", "fleet", "mlflow"):
            self.ports.setdefault(name, free_port())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- addresses and environment

    @property
    def url(self) -> str:
        """The gateway's address."""
        return f"https://localhost:{self.ports['gateway']}"

    @property
    def mlflow_url(self) -> str:
        """The tracking server's address."""
        return f"https://localhost:{self.ports['mlflow']}"

    @property
    def gateway_state(self) -> Path:
        """The gateway's state folder."""
        return self.folder / "coordinator" / "gateway"

    @property
    def ca_file(self) -> Path:
        """The coordinator's CA certificate."""
        return self.gateway_state / "tls" / "ca.crt"

    def site_folder(self, site: str) -> Path:
        """One hospital's folder: `state/`, and `data/` where the caller puts its data."""
        return self.folder / "hospitals" / site

    def _base_env(self) -> dict[str, str]:
        kept = (
            "PATH",
            "HOME",
            "LANG",
            "LC_ALL",
            "TMPDIR",
            "SSL_CERT_FILE",
            "CUDA_VISIBLE_DEVICES",
            "NO_COLOR",
            "COLUMNS",
        )
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        env.update(PYTHONUNBUFFERED="1", FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
        env.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        env.update(self.extra_env)
        return env

    def gateway_env(self) -> dict[str, str]:
        """Environment of `medhive-gateway serve`."""
        return (
            self._base_env()
            | {
                "MEDHIVE_GATEWAY_STATE_DIR": str(self.gateway_state),
                "MEDHIVE_GATEWAY_HOST": "127.0.0.1",
                "MEDHIVE_GATEWAY_PORT": str(self.ports["gateway"]),
                "MEDHIVE_GATEWAY_FLEET_ADDRESS": f"localhost:{self.ports['fleet']}",
                "MEDHIVE_GATEWAY_COORDINATOR_NAME": "Coordinator",
            }
            | ({"MEDHIVE_GATEWAY_MLFLOW_URL": self.mlflow_url} if self.mlflow else {})
        )

    def server_env(self) -> dict[str, str]:
        """Environment of `medhive-server serve`."""
        return (
            self._base_env()
            | {
                "MEDHIVE_SERVER_STATE_DIR": str(self.folder / "coordinator" / "server"),
                "MEDHIVE_SERVER_GATEWAY_URL": self.url,
                "MEDHIVE_SERVER_GATEWAY_CA_FILE": str(self.ca_file),
                "MEDHIVE_SERVER_TOKEN_FILE": str(self.gateway_state / "secrets" / "server-token"),
                "MEDHIVE_SERVER_COORDINATOR_KEY_FILE": str(self.gateway_state / "secrets" / "coordinator.key"),
                "MEDHIVE_SERVER_FLEET_PORT": str(self.ports["fleet"]),
                "MEDHIVE_SERVER_TLS_CERT": str(self.gateway_state / "tls" / "superlink.crt"),
                "MEDHIVE_SERVER_TLS_KEY": str(self.gateway_state / "tls" / "superlink.key"),
            }
            | self._tracking_env()
        )

    def _tracking_env(self) -> dict[str, str]:
        if not self.mlflow:
            return {}
        return {"MEDHIVE_SERVER_MLFLOW_URL": self.mlflow_url, "MEDHIVE_SERVER_MLFLOW_CA_FILE": str(self.ca_file)}

    def admin_env(self) -> dict[str, str]:
        """Environment of `medhive-admin`."""
        return self._base_env() | {"MEDHIVE_ADMIN_CONFIG": str(self.folder / "coordinator" / "admin.json")}

    def site_env(self, site: str) -> dict[str, str]:
        """Environment of `medhive-site` at one hospital."""
        home = self.site_folder(site)
        return self._base_env() | {
            "SERVER_ADDRESS": self.url,
            "CLIENT_ID": site,
            "STATE_DIR": str(home / "state"),
            "DATA_DIR": str(home / "data"),
            **self.hospitals_env,
        }

    # ---- services

    def _program(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> Program:
        program = Program(name, argv, env, self.folder / "logs" / f"{name}.log")
        self.programs[name] = program
        return program.start()

    def start_gateway(self) -> str | None:
        """Start the gateway; returns the admin's password when this was its first start."""
        program = self._program("gateway", ["medhive-gateway", "serve"], self.gateway_env())
        wait_until(self._gateway_ready, "the gateway's /ready", START_DEADLINE_S, program.require_running)
        match = re.search(r"admin password: (\S+)", program.text())
        return match.group(1) if match else None

    def _gateway_ready(self) -> bool:
        if not self.ca_file.exists() or not is_taken(self.ports["gateway"]):
            return False
        with suppress(httpx.TransportError, OSError):
            return httpx.get(f"{self.url}/ready", verify=self.trust().context()).status_code == httpx.codes.OK
        return False

    def trust(self) -> Trust:
        """Trust in this coordinator's own CA."""
        return Trust(ca_pem=self.ca_file.read_text())

    def start_mlflow(self) -> None:
        """Start the tracking server and wait until it answers."""
        self._wait_for_mlflow(self._launch_mlflow())

    def _launch_mlflow(self) -> Program:
        """Start the tracking server over TLS, with the certificate that the gateway made for this machine."""
        script = Path(__file__).parents[2] / "services" / "mlflow" / "serve.py"
        env = self._base_env() | {
            "MEDHIVE_MLFLOW_STATE_DIR": str(self.folder / "coordinator" / "mlflow"),
            "MEDHIVE_MLFLOW_HOST": "127.0.0.1",
            "MEDHIVE_MLFLOW_PORT": str(self.ports["mlflow"]),
            "MEDHIVE_MLFLOW_TLS_CERT": str(self.gateway_state / "tls" / "mlflow.crt"),
            "MEDHIVE_MLFLOW_TLS_KEY": str(self.gateway_state / "tls" / "mlflow.key"),
        }
        return self._program("mlflow", [sys.executable, str(script)], env)

    def _wait_for_mlflow(self, program: Program) -> None:
        wait_until(self._mlflow_ready, "MLflow's /health", START_DEADLINE_S, program.require_running)

    def _mlflow_ready(self) -> bool:
        if not is_taken(self.ports["mlflow"]):
            return False
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.mlflow_url}/health", verify=self.trust().context()).status_code == httpx.codes.OK
        return False

    def start_server(self) -> None:
        """Start the aggregator and wait until it takes work."""
        earlier = self.programs.get("server")
        said = len(earlier.text()) if earlier else 0
        program = self._program("server", ["medhive-server", "serve"], self.server_env())
        program.wait_for(r"(?m)^ready$", after=said)

    def start_site(self, site: str) -> Program:
        """Start `medhive-site run` at one hospital."""
        return self._program(site, ["medhive-site", "run"], self.site_env(site))

    def start(self) -> str | None:
        """Start the coordinator's services, the gateway first; returns the admin's password at the first start."""
        password = self.start_gateway()
        mlflow = self._launch_mlflow() if self.mlflow else None
        self.start_server()
        if mlflow:
            self._wait_for_mlflow(mlflow)
        return password

    def stop(self) -> None:
        """Stop everything: hospitals first, which say goodbye, and last the gateway, to which all others talk."""
        services = {name: self.programs[name] for name in ("server", "mlflow", "gateway") if name in self.programs}
        hospitals = [program for name, program in self.programs.items() if name not in services]
        gateway = [services.pop("gateway")] if "gateway" in services else []
        for programs in (hospitals, [*services.values()], gateway):
            for program in programs:
                program.ask_to_end()
            for program in programs:
                program.stop()

    # ---- commands, as people type them

    def _command(
        self, argv: Sequence[str], env: Mapping[str, str], deadline_s: float
    ) -> subprocess.CompletedProcess[str]:
        self.show(f"{env.get('CLIENT_ID', 'coordinator')} $ " + " ".join(_quoted(part) for part in argv))
        return subprocess.run(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def run(
        self, argv: Sequence[str], env: Mapping[str, str], *, deadline_s: float = COMMAND_DEADLINE_S
    ) -> str:  # fmt: skip
        """Run one command to its end; returns what it printed on stdout.

        Raises:
            StackError: it failed; the text holds what it said.
        """
        done = self._command(argv, env, deadline_s)
        if done.returncode:
            raise StackError(f"{' '.join(argv)} failed with exit code {done.returncode}:\n{done.stderr}{done.stdout}")
        return done.stdout

    def admin(self, *words: str) -> str:
        """`medhive-admin ...`; returns its stdout."""
        return self.run(["medhive-admin", *words], self.admin_env())

    def admin_json(self, *words: str) -> Any:
        """`medhive-admin ... --json`, read."""
        return json.loads(self.admin(*words, "--json"))

    def site(self, site: str, *words: str, env: dict[str, str] | None = None) -> str:
        """`medhive-site ...` at one hospital; returns its stdout."""
        return self.run(["medhive-site", *words], self.site_env(site) | (env or {}))

    def site_json(self, site: str, *words: str) -> Any:
        """`medhive-site ... --json` at one hospital, read."""
        return json.loads(self.site(site, *words, "--json"))

    def failing(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command that is expected to fail; for tests of what users are told."""
        return self._command(argv, env, COMMAND_DEADLINE_S)

    # ---- steps that every user of a stack needs

    def login(self, password: str) -> None:
        """Log `medhive-admin` in as the first admin."""
        password_file = self.folder / "coordinator" / f"password-{secrets.token_hex(4)}"
        password_file.write_text(password)
        password_file.chmod(0o600)
        try:
            self.admin(
                "login", self.url, "--username", "admin", "--password-file", str(password_file),
                "--ca-file", str(self.ca_file),
            )  # fmt: skip
        finally:
            password_file.unlink()

    def join(self, site: str, *studies: str) -> None:
        """Invite one hospital and let it join."""
        words = [word for study in studies for word in ("--study", study)]
        self.join_with(site, self.admin_json("invite", site, *words)["token"])

    def join_with(self, site: str, token: str) -> None:
        """Let one hospital join by its invite."""
        self.site(site, "join", env={"JOIN_TOKEN": token})

    def wait_for_run(self, run_id: str, deadline_s: float) -> dict[str, Any]:
        """Follow a run on the coordinator's live stream until it has ended; returns it."""
        log = self.folder / "logs" / f"watch-{run_id}.log"
        follower = Program("watch", ["medhive-admin", "watch", run_id], self.admin_env(), log).start()
        try:
            wait_until(lambda: not follower.running(), f"the end of {run_id}", deadline_s, self._require_all)
        finally:
            follower.stop()
        run: dict[str, Any] = self.admin_json("show", run_id)
        if run["state"] not in {"completed", "failed", "cancelled", "expired"}:
            raise StackError(f"{run_id} was followed no longer, though it is {run['state']}:\n{follower.tail()}")
        return run

    def _require_all(self) -> None:
        for program in self.programs.values():
            program.require_running()


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"[^\w@%+=:,./-]", word) else word
