"""Requests and runs: asking, deciding, following, stopping."""

from pathlib import Path
from typing import Any, Final

import click

from api_gateway.admin.session import connect, open_source
from medhive.client import GatewayClient
from medhive.curves import lines_of, rounds_csv
from medhive.errors import InvalidInput, MedHiveError
from medhive.follow import ClientSource, follow_request, follow_run
from medhive.spec import build_options
from medhive.states import FINAL_RUN_STATES, RequestState, RunState
from medhive.terminal import Command, Terminal, build, chosen_options, pass_terminal, run_options
from medhive.views import (
    request_details,
    requests_table,
    run_details,
    runs_table,
    version_details,
)
from medhive.wire import API, NewRequest, Reason, RequestAnswer, RoundAnswer, RunAnswer, StudyAnswer, VersionAnswer

DEFAULT_LIMIT: Final = 50


class RunUnsuccessful(MedHiveError):
    """A run that was waited for ended without a new version."""

    code = "run-unsuccessful"


class RequestNotApproved(MedHiveError):
    """A request that was waited for was rejected or cancelled."""

    code = "request-not-approved"


@click.command(cls=Command)
@click.argument("study", required=False)
@run_options
@click.option("--base-version", type=int, help="Version to start from [the newest].")
@click.option("--note", default="", help="A sentence for those who decide.")
@click.option("--wait", is_flag=True, help="Follow the request to its decision and the run to its end.")
@pass_terminal
def request(
    terminal: Terminal, /, study: str | None, base_version: int | None, note: str, wait: bool, **flags: Any
) -> None:
    """Ask for a training run of STUDY; what is left out comes from the study's defaults."""
    with connect() as client:
        study = ask_study(terminal, client, study)
        if terminal.interactive and flags["rounds"] is None:
            flags["rounds"] = _ask_rounds(StudyAnswer.model_validate(client.get(f"{API}/studies/{study}")))
        body = build(NewRequest, study=study, options=chosen_options(flags), base_version=base_version, note=note)
        sent = RequestAnswer.model_validate(client.post(f"{API}/requests", body))
        if not wait:
            terminal.result(sent, lambda: request_details(terminal, sent))
            return
        terminal.note(f"{sent.id} is sent; approve it with: medhive-admin approve {sent.id}")
        wait_for_request(terminal, client, sent.id)


def _ask_rounds(study: StudyAnswer) -> int:
    default = build_options(study.task, study.defaults, {}).rounds
    return int(click.prompt("Rounds", default=default, type=click.IntRange(1), err=True))


def ask_study(terminal: Terminal, client: GatewayClient, study: str | None) -> str:
    """The study that is meant: the one given, the only one, or the one that the person names."""
    if study is not None:
        return study
    names = [StudyAnswer.model_validate(row).name for row in client.get(f"{API}/studies")]
    if len(names) == 1:
        return names[0]
    return terminal.ask(None, "Study", "STUDY", names[0] if names and terminal.interactive else None, names)


def wait_for_request(terminal: Terminal, client: GatewayClient, request_id: str) -> None:
    """Follow a request to its decision and its run to the end, and print the run.

    Raises:
        RequestNotApproved: it was rejected or cancelled.
        RunUnsuccessful: the run ended without a new version.
    """
    decided = follow_request(ClientSource(client), open_source, request_id, lambda _value, text: terminal.note(text))
    if decided.state is not RequestState.APPROVED or decided.run_id is None:
        raise RequestNotApproved(f"{decided.id} is {decided.state}.", request=decided.id, reason=decided.reason)
    run = follow_run(ClientSource(client), open_source, decided.run_id, lambda _value, text: terminal.note(text))
    show_run(terminal, client, run)
    _require_completed(run)


def _require_completed(run: RunAnswer) -> None:
    if run.state is not RunState.COMPLETED:
        reason = f": {run.reason}" if run.reason else "."
        raise RunUnsuccessful(f"{run.id} is {run.state}{reason}", run=run.id, state=str(run.state), reason=run.reason)


