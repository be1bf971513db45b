"""The log is one JSON object a line, also when several processes write into one stream."""

import json
import os
import subprocess
import sys

LINES, PROCESSES = 1000, 3
TALK = f"""
from fl_server.logs import log_json
import structlog
log_json()
log = structlog.get_logger()
for number in range({LINES}):
    log.info("talk", number=number, text="x" * 300)
"""


def test_lines_of_several_processes_stay_whole() -> None:
    read, write = os.pipe()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # as in the containers
    talkers = [
        subprocess.Popen([sys.executable, "-c", TALK], stderr=write, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(PROCESSES)
    ]
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stream:
        numbers = sorted(json.loads(line)["number"] for line in stream)
    assert [talker.wait(timeout=60) for talker in talkers] == [0] * PROCESSES
    assert numbers == sorted([*range(LINES)] * PROCESSES)
