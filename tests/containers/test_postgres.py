"""Gateway and MLflow on PostgreSQL in containers, behind a certificate of the coordinator's own; and their backup.

One stack, one hospital.
"""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose import BUILD_DEADLINE_S, DEADLINE_S, HOST, Compose, OwnTls, run
from stack import wait_until

from fl_client.tasks.phantoms import CLASSES, make_phantoms

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]

SITE = "hospital-a"
STUDY = "brain-mri"
FILES = ("docker-compose.yml", "deploy/compose.postgres.yaml")


@pytest.fixture(scope="module")
def compose(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The coordinator on PostgreSQL, with a hospital that has joined."""
    folder = tmp_path_factory.mktemp("postgres")
    with Compose(folder, FILES, OwnTls(folder)) as compose:
        compose.command("build", "--quiet", deadline_s=BUILD_DEADLINE_S)
        file = "services/fl-client/Dockerfile"
        run("docker", "build", "-q", "-t", "fl-client", "-f", file, ".", deadline_s=BUILD_DEADLINE_S)
        compose.up()
        compose.login()
        scans = make_phantoms(folder / "scans", 10, 1)
        for path in (scans, *scans.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        compose.hospital(SITE, scans)
        compose.admin(
            "studies", "create", STUDY, "--task", "image-folder", "--classes", ",".join(CLASSES), "--member", SITE,
            "--option", "image_size=32",
        )  # fmt: skip
        compose.wait_for_log(SITE, "connected to the fleet")
        yield compose


def one_run(compose: Compose) -> str:
    """A run of this hospital alone, to its end; returns its name."""
    request = compose.site_json(
        SITE, "request", STUDY, "--rounds", "1", "--local-epochs", "1", "--min-sites", "1", "--person", "Dr. Noor"
    )
    run_id = str(compose.admin_json("approve", request["id"])["run_id"])
    done = compose.ended(run_id)
    assert (done["state"], done["reason"]) == ("completed", "")
    return run_id


def query(compose: Compose, database: str, sql: str) -> list[str]:
    """What the database's own superuser, inside its container, reads."""
    words = (
        "exec",
        "--no-TTY",
        "postgres",
        "psql",
        "--no-align",
        "--tuples-only",
        "--dbname",
        database,
        "--command",
        sql,
    )
    return compose.command(*words).split()


def tracked(compose: Compose, run_id: str) -> bool:
    """Whether MLflow's tables say that a run has ended well."""
    return query(compose, "mlflow", "SELECT name, status FROM runs").count(f"{run_id}|FINISHED") == 1


def test_a_runs_bookkeeping_lies_in_postgresql(compose: Compose) -> None:
    run_id = one_run(compose)
    assert query(compose, "gateway", "SELECT count(*) FROM versions WHERE number = 1") == ["1"]
    wait_until(lambda: tracked(compose, run_id), f"{run_id} in MLflow's tables", DEADLINE_S)
    files = compose.command("exec", "--no-TTY", "gateway", "ls", "/state").split()
    assert "gateway.db" not in files


def test_the_door_shows_the_coordinators_own_certificate(compose: Compose) -> None:
    """The hospital joined through it and trained; the key is with the proxy alone."""
    assert compose.own_tls
    trusting = ssl.create_default_context(cafile=str(compose.own_tls.ca_file))
    with (
        socket.create_connection(("127.0.0.1", compose.port), timeout=30) as plain,
        trusting.wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        assert tls.version() in {"TLSv1.2", "TLSv1.3"}
    seen = compose.command("exec", "--no-TTY", "gateway", "find", "/own-certs", "-type", "f").split()
    assert seen == ["/own-certs/tls.crt"]


def test_each_service_has_its_own_login_over_tls_alone(compose: Compose) -> None:
    roles = "SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper ORDER BY 1"
    assert query(compose, "postgres", roles) == ["gateway", "mlflow"]
    plain = (
        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_addr IS NOT NULL AND NOT ssl"
    )
    assert query(compose, "postgres", plain) == ["0"]
    code = (
        "import psycopg; url = open('/database/url').read().strip(); "
        "names = [url, url.replace('/gateway?', '/mlflow?'), url.replace('verify-full', 'disable')]\n"
        "for each in names:\n"
        "    try:\n"
        "        psycopg.connect(each).close(); print('open')\n"
        "    except psycopg.OperationalError as error:\n"
        "        print('pg_hba' if 'pg_hba.conf' in str(error) else error)\n"
    )
    assert compose.command("exec", "--no-TTY", "gateway", "python", "-c", code).split() == ["open", "pg_hba", "pg_hba"]
    password = compose.command("exec", "--no-TTY", "gateway", "cat", "/database/url").split(":")[2].split("@")[0]
    assert len(password) == 64
    logs = compose.command("logs", "--no-color")
    assert password not in logs
    assert password not in run("docker", "inspect", compose.container("gateway"), compose.container("postgres"))


def test_a_backup_goes_on_in_an_empty_coordinator(compose: Compose, tmp_path: Path) -> None:
    file = tmp_path / "coordinator.backup"
    before = compose.admin_json("models", STUDY)
    compose.command("stop")
    compose.make("backup", f"FILE={file}")
    compose.command("down", "--volumes", "--timeout", "5")
    compose.make("restore", f"FILE={file}")
    compose.up()
    assert compose.admin_json("models", STUDY) == before
    run_id = one_run(compose)
    wait_until(lambda: tracked(compose, run_id), f"{run_id} in MLflow's tables", DEADLINE_S)
    assert compose.admin_json("audit", "verify")["right"]
