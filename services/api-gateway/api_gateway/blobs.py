"""Who may read and send which blob, why each is kept, and when it goes.

Rows say which run or version needs a blob, and so who may read it. Nobody learns from the store that somebody else's bytes
exist: who has no right to a blob is asked for all its bytes.
"""

import contextlib
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, and_, delete, func, select
from sqlalchemy.orm import Session

from api_gateway.blobstore import Part
from api_gateway.models import Blob, BlobReference, ConsentRow, ContributionRow, Execution, Round, Run, Version
from api_gateway.runs import base_digest, get
from api_gateway.work import Gateway, Work
from medhive.errors import Conflict, NotAllowed, NotFound, TooLarge
from medhive.queues import IN_THE_QUEUE, ExecutionState
from medhive.states import FINAL_RUN_STATES, ConsentState, Role, RoundState

GRACE = timedelta(hours=1)  # how long a file may lie there without a row: a crash between renaming and recording
SERVER_OWNER = ""
FOR_ONE_SITE = "@"  # no site's name begins with it


def owner_of(work: Work, reader: str | None) -> str:
    """In whose name the caller uploads: a site in its own, the aggregator in its own for all sites or for one reader alone.

    Raises:
        NotAllowed: a site names a reader.
    """
    if work.caller.role is Role.SERVER:
        return f"{FOR_ONE_SITE}{reader}" if reader else SERVER_OWNER
    if reader:
        raise NotAllowed("Only the aggregator uploads for a site.")
    return work.own_site()


def open_run(work: Work, number: int) -> Run:
    """A run whose blobs the caller may use: the aggregator any, a site one that it has consented to.

    Raises:
        NotFound: there is no such run.
        NotAllowed: the site has no consent to it.
    """
    run = get(work, number)
    if work.caller.role is not Role.SERVER:
        consent = work.session.get(ConsentRow, (run.id, work.own_site()))
        if consent is None or consent.state != ConsentState.GRANTED:
            raise NotAllowed(f"Site {work.caller.site} has no consent to RUN_{number}.", run_id=f"RUN_{number}")
    return run


def readable(work: Work, run: Run, digest: str) -> bool:
    """Whether the caller may read this blob of the run, and it is complete."""
    if work.session.get(Blob, digest) is None or not work.gateway.blobs.has(digest):
        return False
    if base_digest(work, run) == digest:
        return True
    query = select(BlobReference.id).where(BlobReference.run_id == run.id, BlobReference.digest == digest)
    if work.caller.role is not Role.SERVER:
        own = work.own_site()
        query = query.where(BlobReference.owner.in_((SERVER_OWNER, own, f"{FOR_ONE_SITE}{own}")))
    return work.session.scalar(query.limit(1)) is not None


def is_kept_for(work: Work, run: Run, digest: str, reader: str) -> bool:
    """Whether this blob of the run is there for this one site, who else may read it or not."""
    reference = _reference(run.id, digest, owner_of(work, reader))
    kept = work.session.scalar(select(BlobReference.id).where(reference)) is not None
    return kept and work.gateway.blobs.has(digest)


def require_readable(work: Work, number: int, digest: str) -> Path:
    """The file of a blob that the caller may read.

    Raises:
        NotFound: there is no such blob, or the caller may not know.
    """
    if not readable(work, open_run(work, number), digest):
        raise NotFound(f"RUN_{number} has no blob {digest} for you.", digest=digest)
    return work.gateway.blobs.path(digest)


def begin_part(work: Work, number: int, digest: str, part: Part, reader: str | None) -> tuple[Path, str]:
    """Check that the caller may send this part; returns the upload's file and its owner.

    Raises:
        Conflict: the run is over.
        TooLarge: the site's quota is used up.
    """
    run, owner = open_run(work, number), owner_of(work, reader)
    if run.state in FINAL_RUN_STATES:
        raise Conflict(f"RUN_{number} is over ({run.state}); nothing more can be uploaded.", state=run.state)
    upload = work.gateway.blobs.upload_path(owner, f"RUN_{number}", digest)
    if work.caller.role is not Role.SERVER:
        require_quota(work, owner, part.total + work.gateway.blobs.unfinished_bytes(upload))
    return upload, owner


def require_quota(work: Work, owner: str, more: int) -> None:
    """Refuse a site more bytes than it may keep here, for runs and waiting in queues together.

    Raises:
        TooLarge: its quota is used up.
    """
    query = select(func.coalesce(func.sum(Blob.size_bytes), 0))
    query = query.join(BlobReference, BlobReference.digest == Blob.digest).where(BlobReference.owner == owner)
    waiting = select(func.coalesce(func.sum(ContributionRow.size_bytes), 0))
    waiting = waiting.where(ContributionRow.site == owner, ContributionRow.state.in_(IN_THE_QUEUE))
    used = int(work.session.execute(query).scalar_one()) + int(work.session.execute(waiting).scalar_one())
    limit = work.gateway.settings.site_quota_bytes
    if used + more > limit:
        raise TooLarge(f"Site {owner} would keep {used + more} bytes here; its quota is {limit}.", limit=limit)


def keep(gateway: Gateway, upload: Path, number: int, digest: str, owner: str) -> None:
    """Turn a complete upload into a blob of a run; raises as `BlobStore.finish`."""
    with gateway.blobs.digest_lock(digest):
        size = gateway.blobs.finish(upload, digest)
        with gateway.database.write() as session:
            now = gateway.clock()
            note(session, digest, size, now)
            same = _reference(number, digest, owner)
            if session.scalar(select(BlobReference.id).where(same)) is None:
                session.add(BlobReference(digest=digest, run_id=number, owner=owner, created_at=now))


