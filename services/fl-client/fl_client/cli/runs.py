"""Requests, consents and runs, as a hospital sees them."""

from datetime import timedelta
from typing import Any, Final

import click

from fl_client.cli.installation import open_site, open_source, signing_person
from fl_client.cli.queues import agree, queue_details
from fl_client.consents import DEFAULT_VALIDITY, DataCheck, OpenRun, Sent, check_data, grant, open_runs
from fl_client.consents import decline as decline_run
from fl_client.consents import withdraw as withdraw_consent
from fl_client.jobs import JobEvent, Reading
from fl_client.queues import DEFAULT_CONTRIBUTIONS, decline_queue, queue_by_id, unanswered_queues, withdraw_queue
from fl_client.requests import cancel_request, send_request
from fl_client.site import Site
from medhive.errors import InvalidInput, MedHiveError
from medhive.follow import follow_request, follow_run
from medhive.queues import QUEUE_PREFIX, QueueSpec
from medhive.spec import RunSpec, build_options
from medhive.states import RequestState, RunState
from medhive.terminal import Advance, Command, Terminal, chosen_options, moment, pass_terminal, run_options
from medhive.views import request_details, requests_table, run_details
from medhive.wire import RunAnswer, StudyAnswer

DEFAULT_DAYS: Final = DEFAULT_VALIDITY / timedelta(days=1)


class RunUnsuccessful(MedHiveError):
    """A run that was waited for ended without a new version, or was never approved."""

    code = "run-unsuccessful"


@click.command(cls=Command)
@click.argument("study", required=False)
@run_options
@click.option("--base-version", type=int, help="Version to start from [the newest].")
@click.option("--note", default="", help="A sentence for the coordinator.")
@click.option("--person", help="Who asks; stands in the consent that follows.")
@click.option("--wait", is_flag=True, help="Follow the request to its decision and the run to its end.")
@pass_terminal
def request(terminal: Terminal, /, study: str | None, person: str | None, wait: bool, **flags: Any) -> None:
    """Ask the coordinator for a training run of STUDY.

    When it is approved as asked, this hospital's running node agrees to it in your name.
    """
    base_version, note = flags.pop("base_version"), flags.pop("note")
    with open_site() as site:
        chosen = ask_study(terminal, site, study)
        if terminal.interactive and flags["rounds"] is None:
            flags["rounds"] = _ask_rounds(chosen)
        name = signing_person(terminal, site, person)
        options = chosen_options(flags)
        sent = send_request(site, chosen.name, options, person=name, note=note, base_version=base_version)
        if not wait:
            terminal.result(sent, lambda: request_details(terminal, sent))
            return
        terminal.note(f"{sent.id} is sent; the coordinator decides.")
        _wait(terminal, site, sent.id)


def _ask_rounds(study: StudyAnswer) -> int:
    default = build_options(study.task, study.defaults, {}).rounds
    return int(click.prompt("Rounds", default=default, type=click.IntRange(1), err=True))


def ask_study(terminal: Terminal, site: Site, name: str | None) -> StudyAnswer:
    """The study that is meant: the one given, the only one, or the one that the person names."""
    if name is not None:
        return site.gateway.study(name)
    studies = {study.name: study for study in site.gateway.studies()}
    if not studies:
        raise InvalidInput("This hospital is a member of no study yet; ask the coordinator.")
    if len(studies) == 1:
        return next(iter(studies.values()))
    proposed = next(iter(studies)) if terminal.interactive else None
    return studies[terminal.ask(None, "Study", "STUDY", proposed, list(studies))]


