"""Model versions: made at the end of runs, offered to hospitals, decided by each of them.

One version of a study is the candidate at a time. The one before becomes `released`, whether or not a hospital has accepted
it: it stays on offer, and who uses it is in the decisions. Version 0, the untrained beginning, is released from the start
and waits for nobody's decision. Only a clean-up retires a version, and never one that a hospital has accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from api_gateway import blobs
from api_gateway.events import Kind
from api_gateway.models import Blob, ContributionRow, DecisionRow, Member, Queue, Run, Site, Study, Version
from api_gateway.work import Work, transition
from medhive.consent import CLOCK_TOLERANCE
from medhive.errors import BadSignature, Conflict, Expired, NotAllowed, NotFound
from medhive.queues import IN_THE_QUEUE
from medhive.signing import VerifyKey, sign
from medhive.spec import StudyData
from medhive.states import (
    DECISION_TRANSITIONS,
    VERSION_TRANSITIONS,
    DecisionState,
    RunState,
    SiteState,
    VersionState,
    require_transition,
)
from medhive.wire import (
    Cleanup,
    CleanupAnswer,
    Comparison,
    Decision,
    DecisionAnswer,
    DecisionBody,
    Manifest,
    ManifestBody,
    SiteRound,
    VersionAnswer,
)

DECIDED = {DecisionState.ACCEPTED: Kind.DECISION_ACCEPTED, DecisionState.REJECTED: Kind.DECISION_REJECTED}
OPEN_TO_DECISION = (VersionState.CANDIDATE, VersionState.RELEASED)


# ---- making --------------------------------------------------------------------------------------------------------


def next_number(work: Work, study: str) -> int:
    """The number that the study's next trained version gets."""
    newest = work.session.scalar(select(func.max(Version.number)).where(Version.study == study))
    return (newest or 0) + 1


def newest(work: Work, study: str) -> Version | None:
    """The version that training starts from: the newest that is not held and whose bytes are kept."""
    query = select(Version).where(Version.study == study, Version.bytes_kept, Version.state != VersionState.HELD)
    return work.session.scalar(query.order_by(Version.number.desc()).limit(1))


def same_zero(work: Work, study: str, digest: str) -> bool:
    """Whether the study has these initial weights; False while it has none.

    Raises:
        Conflict: it has others.
    """
    present = find(work, study, 0)
    if present is not None and present.digest != digest:
        raise Conflict(
            f"The study {study} has another version 0 than {digest}; hospitals' software must agree.",
            digest=present.digest,
        )
    return present is not None


@dataclass(frozen=True)
class Content:
    """What a version is made of: weights by digest, figures, the sites that gave to it, sums over their tables."""

    digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    sites: Sequence[SiteRound] = ()
    statistics: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What made a version: a run (`run_id` RUN_n), or a queue (`run_id` QUEUE_n), in whose lineage it then is."""

    study: str
    run_id: str
    spec_hash: str
    base_version: int | None
    rounds: int
    run: int | None = None


def of_run(run: Run, number: int) -> Origin:
    """A version's origin in a run; version 0 is made before its first round."""
    base, rounds = (run.spec["base_version"], run.round) if number else (None, 0)
    return Origin(run.study, f"RUN_{run.id}", run.spec_hash, base, rounds, run.id)


def create(work: Work, origin: Origin, number: int, content: Content) -> Version:
    """Register weights, complete in the blob store, as a version, with a manifest under the coordinator's signature.

    Raises:
        CorruptWeights: the blob holds no packed weights.
    """
    size = work.session.get_one(Blob, content.digest).size_bytes
    layout = work.gateway.blobs.layout(content.digest)
    manifest = _manifest(work, origin, number, content, size)
    version = Version(
        study=origin.study,
        number=number,
        state=VersionState.RELEASED,
        digest=content.digest,
        size_bytes=size,
        layout_digest=layout.digest(),
        run_id=origin.run,
        rounds=manifest.rounds,
        metrics=content.metrics,
        confusion=content.confusion,
        manifest=sign(manifest, work.gateway.key).model_dump(mode="json"),
        created_at=work.now,
        bytes_kept=True,
    )
    work.session.add(version)
    work.session.flush()
    blobs.hold_for_version(work, version)
    _record(work, version, Kind.VERSION_CREATED, digest=content.digest)
    return version


