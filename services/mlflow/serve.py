"""Starts MLflow's tracking server the way MedHive uses it: one worker, no telemetry, no jobs, artifacts through the server.

Settings are variables, so that the demo and the image start the same thing:
MEDHIVE_MLFLOW_STATE_DIR (database and artifacts), _HOST, _PORT, _ALLOWED_HOSTS (every name it is reached by, besides
localhost and 127.0.0.1; MLflow answers 403 to others), _DATABASE_URL_FILE (a file with another database's URL),
_TLS_CERT and _TLS_KEY (without them it speaks plain HTTP, for loopback alone).
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PREFIX = "MEDHIVE_MLFLOW_"
DEFAULT_PORT = 8080
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Misconfigured(Exception):
    """A variable does not fit; the text names it."""


def command(environment: Mapping[str, str]) -> list[str]:
    """The server's argument list.

    Raises:
        Misconfigured: a certificate without its key, or plain HTTP beyond loopback.
    """
    state = _state_folder(environment)
    host = environment.get(f"{PREFIX}HOST", LOOPBACK[0])
    port = int(environment.get(f"{PREFIX}PORT", DEFAULT_PORT))
    argv = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    argv += ["--serve-artifacts", "--artifacts-destination", (state / "artifacts").as_uri()]
    argv += ["--allowed-hosts", ",".join(_allowed_hosts(environment, port))]
    tls = _tls_options(environment, host)
    return [*argv, "--uvicorn-opts", shlex.join(["--log-level", "warning", *tls])]


def _state_folder(environment: Mapping[str, str]) -> Path:
    state = Path(environment.get(f"{PREFIX}STATE_DIR", "mlflow-state")).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return state


def _database(environment: Mapping[str, str]) -> str:
    given = environment.get(f"{PREFIX}DATABASE_URL_FILE")
    return Path(given).read_text("utf-8").strip() if given else f"sqlite:///{_state_folder(environment) / 'mlflow.db'}"


def _allowed_hosts(environment: Mapping[str, str], port: int) -> list[str]:
    names = environment.get(f"{PREFIX}ALLOWED_HOSTS", "").split(",")
    names = [*LOOPBACK[:2], *(name.strip() for name in names if name.strip())]
    return [*names, *(f"{name}:{port}" for name in names if ":" not in name)]


def _tls_options(environment: Mapping[str, str], host: str) -> list[str]:
    certificate, key = (environment.get(f"{PREFIX}TLS_{part}") for part in ("CERT", "KEY"))
    if bool(certificate) != bool(key):
        raise Misconfigured(f"Set both {PREFIX}TLS_CERT and {PREFIX}TLS_KEY, or neither.")
    if certificate and key:
        return ["--ssl-certfile", certificate, "--ssl-keyfile", key]
    if host not in LOOPBACK and environment.get(f"{PREFIX}BEHIND_PROXY") != "1":
        raise Misconfigured(
            f"{PREFIX}HOST is {host}: beyond loopback set {PREFIX}TLS_CERT and {PREFIX}TLS_KEY, or "
            f"{PREFIX}BEHIND_PROXY=1 where a proxy on a private network ends TLS."
        )
    return []


def environment_of_server(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with what keeps the server small and quiet, and the database, whose URL may hold a password."""
    return {
        **environment,
        "MLFLOW_BACKEND_STORE_URI": _database(environment),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def main() -> None:
    """Become the server, so that signals reach it."""
    try:
        argv, environment = command(os.environ), environment_of_server(os.environ)
    except (Misconfigured, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line's answer
        raise SystemExit(1) from None
    if os.name == "nt":  # There, a process cannot become another.
        raise SystemExit(subprocess.call(argv, env=environment))
    os.execve(argv[0], argv, environment)  # noqa: S606 - an argument list, no shell


if __name__ == "__main__":
    main()