def _wait(terminal: Terminal, site: Site, request_id: str) -> None:
    def say(_value: Any, text: str) -> None:
        terminal.note(text)

    decided = follow_request(site.gateway, lambda: open_source(site), request_id, say)
    if decided.state is not RequestState.APPROVED or decided.run_id is None:
        raise RunUnsuccessful(f"{decided.id} is {decided.state}.", request=decided.id, reason=decided.reason)
    run = follow_run(site.gateway, lambda: open_source(site), decided.run_id, say)
    rounds = site.gateway.rounds(run.id)
    value = {**run.model_dump(mode="json"), "rounds_done": [item.model_dump(mode="json") for item in rounds]}
    terminal.result(value, lambda: run_details(terminal, run, rounds))
    if run.state is not RunState.COMPLETED:
        raise RunUnsuccessful(f"{run.id} is {run.state}: {run.reason}", run=run.id, state=str(run.state))


@click.command(cls=Command)
@pass_terminal
def requests(terminal: Terminal) -> None:
    """List the training requests of this hospital's studies, and the runs that wait for its consent."""
    with open_site() as site:
        found = sorted(site.gateway.requests(), key=lambda item: item.created_at)
        waiting = [item.run.id for item in open_runs(site)] + unanswered_queues(site)
    value = {"requests": [item.model_dump(mode="json") for item in found], "consent_asked": waiting}
    terminal.result(value, lambda: requests_table(terminal, found))
    if waiting:
        terminal.note(f"Waiting for your consent: {', '.join(waiting)}")


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN_n|QUEUE_n", required=False)
@click.option("--person", help="Who agrees; stands under the signature.")
@click.option("--days", type=float, default=DEFAULT_DAYS, show_default=True, help="Days that the consent is valid.")
@click.option(
    "--contributions",
    type=int,
    default=DEFAULT_CONTRIBUTIONS,
    show_default=True,
    help="Queues: how many contributions it covers.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def consent(terminal: Terminal, /, run_id: str | None, person: str | None, **given: Any) -> None:
    """Agree to a run or a contribution queue: shows it, checks this hospital's data, and signs.

    What is sent says of the data only counts by reason and a keyed fingerprint.
    """
    days, yes = given["days"], given["yes"]
    with open_site() as site:
        if run_id is not None and run_id.startswith(QUEUE_PREFIX):
            _consent_to_queue(terminal, site, run_id, person, given)
            return
        run = _ask_open_run(terminal, site, run_id)
        if not terminal.json:
            run_details(terminal, run)
        name = signing_person(terminal, site, person)
        check = _check(terminal, site, run.spec)
        if not terminal.json:
            _show_check(terminal, check)
        terminal.confirm(f"Agree to {run.id} in the name of {site.name}?", yes)
        sent = grant(site, run, person=name, check=check, valid_for=timedelta(days=days))
    until = moment(sent.consent.body.expires_at) if sent.consent else ""
    value = {"run": run.id, "consent": "granted", "delivered": sent.delivered, "until": until, "check": vars(check)}
    terminal.result(value, lambda: terminal.line(_sent_line(f"Agreed to {run.id} until {until}", sent)))


def _sent_line(done: str, sent: Sent) -> str:
    return f"{done}." if sent.delivered else f"{done}; the coordinator does not answer, the running node delivers it."


def _ask_open_run(terminal: Terminal, site: Site, run_id: str | None) -> RunAnswer:
    """The run that is meant: the one given, the only one that waits, or the one that the person names."""
    if run_id is not None:
        return site.gateway.run(run_id)
    waiting: list[OpenRun] = open_runs(site)
    if not waiting:
        raise InvalidInput("No run waits for this hospital's consent.")
    runs = {item.run.id: item.run for item in waiting}
    if len(runs) == 1 and terminal.interactive:
        return waiting[0].run
    proposed = next(iter(runs)) if terminal.interactive else None
    return runs[terminal.ask(None, "Run", "RUN_n", proposed, list(runs))]


def _consent_to_queue(terminal: Terminal, site: Site, queue_id: str, person: str | None, given: dict[str, Any]) -> None:
    queue = queue_by_id(site, queue_id)
    if not terminal.json:
        queue_details(terminal, queue)
    name = signing_person(terminal, site, person)
    check = _check(terminal, site, queue.spec)
    if not terminal.json:
        _show_check(terminal, check)
    terminal.confirm(f"Agree to {queue.id} in the name of {site.name}?", given["yes"])
    agree(terminal, site, queue, person=name, check=check, days=given["days"], contributions=given["contributions"])


def _check(terminal: Terminal, site: Site, spec: RunSpec | QueueSpec) -> DataCheck:
    with terminal.progress("reading the data") as advance, site.trainer() as trainer:
        return check_data(site, trainer, spec, reading_listener(advance))


def reading_listener(advance: Advance) -> Any:
    """Hear of the trainer's reading, and move a bar."""

    def listen(event: JobEvent) -> None:
        if isinstance(event, Reading):
            advance(event.done, event.total)

    return listen


def _show_check(terminal: Terminal, check: DataCheck) -> None:
    terminal.line()
    terminal.table(["class", "examples>"], [*check.classes.items(), ("all", check.examples)])
    if check.skipped:
        terminal.line("not used: " + ", ".join(f"{reason} {count}" for reason, count in check.skipped.items()))
    terminal.line()


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN_n|QUEUE_n", required=False)
@click.option("--reason", help="Why; the coordinator reads it.")
@click.option("--person", help="Who declines.")
@pass_terminal
def decline(terminal: Terminal, run_id: str | None, reason: str | None, person: str | None) -> None:
    """Decline a run or a queue."""
    with open_site() as site:
        if run_id is not None and run_id.startswith(QUEUE_PREFIX):
            queue = queue_by_id(site, run_id)
            reason = terminal.ask(reason, "Reason", "--reason", "")
            decline_queue(site, queue, person=signing_person(terminal, site, person), reason=reason)
            said = {"queue": queue.id, "consent": "declined"}
            terminal.result(said, lambda: terminal.line(f"Declined {queue.id}."))
            return
        run = _ask_open_run(terminal, site, run_id)
        reason = terminal.ask(reason, "Reason", "--reason", "")
        sent = decline_run(site, run, person=signing_person(terminal, site, person), reason=reason)
    value = {"run": run.id, "consent": "declined", "delivered": sent.delivered}
    terminal.result(value, lambda: terminal.line(_sent_line(f"Declined {run.id}", sent)))


@click.command(cls=Command)
@click.argument("run_id", metavar="RUN_n|QUEUE_n")
@click.option("--reason", help="Why; the coordinator reads it.")
@click.option("--person", help="Who withdraws.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def withdraw(terminal: Terminal, run_id: str, reason: str | None, person: str | None, yes: bool) -> None:
    """Withdraw the consent to a run or a queue; training here stops at once, and they go on without this hospital."""
    with open_site() as site:
        reason = terminal.ask(reason, "Reason", "--reason", "")
        name = signing_person(terminal, site, person)
        terminal.confirm(f"Withdraw from {run_id} for good?", yes)
        if run_id.startswith(QUEUE_PREFIX):
            sent = Sent(withdraw_queue(site, run_id, person=name, reason=reason))
        else:
            sent = withdraw_consent(site, run_id, person=name, reason=reason)
    value = {"run": run_id, "consent": "withdrawn", "delivered": sent.delivered}
    terminal.result(value, lambda: terminal.line(_sent_line(f"Withdrew from {run_id}", sent)))


@click.command(cls=Command)
@click.argument("request_id", metavar="REQ_n")
@click.option("--reason", help="Why; the coordinator reads it.")
@pass_terminal
def cancel(terminal: Terminal, request_id: str, reason: str | None) -> None:
    """Cancel an own request that is not decided yet."""
    with open_site() as site:
        reason = terminal.ask(reason, "Reason", "--reason", "")
        cancelled = cancel_request(site, request_id, reason)
    terminal.result(cancelled, lambda: terminal.line(f"{cancelled.id} is {cancelled.state}."))
