"""Starting and stopping: what is made once, what is refused in one sentence, and how soon the process is gone."""

import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from gateway_world import GatewayProcess, World, running_gateway
from sqlalchemy import text

from api_gateway import migrate, models
from api_gateway.db import WRITES, Base, Database
from medhive.errors import IncompatibleVersion
from medhive.wire import API


def failed_start(folder: Path, **settings: str) -> str:
    """Start, expect exit code 1, and return the one sentence."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEDHIVE_")}
    environment |= {"MEDHIVE_GATEWAY_STATE_DIR": str(folder / "state"), "MEDHIVE_GATEWAY_PORT": "0"}
    environment |= {f"MEDHIVE_GATEWAY_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "api_gateway", "serve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_a_second_start_makes_nothing_new(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        kept = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*.key")}
        password = gateway.password
        assert password and len(kept) == 4
        assert gateway.stop() == 0
        gateway.password = None
        gateway.start()
        assert gateway.password is None
        assert {path: path.read_bytes() for path in (tmp_path / "state").rglob("*.key")} == kept
        gateway.password = password
        World(gateway, tmp_path).close()
        assert password not in gateway.log


def test_secrets_are_the_owners_alone(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        secret = [*(tmp_path / "state").rglob("*.key"), tmp_path / "state" / "secrets" / "server-token"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
        assert gateway.password not in (tmp_path / "state" / "gateway.db").read_bytes().decode("latin-1")


def test_the_certificate_is_the_own_cas_and_says_the_names(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", public_names="fl.example.org,192.0.2.1") as gateway:
        assert httpx.get(f"https://127.0.0.1:{gateway.port}/health", verify=gateway.trust.context()).is_success
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{gateway.url}/health")
        context = gateway.trust.context()
        with (
            socket.create_connection(("127.0.0.1", gateway.port)) as plain,
            context.wrap_socket(plain, server_hostname="fl.example.org") as secured,
        ):
            certificate = secured.getpeercert()
        names = {value for _, value in (certificate or {}).get("subjectAltName", ())}
        assert {"localhost", "127.0.0.1", "fl.example.org", "192.0.2.1"} <= names
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        assert old.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_an_operators_password_is_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("correct horse battery\n")
    with running_gateway(tmp_path / "state", admin_password_file=str(secret)) as gateway:
        assert gateway.password is None
        gateway.password = "correct horse battery"
        World(gateway, tmp_path).close()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with taken:
        port = taken.getsockname()[1]
        assert f"Port {port} on 127.0.0.1 is in use" in failed_start(tmp_path, port=str(port))
    assert "MEDHIVE_GATEWAY_PORT" in failed_start(tmp_path, port="eighty")
    assert "MEDHIVE_GATEWAY_HOST" in failed_start(tmp_path, host="192.0.2.1")
    assert "MEDHIVE_GATEWAY_DATABASE_URL" in failed_start(tmp_path, database_url="mysql://somewhere/x")
    unreachable = "postgresql://nobody:secret-word@127.0.0.1:9/x"
    said = failed_start(tmp_path, database_url=unreachable)
    assert "MEDHIVE_GATEWAY_DATABASE_URL" in said and "secret-word" not in said
    missing = str(tmp_path / "missing")
    assert "ADMIN_PASSWORD_FILE" in failed_start(tmp_path, admin_password_file=missing)
    short = tmp_path / "short"
    short.write_text("short")
    assert "12" in failed_start(tmp_path, admin_password_file=str(short))


def test_sigterm_ends_it_within_five_seconds_though_streams_are_open(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        first = threading.Event()

        def listen() -> None:
            with gateway.client(world.admin_token) as client:
                for _ in client.events(0):
                    first.set()

        thread = threading.Thread(target=listen)
        thread.start()
        assert first.wait(10)
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < 5
        thread.join(10)
        assert not thread.is_alive()
        world.close()


def test_ready_says_what_is_missing(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", mlflow_url="https://127.0.0.1:9") as gateway, gateway.http() as http:
        answer = http.get(f"{gateway.url}/ready")
        assert answer.status_code == 200
        assert answer.json() == {"status": "degraded", "database": "ok", "mlflow": "unreachable"}
        assert http.get(f"{gateway.url}/health").json()["status"] == "alive"
        assert "medhive_events 2" in http.get(f"{gateway.url}/metrics").text


def test_logs_hold_no_token_and_no_password(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        hospital = world.hospital()
        token = world.invite(world.name("site"))
        with gateway.http() as http:
            http.post("/login", json={"username": "admin", "password": "not-the-password"})
            http.get("/nowhere")
        secrets = [world.admin_token, gateway.server_token, gateway.password, token, token.split(".")[1]]
        secrets += [hospital.http.headers["Authorization"].partition(" ")[2], "not-the-password"]
        assert not [secret for secret in secrets if secret in gateway.log]
        assert "http.exchange" in gateway.log
        world.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    if request.param == "sqlite":
        return Database(f"sqlite:///{tmp_path / 'gateway.db'}")
    url = request.getfixturevalue("postgres_url").replace("postgresql://", "postgresql+psycopg://")
    first = Database(url)
    with first.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS migrations"))
        connection.execute(text("CREATE DATABASE migrations"))
    first.close()
    return Database(url.replace("/postgres?", "/migrations?"))


def test_migrations_make_what_the_models_say(database: Database) -> None:
    migrate.upgrade(database)
    migrate.upgrade(database)
    with database.engine.execution_options(**{WRITES: True}).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert connection.execute(text("SELECT id FROM event_head")).scalar_one() == models.HEAD_ROW
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.commit()
    with pytest.raises(IncompatibleVersion, match="9999"):
        migrate.upgrade(database)
    database.close()


def test_several_gateways_may_start_at_once(tmp_path: Path) -> None:
    gateways = [GatewayProcess(tmp_path / "state") for _ in range(3)]
    threads = [threading.Thread(target=each.start) for each in gateways]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [each.password is not None for each in gateways].count(True) == 1
        assert {
            httpx.get(f"{each.url}{API}/coordinator", verify=each.trust.context()).json()["key_id"] for each in gateways
        }
    finally:
        for each in gateways:
            if each.process and each.process.poll() is None:
                each.stop()