def _rounds_of(client: GatewayClient, run_id: str) -> list[RoundAnswer]:
    return [RoundAnswer.model_validate(row) for row in client.get(f"{API}/runs/{run_id}/rounds")]


def show_run(terminal: Terminal, client: GatewayClient, run: RunAnswer) -> None:
    """Print one run with its rounds."""
    rounds = _rounds_of(client, run.id)
    value = {**run.model_dump(mode="json"), "rounds_done": [item.model_dump(mode="json") for item in rounds]}
    terminal.result(value, lambda: run_details(terminal, run, rounds))


@click.command(cls=Command)
@click.option("--study", help="Only this study's.")
@click.option("--state", type=click.Choice([str(state) for state in RequestState]), help="Only those in this state.")
@pass_terminal
def requests(terminal: Terminal, study: str | None, state: str | None) -> None:
    """List training requests, the newest last."""
    with connect() as client:
        found = fetch_requests(client)
    chosen = [item for item in found if study in (None, item.study) and state in (None, item.state)]
    terminal.result(chosen, lambda: requests_table(terminal, chosen))


def fetch_requests(client: GatewayClient) -> list[RequestAnswer]:
    """All requests that the caller may see, the oldest first."""
    found = [RequestAnswer.model_validate(row) for row in client.get(f"{API}/requests")]
    return sorted(found, key=lambda item: item.created_at)


@click.command(cls=Command)
@click.argument("request_id", metavar="REQ_n", required=False)
@click.option("--reason", default="", help="Why; the requester reads it.")
@click.option("--wait", is_flag=True, help="Follow the run to its end.")
@pass_terminal
def approve(terminal: Terminal, request_id: str | None, reason: str, wait: bool) -> None:
    """Approve a request; its run then asks every hospital of the study for consent."""
    with connect() as client:
        request_id = ask_pending(terminal, client, request_id)
        body = build(Reason, reason=reason)
        approved = RequestAnswer.model_validate(client.post(f"{API}/requests/{request_id}/approve", body))
        if not wait:
            text = f"{approved.id} is approved: {approved.run_id} asks the hospitals of {approved.study} for consent."
            terminal.result(approved, lambda: terminal.line(text))
            return
        terminal.note(f"{approved.id} is approved.")
        wait_for_request(terminal, client, approved.id)


def ask_pending(terminal: Terminal, client: GatewayClient, request_id: str | None) -> str:
    """The request that is meant: the one given, or the one that the person names among those that wait."""
    if request_id is not None or not terminal.interactive:
        return terminal.ask(request_id, "Request", "REQ_n")
    pending = [item for item in fetch_requests(client) if item.state is RequestState.PENDING]
    if not pending:
        raise InvalidInput("No request waits for a decision.")
    requests_table(terminal, pending)
    return terminal.ask(None, "Request", "REQ_n", pending[0].id, [item.id for item in pending])


@click.command(cls=Command)
@click.argument("request_id", metavar="REQ_n", required=False)
@click.option("--reason", help="Why; the requester reads it.")
@pass_terminal
def reject(terminal: Terminal, request_id: str | None, reason: str | None) -> None:
    """Reject a request, with a reason."""
    with connect() as client:
        request_id = ask_pending(terminal, client, request_id)
        reason = terminal.ask(reason, "Reason", "--reason")
        body = build(Reason, reason=reason)
        rejected = RequestAnswer.model_validate(client.post(f"{API}/requests/{request_id}/reject", body))
    terminal.result(rejected, lambda: terminal.line(f"{rejected.id} is rejected: {rejected.reason}"))


