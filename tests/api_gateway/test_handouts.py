"""What the services beside the gateway are handed."""

from pathlib import Path

import pytest

from api_gateway.handouts import FILES, hand_out
from api_gateway.settings import Settings
from api_gateway.state import locked, open_state
from medhive.errors import InvalidInput


@pytest.fixture
def state(tmp_path: Path) -> Path:
    settings = Settings(state_dir=tmp_path / "state")
    with locked(settings) as folder:
        open_state(settings, folder)
    return settings.state_dir


def handed(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_service_gets_its_own_files_and_no_other(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "handouts"
    for service in FILES:
        (folder / service).mkdir(parents=True)
    assert hand_out(state, folder) == list(FILES)
    assert set(handed(folder)) == {f"{service}/{Path(name).name}" for service, names in FILES.items() for name in names}
    assert not any("ca.key" in name for name in handed(folder))
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*") if path.is_file())


def test_a_service_without_a_folder_is_left_out(state: Path, tmp_path: Path) -> None:
    (tmp_path / "handouts" / "fl-server").mkdir(parents=True)
    assert hand_out(state, tmp_path / "handouts") == ["fl-server"]


def test_a_second_start_changes_nothing_and_a_new_certificate_is_handed_on(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "handouts"
    (folder / "mlflow").mkdir(parents=True)
    hand_out(state, folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "mlflow").iterdir()}
    hand_out(state, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "mlflow").iterdir()} == before
    (state / "tls" / "mlflow.crt").write_bytes(b"renewed")
    hand_out(state, folder)
    assert (folder / "mlflow" / "mlflow.crt").read_bytes() == b"renewed"


def test_a_missing_folder_is_named(state: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="MEDHIVE_GATEWAY_HANDOUT_DIR names"):
        hand_out(state, tmp_path / "nothing")
