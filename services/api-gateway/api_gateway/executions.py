"""Averages of a queue: when one is due, who makes it, and how its version comes to be, exactly once.

The aggregator leases a due average, as it leases a run, with a fence that grows with each holder. The end of an average is
one transaction: the version, the contributions' lineage, the next average when one is due already. What it was made of is
said with it and compared: when a consent was withdrawn or another version came meanwhile, it is made anew.
"""

from datetime import timedelta
from pathlib import Path

from sqlalchemy import or_, select

from api_gateway import blobs, queues, versions
from api_gateway.events import Kind
from api_gateway.models import ContributionRow, Execution, Queue, Version
from api_gateway.runs import MAX_NUMBER
from api_gateway.work import Gateway, Work, transition
from medhive.consent import Consent
from medhive.errors import Conflict, IllegalTransition, InvalidInput, NotFound
from medhive.queues import (
    ContributionState,
    ExecutionAnswer,
    ExecutionEnd,
    ExecutionState,
    ExecutionTask,
    QueueContribution,
    TakenContribution,
    Waiting,
    due,
    mean_metrics,
    plan_average,
    require_enough,
    taken,
)
from medhive.wire import LeaseRequest, SiteRound

CHANGED = "execution-changed"
"""The cause in a refusal to end an average that was made of something else than what is there now."""


def of_rows(rows: list[ContributionRow]) -> list[Waiting]:
    """The rows as the core's decisions take them."""
    return [Waiting(row.id, row.site, row.examples, row.base_version) for row in rows]


def settle(work: Work, queue: Queue) -> None:
    """Make an average due when enough waits and none is going on."""
    work.session.flush()
    if not queue.open or queues.execution(work, queue) is not None:
        return
    queues.drop_unconsented(work, queue)
    rows, options = queues.waiting(work, queue), queues.spec_of(queue).options
    if due(of_rows(rows), options):
        _make(work, queue, rows, taken(of_rows(rows), options), "capacity")


def execute(work: Work, study: str) -> ExecutionAnswer:
    """An admin asks for an average of what waits; the one that is due already is what he gets.

    Raises:
        NothingToAverage: none wait, or of too few hospitals.
    """
    queue = queues.get(work, study)
    present = queues.execution(work, queue)
    if present is None:
        queues.drop_unconsented(work, queue)
        rows = queues.waiting(work, queue)
        chosen = require_enough(of_rows(rows), queues.spec_of(queue).options)
        present = _make(work, queue, rows, chosen, work.caller.actor)
    return to_answer(work, present)


def _make(
    work: Work, queue: Queue, rows: list[ContributionRow], chosen: tuple[Waiting, ...], asked_by: str
) -> Execution:
    row = Execution(
        queue_id=queue.id, state=ExecutionState.DUE, asked_by=asked_by, created_at=work.now, reason="", fence=0
    )
    work.session.add(row)
    work.session.flush()
    numbers = {item.number for item in chosen}
    for contribution in rows:
        if contribution.id in numbers:
            queues.move(work, contribution, ContributionState.TAKEN)
            contribution.execution_id = row.id
    queues.record(work, queue, Kind.EXECUTION_DUE, execution=row.id, contributions=len(chosen), asked_by=asked_by)
    return row


def get(work: Work, number: int) -> tuple[Execution, Queue]:
    """An average and its queue.

    Raises:
        NotFound: there is none.
    """
    row = work.session.get(Execution, number) if number <= MAX_NUMBER else None
    if row is None:
        raise NotFound(f"There is no execution {number}.", execution=number)
    return row, work.session.get_one(Queue, row.queue_id)


def _taken(work: Work, row: Execution) -> list[ContributionRow]:
    query = select(ContributionRow).where(
        ContributionRow.execution_id == row.id, ContributionRow.state == ContributionState.TAKEN
    )
    return list(work.session.scalars(query.order_by(ContributionRow.id)))


def listed(work: Work, study: str, limit: int) -> list[ExecutionAnswer]:
    """A study's averages, newest first."""
    work.study(study)
    query = select(Execution).join(Queue, Queue.id == Execution.queue_id).where(Queue.study == study)
    return [to_answer(work, row) for row in work.session.scalars(query.order_by(Execution.id.desc()).limit(limit))]


