"""Runs, from approval to their end, and the hospitals' consents to them.

Nothing here waits: whether a run has become ready or has expired is decided whenever an answer comes in, and for deadlines
by `settle_due`, which every look at the runs and a periodic task call; the writing unit's lock makes it safe to call it
from several gateways at once.
"""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, func, or_, select

from api_gateway.events import Kind
from api_gateway.models import (
    ActivityRow,
    ConsentDocument,
    ConsentRow,
    Member,
    Round,
    Run,
    Site,
    TrainingRequest,
    Version,
)
from api_gateway.work import Gateway, Work, transition
from medhive.consent import Consent, check_consent
from medhive.curves import lines_of, rounds_csv
from medhive.errors import BadSignature, Conflict, InvalidInput, NotAllowed, NotFound
from medhive.spec import Privacy, RunSpec
from medhive.states import (
    CONSENT_TRANSITIONS,
    FINAL_RUN_STATES,
    RUN_TRANSITIONS,
    Activity,
    ConsentState,
    Role,
    RoundState,
    RunState,
    require_transition,
)
from medhive.wire import (
    ActivityAnswer,
    ActivityReport,
    ConsentAnswer,
    RoundAnswer,
    RunAnswer,
    SiteRound,
)

MAX_NUMBER = 2**31 - 1  # what the database's integers hold; numbers of rounds and versions stay far below

ENDED: dict[RunState, Kind] = {
    RunState.READY: Kind.RUN_READY,
    RunState.RUNNING: Kind.RUN_STARTED,
    RunState.COMPLETED: Kind.RUN_COMPLETED,
    RunState.FAILED: Kind.RUN_FAILED,
    RunState.CANCELLED: Kind.RUN_CANCELLED,
    RunState.EXPIRED: Kind.RUN_EXPIRED,
}
ANSWERED: dict[ConsentState, Kind] = {
    ConsentState.GRANTED: Kind.CONSENT_GRANTED,
    ConsentState.DECLINED: Kind.CONSENT_DECLINED,
    ConsentState.WITHDRAWN: Kind.CONSENT_WITHDRAWN,
}


# ---- beginning and moving on ---------------------------------------------------------------------------------------


def create(work: Work, request: TrainingRequest, spec: RunSpec) -> Run:
    """Make the run of an approved request and ask every site of its study that has joined."""
    run = Run(
        request_id=request.id,
        study=spec.study,
        state=RunState.CONSENTING,
        spec=request.spec,
        spec_hash=request.spec_hash,
        round=0,
        created_at=work.now,
        consent_deadline=work.now + timedelta(seconds=spec.options.consent_deadline_s),
        reason="",
        stop_requested=False,
        updated_at=work.now,
        fence=0,
    )
    work.session.add(run)
    work.session.flush()
    for site in work.active_members(spec.study):
        work.session.add(ConsentRow(run_id=run.id, site=site.name, state=ConsentState.PENDING))
    work.session.flush()
    record(work, run, Kind.RUN_CREATED, request=f"REQ_{request.id}", spec_hash=run.spec_hash)
    return run


def record(work: Work, run: Run, kind: Kind, site: str | None = None, **data: Any) -> None:
    """Append an event about a run, or about one site in it, and note that the run has changed."""
    subject = f"site {site}" if site else f"RUN_{run.id}"
    work.record(kind, subject, study=run.study, run_id=f"RUN_{run.id}", site=site, **data)
    run.updated_at = work.now


def move(work: Work, run: Run, state: RunState, reason: str = "", **data: Any) -> None:
    """Bring a run into another state.

    Raises:
        IllegalTransition: there is no such step, or somebody else was first.
    """
    require_transition(RUN_TRANSITIONS, RunState(run.state), state, f"RUN_{run.id}")
    transition(work.session, Run.state, run, state)
    if state in FINAL_RUN_STATES:
        run.ended_at, run.reason = work.now, reason
        run.holder = run.lease_expires_at = None
    record(work, run, ENDED[state], reason=reason or None, **data)


def settle(work: Work, run: Run) -> None:
    """Make a consenting run ready or expired, if its consents or its deadline say so."""
    if run.state != RunState.CONSENTING:
        return
    work.session.flush()
    query = select(ConsentRow.state, Site.evaluates_only).join(Site, Site.name == ConsentRow.site)
    states = list(work.session.execute(query.where(ConsentRow.run_id == run.id)))
    pending = sum(state == ConsentState.PENDING for state, _ in states)
    granted = sum(state == ConsentState.GRANTED and not evaluates_only for state, evaluates_only in states)
    overdue = run.consent_deadline <= work.now
    if pending and not overdue:
        return
    needed = RunSpec.model_validate(run.spec).options.min_sites
    if granted >= needed:
        move(work, run, RunState.READY, consents=granted)
    else:
        cause = "the consent deadline passed" if pending else "all sites have answered"
        move(work, run, RunState.EXPIRED, f"{cause}; {granted} consented, {needed} are needed")