def signed_by_another(session: Session, key: VerifyKey) -> bool:
    """Whether a manifest is under another key than this one."""
    return session.scalar(select(Version.number).where(_under_another(key)).limit(1)) is not None


def sign_anew(work: Work) -> None:
    """Sign every manifest that a former key has signed with the present one; what it says stays."""
    key = work.gateway.key
    for version in work.session.scalars(select(Version).where(_under_another(key.public))):
        body = Manifest.model_validate(version.manifest).body
        version.manifest = sign(body, key).model_dump(mode="json")


def _under_another(key: VerifyKey) -> ColumnElement[bool]:
    named: ColumnElement[str] = Version.manifest["key_id"].as_string()
    return named != key.key_id


def _manifest(work: Work, origin: Origin, number: int, content: Content, size: int) -> ManifestBody:
    study = work.session.get_one(Study, origin.study)
    counted = [site for site in content.sites if site.answered and not site.dropped]
    return ManifestBody(
        study=study.name,
        version=number,
        task=study.task,
        data=StudyData.model_validate(study.data),
        digest=content.digest,
        size_bytes=size,
        run_id=origin.run_id,
        spec_hash=origin.spec_hash,
        base_version=origin.base_version,
        rounds=origin.rounds,
        sites=tuple(dict.fromkeys(site.site for site in counted)),
        examples=sum(site.examples for site in counted),
        metrics=content.metrics,
        statistics=content.statistics,
        created_at=work.now,
    )


def _record(work: Work, version: Version, kind: Kind, site: str | None = None, **data: object) -> None:
    subject = f"version {version.number} of {version.study}"
    run_id = version.manifest["body"]["run_id"]
    work.record(kind, subject, study=version.study, run_id=run_id, site=site, version=version.number, **data)


def make_candidate(work: Work, version: Version) -> None:
    """Offer a version to all members that train; the candidate before it becomes released."""
    query = select(Version).where(Version.study == version.study, Version.state == VersionState.CANDIDATE)
    for former in work.session.scalars(query).all():
        transition(work.session, Version.state, former, VersionState.RELEASED)
        _record(work, former, Kind.VERSION_RELEASED)
    require_transition(
        VERSION_TRANSITIONS, VersionState(version.state), VersionState.CANDIDATE, f"Version {version.number}"
    )
    transition(work.session, Version.state, version, VersionState.CANDIDATE)
    members = select(Member.site).join(Site, Site.name == Member.site)
    members = members.where(Member.study == version.study, Site.evaluates_only.is_(False))
    for site in work.session.scalars(members).all():
        _ask(work, version, site)
    _record(work, version, Kind.VERSION_OFFERED)


def await_decision_on_candidate(work: Work, study: str, site: str) -> None:
    """A site that has just become a member is asked for the present candidate; one that only evaluates uses none."""
    if work.session.get_one(Site, site).evaluates_only:
        return
    query = select(Version).where(Version.study == study, Version.state == VersionState.CANDIDATE)
    for version in work.session.scalars(query).all():
        _await(work, version, site)


def _await(work: Work, version: Version, site: str) -> None:
    if work.session.get(DecisionRow, (version.study, version.number, site)) is None:
        row = DecisionRow(study=version.study, version=version.number, site=site, state=DecisionState.PENDING)
        work.session.add(row)


def _ask(work: Work, version: Version, site: str) -> None:
    """Ask a site for its decision; one that has rejected the version is asked anew, one that uses it need not repeat it."""
    _await(work, version, site)
    work.session.flush()
    row = work.session.get_one(DecisionRow, (version.study, version.number, site))
    if row.state == DecisionState.REJECTED:
        transition(work.session, DecisionRow.state, row, DecisionState.PENDING)
        # When it was issued stays, so that the old rejection cannot be sent again.
        row.document, row.decided_at = None, None


# ---- looking -------------------------------------------------------------------------------------------------------


def find(work: Work, study: str, number: int) -> Version | None:
    """A version by number, for the aggregator's purposes."""
    return work.session.get(Version, (study, number))


def get(work: Work, study: str, number: int) -> Version:
    """A version that the caller may see: a member site all but held ones.

    Raises:
        NotFound: there is none.
    """
    work.study(study)
    version = find(work, study, number)
    if version is None or (version.state == VersionState.HELD and not work.caller.sees_all):
        raise NotFound(f"The study {study} has no version {number}.", study=study, version=number)
    return version


