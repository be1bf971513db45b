"""A container engine for the tests that need one: whichever answers, or the one that the program in `ENGINE` brings up.

`ENGINE` names a program with the commands `start`, `env` (prints exports for a shell) and `stop`. It is left running, as
whoever brought it up may need it; `MEDHIVE_NEEDS_ENGINE=1` makes a missing engine a failure instead of a skip.
"""

import os
import re
import subprocess

import pytest

START_DEADLINE_S = 900.0  # it may have to install itself first
EXPORT = re.compile(r"(DOCKER_\w+)=(\S+)")


def answers() -> bool:
    """Whether an engine and compose answer."""
    try:
        return all(
            subprocess.run(["docker", *words], capture_output=True, check=False, timeout=30).returncode == 0
            for words in (["version"], ["compose", "version"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture(scope="session")
def engine() -> str:
    """The engine's version; the environment of this process leads to it."""
    program = os.environ.get("ENGINE")
    if not answers() and program:
        subprocess.run([program, "start"], check=True, timeout=START_DEADLINE_S)
        exports = subprocess.run([program, "env"], check=True, capture_output=True, text=True, timeout=60).stdout
        os.environ.update(EXPORT.findall(exports))
    if not answers():
        reason = "no container engine with compose answers; start one, or name a program that does in ENGINE"
        if os.environ.get("MEDHIVE_NEEDS_ENGINE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
