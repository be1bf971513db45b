"""Contribution queues: opened by an admin, consented to by hospitals, looked at by anybody, cleared with a reason.

A queue outlives a run: hospitals come and go, consents expire and are given anew, so that the newest statement that a site
signed counts. Another specification is another queue with other consents. What waits in it is in `contributions`, how it is
averaged in `executions`.
"""

from datetime import timedelta

from sqlalchemy import func, select

from api_gateway import versions
from api_gateway.events import Kind
from api_gateway.models import ContributionRow, Execution, Member, Queue, QueueConsent, Site
from api_gateway.runs import ANSWERED
from api_gateway.work import Work, transition
from medhive.consent import Consent, ConsentBody
from medhive.errors import BadSignature, Conflict, InvalidInput, MedHiveError, NotAllowed, NotFound
from medhive.queues import (
    CONTRIBUTION_TRANSITIONS,
    IN_THE_QUEUE,
    QUEUE_PREFIX,
    ContributionState,
    ExecutionState,
    QueueAnswer,
    QueueConsentAnswer,
    QueueOptions,
    QueueSpec,
    QueueStatus,
    WaitingSite,
    check_queue_consent,
    queue_state,
)
from medhive.spec import Privacy, StudyData
from medhive.states import ConsentState, SiteState, require_transition

TABLE_TASK = "tabular"
CONNECTED_WITHIN = timedelta(minutes=2)  # four times as often as a site's sign of life is kept


def name_of(queue: Queue) -> str:
    """QUEUE_n."""
    return f"{QUEUE_PREFIX}{queue.id}"


def spec_of(queue: Queue) -> QueueSpec:
    """What the hospitals consent to."""
    return QueueSpec.model_validate(queue.spec)


def record(work: Work, queue: Queue, kind: Kind, site: str | None = None, **data: object) -> None:
    """Append an event about a queue, or about one site in it."""
    subject = f"site {site}" if site else name_of(queue)
    work.record(kind, subject, study=queue.study, run_id=name_of(queue), site=site, **data)


# ---- opening and closing -------------------------------------------------------------------------------------------


def open_queue(work: Work, study: str, options: QueueOptions) -> QueueAnswer:
    """Open a study's queue; the same options again change nothing.

    Raises:
        Conflict: it has a queue with other options; close that one first.
        NotForQueues, InvalidInput: an option that queues or this version cannot honour.
        NotFound: a table study without a version, whose scaling only a run can make.
    """
    row = work.study(study)
    options.require_supported()
    spec = QueueSpec(study=study, task=row.task, data=StudyData.model_validate(row.data), options=options)
    present = _open(work, study)
    if present is not None:
        if present.spec_hash != spec.spec_hash:
            raise Conflict(f"The study {study} has an open queue with other options; close {name_of(present)} first.")
        return to_answer(work, present)
    if row.task == TABLE_TASK and versions.newest(work, study) is None:
        raise NotFound(
            f"The study {study} has no version yet; a run makes the means for its columns. Do one run first."
        )
    queue = Queue(
        study=study, open=True, spec=spec.model_dump(mode="json"), spec_hash=spec.spec_hash, created_at=work.now
    )
    work.session.add(queue)
    work.session.flush()
    record(work, queue, Kind.QUEUE_OPENED, spec_hash=queue.spec_hash, capacity=options.capacity)
    return to_answer(work, queue)


def close(work: Work, study: str, reason: str) -> QueueAnswer:
    """Close a queue: what waits in it is cleared with the reason, and nothing more is taken."""
    queue = get(work, study)
    _clear(work, queue, reason)
    queue.open = False
    record(work, queue, Kind.QUEUE_CLOSED, reason=reason)
    return to_answer(work, queue)


def clear(work: Work, study: str, reason: str) -> QueueStatus:
    """Throw away what waits, an average that is going on included.

    Raises:
        InvalidInput: without a reason.
    """
    if not reason.strip():
        raise InvalidInput("Say why: hospitals read the reason beside their contributions.")
    queue = get(work, study)
    _clear(work, queue, reason)
    return status(work, study)


def _clear(work: Work, queue: Queue, reason: str) -> None:
    rows = waiting(work, queue)
    for row in rows:
        move(work, row, ContributionState.CLEARED, reason)
    going_on = execution(work, queue)
    if going_on is not None:
        transition(work.session, Execution.state, going_on, ExecutionState.CANCELLED)
        going_on.ended_at, going_on.reason = work.now, reason
    record(work, queue, Kind.QUEUE_CLEARED, contributions=len(rows), reason=reason)