def to_answer(work: Work, row: Execution) -> ExecutionAnswer:
    """The average on the wire."""
    queue = work.session.get_one(Queue, row.queue_id)
    numbers = select(ContributionRow.id).where(ContributionRow.execution_id == row.id)
    return ExecutionAnswer(
        execution=row.id,
        queue_id=queues.name_of(queue),
        study=queue.study,
        state=ExecutionState(row.state),
        contributions=len(list(work.session.scalars(numbers))),
        asked_by=row.asked_by,
        created_at=row.created_at,
        ended_at=row.ended_at,
        version=row.version,
        reason=row.reason,
    )


# ---- the aggregator ------------------------------------------------------------------------------------------------


def lease(work: Work, body: LeaseRequest) -> ExecutionTask | None:
    """Give the oldest average that is due to this holder: a new one, its own from before a restart, or a dead holder's."""
    free = or_(
        Execution.lease_expires_at.is_(None), Execution.lease_expires_at <= work.now, Execution.holder == body.holder
    )
    query = select(Execution).where(Execution.state == ExecutionState.DUE, free).order_by(Execution.id).limit(1)
    row = work.session.scalar(query)
    if row is None:
        return None
    row.fence += 1
    row.holder = body.holder
    queue = work.session.get_one(Queue, row.queue_id)
    # While nobody held it a consent may have ended; it must not hold up this average, nor those of other queues behind it.
    queues.drop_unconsented(work, queue)
    queues.record(work, queue, Kind.EXECUTION_LEASED, execution=row.id, fence=row.fence)
    return _task(work, row, queue)


def look(work: Work, number: int, fence: int) -> ExecutionTask:
    """The average as it stands now; keeps the lease alive.

    Raises:
        Conflict: another holder has it.
        IllegalTransition: it is over.
    """
    row, queue = _fenced(work, number, fence)
    queues.drop_unconsented(work, queue)
    return _task(work, row, queue)


def _fenced(work: Work, number: int, fence: int) -> tuple[Execution, Queue]:
    row, queue = get(work, number)
    if row.fence != fence:
        raise Conflict(
            f"The lease on execution {number} with fence {fence} is over; the present fence is {row.fence}.",
            cause="stale-fence",
            fence=row.fence,
        )
    if row.state != ExecutionState.DUE:
        raise IllegalTransition(f"Execution {number} is {row.state}.", old=row.state, new=row.state)
    return row, queue


def _newest(work: Work, queue: Queue) -> Version:
    found = versions.newest(work, queue.study)
    if found is None:
        raise NotFound(f"The study {queue.study} has no version to start from.", study=queue.study)
    return found


def _task(work: Work, row: Execution, queue: Queue) -> ExecutionTask:
    row.lease_expires_at = work.now + timedelta(seconds=work.gateway.settings.lease_s)
    newest = _newest(work, queue)
    return ExecutionTask(
        execution=row.id,
        fence=row.fence,
        expires_at=row.lease_expires_at,
        queue_id=queues.name_of(queue),
        spec=queues.spec_of(queue),
        newest_version=newest.number,
        newest_digest=newest.digest,
        newest_size_bytes=newest.size_bytes,
        contributions=tuple(_taken_answer(work, queue, item) for item in _taken(work, row)),
    )


def _taken_answer(work: Work, queue: Queue, row: ContributionRow) -> TakenContribution:
    consent = queues.require_consent(work, queue, row.site)
    return TakenContribution(
        number=row.id,
        contribution=QueueContribution.model_validate(row.manifest),
        consent=Consent.model_validate(consent.document),
        consent_public_key=work.consent_key(row.site).text,
    )


def readable(work: Work, number: int, digest: str) -> Path:
    """The file of a contribution of this average, or of a version of its study.

    Raises:
        NotFound: it is neither.
    """
    row, queue = get(work, number)
    known = {item.digest for item in _taken(work, row)} | {row.result_digest}
    of_study = select(Version.digest).where(Version.study == queue.study, Version.bytes_kept, Version.digest == digest)
    if (digest in known or work.session.scalar(of_study) is not None) and work.gateway.blobs.has(digest):
        return work.gateway.blobs.path(digest)
    raise NotFound(f"Execution {number} has no blob {digest}.", digest=digest)


def result_upload(work: Work, number: int, digest: str) -> Path:
    """Where the unfinished upload of an average lies."""
    return work.gateway.blobs.upload_path(blobs.SERVER_OWNER, f"execution-{number}", digest)