def settle_due(gateway: Gateway) -> None:
    """Settle the runs whose consent deadline has passed."""
    with gateway.database.read() as session:
        if session.scalar(_due(gateway.clock()).limit(1)) is None:
            return
    with gateway.system_write() as work:
        for number in work.session.scalars(_due(work.now)).all():
            settle(work, work.session.get_one(Run, number))


def _due(now: datetime) -> Select[int]:
    return select(Run.id).where(Run.state == RunState.CONSENTING, Run.consent_deadline <= now).order_by(Run.id)


def stop(work: Work, number: int, reason: str) -> RunAnswer:
    """Stop a run: at once before it runs, else at the aggregator's next step.

    Raises:
        IllegalTransition: it is over.
    """
    run = get(work, number)
    if run.state == RunState.RUNNING:
        if not run.stop_requested:
            run.stop_requested, run.reason = True, reason
            record(work, run, Kind.RUN_STOP_REQUESTED, reason=reason)
    else:
        move(work, run, RunState.CANCELLED, reason or "stopped by an admin")
    return to_answer(work, run)


# ---- consents ------------------------------------------------------------------------------------------------------


def answer_consent(work: Work, number: int, consent: Consent) -> ConsentAnswer:
    """Take a hospital's signed yes or no.

    Raises:
        BadSignature: another key, run, specification, site or coordinator, or a nonce that was used before.
        Expired: outside its validity.
        InvalidInput: too few rounds, no sensible validity, a limit on privacy that nobody would keep, a withdrawal.
        Conflict: the run no longer waits for consents.
        IllegalTransition: this hospital has answered.
    """
    settled, run = consent.body, get(work, number)
    if settled.decision == "withdrawn":
        raise InvalidInput("A withdrawal goes to /withdraw, after a consent.")
    if run.state != RunState.CONSENTING:
        raise Conflict(f"RUN_{number} is {run.state}; it no longer waits for consents.", state=run.state)
    return _take(work, run, consent, ConsentState(settled.decision))


def withdraw(work: Work, number: int, consent: Consent) -> ConsentAnswer:
    """Take a hospital's consent back, at any time before the run is over; raises as `answer_consent`."""
    run = get(work, number)
    if consent.body.decision != "withdrawn":
        raise InvalidInput("Only a statement with the decision `withdrawn` takes a consent back.")
    if run.state in FINAL_RUN_STATES:
        raise Conflict(f"RUN_{number} is over ({run.state}); there is nothing to withdraw from.", state=run.state)
    return _take(work, run, consent, ConsentState.WITHDRAWN)


def _take(work: Work, run: Run, consent: Consent, state: ConsentState) -> ConsentAnswer:
    site = work.own_site()
    _check(work, run, consent, site)
    row = work.session.get(ConsentRow, (run.id, site))
    if row is None:
        raise NotAllowed(f"Site {site} was not asked for RUN_{run.id}.", site=site)
    _keep_document(work, run, consent, site)
    row.document = consent.model_dump(mode="json")
    body = consent.body
    facts = {"person": body.person, "expires_at": body.expires_at.isoformat(), "max_rounds": body.max_rounds}
    settle_consent(work, run, row, state, body.reason, **facts)
    return consent_answer(work, row)


def _check(work: Work, run: Run, consent: Consent, site: str) -> None:
    check_consent(
        consent,
        work.consent_key(site),
        site=site,
        run_id=f"RUN_{run.id}",
        spec_hash=run.spec_hash,
        rounds=RunSpec.model_validate(run.spec).options.rounds,
        coordinator_key_ids=work.gateway.key_ids,
        now=work.now,
    )
    if consent.body.privacy_limits != Privacy():
        raise InvalidInput("This version trains without differential privacy: it cannot keep the consent's limits.")


def _keep_document(work: Work, run: Run, consent: Consent, site: str) -> None:
    nonce = consent.body.nonce
    used = select(ConsentDocument.id).where(ConsentDocument.site == site, ConsentDocument.nonce == nonce)
    if work.session.scalar(used) is not None:
        raise BadSignature("This statement was used already; sign a new one.", site=site)
    document = consent.model_dump(mode="json")
    row = ConsentDocument(run_id=run.id, site=site, nonce=nonce, document=document, received_at=work.now)
    work.session.add(row)


