"""`medhive-site` as people run it, as a process: help, looking at data, dividing a dataset, wrong use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_world import least_seconds
from PIL import Image

HEAVY = ("torch", "monai", "flwr", "sklearn", "pydantic", "httpx", "numpy", "rich")
HELP_LIMIT_S = 0.5


def run_site(*words: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with nothing of the tests' own surroundings but the path."""
    return subprocess.run(
        [sys.executable, "-m", "fl_client", *words],
        env={"PATH": os.environ["PATH"], "HOME": str(state), "STATE_DIR": str(state), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 48 small images, of which chance leaves some for each part; one of them twice, and one that is none."""
    rng = np.random.default_rng(7)
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(48):
            Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / name / f"{number}.png")
    (folder / "dog" / "copy.png").write_bytes((folder / "dog" / "0.png").read_bytes())
    (folder / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    return folder


def test_help_answers_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_client", "--help"]
    assert least_seconds(command, {**os.environ, "STATE_DIR": str(tmp_path)}) < HELP_LIMIT_S
    code = "import sys; from fl_client.__main__ import program; from medhive.terminal import main; main(program, ['--help'])"
    code += f"; sys.exit(','.join(set(sys.modules) & set({HEAVY!r})) or 0)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert loaded.stderr == ""


def test_the_table_says_of_each_command_what_its_help_says() -> None:
    from fl_client.__main__ import COMMANDS, program  # noqa: PLC0415

    for name in COMMANDS:
        context = program.make_context("medhive-site", [name, "--help"], resilient_parsing=True)
        command = program.get_command(context, name)
        assert command is not None
        assert command.help, name


def test_check_data_counts_and_names_what_is_not_used(images: Path, tmp_path: Path) -> None:
    result = run_site("check-data", str(images), "--task", "image-folder", state=tmp_path / "state")
    assert result.returncode == 0, result.stderr
    assert "96 examples" in result.stdout
    assert "broken.png" in result.stdout
    assert "copy.png" in result.stdout or "the same as" in result.stdout
    assert not (tmp_path / "state").exists() or not any((tmp_path / "state").iterdir())


def test_check_data_for_a_program(images: Path, tmp_path: Path) -> None:
    result = run_site("check-data", str(images), "--task", "image-folder", "--json", state=tmp_path / "state")
    value = json.loads(result.stdout)
    assert value["classes"] == {"cat": 48, "dog": 48}
    assert value["reasons"]["duplicate"] == 1
    assert sum(value["reasons"].values()) == 2


def test_check_data_names_the_class_that_the_study_does_not_know(images: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"task": "image-folder", "data": {"classes": ["cat", "horse"]}}))
    words = ("check-data", str(images), "--study-file", str(study))
    result = run_site(*words, state=tmp_path / "state")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "dog" in result.stderr
    mapped = run_site(*words, "--class", "dog=horse", "--json", state=tmp_path / "state")
    assert json.loads(mapped.stdout)["classes"] == {"cat": 48, "horse": 48}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("check-data", "/nowhere", "--task", "image-folder"), 1, "There is nothing at /nowhere"),
        (("check-data",), 2, "Give PATH and --task, or join a coordinator first"),
        (("check-data", "/nowhere", "--task", "tabular"), 2, "Give --study-file"),
        (("check-data", "--study", "hearts"), 1, "has not joined yet"),
        (("split", "/nowhere", "--out", "out"), 1, "There is nothing at /nowhere"),
        (("split", "a", "--out", "b", "--shares", "1,x"), 2, "--shares takes numbers"),
        (("status",), 1, "medhive-site join"),
        (("join", "--client-id", "A"), 2, "Missing SERVER_ADDRESS"),
        (("join", "--client-id", "A", "--server-address", "http://x"), 1, "must begin with https://"),
        (("run",), 2, "Missing SERVER_ADDRESS"),
        (("menu",), 2, "needs a terminal"),
    ],
)
def test_wrong_use_and_missing_things_are_said(
    words: tuple[str, ...], code: int, sentence: str, tmp_path: Path
) -> None:
    result = run_site(*words, state=tmp_path / "state")
    assert (result.returncode, result.stdout) == (code, "")
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_split_ends_with_a_table_and_overwrites_nothing(images: Path, tmp_path: Path) -> None:
    (images / "dog" / "copy.png").unlink()
    (images / "dog" / "broken.png").unlink()
    out = tmp_path / "sites"
    words = ("split", str(images), "--out", str(out), "--names", "north,south", "--shares", "2,1")
    result = run_site(*words, state=tmp_path / "state")
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[2:5]] == [
        ["north", "32", "32", "64", "66.7%"],
        ["south", "16", "16", "32", "33.3%"],
        ["all", "48", "48", "96", "100.0%"],
    ]
    assert sum(path.is_file() for path in out.rglob("*")) == 96
    again = run_site(*words, state=tmp_path / "state")
    assert again.returncode == 1
    assert "not empty" in again.stderr


def test_an_unusable_state_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_site("join", "--client-id", "A", "--server-address", "x", state=tmp_path / "file" / "state")
    assert result.returncode == 1
    assert "set STATE_DIR" in result.stderr
