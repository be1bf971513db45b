"""The rules that all command lines share: where output goes, exit codes, questions, what a hostile name cannot do."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest

from medhive.errors import Conflict
from medhive.menu import Item, run_menu
from medhive.terminal import (
    Command,
    Program,
    Terminal,
    chosen_options,
    duration,
    main,
    pairs,
    pass_terminal,
    printable,
    run_options,
    size,
)

PROGRAM = Program(
    "trial",
    "A program for trials.",
    {
        "fail": (f"{__name__}:fail", "Fails."),
        "say": (f"{__name__}:say", "Says."),
        "options": (f"{__name__}:options", "Shows what was chosen."),
    },
    hints={"conflict": "Do the other thing."},
)


@click.command(cls=Command)
@pass_terminal
def fail(terminal: Terminal) -> None:
    """Fail."""
    raise Conflict(f"No. {'json' if terminal.json else ''}".strip(), run="RUN_1")


@click.command(cls=Command)
@click.option("--word")
@pass_terminal
def say(terminal: Terminal, word: str | None) -> None:
    """Say a word."""
    word = terminal.ask(word, "Word", "--word")
    terminal.note("aside")
    terminal.result({"word": word}, lambda: terminal.table(["word", "count>"], [[word, 3]]))


@click.command(cls=Command)
@run_options
@pass_terminal
def options(terminal: Terminal, /, **flags: object) -> None:
    """Show the chosen options."""
    terminal.result(chosen_options(flags), lambda: None)


@pytest.fixture(autouse=True)
def known_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program imports its commands by name; tests are imported under a name that only pytest knows."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def test_an_error_is_one_sentence_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, ["fail"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: No. Do the other thing.\n")


def test_an_error_has_its_code_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, ["--json", "fail"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "conflict", "detail": "No. json", "data": {"run": "RUN_1"}}


@pytest.mark.parametrize("arguments", [["nonsense"], ["say", "--nonsense"], ["say"], ["options", "--rounds", "many"]])
def test_wrong_use_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err


def test_a_missing_value_names_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    main(PROGRAM, ["say"])
    assert "Missing --word (Word); there is no terminal to ask on." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--json", "say", "--word", "ä"], ["say", "--word", "ä", "--json"]])
def test_json_may_stand_before_or_after_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"word": "ä"}
    assert err == "aside\n"


def test_a_table_in_a_pipe_is_plain_and_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, ["say", "--word", "x" * 150]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "count"]
    assert lines[2].split() == ["x" * 150, "3"]


def test_help_is_exit_code_0_and_imports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Program("broken", "About.", {"lost": ("medhive.nowhere:lost", "Its line.")})
    assert main(broken, ["--help"]) == 0
    assert "Its line." in capsys.readouterr().out


def test_a_name_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[31mb\x07\r\nc\u202e") == "a\ufffd[31mb\ufffd\ufffd\nc\ufffd"


def test_options_that_are_not_given_are_left_to_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PROGRAM, ["options", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_options_have_their_names_in_the_specification(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--rounds 3 --strategy krum --strategy-param malicious=1 --C 0.5 --dp-epsilon 3 --secagg --json"
    assert main(PROGRAM, ["options", *words.split()]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "rounds": 3,
        "strategy": "krum",
        "strategy_params": {"malicious": 1.0},
        "C": 0.5,
        "privacy": {"dp_epsilon": 3.0, "secagg": True},
    }


def test_a_pair_needs_its_sign() -> None:
    assert pairs(["a=b=c"], "--x") == {"a": "b=c"}
    with pytest.raises(click.UsageError, match="--x takes NAME=VALUE"):
        pairs(["ab"], "--x")


def test_figures_for_people() -> None:
    assert [size(0), size(999), size(1_500), size(2_000_000), size(5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "5000.0 GB",
    ]
    assert [duration(1.25), duration(90)] == ["1.2 s", "1.5 min"]


def test_no_color_is_respected(tmp_path: Path) -> None:
    code = "from medhive.terminal import Terminal; Terminal().table(['a'], [['b']])"
    plain, coloured = (_on_a_terminal([sys.executable, "-c", code], extra) for extra in ({"NO_COLOR": "1"}, {}))
    assert "\x1b[3" not in plain
    assert "\x1b[1m" in coloured


WIDE = """
from medhive.terminal import Terminal
rows = [["RUN_1", "hospital-a, hospital-b, hospital-c", "", 1], ["RUN_2", "hospital-a", "", 22]]
Terminal().table(["run", "answered", "dropped", "count>"], rows)
"""


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        # As it is; without the empty column and folded; as names and values.
        (80, ["run answered dropped count", "RUN_1 hospital-a, hospital-b, hospital-c 1"]),
        (40, ["run answered count", "RUN_1 hospital-a, hospital-b, 1", "hospital-c"]),
        (20, ["run RUN_1", "answered hospital-a, hospital-b, hospital-c", "count 1"]),
    ],
)
def test_a_narrow_terminal_loses_no_letter(width: int, lines: list[str]) -> None:
    text = _on_a_terminal([sys.executable, "-c", WIDE], {"NO_COLOR": "1"}, width)
    shown = [" ".join(line.split()) for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    assert [line for line in lines if line not in shown] == []


def _on_a_terminal(command: list[str], extra: dict[str, str], width: int = 80) -> str:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, width))
    unwanted = ("NO_COLOR", "CI", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    subprocess.run(command, stdout=follower, env={**environment, "TERM": "xterm", **extra}, check=True, timeout=30)
    os.close(follower)
    text = b""
    try:
        while piece := os.read(leader, 65536):
            text += piece
    except OSError:
        pass  # the terminal's end
    os.close(leader)
    return text.decode()


def test_a_menu_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def conflict() -> None:
        raise Conflict("Not now.")

    answers = iter(["1", "7", "", "2", "0"])
    monkeypatch.setattr(click.termui, "visible_prompt_func", lambda _text: next(answers))
    done: list[str] = []
    run_menu(Terminal(), lambda: "the head", (Item("Fail", conflict), Item("Work", lambda: done.append("worked"))))
    out, err = capsys.readouterr()
    assert out.count("the head") == 5
    assert out.count("  1  Fail") == 2, "at first, and when it was asked for"
    assert "error: Not now." in err
    assert "7 is no line of this menu." in err
    assert done == ["worked"]
