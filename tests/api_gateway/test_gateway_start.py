"""Starting and stopping: what is made once, what is refused in one sentence, and how soon the process is gone."""

import contextlib
import hashlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from gateway_world import GatewayProcess, World, running_gateway
from old_files import make_old
from queue_world import Scene
from sqlalchemy import text
from sqlalchemy.exc import InternalError, OperationalError
from waiting import DEADLINE_S, until

from api_gateway import blobs, migrate, models
from api_gateway.__main__ import build, main
from api_gateway.app import sweep
from api_gateway.blobstore import UPLOAD_KEPT
from api_gateway.db import WRITES, Base, Database, translated
from api_gateway.settings import Settings
from medhive.errors import IncompatibleVersion, NoSpace, Unavailable
from medhive.wire import API


class FailedStart:
    """Starts that are to fail: exit code 1 and one sentence, which is returned."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, **settings: str) -> str:
        with self.monkeypatch.context() as patch:
            values = {"state_dir": str(self.folder / "state"), "port": "0", **settings}
            for name, value in values.items():
                patch.setenv(f"MEDHIVE_GATEWAY_{name.upper()}", value)
            assert main(["serve"]) == 1
        shown = self.capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err


@pytest.fixture
def failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FailedStart:
    return FailedStart(tmp_path, monkeypatch, capsys)


def test_a_second_start_makes_nothing_new(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        kept = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*.key")}
        password = gateway.password
        assert password and len(kept) == 7
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
        assert httpx.get(
            f"https://127.0.0.1:{gateway.port}/health", verify=gateway.trust.context(), timeout=60
        ).is_success
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{gateway.url}/health", timeout=60)
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


def test_what_cannot_be_used_is_named(tmp_path: Path, failed_start: FailedStart) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with taken:
        port = taken.getsockname()[1]
        assert f"Port {port} on 127.0.0.1 is in use" in failed_start(port=str(port))
    assert "MEDHIVE_GATEWAY_PORT" in failed_start(port="eighty")
    assert "MEDHIVE_GATEWAY_HOST" in failed_start(host="192.0.2.1")
    assert "MEDHIVE_GATEWAY_DATABASE_URL" in failed_start(database_url="mysql://somewhere/x")
    unreachable = "postgresql://nobody:secret-word@127.0.0.1:9/x"
    said = failed_start(database_url=unreachable)
    assert "MEDHIVE_GATEWAY_DATABASE_URL" in said and "secret-word" not in said
    missing = str(tmp_path / "missing")
    assert "ADMIN_PASSWORD_FILE" in failed_start(admin_password_file=missing)
    assert "OWN_CERT_FILE" in failed_start(own_cert_file=missing)
    short = tmp_path / "short"
    short.write_text("short")
    assert "12" in failed_start(admin_password_file=str(short))


def test_sigterm_ends_it_though_streams_are_open(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        first = threading.Event()

        def listen() -> None:
            with gateway.client(world.admin_token) as client:
                for _ in client.events(0):
                    first.set()

        thread = threading.Thread(target=listen)
        thread.start()
        assert first.wait(DEADLINE_S)
        assert gateway.stop() == 0
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        world.close()


def test_ready_says_what_is_missing(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", mlflow_url="https://127.0.0.1:9") as gateway, gateway.http() as http:
        answer = http.get(f"{gateway.url}/ready")
        assert answer.status_code == 200
        said = {"status": "degraded", "database": "ok", "mlflow": "unreachable", "certificates_ending": []}
        assert answer.json() == said
        assert http.get(f"{gateway.url}/health").json()["status"] == "alive"
        assert "medhive_events 2.0" in http.get(f"{gateway.url}/metrics").text


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
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of the test's own, closed after it also when it fails, so that no other test meets its connections."""
    url = f"sqlite:///{tmp_path / 'gateway.db'}"
    if request.param == "postgres":
        url = request.getfixturevalue("empty_postgres").replace("postgresql://", "postgresql+psycopg://")
    database = Database(url)
    yield database
    database.close()


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


def test_hospitals_of_an_older_database_speak_the_protocol_of_its_time(database: Database) -> None:
    insert = (
        "INSERT INTO sites (name, state, created_at, joined_at, node_online, evaluates_only) "
        "VALUES (:name, 'x', '2026-01-01', :joined, :no, :no)"
    )
    with database.engine.execution_options(**{WRITES: True}).connect() as connection, connection.begin():
        command.upgrade(migrate.config(connection), "0003")
        for name, joined in {"joined": "2026-01-02", "invited": None}.items():
            connection.execute(text(insert), {"name": name, "joined": joined, "no": False})
    migrate.upgrade(database)
    with database.engine.connect() as connection:
        found = connection.execute(text("SELECT name, protocol FROM sites ORDER BY name")).all()
    assert [tuple(row) for row in found] == [("invited", None), ("joined", 1)]


def test_gateways_that_start_at_the_same_moment_migrate_once(database: Database) -> None:
    """Each step once: whoever comes second waits, and finds the tables there."""
    url = database.engine.url.render_as_string(hide_password=False)
    database.engine.connect().close()  # SQLite refuses one of two that give a new file its journal in the same moment
    code = (
        "import sys; from api_gateway import migrate; from api_gateway.db import Database; "
        "made = Database(sys.argv[1]); print(flush=True); sys.stdin.read(); migrate.upgrade(made)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, "-c", code, url], **pipes) for _ in range(2)]
    for each in started:
        assert each.stdout is not None
        each.stdout.readline()
    for each in started:
        assert each.stdin is not None
        each.stdin.close()
        each.stdin = None
    ended = [each.communicate(timeout=60) for each in started]
    assert [each.returncode for each in started] == [0, 0], [stderr.decode() for _, stderr in ended]
    with database.engine.connect() as connection:
        assert (
            compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata) == []
        )
        assert connection.execute(text("SELECT id FROM event_head")).scalar_one() == models.HEAD_ROW


