"""The aggregator's side: it leases runs, reports what happens in them, and ends them.

A lease has a fence, a number that grows with each holder. Every report carries it, so that an aggregator that was thought
dead and comes back cannot speak for a run that another has taken up.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import or_, select, update

from api_gateway import blobs, runs, versions
from api_gateway.events import Kind
from api_gateway.models import ConsentRow, Round, Run
from api_gateway.work import Work
from medhive.errors import Conflict, IllegalTransition, InvalidInput
from medhive.spec import RunSpec
from medhive.states import FINAL_RUN_STATES, RoundState, RunState
from medhive.wire import Lease, LeaseRequest, Refusal, RoundReport, RunAnswer, RunEnd, VersionAnswer, VersionZero

MAX_FIGURE = 2**53  # of bytes in a round: what JSON carries exactly
OPEN_TO_LEASE = (RunState.READY, RunState.RUNNING)


def lease(work: Work, body: LeaseRequest) -> Lease | None:
    """Give the oldest run that is ready, or whose holder has died, to this holder; None when there is none."""
    free = or_(Run.lease_expires_at.is_(None), Run.lease_expires_at <= work.now)
    run = work.session.scalar(select(Run).where(Run.state.in_(OPEN_TO_LEASE), free).order_by(Run.id).limit(1))
    if run is None:
        return None
    run.fence += 1
    run.holder = body.holder
    expires = run.lease_expires_at = work.now + timedelta(seconds=work.gateway.settings.lease_s)
    runs.record(work, run, Kind.RUN_LEASED, fence=run.fence)
    return Lease(run_id=f"RUN_{run.id}", fence=run.fence, expires_at=expires)


def heartbeat(work: Work, number: int, fence: int) -> RunAnswer:
    """Keep a lease alive; the answer says what the aggregator needs to know: stop, consents, who trains since when.

    Raises:
        Conflict: another holder has the run.
    """
    run = _fenced(work, number, fence)
    if run.state not in FINAL_RUN_STATES:
        expires = work.now + timedelta(seconds=work.gateway.settings.lease_s)
        # This unit holds no lock but the row's: a lease given to another in the same moment must win.
        statement = update(Run).where(Run.id == number, Run.fence == fence, Run.state.not_in(FINAL_RUN_STATES))
        work.session.execute(statement.values(lease_expires_at=expires).execution_options(synchronize_session=False))
        work.session.refresh(run)
        _require_fence(run, fence)
    return runs.to_answer(work, run)


def start(work: Work, number: int, fence: int) -> RunAnswer:
    """The run begins; for a holder that has taken it up in the middle nothing changes.

    Raises:
        IllegalTransition: it was cancelled in the meantime.
        Conflict: another holder has the run.
    """
    run = _fenced(work, number, fence)
    if run.state != RunState.RUNNING:
        run.started_at = work.now
        runs.move(work, run, RunState.RUNNING)
    return runs.to_answer(work, run)


def _fenced(work: Work, number: int, fence: int) -> Run:
    run = runs.get(work, number)
    _require_fence(run, fence)
    return run


def _require_fence(run: Run, fence: int) -> None:
    if run.fence != fence:
        raise Conflict(
            f"The lease on RUN_{run.id} with fence {fence} is over; the present fence is {run.fence}.",
            cause="stale-fence",
            fence=run.fence,
        )


def _running(work: Work, number: int, fence: int) -> Run:
    run = _fenced(work, number, fence)
    if run.state != RunState.RUNNING:
        raise IllegalTransition(f"RUN_{number} is {run.state}, not running.", old=run.state, new=run.state)
    return run


# ---- rounds --------------------------------------------------------------------------------------------------------


def report_round(work: Work, number: int, round_number: int, body: RoundReport) -> RunAnswer:
    """Keep a round's report. It may be sent again; once closed, only the same.

    Raises:
        Conflict: another report of a closed round, or another holder.
        InvalidInput: a round or site that the run does not have, or a figure out of range.
        NotFound: the digest is no blob of this run.
    """
    run = _running(work, number, body.fence)
    _check_report(work, run, round_number, body)
    report = body.model_dump(mode="json", exclude={"fence"})
    row = work.session.get(Round, (run.id, round_number))
    if row is not None and row.state != RoundState.OPEN:
        # Read, not compared as it lies there: an older version may have kept it, without what came later.
        if RoundReport.model_validate({**row.report, "fence": body.fence}) != body:
            raise Conflict(f"Round {round_number} of RUN_{run.id} is {row.state}; another report of it comes too late.")
        return runs.to_answer(work, run)
    known = row is not None
    row = row or Round(run_id=run.id, number=round_number)
    row.state, row.opened_at, row.report = body.state, body.opened_at, report
    row.bytes_down, row.bytes_up = body.bytes_down, body.bytes_up
    work.session.add(row)
    run.round = max(run.round, round_number)
    _record_round(work, run, round_number, body, known)
    if body.state is RoundState.CLOSED:
        blobs.forget_old_rounds(work, run, round_number)
    return runs.to_answer(work, run)


def _check_report(work: Work, run: Run, round_number: int, body: RoundReport) -> None:
    rounds = RunSpec.model_validate(run.spec).options.rounds
    if round_number > rounds:
        raise InvalidInput(f"RUN_{run.id} has {rounds} rounds, not {round_number}.", round=round_number)
    if not (0 <= body.bytes_down <= MAX_FIGURE and 0 <= body.bytes_up <= MAX_FIGURE):
        raise InvalidInput("The bytes of a round are out of range.")
    named = {item.site for item in (*body.sites, *body.evaluators)}
    _require_asked(work, run, named | {refusal.site for refusal in body.refusals})
    if body.weights_digest:
        blobs.make_global(work, run, body.weights_digest)


def _require_asked(work: Work, run: Run, sites: set[str]) -> None:
    asked = set(work.session.scalars(select(ConsentRow.site).where(ConsentRow.run_id == run.id)))
    strangers = sorted(sites - asked)
    if strangers:
        raise InvalidInput(f"Site {strangers[0][:80]} is not part of RUN_{run.id}.")


def _record_round(work: Work, run: Run, round_number: int, body: RoundReport, known: bool) -> None:
    if body.state is RoundState.OPEN:
        if not known:
            runs.record(work, run, Kind.ROUND_OPENED, round=round_number)
        run.updated_at = work.now
        return
    _record_refusals(work, run, round_number, body.refusals)
    for site in (*body.sites, *body.evaluators):
        if site.dropped:
            runs.record(work, run, Kind.SITE_DROPPED, site=site.site, round=round_number, reason=site.dropped)
    kind = Kind.ROUND_CLOSED if body.state is RoundState.CLOSED else Kind.ROUND_FAILED
    answered = sum(site.answered and not site.dropped for site in body.sites)
    facts: dict[str, Any] = {"answered": answered, "addressed": len(body.sites), "seconds": body.seconds}
    shown = {name: body.metrics[name] for name in ("val_accuracy", "val_loss", "test_accuracy") if name in body.metrics}
    runs.record(work, run, kind, round=round_number, metrics=shown, **facts)


def _record_refusals(work: Work, run: Run, round_number: int, refusals: tuple[Refusal, ...]) -> None:
    """The code alone: a reason's text may repeat what a stranger wrote."""
    for refusal in refusals:
        runs.record(
            work, run, Kind.CONTRIBUTION_REFUSED, site=refusal.site, round=round_number, reason_code=refusal.code
        )


