"""docs/deployment.md, "Try it": three hospitals with data by one compose file, and the commands that the document gives."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose import BUILD_DEADLINE_S, ROOT, Compose, run

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]

FILES = ("docker-compose.yml", "deploy/compose.demo.yaml")


def commands() -> list[list[str]]:
    """What a reader types, in order, but for `export`; docker's own terminal is none here."""
    section = (ROOT / "docs" / "deployment.md").read_text("utf-8").split("## Try it\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line.replace(" exec ", " exec --no-TTY ")) for line in lines if line.startswith("docker ")]


@pytest.fixture
def demo(engine: str, tmp_path: Path) -> Iterator[Compose]:
    """Nothing is started yet; all of it is removed."""
    with Compose(tmp_path, FILES) as compose:
        yield compose


def test_what_the_document_says_to_type_runs_the_main_job(demo: Compose) -> None:
    typed = commands()
    assert len(typed) > 9
    printed = {" ".join(words[5:7]): run(*words, env=demo.environment, deadline_s=BUILD_DEADLINE_S) for words in typed}
    assert printed["medhive-admin sites"].count("hospital-") == 3
    assert "RUN_1 is completed: version 1 of brain-mri" in printed["medhive-admin watch"]
    assert "accepted and in use" in printed["medhive-site accept"]
    assert printed["medhive-site predict"].count("glioma") > 30, "most of its own scans of that class"

    for site in ("hospital-a", "hospital-b", "hospital-c"):
        mounts = json.loads(run("docker", "inspect", demo.container(site)))[0]["Mounts"]
        letter = site.removeprefix("hospital-")
        names = {f"{demo.name}_demo-hospital-{letter}": False, f"{demo.name}_demo-state-{letter}": True}
        assert {item["Name"]: item["RW"] for item in mounts} == names, "its own volumes, the data read-only"

    before = demo.admin_json("models", "brain-mri"), demo.admin_json("invite", "--list")
    demo.command("up", "--detach")
    assert (demo.admin_json("models", "brain-mri"), demo.admin_json("invite", "--list")) == before