def settle_consent(work: Work, run: Run, row: ConsentRow, state: ConsentState, reason: str = "", **data: Any) -> None:
    """Change one site's standing in a run, and the run with it when it was the last to answer.

    Raises:
        IllegalTransition: the site cannot say this now.
    """
    require_transition(CONSENT_TRANSITIONS, ConsentState(row.state), state, f"The consent of {row.site}")
    transition(work.session, ConsentRow.state, row, state)
    row.answered_at = work.now
    record(work, run, ANSWERED[state], site=row.site, reason=reason or None, **data)
    settle(work, run)


def consents(work: Work, number: int) -> list[ConsentAnswer]:
    """The sites' standing in a run; a hospital sees its own."""
    return [consent_answer(work, row) for row in _consent_rows(work, get(work, number))]


def _consent_rows(work: Work, run: Run) -> list[ConsentRow]:
    query = select(ConsentRow).where(ConsentRow.run_id == run.id).order_by(ConsentRow.site)
    if not work.caller.sees_all:
        query = query.where(ConsentRow.site == work.own_site())
    return list(work.session.scalars(query))


def consent_answer(work: Work, row: ConsentRow) -> ConsentAnswer:
    """One site's standing, with the document and the key that vouches for it."""
    return ConsentAnswer(
        site=row.site,
        state=ConsentState(row.state),
        evaluates_only=_evaluates_only(work, row),
        consent=Consent.model_validate(row.document) if row.document else None,
        consent_public_key=work.consent_key(row.site).text,
        answered_at=row.answered_at,
    )


# ---- looking -------------------------------------------------------------------------------------------------------


def get(work: Work, number: int) -> Run:
    """A run that the caller may see: a hospital those of its studies, and those that it was asked for.

    Raises:
        NotFound: there is none.
    """
    run = work.session.get(Run, number)
    if run is None or not _sees(work, run):
        raise NotFound(f"There is no run RUN_{number}.", run_id=f"RUN_{number}")
    return run


def _sees(work: Work, run: Run) -> bool:
    site = work.caller.site
    return work.caller.sees_all or work.is_member(run.study, site) or _asked(work, run, site)


def _asked(work: Work, run: Run, site: str | None) -> bool:
    return site is not None and work.session.get(ConsentRow, (run.id, site)) is not None


def listed(
    work: Work, study: str | None, state: RunState | None, changed_after: datetime | None, limit: int
) -> list[RunAnswer]:
    """The runs that the caller may see: newest first, or the changed ones in the order of their change."""
    query = select(Run).limit(limit)
    query = query.order_by(Run.updated_at, Run.id) if changed_after else query.order_by(Run.id.desc())
    if changed_after is not None:
        query = query.where(Run.updated_at > changed_after)
    if study is not None:
        query = query.where(Run.study == study)
    if state is not None:
        query = query.where(Run.state == state)
    if not work.caller.sees_all:
        own = work.own_site()
        mine = select(Member.study).where(Member.site == own)
        asked = select(ConsentRow.run_id).where(ConsentRow.site == own)
        query = query.where(or_(Run.study.in_(mine), Run.id.in_(asked)))
    return [to_answer(work, run, brief=True) for run in work.session.scalars(query)]


def to_answer(work: Work, run: Run, *, brief: bool = False) -> RunAnswer:
    """The run on the wire; `brief` leaves out the consents' documents and who does what right now."""
    request = work.session.get_one(TrainingRequest, run.request_id)
    rows = _consent_rows(work, run)
    spec = RunSpec.model_validate(run.spec)
    return RunAnswer(
        id=f"RUN_{run.id}",
        request_id=f"REQ_{run.request_id}",
        study=run.study,
        state=RunState(run.state),
        spec=spec,
        spec_hash=run.spec_hash,
        round=run.round,
        rounds=spec.options.rounds,
        created_at=run.created_at,
        consent_deadline=run.consent_deadline,
        started_at=run.started_at,
        ended_at=run.ended_at,
        reason=run.reason,
        stop_requested=run.stop_requested,
        requested_by=request.requested_by,
        request_site=request.site,
        base_digest=base_digest(work, run),
        version=run.version,
        mlflow_run_id=run.mlflow_run_id,
        updated_at=run.updated_at,
        consents=tuple(_brief(work, row) if brief else consent_answer(work, row) for row in rows),
        activity=() if brief else tuple(activities(work, run)),
        **({} if brief else _ending(work, run)),
    )


