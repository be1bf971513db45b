"""A numbered menu over the same commands, for people who come by once a week.

Its head shows who is logged in and what waits. What arrives while the menu waits (a request, a new version, a run's end) is
announced at once, by the live event stream.
"""

from collections.abc import Callable, Mapping
from typing import Final

import click

from api_gateway.admin import models, runs
from api_gateway.admin.identity import ending_certificates
from api_gateway.admin.session import Session, load_session, open_source
from medhive.client import GatewayClient
from medhive.errors import InvalidInput
from medhive.follow import ClientSource, Feed
from medhive.menu import Item, run_menu
from medhive.states import FINAL_RUN_STATES, RequestState
from medhive.terminal import Command, Terminal, pass_terminal
from medhive.wire import EventAnswer

ANNOUNCED: Final[Mapping[str, str]] = {
    "request.sent": "new request",
    "version.created": "new version",
    "run.completed": "run completed",
    "run.failed": "run failed",
    "run.expired": "run expired",
    "site.joined": "hospital joined",
    "consent.declined": "consent declined",
    "consent.withdrawn": "consent withdrawn",
    "contribution.refused": "contribution refused",
}


@click.command(cls=Command)
@click.pass_context
@pass_terminal
def menu(terminal: Terminal, context: click.Context) -> None:
    """A numbered menu over these commands; needs a terminal."""
    if not terminal.interactive:
        raise click.UsageError("The menu needs a terminal; the same is done by the single commands.")
    session = load_session()

    def announce(event: EventAnswer) -> None:
        if event.kind in ANNOUNCED:
            origin = f" from {event.site or event.actor.removeprefix('site:')}" if event.kind == "request.sent" else ""
            terminal.note(f"\n*** {ANNOUNCED[event.kind]}: {event.subject}{origin} ***")

    with session.open() as client:
        newest = ClientSource(client).head().body.number
        with Feed(open_source, newest, announce):
            run_menu(terminal, lambda: _head(session, client), _items(context, terminal, client))


def _head(session: Session, client: GatewayClient) -> str:
    pending = sum(item.state is RequestState.PENDING for item in runs.fetch_requests(client))
    active = sum(item.state not in FINAL_RUN_STATES for item in runs.fetch_runs(client))
    newest = {item.study: item.version for item in models.fetch_versions(client)}
    versions = ", ".join(f"{study} v{number}" for study, number in newest.items()) or "none yet"
    who = f"{session.name} ({session.role}) at {session.address}"
    warnings = "".join(f"\n{warning}" for warning in ending_certificates(client))
    return f"{who}{warnings}\npending requests: {pending}   active runs: {active}   newest versions: {versions}"


def _items(context: click.Context, terminal: Terminal, client: GatewayClient) -> tuple[Item, ...]:
    def call(command: click.Command, **values: object) -> Callable[[], object]:
        return lambda: context.invoke(command, **values)

    def version_command(command: click.Command) -> Callable[[], object]:
        def run() -> object:
            study = runs.ask_study(terminal, client, None)
            version = _ask_version(terminal, client, study)
            return context.invoke(command, study=study, version=version)

        return run

    return (
        Item("View pending requests", call(runs.requests, state=str(RequestState.PENDING))),
        Item("Approve a request", call(runs.approve)),
        Item("Reject a request", call(runs.reject)),
        Item("Active runs", call(runs.runs)),
        Item("History of runs", call(runs.history)),
        Item("Model versions", call(models.models)),
        Item("Details of a version", version_command(models.model)),
        Item("Export a version", version_command(models.export)),
        Item("Statistics", call(models.stats)),
        Item("Clean up old versions", call(models.cleanup)),
    )


def _ask_version(terminal: Terminal, client: GatewayClient, study: str) -> int:
    numbers = [str(item.version) for item in models.fetch_versions(client, study)]
    if not numbers:
        raise InvalidInput(f"{study} has no version yet.")
    return int(terminal.ask(None, "Version", "VERSION", numbers[-1], numbers))
