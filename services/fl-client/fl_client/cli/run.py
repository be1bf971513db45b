"""`run`: the resident node in the foreground, until Ctrl-C, SIGTERM, or the coordinator's last word."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import click
import structlog

from fl_client.cli.installation import load_settings, open_site
from fl_client.cli.membership import join_with, known_identity
from fl_client.cli.report import Reporter
from fl_client.monitoring import Figures
from fl_client.node import Node
from medhive.leftovers import remove_leftovers
from medhive.terminal import Command, Terminal, pass_terminal

# Windows has no SIGTERM that anybody sends; its SIGINT is Ctrl-C like everywhere.
END_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@click.command(cls=Command)
@pass_terminal
def run(terminal: Terminal) -> None:
    """Stay connected, and train when a run that this hospital agreed to asks for it; ends with Ctrl-C.

    Not joined yet, it joins first, with SERVER_ADDRESS, CLIENT_ID and JOIN_TOKEN. What happens is printed on standard
    output, the technical log (JSON lines) on standard error.
    """
    log_to_stderr()
    settings = load_settings()
    if known_identity(settings) is None:
        outcome = join_with(terminal, settings)
        terminal.note(f"{outcome.identity.site} has joined {outcome.identity.coordinator_name}.")
    with open_site() as site:
        remove_leftovers(site.settings.state_dir)
        figures = Figures(site.settings, Reporter(terminal))
        node = Node(site, figures)
        with figures.served_for(node, site.store), ended_by_signals(node.stop):
            node.run()


def log_to_stderr() -> None:
    """Write the structured log as JSON lines, apart from what people read."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@contextmanager
def ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the work in an orderly way; a second Ctrl-C ends it at once."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop()

    before = {number: signal.signal(number, end) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