def listed(work: Work, study: str) -> list[VersionAnswer]:
    """The study's versions that the caller may see, newest first."""
    work.study(study)
    query = select(Version).where(Version.study == study).order_by(Version.number.desc())
    if not work.caller.sees_all:
        query = query.where(Version.state != VersionState.HELD)
    return [to_answer(work, version) for version in work.session.scalars(query)]


def compare(work: Work, study: str, a: int, b: int) -> Comparison:
    """Two versions side by side; differences are b minus a, of the metrics that both have."""
    first, second = get(work, study, a), get(work, study, b)
    both = sorted(first.metrics.keys() & second.metrics.keys())
    return Comparison(
        a=to_answer(work, first),
        b=to_answer(work, second),
        metric_differences={name: second.metrics[name] - first.metrics[name] for name in both},
        same_architecture=first.layout_digest == second.layout_digest,
    )


def to_answer(work: Work, version: Version) -> VersionAnswer:
    """The version on the wire; a hospital sees its own decision."""
    query = select(DecisionRow).where(DecisionRow.study == version.study, DecisionRow.version == version.number)
    if not work.caller.sees_all:
        query = query.where(DecisionRow.site == work.own_site())
    return VersionAnswer(
        study=version.study,
        version=version.number,
        state=VersionState(version.state),
        digest=version.digest,
        size_bytes=version.size_bytes,
        run_id=version.manifest["body"]["run_id"],
        rounds=version.rounds,
        metrics=version.metrics,
        confusion=version.confusion,
        created_at=version.created_at,
        manifest=Manifest.model_validate(version.manifest),
        decisions=tuple(_decision_answer(row) for row in work.session.scalars(query.order_by(DecisionRow.site))),
        bytes_kept=version.bytes_kept,
    )


def _decision_answer(row: DecisionRow) -> DecisionAnswer:
    body = DecisionBody.model_validate(row.document["body"]) if row.document else None
    return DecisionAnswer(
        site=row.site,
        state=DecisionState(row.state),
        reason=body.reason if body else "",
        person=body.person if body else "",
        metrics=body.metrics if body else {},
        decided_at=row.decided_at,
    )


# ---- deciding ------------------------------------------------------------------------------------------------------


def decide(work: Work, study: str, number: int, decision: Decision) -> VersionAnswer:
    """Take a hospital's signed decision; the same one may be sent again, a later one changes it.

    Raises:
        NotAllowed: the site only evaluates.
        BadSignature: another key, site, version or content.
        Expired: dated in the future, or older than the decision on record.
        Conflict: the version is held or retired.
        IllegalTransition: there is no such step from the decision on record.
    """
    version, site = get(work, study, number), work.own_site()
    if work.site(site).evaluates_only:
        raise NotAllowed(f"The site {site} only evaluates; it decides on no version.", site=site)
    body = _checked(work, version, site, decision)
    _await(work, version, site)
    work.session.flush()
    row = work.session.get_one(DecisionRow, (study, number, site))
    document = decision.model_dump(mode="json")
    if row.document == document:
        return to_answer(work, version)
    if version.state not in OPEN_TO_DECISION or not version.bytes_kept:
        raise Conflict(f"Version {number} of {study} is {version.state}; it cannot be decided on.", state=version.state)
    if row.issued_at is not None and body.issued_at <= row.issued_at:
        raise Expired("This decision is older than the one on record; sign a new one.", site=site)
    new = DecisionState(body.decision)
    if row.state != new:
        require_transition(DECISION_TRANSITIONS, DecisionState(row.state), new, f"The decision of {site}")
        transition(work.session, DecisionRow.state, row, new)
    row.document, row.decided_at, row.issued_at = document, work.now, body.issued_at
    _record(work, version, DECIDED[new], site=site, person=body.person, reason=body.reason)
    work.session.flush()
    return to_answer(work, version)


def _checked(work: Work, version: Version, site: str, decision: Decision) -> DecisionBody:
    body = decision.verify(work.consent_key(site))
    expected = {"site": site, "study": version.study, "version": version.number, "digest": version.digest}
    for name, value in expected.items():
        if getattr(body, name) != value:
            raise BadSignature(f"The decision is for {name} {getattr(body, name)}, not for {value}.", field=name)
    if body.issued_at > work.now + CLOCK_TOLERANCE:
        raise Expired("The decision is dated in the future; set the hospital's clock.", site=site)
    return body


