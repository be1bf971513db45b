"""The container's first process: `docker run ... fl-client [-e NAME=VALUE ...] [COMMAND ...]`.

It has process id 1, to which the kernel delivers no signal that nobody handles: `docker stop` would wait ten seconds and
kill. So signals are dealt with before anything slow is imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Final, NoReturn

STOP_S: Final = 4.5
"""What has not ended so long after SIGTERM is cut off; it is as safe as a power cut, and resumed at the next start."""

SERVING: Final = frozenset({"--json", "--no-input"})
"""Options with which `run` is still what the container does without a command."""


def main(arguments: Sequence[str]) -> int:
    """Run the container's command; returns its exit code."""
    end_in_time()
    from fl_client.container.arguments import parse, prepared  # noqa: PLC0415 - signals first
    from fl_client.container.exits import exit_code  # noqa: PLC0415
    from medhive.errors import MedHiveError  # noqa: PLC0415

    try:
        line = parse(arguments)
        if line.given:
            _start_again(line.given, line.command)
        _take_on(prepared(os.environ))
        if not line.command or (line.command[0] == "run" and SERVING.issuperset(line.command[1:])):
            return _serve(json="--json" in line.command)
    except MedHiveError as error:
        code = exit_code(error)
        sys.stderr.write(f"error: {error} [exit code {code}]\n")
        return int(code)
    return _command(line.command)


def end_in_time() -> None:
    """Have SIGTERM end this process, whoever handles it later, within `STOP_S`."""
    signal.signal(signal.SIGTERM, _end)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="end-in-time", daemon=True).start()


def _watch(reading: int) -> None:
    while os.read(reading, 1) != bytes([signal.SIGTERM]):
        pass
    time.sleep(STOP_S)
    os.write(sys.stderr.fileno(), b"stopped; what was under way is resumed at the next start\n")
    os._exit(128 + signal.SIGTERM)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _start_again(given: Mapping[str, str], command: tuple[str, ...]) -> NoReturn:
    """With the variables where they belong: libraries read them as they load, and a token leaves the command line."""
    program = [sys.executable, "-P", "-m", "fl_client.container", *command]
    os.execve(sys.executable, program, {**os.environ, **given})  # noqa: S606 - no shell is meant


def _take_on(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _serve(json: bool) -> int:
    from fl_client.container.serve import serve  # noqa: PLC0415 - signals first
    from medhive.terminal import Terminal  # noqa: PLC0415

    try:
        serve(Terminal(json=json, no_input=True))
    except (SystemExit, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    return 0


def _command(command: tuple[str, ...]) -> int:
    from fl_client.__main__ import program  # noqa: PLC0415 - signals first
    from medhive.terminal import main as run_program  # noqa: PLC0415

    return run_program(program, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
