"""`medhive-admin queue` with a real gateway: the single words, and the prompt that reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_world import World, running_gateway
from queue_world import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        scene = Scene.made(world, capacity=4)
        password = tmp_path / "password"
        password.write_text(gateway.password or "")
        password.chmod(0o600)
        ca_file = str(gateway.state_dir / "tls" / "ca.crt")
        words = ["login", gateway.url, "--username", "admin", "--password-file", str(password), "--ca-file", ca_file]
        assert admin(scene, *words).returncode == 0
        yield scene
        world.close()


def admin(scene: Scene, *words: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "MEDHIVE_ADMIN_CONFIG": str(scene.world.folder / "admin.json")}
    command = [sys.executable, "-m", "api_gateway.admin", *words]
    return subprocess.run(
        command, env=environment, input=typed, capture_output=True, text=True, timeout=60, check=False
    )


def test_words_and_prompt(scene: Scene) -> None:
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    status = json.loads(admin(scene, "queue", "status", "--json").stdout)
    assert (status["queue_size"], status["state"], len(status["waiting"])) == (2, "partial", 2)
    lines = [
        f"status {scene.study}",
        "nonsense",
        "clear --yes",
        "clear --reason 'a wrong scanner' --yes",
        "execute",
        "quit",
    ]
    typed = "\n".join([*lines, "status"])
    prompt = admin(scene, "queue", typed=typed)
    assert prompt.returncode == 0, prompt.stderr
    assert prompt.stdout.count("partial, 2 of 4") == 1 and "QUEUE_1 is cleared of 2 contributions." in prompt.stdout
    assert "throw away what waits" in prompt.stderr and "There is no word nonsense" in prompt.stderr
    assert "--reason" in prompt.stderr and "0 hospitals" in prompt.stderr
    assert {row.reason for row in scene.contributions()} == {"a wrong scanner"}
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, 10 + seed)
    executed = admin(scene, "queue", "execute", scene.study)
    assert "Execution 1: 2 contributions are averaged" in executed.stdout, executed.stderr
    assert admin(scene, "queue", "--no-input").returncode == 2
    closed = admin(scene, "studies", "queue", scene.study, "--close", "--reason", "over")
    assert closed.stdout == f"QUEUE_1 of {scene.study} is closed.\n"
    opened = admin(scene, "studies", "queue", scene.study, "--capacity", "3", "--lr", "0.1")
    assert "QUEUE_2" in opened.stdout and "medhive-site consent QUEUE_2" in opened.stdout
    assert admin(scene, "queue", "status", "nowhere").returncode == 1