def move(work: Work, row: ContributionRow, state: ContributionState, reason: str = "") -> None:
    """Bring a contribution into another state."""
    old = ContributionState(row.state)
    require_transition(CONTRIBUTION_TRANSITIONS, old, state, f"Contribution {row.id}")
    transition(work.session, ContributionRow.state, row, state)
    row.reason = reason


# ---- looking -------------------------------------------------------------------------------------------------------


def _open(work: Work, study: str) -> Queue | None:
    return work.session.scalar(select(Queue).where(Queue.study == study, Queue.open))


def get(work: Work, study: str) -> Queue:
    """The open queue of a study that the caller may see.

    Raises:
        NotFound: there is none.
    """
    work.study(study)
    found = _open(work, study)
    if found is None:
        raise NotFound(f"The study {study} has no open queue.", study=study)
    return found


def only_study(work: Work, study: str | None, *, anybody: bool = False) -> str:
    """The study that is meant: the named one, or the only one with an open queue that the caller may see.

    Raises:
        InvalidInput: several have a queue.
        NotFound: none has.
    """
    if study is not None:
        return study
    query = select(Queue.study).where(Queue.open).order_by(Queue.study)
    if not (anybody or work.caller.sees_all):
        query = query.join(Member, Member.study == Queue.study).where(Member.site == work.own_site())
    found = list(work.session.scalars(query.limit(2)))
    if len(found) > 1:
        raise InvalidInput("Several studies have a queue; name one with ?study=.")
    if not found:
        raise NotFound("No study here has an open queue.")
    return found[0]


def waiting(work: Work, queue: Queue) -> list[ContributionRow]:
    """What is in the queue, oldest first; also what an average that is going on has taken."""
    query = select(ContributionRow).where(ContributionRow.queue_id == queue.id, ContributionRow.state.in_(IN_THE_QUEUE))
    return list(work.session.scalars(query.order_by(ContributionRow.id)))


def execution(work: Work, queue: Queue) -> Execution | None:
    """The average that is due or going on."""
    query = select(Execution).where(Execution.queue_id == queue.id, Execution.state == ExecutionState.DUE)
    return work.session.scalar(query)


def to_answer(work: Work, queue: Queue) -> QueueAnswer:
    """The queue on the wire; a hospital sees its own consent."""
    members = [site.name for site in work.training_members(queue.study)]
    if not work.caller.sees_all:
        members = [work.own_site()]
    newest = versions.newest(work, queue.study)
    return QueueAnswer(
        id=name_of(queue),
        study=queue.study,
        open=queue.open,
        spec=spec_of(queue),
        spec_hash=queue.spec_hash,
        created_at=queue.created_at,
        newest_version=newest.number if newest else None,
        consents=tuple(_consent_answer(work, queue, site) for site in members),
    )


def status(work: Work, study: str, *, anonymous: bool = False) -> QueueStatus:
    """How full a queue is; names for those who are logged in (a hospital its own), addresses for admins alone."""
    queue = _open(work, study) if anonymous else get(work, study)
    if queue is None:
        raise NotFound(f"The study {study} has no open queue.", study=study)
    rows, newest = waiting(work, queue), versions.newest(work, study)
    connected = _connected(work, study)
    capacity = spec_of(queue).options.capacity
    return QueueStatus(
        study=study,
        queue_id=name_of(queue),
        queue_size=len(rows),
        capacity=capacity,
        state=queue_state(len(rows), capacity),
        queued_sites=len({row.site for row in rows}),
        connected_sites=len(connected),
        model_available=newest is not None,
        newest_version=newest.number if newest else None,
        averaging=execution(work, queue) is not None,
        waiting=() if anonymous else _waiting_sites(work, rows),
        connected=tuple(name for name in connected if not anonymous and _may_name(work, name)),
    )


def _may_name(work: Work, site: str) -> bool:
    return work.caller.sees_all or work.caller.site == site


def _waiting_sites(work: Work, rows: list[ContributionRow]) -> tuple[WaitingSite, ...]:
    by_site: dict[str, list[ContributionRow]] = {}
    for row in rows:
        by_site.setdefault(row.site, []).append(row)
    return tuple(
        WaitingSite(
            site=site,
            contributions=len(own),
            received_at=own[-1].received_at,
            source_address=own[-1].source_address if work.caller.is_admin else None,
        )
        for site, own in sorted(by_site.items())
        if _may_name(work, site)
    )


def _connected(work: Work, study: str) -> list[str]:
    since = work.now - CONNECTED_WITHIN
    query = select(Site.name).join(Member, Member.site == Site.name)
    query = query.where(Member.study == study, Site.state == SiteState.ACTIVE)
    query = query.where(Site.node_online | (Site.last_seen_at > since)).order_by(Site.name)
    return list(work.session.scalars(query))