@click.command(cls=Command)
@click.option("--study", help="Only this study's.")
@click.option("--all", "everything", is_flag=True, help="Also those that have ended.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=DEFAULT_LIMIT, show_default=True, help="At most so many."
)
@pass_terminal
def runs(terminal: Terminal, study: str | None, everything: bool, limit: int) -> None:
    """List the active runs, or all."""
    with connect() as client:
        found = fetch_runs(client, study, limit)
    chosen = [item for item in found if everything or item.state not in FINAL_RUN_STATES]
    terminal.result(chosen, lambda: runs_table(terminal, chosen))


def fetch_runs(client: GatewayClient, study: str | None = None, limit: int = DEFAULT_LIMIT) -> list[RunAnswer]:
    """The newest runs, the oldest of them first."""
    found = [RunAnswer.model_validate(row) for row in client.get(f"{API}/runs", study=study, limit=limit)]
    return sorted(found, key=lambda item: item.created_at)


@click.command(cls=Command)
@click.option("--study", help="Only this study's.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=DEFAULT_LIMIT, show_default=True, help="At most so many."
)
@pass_terminal
def history(terminal: Terminal, study: str | None, limit: int) -> None:
    """List the runs that have ended."""
    with connect() as client:
        ended = [item for item in fetch_runs(client, study, limit) if item.state in FINAL_RUN_STATES]
    terminal.result(ended, lambda: runs_table(terminal, ended))


@click.command(cls=Command)
@click.argument("what", metavar="REQ_n|RUN_n|STUDY/n")
@click.option(
    "--csv", "table", type=click.Path(path_type=Path), metavar="FILE", help="Write a run's rounds there as CSV."
)
@pass_terminal
def show(terminal: Terminal, what: str, table: Path | None) -> None:
    """Show a request (REQ_n), a run (RUN_n) or a version (STUDY/n)."""
    if table is not None and not what.startswith("RUN_"):
        raise click.UsageError("--csv is of a run: RUN_n.")
    with connect() as client:
        if table is not None:
            _save_rounds(terminal, client, what, table)
        elif what.startswith("REQ_"):
            request = RequestAnswer.model_validate(client.get(f"{API}/requests/{what}"))
            terminal.result(request, lambda: request_details(terminal, request))
        elif what.startswith("RUN_"):
            show_run(terminal, client, RunAnswer.model_validate(client.get(f"{API}/runs/{what}")))
        else:
            study, _, number = what.rpartition("/")
            if not study or not number.isdecimal():
                raise click.UsageError(f"{what!r} is no REQ_n, RUN_n or STUDY/n.")
            version = VersionAnswer.model_validate(client.get(f"{API}/studies/{study}/versions/{number}"))
            terminal.result(version, lambda: version_details(terminal, version))


def _save_rounds(terminal: Terminal, client: GatewayClient, run_id: str, path: Path) -> None:
    run = RunAnswer.model_validate(client.get(f"{API}/runs/{run_id}"))
    path.write_text(rounds_csv(lines_of(_rounds_of(client, run_id), run.metrics)), "utf-8", newline="")
    terminal.result({"run": run_id, "file": str(path)}, lambda: terminal.line(f"The rounds of {run_id} are in {path}."))


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN_n")
@pass_terminal
def watch(terminal: Terminal, run_id: str) -> None:
    """Follow a run live, to its end: consents, epochs, rounds, who was dropped and why."""
    with connect() as client:
        _require_completed(follow_run(ClientSource(client), open_source, run_id, terminal.record, epochs=True))


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN_n")
@click.option("--reason", help="Why; everybody can read it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def stop(terminal: Terminal, run_id: str, reason: str | None, yes: bool) -> None:
    """Stop a run; what its rounds have made so far is not released."""
    reason = terminal.ask(reason, "Reason", "--reason", "")
    terminal.confirm(f"Stop {run_id}?", yes)
    with connect() as client:
        run = RunAnswer.model_validate(client.post(f"{API}/runs/{run_id}/stop", build(Reason, reason=reason)))
    text = f"{run.id} is {run.state}." if run.ended_at else f"{run.id} will stop in a moment."
    terminal.result(run, lambda: terminal.line(text))
