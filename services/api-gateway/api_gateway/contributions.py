"""Contributions on their way in: who may send one, what it must be, and the moment from which it counts.

The manifest is checked before any byte, the bytes when all are there and before the contribution is acknowledged: the
hospital hears at once what is wrong, and nothing that could not be averaged waits. The aggregator checks the same again,
since it believes no other process. A check reads the file once, window by window, on a thread and never in the event loop;
a few at a time, so that many uploads at once take no more memory than one.
"""

import threading
from pathlib import Path

from sqlalchemy import select

from api_gateway import blobs, executions, queues, versions
from api_gateway.blobstore import Part
from api_gateway.events import Kind
from api_gateway.models import ContributionRow, Queue, Version
from api_gateway.work import Call, Work
from medhive.contribution import ContributionLimits, NormTooLarge, NotFinite, check_contribution
from medhive.errors import BadSignature, InvalidInput, MedHiveError, NotAllowed, NotFound
from medhive.packing import CorruptWeights, WeightsFile, WrongLayout
from medhive.queues import (
    ContributionState,
    QueueContribution,
    QueueContributionAnswer,
    QueueContributionBody,
    check_queue_contribution,
    require_fresh_enough,
)
from medhive.states import Role

CHECKS_AT_ONCE = threading.BoundedSemaphore(2)
UNSOUND = (CorruptWeights, WrongLayout, NotFinite, NormTooLarge)
"""What the log keeps of refused uploads: bytes that could not be averaged, not a line that broke."""
HEADER_ROOM_BYTES = 1024 * 1024
"""How much longer a contribution may be than its base: texts in the header differ, numbers do not."""


def _checked(work: Work, contribution: QueueContribution) -> tuple[Queue, QueueContributionBody]:
    site = work.own_site()
    queue = queues.get(work, contribution.body.study)
    body = check_queue_contribution(
        contribution,
        work.consent_key(site),
        site=site,
        queue_id=queues.name_of(queue),
        spec=queues.spec_of(queue),
    )
    return queue, body


def find(work: Work, contribution: QueueContribution) -> ContributionRow | None:
    """The contribution of these bytes that the site has sent before; None when it was withdrawn and may come again.

    Raises:
        BadSignature: it is not this site's, or for another queue.
        NotFound: the study has no open queue for this site.
    """
    queue, body = _checked(work, contribution)
    row = _same(work, queue, body)
    return None if row is not None and row.state == ContributionState.WITHDRAWN else row


def _same(work: Work, queue: Queue, body: QueueContributionBody) -> ContributionRow | None:
    query = select(ContributionRow).where(
        ContributionRow.queue_id == queue.id,
        ContributionRow.site == body.site,
        ContributionRow.digest == body.content_digest,
    )
    return work.session.scalar(query)


def upload_of(work: Work, contribution: QueueContribution) -> Path:
    """Where the unfinished upload of this contribution lies."""
    body = contribution.body
    return work.gateway.blobs.upload_path(work.own_site(), body.queue_id, body.content_digest)


def begin(work: Work, contribution: QueueContribution, part: Part) -> Path:
    """Check that the caller may send this part of this contribution; returns the upload's file.

    Raises:
        BadSignature, NotFound: as `find`.
        NotAllowed, Expired: without a consent that covers one more.
        TooStale, InvalidInput: it began from a version that is too old, unknown or of other bytes, or its size cannot be.
        TooLarge: the site's quota is used up.
    """
    queue, body = _checked(work, contribution)
    base = _admitted(work, queue, body)
    if part.total != body.content_size_bytes:
        raise InvalidInput(f"The manifest says {body.content_size_bytes} bytes, the upload {part.total}.")
    if not 0 <= body.content_size_bytes - base.size_bytes + HEADER_ROOM_BYTES <= 2 * HEADER_ROOM_BYTES:
        raise InvalidInput(
            f"The contribution has {body.content_size_bytes} bytes where the study's model has {base.size_bytes}: it is "
            "another model. Train from the version that /download gives.",
            expected_bytes=base.size_bytes,
        )
    upload = upload_of(work, contribution)
    blobs.require_quota(work, body.site, part.total + work.gateway.blobs.unfinished_bytes(upload))
    return upload


def _admitted(work: Work, queue: Queue, body: QueueContributionBody) -> Version:
    """The base version of a contribution that the queue would take now."""
    if work.site(body.site).evaluates_only:
        raise NotAllowed(f"The site {body.site} only evaluates; it gives nothing to a queue.", site=body.site)
    queues.require_consent(work, queue, body.site, more=1)
    newest, base = versions.newest(work, queue.study), versions.find(work, queue.study, body.base_version)
    if newest is None or base is None or not base.bytes_kept:
        raise NotFound(
            f"The study {queue.study} has no version {body.base_version} any more; train again from the newest.",
            version=body.base_version,
        )
    if base.digest != body.base_digest:
        raise BadSignature(f"Version {base.number} has other weights than those that this contribution began from.")
    require_fresh_enough(base.number, newest.number, queues.spec_of(queue).options.max_staleness)
    return base


def keep(call: Call, upload: Path, contribution: QueueContribution) -> QueueContributionAnswer:
    """Turn a complete upload into a contribution that counts; an average that falls due by it is made due with it.

    Raises:
        CorruptWeights, WrongLayout, NotFinite, NormTooLarge: the bytes are no contribution to this queue; an event says so.
        DigestMismatch: they are others than announced.
        MedHiveError: as `begin`.
    """
    try:
        with CHECKS_AT_ONCE:
            _require_sound(call, upload, contribution)
        return _take(call, upload, contribution)
    except UNSOUND as error:
        _note_refusal(call, contribution, error)
        raise
    finally:
        upload.unlink(missing_ok=True)