def beside(database: Database) -> Database:
    """Another gateway's connections to the same database."""
    return Database(database.engine.url.render_as_string(hide_password=False))


def test_a_writer_waits_for_another_only_so_long(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate.upgrade(database)
    monkeypatch.setattr("api_gateway.db.BUSY_TIMEOUT_S", 1)
    with contextlib.closing(beside(database)) as other:
        with database.write(), pytest.raises(Unavailable), other.write():
            pytest.fail("two wrote at once")
        with other.write():
            pass


@pytest.mark.postgres
def test_a_gateway_that_falls_silent_in_a_change_holds_up_the_others_for_a_moment(
    empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine is cut off, and nobody ends its connection: what it had begun counts for nothing."""
    with contextlib.closing(Database(empty_postgres.replace("postgresql://", "postgresql+psycopg://"))) as database:
        migrate.upgrade(database)
        with contextlib.closing(beside(database)) as silent:
            unit = silent.write()
            with monkeypatch.context() as patched:
                patched.setattr("api_gateway.db.SILENT_S", 1)
                unit.__enter__()
            with database.write():
                pass
            with pytest.raises(InternalError, match="idle-in-transaction"):
                unit.__exit__(None, None, None)


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
            httpx.get(f"{each.url}{API}/coordinator", verify=each.trust.context(), timeout=60).json()["key_id"]
            for each in gateways
        }
    finally:
        for each in gateways:
            if each.process and each.process.poll() is None:
                each.stop()


def test_the_sweep_deletes_what_nothing_needs(tmp_path: Path) -> None:
    gateway, _ = build(Settings(state_dir=tmp_path / "state"))
    store = gateway.blobs
    stray, fresh = store.path("a" * 64), store.path("b" * 64)
    forgotten, present = store.upload_path("one", "run", "c" * 64), store.upload_path("one", "run", "d" * 64)
    for path in (stray, fresh, forgotten, present):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    long_ago = (gateway.clock() - 2 * UPLOAD_KEPT).timestamp()
    for path in (stray, forgotten):
        os.utime(path, (long_ago, long_ago))
    sweep(gateway)
    assert [path.exists() for path in (stray, fresh, forgotten, present)] == [False, True, False, True]
    assert blobs.GRACE < UPLOAD_KEPT
    gateway.database.close()


def test_a_start_drops_the_uploads_that_a_killed_gateway_left(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        uploads = tmp_path / "state" / "blobs" / "uploads" / "site-one"
        uploads.mkdir(mode=0o700)
        forgotten, going_on = uploads / "a.part", uploads / "b.part"
        for path in (forgotten, going_on):
            path.write_bytes(b"half")
        make_old(forgotten, 2 * UPLOAD_KEPT.total_seconds())
        gateway.kill()
        gateway.start()
        until(lambda: not forgotten.exists(), "the first sweep")
        assert going_on.exists()


@pytest.mark.parametrize(
    ("said", "cause"),
    [("database or disk is full", NoSpace), ("could not extend file", NoSpace), ("connection refused", Unavailable)],
)
def test_a_databases_troubles_have_names(said: str, cause: type[Exception]) -> None:
    with pytest.raises(cause), translated():
        raise OperationalError("INSERT", {}, Exception(said))


def test_a_named_proxy_is_believed_and_sends_the_bytes(tmp_path: Path) -> None:
    settings = {"trusted_proxy": "127.0.0.0/8", "accel_prefix": "/protected/"}
    with running_gateway(tmp_path / "state", **settings) as gateway:
        world = World(gateway, tmp_path)
        hospital = world.hospital()
        study = world.study(hospital)
        version = world.released(study, hospital)
        with gateway.http(world.admin_token) as http:
            http.headers["X-Forwarded-For"] = "198.51.100.7, 203.0.113.9"
            assert http.post("/requests", json={"study": study}).json()["source_address"] == "203.0.113.9"
            answer = http.get(f"/studies/{study}/versions/1/file")
            del http.headers["X-Forwarded-For"]
            direct = http.get(f"/studies/{study}/versions/1/file")
        digest = version.digest
        assert answer.headers["X-Accel-Redirect"] == f"/protected/{digest[:2]}/{digest[2:4]}/{digest}"
        assert answer.content == b""
        # A service beside the gateway asks it without the proxy, which alone could send the bytes for it.
        assert hashlib.sha256(direct.content).hexdigest() == digest
        scene = Scene.made(world)
        scene.hospitals[0].http.headers["X-Forwarded-For"] = "198.51.100.7, 203.0.113.8"
        assert scene.post(scene.hospitals[0], scene.weights(1)).status_code == 201
        assert scene.status().waiting[0].source_address == "203.0.113.8"
        rows = world.admin.get(f"{API}/events", after=0, limit=1000)
        received = [row["data"] for row in rows if row["kind"] == "contribution.received"]
        assert [data["source_address"] for data in received] == ["203.0.113.8"]
        world.close()