def keep_result(gateway: Gateway, upload: Path, number: int, digest: str) -> None:
    """Turn a complete upload into the result of an average, which its end names; raises as `BlobStore.finish`."""
    with gateway.blobs.digest_lock(digest):
        size = gateway.blobs.finish(upload, digest)
        with gateway.system_write() as work:
            row, _ = get(work, number)
            if row.state == ExecutionState.DUE:
                blobs.note(work.session, digest, size, work.now)
                row.result_digest = digest


# ---- the end -------------------------------------------------------------------------------------------------------


def end(work: Work, number: int, body: ExecutionEnd) -> ExecutionAnswer:
    """End an average: `done` makes the study's next version. The same end may be reported again.

    Raises:
        Conflict: another holder has it; or, with the cause `execution-changed`, it was made of something else than what is
            there now.
        InvalidInput: done without a digest, or with nothing counted.
        NotFound: the digest was not sent.
    """
    row, _ = get(work, number)
    report = body.model_dump(mode="json", exclude={"fence"})
    if row.fence == body.fence and row.end_report == report:
        return to_answer(work, row)
    row, queue = _fenced(work, number, body.fence)
    rows = {item.id: item for item in _taken(work, row)}
    _require_unchanged(work, queue, rows, body)
    for refused, code in sorted(body.refused.items()):
        queues.move(work, rows[refused], ContributionState.REFUSED, code)
        queues.record(work, queue, Kind.CONTRIBUTION_REFUSED, site=rows[refused].site, reason_code=code)
    counted = [rows[item] for item in sorted(body.counted)]
    if body.state == "done":
        _release(work, row, queue, counted, body)
    else:
        _give_back(work, row, queue, counted, body.reason)
    row.ended_at, row.end_report = work.now, report
    work.session.flush()
    if body.state == "done":
        settle(work, queue)
    return to_answer(work, row)


def _require_unchanged(work: Work, queue: Queue, rows: dict[int, ContributionRow], body: ExecutionEnd) -> None:
    queues.drop_unconsented(work, queue)
    present = {number for number, row in rows.items() if row.state == ContributionState.TAKEN}
    told = set(body.counted) | set(body.refused)
    newest = _newest(work, queue)
    if told != present or set(body.counted) & set(body.refused) or newest.number != body.newest_version:
        raise Conflict(
            "What this average was made of has changed meanwhile; look again and make it anew.", cause=CHANGED
        )


def _release(work: Work, row: Execution, queue: Queue, counted: list[ContributionRow], body: ExecutionEnd) -> None:
    if body.digest is None or body.digest != row.result_digest:
        raise InvalidInput("A finished average needs the digest of the weights that were sent for it.")
    require_enough(of_rows(counted), queues.spec_of(queue).options)
    before = _newest(work, queue)
    manifests = {item.id: QueueContribution.model_validate(item.manifest).body for item in counted}
    sites = tuple(SiteRound(site=item.site, answered=True, examples=item.examples) for item in counted)
    metrics = mean_metrics([(item.examples, manifests[item.id].metrics) for item in counted])
    statistics = before.manifest["body"]["statistics"]
    origin = versions.Origin(queue.study, queues.name_of(queue), queue.spec_hash, before.number, 0)
    content = versions.Content(body.digest, metrics, sites=sites, statistics=statistics)
    version = versions.create(work, origin, versions.next_number(work, queue.study), content)
    for share in plan_average(of_rows(counted), before.number):
        item = next(each for each in counted if each.id == share.number)
        queues.move(work, item, ContributionState.COUNTED)
        item.staleness, item.weight, item.version = share.staleness, share.weight, version.number
    versions.make_candidate(work, version)
    transition(work.session, Execution.state, row, ExecutionState.DONE)
    row.version = version.number
    lineage = [[item.id, item.site, item.digest, item.staleness, item.weight] for item in counted]
    queues.record(work, queue, Kind.EXECUTION_DONE, execution=row.id, version=version.number, lineage=lineage)


def _give_back(work: Work, row: Execution, queue: Queue, counted: list[ContributionRow], reason: str) -> None:
    for item in counted:
        queues.move(work, item, ContributionState.WAITING, reason)
        item.execution_id = None
    transition(work.session, Execution.state, row, ExecutionState.FAILED)
    row.reason = reason
    queues.record(work, queue, Kind.EXECUTION_FAILED, execution=row.id, reason=reason)