# ---- consents ------------------------------------------------------------------------------------------------------


def answer_consent(work: Work, study: str, consent: Consent) -> QueueConsentAnswer:
    """Take a hospital's signed yes, no, or no longer; the newest statement counts.

    Raises:
        BadSignature: another key, queue, specification, site or coordinator, or a nonce that was used before.
        Expired: outside its validity, or older than the statement on record.
        InvalidInput: no sensible validity, or a limit on privacy that nobody would keep.
    """
    queue, site, body = get(work, study), work.own_site(), consent.body
    _check(work, queue, consent, site)
    if body.privacy_limits != Privacy():
        raise InvalidInput("This version trains without differential privacy: it cannot keep the consent's limits.")
    used = select(QueueConsent.id).where(QueueConsent.site == site, QueueConsent.nonce == body.nonce)
    if work.session.scalar(used) is not None:
        raise BadSignature("This statement was used already; sign a new one.", site=site)
    state = ConsentState(body.decision)
    row = QueueConsent(
        queue_id=queue.id,
        site=site,
        nonce=body.nonce,
        state=state,
        document=consent.model_dump(mode="json"),
        received_at=work.now,
    )
    work.session.add(row)
    work.session.flush()
    facts = {"person": body.person, "expires_at": body.expires_at.isoformat(), "contributions": body.max_rounds}
    record(work, queue, ANSWERED[state], site=site, reason=body.reason or None, **facts)
    if state is not ConsentState.GRANTED:
        _take_out(work, queue, site, body.reason or f"the consent is {state}")
    return _consent_answer(work, queue, site)


def _check(work: Work, queue: Queue, consent: Consent, site: str) -> ConsentBody:
    return check_queue_consent(
        consent,
        work.consent_key(site),
        site=site,
        queue_id=name_of(queue),
        spec=spec_of(queue),
        coordinator_key_ids=work.gateway.key_ids,
        now=work.now,
    )


def _newest_consent(work: Work, queue: Queue, site: str) -> QueueConsent | None:
    query = select(QueueConsent).where(QueueConsent.queue_id == queue.id, QueueConsent.site == site)
    return work.session.scalar(query.order_by(QueueConsent.id.desc()).limit(1))


def _consent_answer(work: Work, queue: Queue, site: str) -> QueueConsentAnswer:
    row = _newest_consent(work, queue, site)
    if row is None:
        return QueueConsentAnswer(site=site, state=ConsentState.PENDING)
    consent = Consent.model_validate(row.document)
    return QueueConsentAnswer(site=site, state=ConsentState(row.state), consent=consent, answered_at=row.received_at)


def require_consent(work: Work, queue: Queue, site: str, *, more: int = 0) -> QueueConsent:
    """The consent of a member that covers this queue now, and so many contributions beyond those that were made under it.

    Raises:
        NotAllowed: the site is no member, has not agreed, or agreed to fewer contributions.
        Expired, BadSignature: its consent does not hold any more.
    """
    row = _newest_consent(work, queue, site)
    if not work.is_member(queue.study, site) or row is None or row.state != ConsentState.GRANTED:
        raise NotAllowed(f"Site {site} has no consent to {name_of(queue)}.", site=site, queue=name_of(queue))
    body = _check(work, queue, Consent.model_validate(row.document), site)
    made = select(func.count()).where(ContributionRow.consent_id == row.id)
    if more and int(work.session.scalar(made) or 0) + more > body.max_rounds:
        raise NotAllowed(
            f"The consent of {site} covers {body.max_rounds} contributions to {name_of(queue)}; give a new one.",
            limit=body.max_rounds,
        )
    return row


def drop_unconsented(work: Work, queue: Queue) -> None:
    """Take out what waits of hospitals whose consent does not hold any more, so that it is never averaged."""
    for site in sorted({row.site for row in waiting(work, queue)}):
        try:
            require_consent(work, queue, site)
        except MedHiveError as error:
            _take_out(work, queue, site, str(error))


def _take_out(work: Work, queue: Queue, site: str, reason: str) -> None:
    own = [row for row in waiting(work, queue) if row.site == site]
    for row in own:
        move(work, row, ContributionState.WITHDRAWN, reason)
    if own:
        record(work, queue, Kind.CONTRIBUTION_WITHDRAWN, site=site, contributions=len(own), reason=reason)


def end_part(work: Work, study: str, site: str, reason: str) -> None:
    """The site no longer takes part: what waits of it is taken out."""
    queue = _open(work, study)
    if queue is not None:
        _take_out(work, queue, site, reason)