def offer(work: Work, study: str, number: int) -> VersionAnswer:
    """The coordinator's roll-back: an older version becomes the candidate again.

    Raises:
        Conflict: its weights were cleaned up.
        IllegalTransition: it is the candidate, or held.
    """
    version = get(work, study, number)
    blobs.version_blob(work, version)
    if version.state == VersionState.CANDIDATE:
        raise Conflict(f"Version {number} of {study} is the candidate already.", version=number)
    if version.state == VersionState.HELD:
        raise Conflict(f"Version {number} of {study} is held back; release it first.", version=number)
    make_candidate(work, version)
    work.session.flush()
    return to_answer(work, version)


def export(work: Work, study: str, number: int, site: str) -> VersionAnswer:
    """Offer a version to one member site, which is then asked for its decision.

    Raises:
        NotAllowed: the site takes no part in the study.
        Conflict: the version is held or retired.
    """
    version = get(work, study, number)
    blobs.version_blob(work, version)
    if version.state not in OPEN_TO_DECISION:
        raise Conflict(f"Version {number} of {study} is {version.state}; offer it first.", state=version.state)
    row = work.site(site)
    if not work.is_member(study, site) or row.state != SiteState.ACTIVE:
        raise NotAllowed(f"Site {site} takes no part in the study {study}.", site=site, study=study)
    _ask(work, version, site)
    _record(work, version, Kind.VERSION_EXPORTED, site=site)
    work.session.flush()
    return to_answer(work, version)


# ---- clean-up ------------------------------------------------------------------------------------------------------


def clean_up(work: Work, body: Cleanup) -> CleanupAnswer:
    """Retire old versions and let go of what finished runs have left; the caller sweeps the files after the commit.

    Kept in each study are: the newest `keep` versions, the candidate, version 0, every version that a site has accepted,
    those that an unfinished run starts from, and those that a waiting contribution began from. A dry run undoes everything
    once it knows what it would have been.
    """
    with work.session.begin_nested() as savepoint:
        retired = _retire(work, body)
        blobs.release_finished_runs(work, work.now)
        work.session.flush()
        freed = blobs.unreferenced(work)
        answer = CleanupAnswer(
            versions=tuple(f"{version.study}/{version.number}" for version in retired),
            blobs=len(freed),
            bytes_freed=sum(blob.size_bytes for blob in freed),
        )
        work.record(Kind.CLEANUP_DONE, "blob store", versions=len(retired), blobs=len(freed), bytes=answer.bytes_freed)
        if body.dry_run:
            savepoint.rollback()
    return answer


def _retire(work: Work, body: Cleanup) -> list[Version]:
    chosen = [work.study(body.study).name] if body.study else list(work.session.scalars(select(Study.name)))
    retired = [version for study in chosen for version in _superfluous(work, study, body.keep)]
    for version in retired:
        if version.state != VersionState.RETIRED:
            transition(work.session, Version.state, version, VersionState.RETIRED)
        blobs.let_go_of_version(work, version)
        _record(work, version, Kind.VERSION_RETIRED)
    return retired


def _superfluous(work: Work, study: str, keep: int) -> list[Version]:
    query = select(Version).where(Version.study == study, Version.bytes_kept, Version.number > 0)
    kept = list(work.session.scalars(query.order_by(Version.number.desc())))
    needed = _needed(work, study)
    return [
        version
        for version in kept[keep:]
        if version.number not in needed and version.state in (VersionState.RELEASED, VersionState.RETIRED)
    ]


def _needed(work: Work, study: str) -> set[int]:
    accepted = select(DecisionRow.version).where(
        DecisionRow.study == study, DecisionRow.state == DecisionState.ACCEPTED
    )
    unfinished = (RunState.CONSENTING, RunState.READY, RunState.RUNNING)
    runs = work.session.scalars(select(Run).where(Run.study == study, Run.state.in_(unfinished)))
    waiting = select(ContributionRow.base_version).join(Queue, Queue.id == ContributionRow.queue_id)
    waiting = waiting.where(Queue.study == study, ContributionRow.state.in_(IN_THE_QUEUE))
    bases = {run.spec["base_version"] for run in runs} | set(work.session.scalars(waiting))
    return set(work.session.scalars(accepted)) | bases