def _ending(work: Work, run: Run) -> dict[str, Any]:
    """What the sites said of the final weights; a hospital sees the global figures and its own."""
    if run.end_report is None:
        return {}
    # A report of an older version knows nothing of evaluators.
    end = {name: run.end_report.get(name, []) for name in ("metrics", "confusion", "sites", "evaluators")}
    if not work.caller.sees_all:
        for name in ("sites", "evaluators"):
            end[name] = [site for site in end[name] if site["site"] == work.caller.site]
    return end


def _brief(work: Work, row: ConsentRow) -> ConsentAnswer:
    return ConsentAnswer(
        site=row.site,
        state=ConsentState(row.state),
        evaluates_only=_evaluates_only(work, row),
        answered_at=row.answered_at,
    )


def _evaluates_only(work: Work, row: ConsentRow) -> bool:
    return work.session.get_one(Site, row.site).evaluates_only


def base_digest(work: Work, run: Run) -> str | None:
    """The digest of the weights that a run starts from; None while the study has no version 0."""
    query = select(Version.digest).where(Version.study == run.study, Version.number == run.spec["base_version"])
    return work.session.scalar(query)


def rounds(work: Work, number: int) -> list[RoundAnswer]:
    """A run's rounds in order; a hospital sees the global figures and its own."""
    run = get(work, number)
    rows = work.session.scalars(select(Round).where(Round.run_id == run.id).order_by(Round.number))
    return [_round_answer(work, row) for row in rows]


def table_of_rounds(work: Work, number: int) -> str:
    """The same as CSV. Of figures that all sites made together: for callers who see all of them."""
    return rounds_csv(lines_of(rounds(work, number), to_answer(work, get(work, number)).metrics))


def _round_answer(work: Work, row: Round) -> RoundAnswer:
    answer = RoundAnswer.model_validate({**row.report, "number": row.number})
    if work.caller.sees_all:
        return answer
    own = {
        "sites": tuple(site for site in answer.sites if site.site == work.caller.site),
        "evaluators": tuple(site for site in answer.evaluators if site.site == work.caller.site),
        "refusals": tuple(refusal for refusal in answer.refusals if refusal.site == work.caller.site),
    }
    return answer.model_copy(update=own)


def last_closed_sites(work: Work, run: Run) -> tuple[SiteRound, ...]:
    """What the sites gave to the last round that was closed."""
    query = select(Round).where(Round.run_id == run.id, Round.state == RoundState.CLOSED, Round.number > 0)
    row = work.session.scalar(query.order_by(Round.number.desc()).limit(1))
    return tuple(SiteRound.model_validate(site) for site in row.report["sites"]) if row else ()


# ---- who does what right now ---------------------------------------------------------------------------------------


def report_activity(work: Work, number: int, body: ActivityReport) -> None:
    """Keep what a consenting site does; volatile, no event.

    Raises:
        NotAllowed: the site has not consented to this run.
        Conflict: the run is over.
    """
    run, site = get(work, number), work.own_site()
    consent = work.session.get(ConsentRow, (run.id, site))
    if consent is None or consent.state != ConsentState.GRANTED:
        raise NotAllowed(f"Site {site} has no consent to RUN_{number}.", site=site)
    if run.state in FINAL_RUN_STATES:
        raise Conflict(f"RUN_{number} is over ({run.state}).", state=run.state)
    if body.round > RunSpec.model_validate(run.spec).options.rounds:
        raise InvalidInput(f"RUN_{number} has no round {body.round}.", round=body.round)
    row = work.session.get(ActivityRow, (run.id, site)) or ActivityRow(run_id=run.id, site=site, round=-1)
    if row.round != body.round:
        row.started_at = None
    if row.started_at is None and body.activity is Activity.TRAINING:
        row.started_at = work.now
    row.round, row.updated_at, row.report = body.round, work.now, body.model_dump(mode="json")
    work.session.add(row)


def activities(work: Work, run: Run) -> list[ActivityAnswer]:
    """Who does what in a run; a hospital sees itself."""
    query = select(ActivityRow).where(ActivityRow.run_id == run.id).order_by(ActivityRow.site)
    if work.caller.role is Role.SITE:
        query = query.where(ActivityRow.site == work.own_site())
    return [
        ActivityAnswer.model_validate(
            {**row.report, "site": row.site, "started_at": row.started_at, "updated_at": row.updated_at}
        )
        for row in work.session.scalars(query)
    ]


def counts(work: Work) -> dict[str, int]:
    """How many runs are in which state."""
    rows = work.session.execute(select(Run.state, func.count()).group_by(Run.state)).all()
    return dict(rows)
