"""Starts MLflow's tracking server the way MedHive uses it: one worker, no telemetry, no jobs, artifacts through the server.

Settings are variables, so that the demo and the image start the same thing:
MEDHIVE_MLFLOW_STATE_DIR (database and artifacts), _HOST, _PORT, _ALLOWED_HOSTS (every name it is reached by, besides
localhost and 127.0.0.1; MLflow answers 403 to others), _DATABASE_URL_FILE (a file with another database's URL),
_TLS_CERT and _TLS_KEY (without them it speaks plain HTTP, for loopback alone); and, for logins, _WRITER_PASSWORD_FILE (of
`writer`, the aggregator), _READER_PASSWORD_FILE (of `reader`, whom the proxy lets people be) and _COOKIE_SECRET_FILE.
_METRICS_PORT is where Prometheus reads how the server is used.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PREFIX = "MEDHIVE_MLFLOW_"
DEFAULT_PORT = 8080
WRITER, READER = "writer", "reader"
LOGIN_FILES = ("WRITER_PASSWORD_FILE", "READER_PASSWORD_FILE", "COOKIE_SECRET_FILE")
PASSWORD_CHECKED_EVERY_S = 60  # MLflow's slow hash of a password costs more than most of its answers
METRICS, PREPARE = "metrics", "prepare"
DATABASE = "mlflow.db"
PARENT_LOOK_S = 1.0
LOOK_S = 1.0  # how soon the server's own end, or a new certificate, is noticed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
END_S = 4.0  # from SIGTERM to SIGKILL: a container is to end within five seconds
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
    argv += ["--expose-prometheus", str(state / METRICS)] if environment.get(f"{PREFIX}METRICS_PORT") else []
    argv += ["--app-name", "basic-auth"] if _logins(environment) else []
    tls = _tls_options(environment, host)
    return [*argv, "--uvicorn-opts", shlex.join(["--log-level", "warning", *tls])]


def _state_folder(environment: Mapping[str, str]) -> Path:
    state = Path(environment.get(f"{PREFIX}STATE_DIR", "mlflow-state")).resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return state


def _database(environment: Mapping[str, str]) -> str:
    given = environment.get(f"{PREFIX}DATABASE_URL_FILE")
    if not given:
        return f"sqlite:///{_state_folder(environment) / DATABASE}"
    url = Path(given).read_text("utf-8").strip()
    # SQLAlchemy's default driver is another one than the gateway's.
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


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


def _logins(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of the logins, by the setting's name; empty without logins."""
    given = {name: environment.get(PREFIX + name) for name in LOGIN_FILES}
    if not any(given.values()):
        return {}
    missing = [PREFIX + name for name, path in given.items() if not path]
    if missing:
        raise Misconfigured(f"Logins need {', '.join(missing)} too.")
    return {name: Path(path).read_text("utf-8").strip() for name, path in given.items() if path}


def _login_environment(environment: Mapping[str, str]) -> dict[str, str]:
    logins = _logins(environment)
    if not logins:
        return {}
    state = _state_folder(environment)
    config = state / "auth.ini"
    config.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {_login_database(state)}\n"
        f"admin_username = {WRITER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"auth_cache_ttl_seconds = {PASSWORD_CHECKED_EVERY_S}\n",
        "utf-8",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": logins["WRITER_PASSWORD_FILE"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": logins["COOKIE_SECRET_FILE"],
    }


def _login_database(state: Path) -> str:
    return f"sqlite:///{state / 'auth.db'}"


def ensure_logins(environment: Mapping[str, str]) -> None:
    """Make the two users, or give them their new passwords; nothing to do, and nothing imported, when all is as it was.

    MLflow makes only its first user by itself, and takes no new password for it from its settings.
    """
    logins = _logins(environment)
    if not logins:
        return
    state = _state_folder(environment)
    passwords = {WRITER: logins["WRITER_PASSWORD_FILE"], READER: logins["READER_PASSWORD_FILE"]}
    digest, done = hashlib.sha256("\n".join(passwords.values()).encode()).hexdigest(), state / "auth.sha256"
    if done.exists() and done.read_text("utf-8") == digest and (state / "auth.db").exists():
        return
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore  # noqa: PLC0415 - takes seconds, needed once

    store = SqlAlchemyStore()
    store.init_db(_login_database(state))
    for name, password in passwords.items():
        if store.has_user(name):
            store.update_user(name, password=password, is_admin=name == WRITER)
        else:
            store.create_user(name, password, is_admin=name == WRITER)
    done.write_text(digest, "utf-8")


