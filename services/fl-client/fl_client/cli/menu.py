"""A numbered menu over the same commands, for people who come by when something has arrived.

Its head shows who this hospital is and what waits. What arrives while the menu waits is announced at once, by the
coordinator's live event stream.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import click

from fl_client import updates as versions_here
from fl_client.cli import membership, runs, versions
from fl_client.cli.installation import open_site, open_source
from fl_client.consents import open_runs
from fl_client.site import Site
from medhive.errors import Unreachable
from medhive.follow import Feed
from medhive.menu import Item, run_menu
from medhive.terminal import Command, Terminal, moment, pass_terminal
from medhive.wire import EventAnswer

ANNOUNCED: Final[Mapping[str, str]] = {
    "version.created": "new version",
    "version.offered": "version offered",
    "version.exported": "version offered to this hospital",
    "run.created": "a run asks for consent",
    "request.approved": "request approved",
    "request.rejected": "request rejected",
    "run.completed": "run completed",
    "run.failed": "run failed",
    "run.expired": "run expired",
}


@click.command(cls=Command)
@click.pass_context
@pass_terminal
def menu(terminal: Terminal, context: click.Context) -> None:
    """A numbered menu over these commands; needs a terminal."""
    if not terminal.interactive:
        raise click.UsageError("The menu needs a terminal; the same is done by the single commands.")

    def announce(event: EventAnswer) -> None:
        if event.kind in ANNOUNCED:
            terminal.note(f"\n*** {ANNOUNCED[event.kind]}: {event.subject} ***")

    with open_site() as site, Feed(lambda: open_source(site), _newest_event(site), announce):
        run_menu(terminal, lambda: _head(site), _items(context, terminal, site))


def _newest_event(site: Site) -> int:
    """Where announcements begin; without the coordinator, at what this hospital has seen."""
    try:
        return site.gateway.head().body.number
    except Unreachable:
        seen = site.store.newest_head()
        return seen.number if seen else 0


def _head(site: Site) -> str:
    in_use = ", ".join(f"{study} v{number}" for study, number in membership.champions(site).items()) or "none"
    waiting = len(versions_here.undecided(site))
    line = f"{site.name} of {site.identity.coordinator_name}"
    try:
        line += f"\nconsents asked: {len(open_runs(site))}"
    except Unreachable:
        line += "\nthe coordinator does not answer"
    return f"{line}   versions to decide on: {waiting}   in use: {in_use}"


def _items(context: click.Context, terminal: Terminal, site: Site) -> tuple[Item, ...]:
    def call(command: click.Command, **values: object) -> Callable[[], object]:
        return lambda: context.invoke(command, **values)

    return (
        Item("Send a training request", call(runs.request)),
        Item("Agree to a run", call(runs.consent)),
        Item("Decline a run", call(runs.decline)),
        Item("Withdraw from a run", lambda: context.invoke(runs.withdraw, run_id=terminal.ask(None, "Run", "RUN_n"))),
        Item("Requests", call(runs.requests)),
        Item("Version history", call(versions.history)),
        Item("Last version", lambda: _last_version(context, site)),
        Item("Local models", call(versions.models)),
        Item("Notifications", lambda: _notifications(terminal, site)),
        Item("Accept a version", call(versions.accept)),
        Item("Reject a version", call(versions.reject)),
        Item("Go back to an earlier version", call(versions.rollback)),
        Item("Use the model", lambda: context.invoke(versions.predict, path=_ask_path(terminal))),
        Item("Settings", call(membership.settings)),
    )


def _ask_path(terminal: Terminal) -> Path:
    return Path(terminal.ask(None, "File or folder", "PATH")).expanduser()


def _last_version(context: click.Context, site: Site) -> None:
    newest = max(site.store.versions(), key=lambda item: item.received_at, default=None)
    if newest is None:
        context.invoke(versions.updates)
    else:
        context.invoke(versions.updates, study=newest.study, version=newest.version)


def _notifications(terminal: Terminal, site: Site) -> None:
    """What waits for a person, and what the coordinator has said lately."""
    for item in open_runs(site):
        terminal.line(f"{item.run.id} of {item.run.study} waits for this hospital's consent")
    for update in versions_here.undecided(site):
        terminal.line(f"version {update.version} of {update.study} waits for this hospital's decision")
    rows = [[run.id, run.study, run.state, moment(run.updated_at), run.reason] for run in site.gateway.runs(limit=10)]
    terminal.table(["run", "study", "state", "changed", "reason"], rows, "no runs yet")
