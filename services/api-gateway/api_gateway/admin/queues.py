"""`queue`: how full a study's contribution queue is, an average by hand, a clearing; alone, a prompt with the same words."""

import shlex
import sys
from typing import Final

import click

from api_gateway.admin.session import connect
from medhive.client import GatewayClient
from medhive.errors import MedHiveError
from medhive.queues import ExecutionAnswer, QueueAnswer, QueueOptions, QueueStatus
from medhive.terminal import Group, Terminal, build, moment, pass_terminal
from medhive.wire import API, Reason

PROMPT: Final = "queue> "
WORDS: Final = {
    "status": "how full it is, who waits, the newest version",
    "execute": "average what waits, now",
    "clear": "throw away what waits, with a reason",
    "help": "this list",
    "quit": "leave",
}


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
@pass_terminal
def queue(terminal: Terminal, context: click.Context) -> None:
    """A study's contribution queue: status, execute, clear; alone, a prompt with these words, help and quit."""
    if context.invoked_subcommand is None:
        if terminal.no_input:
            raise click.UsageError("The prompt reads words; with --no-input name one: status, execute or clear.")
        _prompt(terminal, context)


def _prompt(terminal: Terminal, context: click.Context) -> None:
    """Read words until `quit` or the end of the input; what fails is said and ends nothing."""
    _help(terminal)
    while True:
        click.echo(PROMPT, nl=False, err=True)
        line = sys.stdin.readline()
        words = _words(line)
        if not line or words[:1] == ["quit"]:
            return
        if words:
            _do(terminal, context, words)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return [line]


def _do(terminal: Terminal, context: click.Context, words: list[str]) -> None:
    command = queue.get_command(context, words[0])
    if command is None:
        terminal.note(f"There is no word {words[0]}; help lists them.")
        return
    try:
        command.main(words[1:], prog_name=words[0], standalone_mode=False, parent=context)
    except click.ClickException as error:
        terminal.note(f"error: {error.format_message()}")
    except MedHiveError as error:
        terminal.fail(error)


def _help(terminal: Terminal) -> None:
    for word, about in WORDS.items():
        terminal.note(f"{word:<8}  {about}")


@queue.command("help")
@pass_terminal
def show_help(terminal: Terminal) -> None:
    """Say what the words mean."""
    terminal.result(WORDS, lambda: _help(terminal))


@queue.command("quit")
def leave() -> None:
    """Leave the prompt."""


@queue.command("status")
@click.argument("study", required=False)
@pass_terminal
def status(terminal: Terminal, study: str | None) -> None:
    """How full STUDY's queue is, whose contributions wait, and the newest version."""
    with connect() as client:
        found = _status(client, study)
    terminal.result(found, lambda: _show(terminal, found))


def _status(client: GatewayClient, study: str | None) -> QueueStatus:
    return QueueStatus.model_validate(client.get("/status", study=study))


def _show(terminal: Terminal, found: QueueStatus) -> None:
    terminal.fields(
        [
            ("queue", f"{found.queue_id} of {found.study}"),
            ("state", f"{found.state}, {found.queue_size} of {found.capacity}"),
            ("averaging", "now" if found.averaging else ""),
            ("newest version", "none yet" if found.newest_version is None else found.newest_version),
            ("connected", f"{found.connected_sites}: {', '.join(found.connected)}" if found.connected else 0),
        ]
    )
    if found.waiting:
        terminal.line()
        rows = [
            [item.site, item.contributions, moment(item.received_at), item.source_address] for item in found.waiting
        ]
        terminal.table(["site", "waiting>", "last", "address"], rows)


@queue.command("execute")
@click.argument("study", required=False)
@pass_terminal
def execute(terminal: Terminal, study: str | None) -> None:
    """Average what waits in STUDY's queue, now; the aggregator makes the next version of it."""
    with connect() as client:
        name = _status(client, study).study
        made = ExecutionAnswer.model_validate(client.post(f"{API}/studies/{name}/queue/execute"))
    text = f"Execution {made.execution}: {made.contributions} contributions are averaged; status shows the version."
    terminal.result(made, lambda: terminal.line(text))


@queue.command("clear")
@click.argument("study", required=False)
@click.option("--reason", help="Why; the hospitals read it beside their contributions.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def clear(terminal: Terminal, study: str | None, reason: str | None, yes: bool) -> None:
    """Throw away what waits in STUDY's queue."""
    with connect() as client:
        found = _status(client, study)
        why = terminal.ask(reason, "Reason", "--reason")
        terminal.confirm(f"Throw away {found.queue_size} contributions to {found.queue_id}?", yes)
        after = QueueStatus.model_validate(
            client.post(f"{API}/studies/{found.study}/queue/clear", build(Reason, reason=why))
        )
    text = f"{found.queue_id} is cleared of {found.queue_size} contributions."
    terminal.result(after, lambda: terminal.line(text))


# ---- opening, which belongs to the study ---------------------------------------------------------------------------


@click.command("queue")
@click.argument("name")
@click.option("--capacity", type=int, help="Contributions that make an average due [10].")
@click.option("--min-sites", type=int, help="Hospitals that they must be of [2].")
@click.option("--max-staleness", type=int, help="How many versions old a contribution's base may be [10].")
@click.option("--local-epochs", type=int, help="Epochs of each training [5].")
@click.option("--batch-size", type=int, help="Examples a step [32].")
@click.option("--lr", type=float, help="Learning rate [the task's own].")
@click.option("--seed", type=int, help="Seed of each training [42].")
@click.option("--max-norm", type=float, help="Largest change of a contribution (L2 norm) [the others decide].")
@click.option("--close", "closing", is_flag=True, help="Close the queue instead; what waits is cleared.")
@click.option("--reason", default="", help="With --close: why.")
@pass_terminal
def study_queue(terminal: Terminal, /, name: str, closing: bool, reason: str, **given: int | float | None) -> None:
    """Open the contribution queue of study NAME, which its hospitals are then asked to agree to; or close it."""
    chosen = {key: value for key, value in given.items() if value is not None}
    with connect() as client:
        if closing:
            answer = client.post(f"{API}/studies/{name}/queue/close", build(Reason, reason=reason))
        else:
            answer = client.put(f"{API}/studies/{name}/queue", build(QueueOptions, **chosen))
    found = QueueAnswer.model_validate(answer)
    text = f"{found.id} of {name} is closed."
    if found.open:
        text = f"{found.id} of {name} is open; its hospitals agree with: medhive-site consent {found.id}"
    terminal.result(found, lambda: terminal.line(text))