def ensure_schema(environment: Mapping[str, str]) -> None:
    """Bring the database of an older MLflow to this one's shape; nothing to do, and nothing imported, without a new version
    or a database.

    The server makes a new database's tables by itself, but refuses an older version's. One server runs at a time.
    """
    done, version = _state_folder(environment) / "schema.version", metadata.version("mlflow")
    if done.exists() and done.read_text("utf-8") == version:
        return
    if not environment.get(f"{PREFIX}DATABASE_URL_FILE") and not (_state_folder(environment) / DATABASE).exists():
        done.write_text(version, "utf-8")
        return
    from mlflow.store.db import utils  # noqa: PLC0415 - takes seconds, needed once

    engine = utils.create_sqlalchemy_engine(_database(environment))
    # What `mlflow db upgrade` calls, which takes the database's address, and so its password, on its command line alone.
    if not utils._is_empty_database(engine):
        utils._upgrade_db(engine)
    engine.dispose()
    done.write_text(version, "utf-8")


def environment_of_server(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with what keeps the server small and quiet, and the database, whose URL may hold a password."""
    return {
        **environment,
        "MLFLOW_BACKEND_STORE_URI": _database(environment),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **_login_environment(environment),
    }


def start_metrics(environment: Mapping[str, str]) -> "subprocess.Popen[bytes] | None":
    """Start the process that shows the server's counts, where a port for it is set; it ends with this process.

    MLflow shows them by itself, but behind its login to its admin alone, who may do everything.
    """
    port = environment.get(f"{PREFIX}METRICS_PORT")
    if not port:
        return None
    folder = _state_folder(environment) / METRICS
    shutil.rmtree(folder, ignore_errors=True)  # the counts of an earlier process would be added
    folder.mkdir(mode=0o700)
    return subprocess.Popen([sys.executable, __file__, METRICS, str(os.getpid()), str(int(port)), str(folder)])


def show_metrics(parent: int, port: int, folder: str, environment: Mapping[str, str]) -> None:
    """Serve the counts in the folder, over TLS where the server has it, while the parent lives."""
    from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - not in the server's process
    from prometheus_client.multiprocess import MultiProcessCollector  # noqa: PLC0415

    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    tls = {name: environment.get(f"{PREFIX}TLS_{part}") for name, part in (("certfile", "CERT"), ("keyfile", "KEY"))}
    start_http_server(port, environment.get(f"{PREFIX}HOST", LOOPBACK[0]), registry, **tls)
    while os.getppid() == parent:
        time.sleep(PARENT_LOOK_S)


def prepare(environment: Mapping[str, str]) -> None:
    """Bring database and logins up to date, before the server starts."""
    try:
        ensure_schema(environment)
        ensure_logins(environment)
    except (Misconfigured, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line's answer
        raise SystemExit(1) from None


def main() -> None:
    """Become the server, or, where it shows a certificate, the one who starts it anew when that is renewed."""
    try:
        argv, environment = command(os.environ), environment_of_server(os.environ)
        # In a process of its own: what it may have to import would stay in the memory of this one.
        if subprocess.call([sys.executable, __file__, PREPARE]):
            raise SystemExit(1)
        shown = certificate_files(os.environ)
        if os.name == "nt" or shown:
            raise SystemExit(keep_serving(argv, environment, shown))
        start_metrics(os.environ)
    except (Misconfigured, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line's answer
        raise SystemExit(1) from None
    os.execve(argv[0], argv, environment)  # noqa: S606 - an argument list, no shell


def certificate_files(environment: Mapping[str, str]) -> list[Path]:
    """What the server shows, and knows only by a new start when it is renewed."""
    return [
        Path(environment[f"{PREFIX}TLS_{part}"]) for part in ("CERT", "KEY") if environment.get(f"{PREFIX}TLS_{part}")
    ]


def keep_serving(argv: list[str], environment: Mapping[str, str], shown: list[Path]) -> int:
    """Run the server, anew with each new certificate, until it ends by itself or is told to; returns its exit code.

    Nothing is lost by a new start: what the aggregator cannot deliver meanwhile it delivers afterwards.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    while True:
        held, metrics = _content(shown), start_metrics(environment)
        server = subprocess.Popen(argv, env=environment, preexec_fn=_end_with_parent)  # noqa: PLW1509 - no threads here
        while server.poll() is None and not told.is_set() and _content(shown) in (held, None):
            told.wait(LOOK_S)
        code = server.poll()
        for process in (metrics, server):
            _end(process)
        if code is not None or told.is_set():
            return code or 0


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent was killed: no second server may find the port taken (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes] | None") -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _content(files: list[Path]) -> list[bytes] | None:
    """What the files hold; None while one of them is being replaced."""
    try:
        return [path.read_bytes() for path in files]
    except OSError:
        return None


if __name__ == "__main__":
    if sys.argv[1:2] == [METRICS]:
        show_metrics(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], os.environ)
    elif sys.argv[1:2] == [PREPARE]:
        prepare(os.environ)
    else:
        main()
