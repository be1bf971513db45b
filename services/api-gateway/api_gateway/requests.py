"""Training requests: sent by hospitals or the coordinator, decided once."""

from typing import Any

from sqlalchemy import func, select

from api_gateway import runs, studies
from api_gateway.events import Kind
from api_gateway.models import Member, Run, Site, TrainingRequest, Version
from api_gateway.work import Work, transition
from medhive.errors import Conflict, InvalidInput, NotAllowed, NotFound
from medhive.spec import RunSpec, StudyData
from medhive.states import REQUEST_TRANSITIONS, RequestState, VersionState, require_transition
from medhive.wire import NewRequest, RequestAnswer


def send(work: Work, body: NewRequest) -> RequestAnswer:
    """Keep a request with the specification that its run would have.

    Raises:
        NotFound: no such study, or no such version to start from.
        InvalidInput: an option is out of range, or more sites are asked for than the study has to train.
    """
    study = work.study(body.study)
    options = studies.checked_options(study.task, study.defaults, body.options)
    training = select(func.count()).select_from(Member).join(Site, Site.name == Member.site)
    training = training.where(Member.study == study.name, Site.evaluates_only.is_(False))
    invited = work.session.execute(training).scalar_one()
    if options.min_sites > invited:
        raise InvalidInput(
            f"min_sites is {options.min_sites}, but the study {study.name} has {invited} sites; it could never begin.",
            min_sites=options.min_sites,
            members=invited,
        )
    spec = RunSpec(
        study=study.name,
        task=study.task,
        data=StudyData.model_validate(study.data),
        base_version=_base_version(work, study.name, body.base_version),
        options=options,
    )
    row = TrainingRequest(
        study=study.name,
        requested_by=work.caller.name,
        site=work.caller.site,
        state=RequestState.PENDING,
        spec=spec.model_dump(mode="json"),
        spec_hash=spec.spec_hash,
        note=body.note,
        created_at=work.now,
        source_address=work.source,
        reason="",
    )
    work.session.add(row)
    work.session.flush()
    _record(work, row, Kind.REQUEST_SENT, rounds=options.rounds, source_address=work.source)
    return to_answer(work, row)


def _base_version(work: Work, study: str, chosen: int | None) -> int:
    query = select(func.max(Version.number)).where(Version.study == study, Version.state != VersionState.RETIRED)
    if chosen is None:
        return work.session.scalar(query.where(Version.bytes_kept, Version.state != VersionState.HELD)) or 0
    version = work.session.get(Version, (study, chosen)) if chosen <= runs.MAX_NUMBER else None
    if chosen and (version is None or not version.bytes_kept):
        raise NotFound(f"The study {study} has no version {chosen} to start from.", study=study, version=chosen)
    return chosen


def get(work: Work, number: int) -> TrainingRequest:
    """A request that the caller may see: a hospital sees those of its studies.

    Raises:
        NotFound: there is none.
    """
    row = work.session.get(TrainingRequest, number)
    if row is None or not _sees(work, row):
        raise NotFound(f"There is no request REQ_{number}.", request=f"REQ_{number}")
    return row


def _sees(work: Work, row: TrainingRequest) -> bool:
    if work.caller.sees_all:
        return True
    return work.caller.site is not None and (
        row.site == work.caller.site or work.is_member(row.study, work.caller.site)
    )


def listed(work: Work, study: str | None, state: RequestState | None, limit: int) -> list[RequestAnswer]:
    """The requests that the caller may see, newest first."""
    query = select(TrainingRequest).order_by(TrainingRequest.id.desc()).limit(limit)
    if study is not None:
        query = query.where(TrainingRequest.study == study)
    if state is not None:
        query = query.where(TrainingRequest.state == state)
    if not work.caller.sees_all:
        own = work.own_site()
        mine = select(Member.study).where(Member.site == own)
        query = query.where((TrainingRequest.site == own) | TrainingRequest.study.in_(mine))
    return [to_answer(work, row) for row in work.session.scalars(query)]


def approve(work: Work, number: int, reason: str) -> RequestAnswer:
    """Approve, which makes the run.

    Raises:
        IllegalTransition: it was decided already.
        Conflict: fewer sites than the run needs have joined, or its base version is gone.
    """
    row = get(work, number)
    _decide(work, row, RequestState.APPROVED, reason)
    spec = RunSpec.model_validate(row.spec)
    _require_possible(work, spec)
    _record(work, row, Kind.REQUEST_APPROVED, reason=reason)
    runs.create(work, row, spec)
    return to_answer(work, row)


def _require_possible(work: Work, spec: RunSpec) -> None:
    joined = len(work.training_members(spec.study))
    if joined < spec.options.min_sites:
        raise Conflict(
            f"The run needs {spec.options.min_sites} sites, but {joined} of the study {spec.study} have joined.",
            joined=joined,
            min_sites=spec.options.min_sites,
        )
    base = work.session.get(Version, (spec.study, spec.base_version))
    if spec.base_version and (base is None or not base.bytes_kept):
        raise Conflict(f"Version {spec.base_version}, from which the run would start, was cleaned up; request it anew.")


def reject(work: Work, number: int, reason: str) -> RequestAnswer:
    """Reject with a reason."""
    row = get(work, number)
    _decide(work, row, RequestState.REJECTED, reason)
    _record(work, row, Kind.REQUEST_REJECTED, reason=reason)
    return to_answer(work, row)


def cancel(work: Work, number: int, reason: str) -> RequestAnswer:
    """Take a request back; its sender's hospital, or an admin.

    Raises:
        NotAllowed: somebody else's request.
    """
    row = get(work, number)
    own = row.site == work.caller.site if work.caller.site else row.requested_by == work.caller.name
    if not own and not work.caller.is_admin:
        raise NotAllowed(f"REQ_{number} was sent by {row.requested_by}; only they or an admin can cancel it.")
    _decide(work, row, RequestState.CANCELLED, reason)
    _record(work, row, Kind.REQUEST_CANCELLED, reason=reason)
    return to_answer(work, row)


def _decide(work: Work, row: TrainingRequest, state: RequestState, reason: str) -> None:
    require_transition(REQUEST_TRANSITIONS, RequestState(row.state), state, f"REQ_{row.id}")
    transition(work.session, TrainingRequest.state, row, state)
    row.decided_by, row.decided_at, row.reason = work.caller.name, work.now, reason


def _record(work: Work, row: TrainingRequest, kind: Kind, **data: Any) -> None:
    # A study's requests are its members' business, so the row names the study and no single site.
    work.record(kind, f"REQ_{row.id}", study=row.study, requested_by=row.requested_by, **data)


def to_answer(work: Work, row: TrainingRequest) -> RequestAnswer:
    """The request on the wire; the address only for admins."""
    run = work.session.scalar(select(Run.id).where(Run.request_id == row.id))
    return RequestAnswer(
        id=f"REQ_{row.id}",
        study=row.study,
        requested_by=row.requested_by,
        site=row.site,
        state=RequestState(row.state),
        spec=RunSpec.model_validate(row.spec),
        spec_hash=row.spec_hash,
        note=row.note,
        created_at=row.created_at,
        source_address=row.source_address if work.caller.is_admin else None,
        decided_by=row.decided_by,
        decided_at=row.decided_at,
        reason=row.reason,
        run_id=f"RUN_{run}" if run else None,
    )