# ---- versions and the end ------------------------------------------------------------------------------------------


def version_zero(work: Work, number: int, body: VersionZero) -> VersionAnswer:
    """Register the study's initial weights; the same digest may come again, from any run.

    Raises:
        Conflict: the study has another version 0.
        NotFound: the digest is no blob of this run.
    """
    run = _running(work, number, body.fence)
    if versions.same_zero(work, run.study, body.digest):
        return versions.to_answer(work, versions.get(work, run.study, 0))
    blobs.make_global(work, run, body.digest)
    content = versions.Content(body.digest, statistics=body.statistics)
    version = versions.create(work, versions.of_run(run, 0), 0, content)
    run.updated_at = work.now
    return versions.to_answer(work, version)


def end(work: Work, number: int, body: RunEnd) -> RunAnswer:
    """End a run; a completed one makes the study's next version. The same end may be reported again.

    Raises:
        InvalidInput: completed without a digest, or a site that the run does not have.
        NotFound: the digest is no blob of this run.
        IllegalTransition: the run is over in another way.
    """
    run = _fenced(work, number, body.fence)
    state = RunState(body.state)
    if run.state in FINAL_RUN_STATES and run.state == state and run.end_report == _end_report(body):
        return runs.to_answer(work, run)
    reason = body.reason or (run.reason if run.stop_requested else "")
    _require_asked(work, run, {refusal.site for refusal in body.refusals})
    _record_refusals(work, run, run.round, body.refusals)
    if state is RunState.COMPLETED:
        _release(work, run, body)
    run.end_report = _end_report(body)
    runs.move(work, run, state, reason, version=run.version)
    return runs.to_answer(work, run)


def _end_report(body: RunEnd) -> dict[str, object]:
    # What was refused is in the log; a report that is made anew after a crash does not know it any more.
    return body.model_dump(mode="json", exclude={"fence", "refusals"})


def _release(work: Work, run: Run, body: RunEnd) -> None:
    if body.digest is None:
        raise InvalidInput("A completed run needs the digest of its final weights.")
    if run.state != RunState.RUNNING:
        raise IllegalTransition(f"RUN_{run.id} is {run.state}, not running.", old=run.state, new=body.state)
    blobs.make_global(work, run, body.digest)
    number = versions.next_number(work, run.study)
    sites = body.sites or runs.last_closed_sites(work, run)
    content = versions.Content(body.digest, body.metrics, body.confusion, sites, body.statistics)
    version = versions.create(work, versions.of_run(run, number), number, content)
    run.version = version.number
    versions.make_candidate(work, version)


def tracked(work: Work, number: int, mlflow_run_id: str) -> RunAnswer:
    """Keep where the tracking server shows this run."""
    run = runs.get(work, number)
    if run.mlflow_run_id != mlflow_run_id:
        run.mlflow_run_id = mlflow_run_id
        runs.record(work, run, Kind.RUN_TRACKED, mlflow_run_id=mlflow_run_id)
    return runs.to_answer(work, run)