def note(session: Session, digest: str, size: int, now: datetime) -> None:
    """Keep that these bytes lie in the store; what needs them says so in the same transaction."""
    if session.get(Blob, digest) is None:
        session.add(Blob(digest=digest, size_bytes=size, created_at=now))
        session.flush()


def _reference(number: int, digest: str, owner: str) -> ColumnElement[bool]:
    return and_(BlobReference.digest == digest, BlobReference.run_id == number, BlobReference.owner == owner)


def make_global(work: Work, run: Run, digest: str) -> int:
    """Make a blob of the run its global weights, whoever uploaded it first; returns its size.

    Raises:
        NotFound: the digest is no blob of this run.
    """
    if not readable(work, run, digest):
        raise NotFound(f"{digest} was not uploaded as a blob of RUN_{run.id}.", digest=digest)
    if work.session.scalar(select(BlobReference.id).where(_reference(run.id, digest, SERVER_OWNER))) is None:
        row = BlobReference(digest=digest, run_id=run.id, owner=SERVER_OWNER, created_at=work.now)
        work.session.add(row)
        work.session.flush()
    return work.session.get_one(Blob, digest).size_bytes


# ---- what nothing needs any more -----------------------------------------------------------------------------------


def forget_old_rounds(work: Work, run: Run, closed: int) -> None:
    """Let go of the updates and global weights of rounds before the last but one; the aggregator has moved on."""
    before = work.session.get(Round, (run.id, closed - 1))
    if before is None or before.state != RoundState.CLOSED:
        return
    recent = [row.report.get("weights_digest") for row in (before, work.session.get(Round, (run.id, closed))) if row]
    needed = [digest for digest in recent if digest]
    old = and_(BlobReference.run_id == run.id, BlobReference.created_at < before.opened_at)
    statement = delete(BlobReference).where(old, BlobReference.digest.not_in(needed))
    work.session.execute(statement.execution_options(synchronize_session="fetch"))


def release_finished_runs(work: Work, ended_before: datetime) -> None:
    """Let go of the blobs of runs that are over; versions hold their own."""
    over = select(Run.id).where(Run.state.in_(FINAL_RUN_STATES), Run.ended_at <= ended_before)
    statement = delete(BlobReference).where(BlobReference.run_id.in_(over))
    work.session.execute(statement.execution_options(synchronize_session="fetch"))


def unreferenced(work: Work) -> list[Blob]:
    """The blobs that nothing refers to any more."""
    referred = select(BlobReference.id).where(BlobReference.digest == Blob.digest).exists()
    queued = select(ContributionRow.id).where(ContributionRow.digest == Blob.digest)
    is_queued = queued.where(ContributionRow.state.in_(IN_THE_QUEUE)).exists()
    result = select(Execution.id).where(Execution.result_digest == Blob.digest, Execution.state == ExecutionState.DUE)
    return list(work.session.scalars(select(Blob).where(~referred, ~is_queued, ~result.exists())))


def sweep(gateway: Gateway) -> tuple[int, int]:
    """Delete the files of blobs that nothing refers to, and stray files; returns how many and their bytes."""
    with gateway.system_write() as work:
        candidates = [blob.digest for blob in unreferenced(work)]
    count = freed = 0
    for digest in candidates:
        size = _delete(gateway, digest)
        count, freed = count + (size is not None), freed + (size or 0)
    _delete_strays(gateway)
    gateway.blobs.drop_old_uploads(gateway.clock())
    return count, freed


def _delete(gateway: Gateway, digest: str) -> int | None:
    # Row and file go under the lock under which an upload of the same bytes would bring them back.
    with gateway.blobs.digest_lock(digest):
        with gateway.system_write() as work:
            blob = work.session.get(Blob, digest)
            if blob is None or blob not in unreferenced(work):
                return None
            size = blob.size_bytes
            work.session.delete(blob)
        gateway.blobs.path(digest).unlink(missing_ok=True)
        return size


def _delete_strays(gateway: Gateway) -> None:
    oldest = (gateway.clock() - GRACE).timestamp()
    with gateway.database.read() as session:
        known = set(session.scalars(select(Blob.digest)))
    for path in gateway.blobs.complete_files():
        with contextlib.suppress(FileNotFoundError):
            if path.name not in known and path.stat().st_mtime < oldest:
                with gateway.blobs.digest_lock(path.name), gateway.database.read() as session:
                    if session.get(Blob, path.name) is None:
                        path.unlink()


def total_bytes(work: Work) -> int:
    """What the store holds."""
    return int(work.session.execute(select(func.coalesce(func.sum(Blob.size_bytes), 0))).scalar_one())


def version_blob(work: Work, version: Version) -> Path:
    """The file of a version's weights.

    Raises:
        NotFound: a clean-up has removed them.
    """
    if not version.bytes_kept or not work.gateway.blobs.has(version.digest):
        raise NotFound(
            f"The weights of version {version.number} of {version.study} were cleaned up.", version=version.number
        )
    return work.gateway.blobs.path(version.digest)


def hold_for_version(work: Work, version: Version) -> None:
    """Keep a version's weights until a clean-up lets go of them."""
    row = BlobReference(
        digest=version.digest, owner=SERVER_OWNER, study=version.study, version=version.number, created_at=work.now
    )
    work.session.add(row)


def let_go_of_version(work: Work, version: Version) -> None:
    """The version's weights are no longer needed for it."""
    version.bytes_kept = False
    mine = and_(BlobReference.study == version.study, BlobReference.version == version.number)
    work.session.execute(delete(BlobReference).where(mine).execution_options(synchronize_session="fetch"))
