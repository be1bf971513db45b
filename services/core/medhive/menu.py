"""The loop of a numbered menu, the same at the coordinator and at a hospital."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import click

from medhive.errors import MedHiveError
from medhive.terminal import Terminal

LEAVE: Final = "0"
QUESTION: Final = f"Enter shows the menu, {LEAVE} leaves. Number"


@dataclass(frozen=True)
class Item:
    """One line of a menu and what it does."""

    title: str
    action: Callable[[], object]


def run_menu(terminal: Terminal, head: Callable[[], str], items: Sequence[Item]) -> None:
    """Show the head and the lines, do what the person chooses, until the person leaves.

    What goes wrong in one line is said, and the menu goes on. The lines are shown at first and when they are asked for, so
    that a result is not pushed out of sight by them.
    """
    shown = False
    while True:
        terminal.line()
        _guarded(terminal, lambda: terminal.line(head()))
        if not shown:
            _show(terminal, items)
            shown = True
        try:
            choice = str(click.prompt(f"\n{QUESTION}", default="", show_default=False, err=True)).strip()
        except click.Abort:
            return
        if choice in (LEAVE, "q", "quit"):
            return
        if not choice:
            shown = False
            continue
        if not choice.isdecimal() or not 1 <= int(choice) <= len(items):
            terminal.note(f"{choice} is no line of this menu.")
            continue
        terminal.line()
        _guarded(terminal, items[int(choice) - 1].action)


def _show(terminal: Terminal, items: Sequence[Item]) -> None:
    terminal.line()
    for number, item in enumerate(items, start=1):
        terminal.line(f"{number:>3}  {item.title}")
    terminal.line(f"{LEAVE:>3}  Leave")


def _guarded(terminal: Terminal, action: Callable[[], object]) -> None:
    """Do it; an error, a wrong answer or Ctrl-C ends this line, not the menu."""
    try:
        action()
    except MedHiveError as error:
        terminal.fail(error)
    except click.ClickException as error:
        terminal.note(f"error: {error.format_message()}")
    except click.exceptions.Exit:
        pass  # the command has said why
    except (click.Abort, KeyboardInterrupt):
        terminal.note("left")
