"""How the tracking server is started: small, quiet, locked to the names it is reached by, no secret on its command line."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from waiting import DEADLINE_S, until

SCRIPT = Path(__file__).parents[2] / "services" / "mlflow" / "serve.py"


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mlflow_serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_keeps_to_loopback_and_to_one_worker(serve: ModuleType, tmp_path: Path) -> None:
    environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path / "state"), "MEDHIVE_MLFLOW_PORT": "8181"}
    argv = serve.command(environment)
    options = dict(itertools.pairwise(argv))
    assert (options["--host"], options["--port"], options["--workers"]) == ("127.0.0.1", "8181", "1")
    assert options["--allowed-hosts"] == "127.0.0.1,localhost,127.0.0.1:8181,localhost:8181"
    assert serve.environment_of_server(environment)["MLFLOW_BACKEND_STORE_URI"].startswith("sqlite:///")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_databases_password_stands_on_no_command_line(serve: ModuleType, tmp_path: Path) -> None:
    url = tmp_path / "url"
    url.write_text("postgresql://mlflow:secret@db/mlflow\n")
    environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path), "MEDHIVE_MLFLOW_DATABASE_URL_FILE": str(url)}
    assert "secret" not in " ".join(serve.command(environment))
    assert "secret" in serve.environment_of_server(environment)["MLFLOW_BACKEND_STORE_URI"]


def test_beyond_loopback_it_wants_a_certificate_or_a_proxy(serve: ModuleType, tmp_path: Path) -> None:
    environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path), "MEDHIVE_MLFLOW_HOST": "0.0.0.0"}  # noqa: S104
    with pytest.raises(serve.Misconfigured, match="MEDHIVE_MLFLOW_TLS_CERT"):
        serve.command(environment)
    with pytest.raises(serve.Misconfigured, match="both"):
        serve.command({**environment, "MEDHIVE_MLFLOW_TLS_CERT": "a.crt"})
    tls = {"MEDHIVE_MLFLOW_TLS_CERT": "a.crt", "MEDHIVE_MLFLOW_TLS_KEY": "a.key"}
    assert "--ssl-certfile a.crt --ssl-keyfile a.key" in serve.command({**environment, **tls})[-1]
    assert serve.command({**environment, "MEDHIVE_MLFLOW_BEHIND_PROXY": "1"})


def with_logins(folder: Path) -> dict[str, str]:
    environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(folder / "state")}
    for name in ("WRITER_PASSWORD", "READER_PASSWORD", "COOKIE_SECRET"):
        file = folder / name
        file.write_text(f"{name.lower()}-of-this-test\n")
        environment[f"MEDHIVE_MLFLOW_{name}_FILE"] = str(file)
    return environment


def test_logins_come_from_files_and_stand_on_no_command_line(serve: ModuleType, tmp_path: Path) -> None:
    environment = with_logins(tmp_path)
    argv = serve.command(environment)
    assert "basic-auth" in argv
    assert "of-this-test" not in " ".join(argv)
    started = serve.environment_of_server(environment)
    assert started["MLFLOW_AUTH_ADMIN_PASSWORD"] == "writer_password-of-this-test"
    assert "of-this-test" not in Path(started["MLFLOW_AUTH_CONFIG_PATH"]).read_text("utf-8")
    assert "basic-auth" not in serve.command({"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path / "state")})
    del environment["MEDHIVE_MLFLOW_READER_PASSWORD_FILE"]
    with pytest.raises(serve.Misconfigured, match="MEDHIVE_MLFLOW_READER_PASSWORD_FILE"):
        serve.command(environment)


def test_a_renewed_certificate_starts_the_server_anew(tmp_path: Path) -> None:
    certificate, log = tmp_path / "shown.crt", tmp_path / "log"
    certificate.write_text("first")
    server = (
        f"import time; shown = open({str(certificate)!r}).read(); "
        f"open({str(log)!r}, 'a').write(f'started {{shown}}\\n'); time.sleep(600)"
    )
    code = (
        f"import importlib.util as u; from pathlib import Path; s = u.spec_from_file_location('serve', {str(SCRIPT)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        f"raise SystemExit(m.keep_serving([{sys.executable!r}, '-c', {server!r}], {{}}, [Path({str(certificate)!r})]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: log.exists() and log.read_text() == "started first\n", "the first start")
        (tmp_path / "renewed").write_text("second")
        (tmp_path / "renewed").replace(certificate)
        until(lambda: log.read_text() == "started first\nstarted second\n", "the second start")
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_a_new_state_folder_needs_no_look_at_its_database(
    serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.store.db", None)  # may not be imported
    settings = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path)}
    serve.ensure_schema(settings)
    (tmp_path / "mlflow.db").touch()
    serve.ensure_schema(settings)
    (tmp_path / "schema.version").write_text("3.0.0")
    with pytest.raises(ImportError):
        serve.ensure_schema(settings)


def test_an_older_mlflows_database_is_brought_up_to_date(serve: ModuleType, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - seconds to collect, in every worker
    from mlflow.store.db import utils  # noqa: PLC0415
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase  # noqa: PLC0415

    environment = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path)}
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{tmp_path / 'mlflow.db'}")
    InitialBase.metadata.create_all(engine)
    with pytest.raises(MlflowException, match="out-of-date"):
        utils._verify_schema(engine)
    serve.ensure_schema(environment)
    utils._verify_schema(engine)
    before = (tmp_path / "mlflow.db").stat().st_mtime_ns
    serve.ensure_schema(environment)
    assert (tmp_path / "mlflow.db").stat().st_mtime_ns == before
    engine.dispose()