def _require_sound(call: Call, upload: Path, contribution: QueueContribution) -> None:
    with call.read(Role.SITE) as work:
        queue, body = _checked(work, contribution)
        base = blobs.version_blob(work, _admitted(work, queue, body))
        limits = ContributionLimits(queues.spec_of(queue).options.max_norm)
    layout = WeightsFile.at(base).layout
    check_contribution(upload, layout, base, limits, f"the contribution of {body.site}")


def _take(call: Call, upload: Path, contribution: QueueContribution) -> QueueContributionAnswer:
    digest, store = contribution.body.content_digest, call.gateway.blobs
    with store.digest_lock(digest):
        size = store.finish(upload, digest)
        with call.write(Role.SITE) as work:
            queue, _ = _checked(work, contribution)
            row = find(work, contribution)
            if row is None:
                blobs.note(work.session, digest, size, work.now)
                row = _added(work, queue, contribution, size)
                executions.settle(work, queue)
            return to_answer(work, row)


def _added(work: Work, queue: Queue, contribution: QueueContribution, size: int) -> ContributionRow:
    body = contribution.body
    _admitted(work, queue, body)
    consent, row = queues.require_consent(work, queue, body.site, more=1), _same(work, queue, body)
    if row is None:
        row = ContributionRow(
            queue_id=queue.id,
            site=body.site,
            state=ContributionState.WAITING,
            digest=body.content_digest,
            size_bytes=size,
            reason="",
        )
    else:
        queues.move(work, row, ContributionState.WAITING)
        row.execution_id = None
    row.consent_id = consent.id
    row.base_version, row.examples = body.base_version, body.examples
    row.manifest, row.source_address, row.received_at = contribution.model_dump(mode="json"), work.source, work.now
    work.session.add(row)
    work.session.flush()
    facts = {"contribution": row.id, "digest": row.digest, "base_version": row.base_version, "examples": row.examples}
    queues.record(work, queue, Kind.CONTRIBUTION_RECEIVED, site=body.site, source_address=work.source, **facts)
    return row


def _note_refusal(call: Call, contribution: QueueContribution, error: MedHiveError) -> None:
    """The code alone: a reason's text may repeat what a stranger wrote."""
    with call.write(Role.SITE) as work:
        queue = queues.get(work, contribution.body.study)
        queues.record(work, queue, Kind.CONTRIBUTION_REFUSED, site=work.own_site(), reason_code=error.code)


# ---- looking -------------------------------------------------------------------------------------------------------


def listed(work: Work, study: str, version: int | None, limit: int) -> list[QueueContributionAnswer]:
    """Contributions to a study's queues, newest first, of one version its lineage; a hospital sees its own."""
    work.study(study)
    query = select(ContributionRow).join(Queue, Queue.id == ContributionRow.queue_id).where(Queue.study == study)
    if version is not None:
        query = query.where(ContributionRow.version == version)
    if not work.caller.sees_all:
        query = query.where(ContributionRow.site == work.own_site())
    return [
        to_answer(work, row) for row in work.session.scalars(query.order_by(ContributionRow.id.desc()).limit(limit))
    ]


def to_answer(work: Work, row: ContributionRow) -> QueueContributionAnswer:
    """The contribution on the wire."""
    queue = work.session.get_one(Queue, row.queue_id)
    return QueueContributionAnswer(
        number=row.id,
        queue_id=queues.name_of(queue),
        study=queue.study,
        site=row.site,
        state=ContributionState(row.state),
        digest=row.digest,
        base_version=row.base_version,
        examples=row.examples,
        metrics=row.manifest["body"]["metrics"],
        received_at=row.received_at,
        execution=row.execution_id,
        staleness=row.staleness,
        weight=row.weight,
        version=row.version,
        reason=row.reason,
    )


# ---- version 0 -----------------------------------------------------------------------------------------------------


def begin_version_zero(work: Work, study: str, digest: str, part: Part) -> Path | None:
    """Check that the caller may send the study's initial weights; None when they are there already.

    Raises:
        NotAllowed: the site has no consent to the queue.
        Conflict: the study has another version 0; hospitals' software must agree.
        TooLarge: the site's quota is used up.
    """
    site = work.own_site()
    queue = queues.get(work, study)
    queues.require_consent(work, queue, site)
    if versions.same_zero(work, study, digest):
        return None
    upload = zero_upload(work, study, digest)
    blobs.require_quota(work, site, part.total + work.gateway.blobs.unfinished_bytes(upload))
    return upload


def zero_upload(work: Work, study: str, digest: str) -> Path:
    """Where a site's unfinished upload of the study's initial weights lies."""
    return work.gateway.blobs.upload_path(work.own_site(), f"version-zero-{study}", digest)


def keep_version_zero(call: Call, upload: Path, study: str, digest: str) -> None:
    """Register a complete upload as the study's initial weights, which every member can make and compare.

    Raises:
        CorruptWeights, DigestMismatch: it holds something else.
        MedHiveError: as `begin_version_zero`.
    """
    store = call.gateway.blobs
    try:
        layout = WeightsFile.at(upload).layout
        check_contribution(upload, layout, upload, whose="the initial weights")
        with store.digest_lock(digest):
            size = store.finish(upload, digest)
            with call.write(Role.SITE) as work:
                queue = queues.get(work, study)
                queues.require_consent(work, queue, work.own_site())
                if not versions.same_zero(work, study, digest):
                    blobs.note(work.session, digest, size, work.now)
                    origin = versions.Origin(study, queues.name_of(queue), queue.spec_hash, None, 0)
                    versions.create(work, origin, 0, versions.Content(digest))
    finally:
        upload.unlink(missing_ok=True)
