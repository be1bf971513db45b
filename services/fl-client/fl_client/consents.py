"""Giving, refusing and taking back a hospital's consent to a run, by a person or as one has allowed beforehand.

The data are checked first, and what is signed says about them only a keyed fingerprint and counts by reason. An answer is
kept in site.db before it is sent: when the coordinator does not answer, the node delivers it later. A withdrawal counts
at this hospital from the moment that it is written down, whether or not the coordinator can hear it.
"""

import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from fl_client.gateway import SiteRevoked
from fl_client.jobs import Job, JobKind
from fl_client.policy import load_policy, objection
from fl_client.site import Site, one_at_a_time
from fl_client.store import ConsentRecord, GivenConsent, OutboxItem, Statement
from fl_client.trainer import Listener, Trainer
from medhive.consent import MAX_VALIDITY, Consent, ConsentBody, check_consent
from medhive.errors import (
    ClockSkew,
    Conflict,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    TooManyAttempts,
    Unreachable,
)
from medhive.queues import QueueSpec
from medhive.signing import sign
from medhive.spec import RunSpec
from medhive.states import FINAL_RUN_STATES, ConsentState, RunState
from medhive.wire import Decision, RunAnswer

# Long enough for the longest usual run, short enough that a forgotten consent ends by itself.
DEFAULT_VALIDITY = timedelta(days=30)
CONSENT, QUEUE_CONSENT, DECISION = "consent", "queue-consent", "decision"
# How long a person waits for the node's delivery to end. Longer than an exchange with a gateway that does not answer: who
# holds the outbox for longer hangs, and delivers what is in it later or leaves it to the next look.
OUTBOX_PATIENCE_S = 60.0
# HTTP's classes of answers: from the one on it is the statement that is at fault, from the other on the one who answers.
FIRST_REFUSAL, FIRST_TROUBLE = 400, 500
# What the coordinator says about the exchange, and not about what was said in it.
PASSING = (NotAuthenticated, ClockSkew, IncompatibleVersion, TooManyAttempts)

log = structlog.get_logger()


@dataclass(frozen=True)
class DataCheck:
    """What check-data found, without a name: examples per class, skipped by reason, the keyed fingerprint."""

    fingerprint: str
    examples: int
    classes: dict[str, int]
    skipped: dict[str, int]


@dataclass(frozen=True)
class OpenRun:
    """A run that waits for this site's answer; `own_request` when it is exactly what this site itself asked for."""

    run: RunAnswer
    own_request: bool


@dataclass(frozen=True)
class Permission:
    """Who allowed a consent beforehand, and by what."""

    person: str
    given_by: str


@dataclass(frozen=True)
class Sent:
    """`delivered` is False when the coordinator did not answer: the node will deliver it."""

    delivered: bool
    consent: Consent | None = None


def open_runs(site: Site) -> list[OpenRun]:
    """Runs that wait for this site's answer, oldest first."""
    waiting = site.gateway.runs(state=RunState.CONSENTING.value)
    found = [OpenRun(run, _is_own_request(site, run)) for run in waiting if _is_open(site, run)]
    return sorted(found, key=lambda item: item.run.created_at)


def runs_counting_on(site: Site, folder: Path, study: str | None = None) -> list[str]:
    """Runs that this site agreed to and that may still train on data in a folder, or on a study's."""
    now = site.latest_now()
    return [
        item.run_id
        for item in site.store.consents()
        if _may_train(site, item, now) and _uses(site, item, folder, study)
    ]


def _may_train(site: Site, consent: GivenConsent, now: datetime) -> bool:
    run = site.store.run(consent.run_id)
    over = run is not None and run.state in FINAL_RUN_STATES
    return consent.state in {"sending", "granted"} and not over and now < consent.signed.body.expires_at


def _uses(site: Site, consent: GivenConsent, folder: Path, study: str | None) -> bool:
    data, folder = site.data_dir(consent.study).resolve(), folder.resolve()
    return consent.study == study or data.is_relative_to(folder) or folder.is_relative_to(data)


def check_data(site: Site, trainer: Trainer, spec: RunSpec | QueueSpec, listener: Listener | None = None) -> DataCheck:
    """Read the study's data through and say what a consent may say about them.

    Raises:
        JobFailed: the data do not fit the study; `cause_code` names why.
    """
    source = site.source(spec.study, spec.task, spec.data)
    job = Job(id=f"check-{secrets.token_hex(4)}", kind=JobKind.CHECK, source=source)
    report = trainer.run(job, listener) if listener else trainer.run(job)
    return DataCheck(report["fingerprint"], report["examples"], dict(report["classes"]), dict(report["reasons"]))


def grant(
    site: Site,
    run: RunAnswer,
    *,
    person: str,
    check: DataCheck,
    valid_for: timedelta = DEFAULT_VALIDITY,
    given_by: str = "person",
) -> Sent:
    """Consent to a run.

    Raises:
        Conflict: the run no longer waits for consents, or this site has answered.
        InvalidInput: the specification is not what its hash says, or asks what this version cannot honour.
        MedHiveError: the coordinator's refusal.
    """
    _require_open(site, run)
    _require_honest(run)
    run.spec.options.privacy.require_supported()
    if not timedelta(0) < valid_for <= MAX_VALIDITY:
        raise InvalidInput("A consent must expire after it is issued, within a year.")
    rounds = run.spec.options.rounds
    body = consent_body(site, run.id, run.spec, "granted", person, valid_for=valid_for, check=check, max_rounds=rounds)
    return _send(site, sign(body, site.consent_key), run.spec, "sending", given_by)


def decline(site: Site, run: RunAnswer, *, person: str, reason: str = "") -> Sent:
    """Refuse to take part in a run.

    Raises:
        Conflict: the run no longer waits for consents, or this site has answered.
        MedHiveError: the coordinator's refusal.
    """
    _require_open(site, run)
    body = consent_body(site, run.id, run.spec, "declined", person, reason=reason)
    return _send(site, sign(body, site.consent_key), run.spec, "declined", "person")


def withdraw(site: Site, run_id: str, *, person: str, reason: str = "") -> Sent:
    """Take a consent back; a running node stops its training within a second or two.

    Raises:
        NotFound: this site has not consented to that run.
        Conflict: it was declined or withdrawn before.
        MedHiveError: the coordinator's refusal; the withdrawal counts here all the same.
    """
    given = site.store.consent(run_id)
    if given is None:
        raise NotFound(f"This hospital has given no consent to {run_id}.", run_id=run_id)
    if given.state not in ("sending", "granted"):
        raise Conflict(f"The consent to {run_id} is {given.state} already.", run_id=run_id)
    body = consent_body(site, run_id, given.spec, "withdrawn", person, reason=reason)
    signed = sign(body, site.consent_key)
    return _send(site, signed, given.spec, "withdrawn", "person")


def permission(site: Site, run: RunAnswer) -> Permission | str:
    """Who has allowed to consent to this run by itself; or, as text, why nobody has.

    Raises:
        BadSignature, InvalidInput: the policy file is damaged or not this hospital's.
    """
    own = site.store.own_request(run.request_id)
    if own is not None and own[0] == run.spec.spec_hash:
        return Permission(own[1], f"own request {run.request_id}")
    policy = load_policy(site)
    if policy is None:
        if own is not None:
            return "the coordinator changed what this hospital had asked for"
        return ""
    reason = objection(policy, run.spec, site.latest_now())
    return reason if reason is not None else Permission(policy.person, "policy")


def valid_consent(site: Site, run_id: str, now: datetime) -> GivenConsent:
    """The own consent that covers a run now.

    Raises:
        NotAllowed: there is none, or it was declined or withdrawn.
        Expired, BadSignature, InvalidInput: it does not hold (any more).
    """
    given = site.store.consent(run_id)
    if given is None:
        raise NotAllowed(f"This hospital has not consented to {run_id}.", run_id=run_id)
    if given.state not in ("sending", "granted"):
        raise NotAllowed(f"This hospital's consent to {run_id} is {given.state}.", run_id=run_id)
    check_consent(
        given.signed,
        site.consent_key.public,
        site=site.name,
        run_id=run_id,
        spec_hash=given.spec.spec_hash,
        rounds=given.spec.options.rounds,
        coordinator_key_ids=site.identity.key_ids,
        now=now,
    )
    return given


def deliver(site: Site) -> list[tuple[OutboxItem, MedHiveError | None]]:
    """Send what the coordinator has not received yet; returns what it took (None) or refused (why).

    What somebody else than the coordinator answered, or itself in trouble, is kept too.

    Raises:
        Unreachable: the coordinator does not answer; everything is kept.
    """
    with _outbox(site, 0.0) as held:
        # Whoever holds it is delivering.
        return _deliver_all(site) if held else []


def _outbox(site: Site, patience_s: float) -> AbstractContextManager[bool]:
    """Keep the outbox to oneself: command line and node would otherwise send the same statement at the same moment."""
    return one_at_a_time(site.settings.state_dir / "outbox.lock", patience_s)


def _deliver_all(site: Site) -> list[tuple[OutboxItem, MedHiveError | None]]:
    """Send one after the other; raises as `deliver`."""
    results = []
    for item in site.store.outbox():
        try:
            results.append((item, _deliver_one(site, item)))
        except Unreachable:
            raise
        except MedHiveError as error:
            # Nobody's word on it. It waits, and what comes after it too: a withdrawal does not overtake its consent.
            log.warning("outbox.kept", kind=item.kind, reason=error.code)
            break
    return results


def _deliver_one(site: Site, item: OutboxItem) -> MedHiveError | None:
    """Send a statement; the coordinator's refusal, if it has one. Raises why it could not be heard."""
    try:
        site.gateway.post(item.path, item.body)
    except MedHiveError as error:
        if not _is_refusal(error):
            raise
        if _was_received(site, item):
            _settle(site, item)
            return None
        site.store.refused(item.id, str(error))
        if item.kind == CONSENT and item.body["body"]["decision"] != "withdrawn":
            site.store.forget_consent(item.body["body"]["run_id"])
        return error
    _settle(site, item)
    return None


def _is_refusal(error: MedHiveError) -> bool:
    """Whether the coordinator has said no.

    Else it was not asked, is in trouble itself, or first wants something else put right: sent again, it may say yes.
    """
    answered = FIRST_REFUSAL <= error.data.get("status", 0) < FIRST_TROUBLE
    return isinstance(error, SiteRevoked) or (answered and not isinstance(error, PASSING))


def _settle(site: Site, item: OutboxItem) -> None:
    if item.kind == CONSENT and item.body["body"]["decision"] == "granted":
        site.store.set_consent_state(item.body["body"]["run_id"], "granted")
    site.store.delivered(item.id)


def _was_received(site: Site, item: OutboxItem) -> bool:
    """Whether a refusal only means that an earlier try had arrived and its answer was lost."""
    if item.kind not in (CONSENT, QUEUE_CONSENT):
        return False
    consent = Consent.model_validate(item.body)
    given = (
        site.gateway.consents(consent.body.run_id)
        if item.kind == CONSENT
        else site.gateway.queue(item.path.split("/")[2]).consents
    )
    own = (answer.consent for answer in given if answer.site == site.name)
    return any(kept is not None and kept.signature == consent.signature for kept in own)


def _send(site: Site, signed: Consent, spec: RunSpec, state: ConsentRecord, given_by: str) -> Sent:
    run_id = signed.body.run_id
    path = f"/runs/{run_id}/" + ("withdraw" if state == "withdrawn" else "consents")
    statement = Statement(CONSENT, path, signed.model_dump(mode="json"))
    if state == "withdrawn":
        # Counts here at once, whoever holds the outbox.
        return Sent(bring(site, site.store.withdraw_consent(run_id, statement)), signed)
    with _outbox(site, OUTBOX_PATIENCE_S) as held:
        _require_unanswered(site, run_id)
        number = site.store.keep_consent(signed, spec, state, given_by, statement)
        return Sent(held and _bring(site, number), signed)


def bring(site: Site, number: int) -> bool:
    """Try to deliver what was queued under a number; False where the coordinator does not take it now: the node will.

    Raises:
        MedHiveError: the coordinator's refusal.
    """
    with _outbox(site, OUTBOX_PATIENCE_S) as held:
        return held and _bring(site, number)


def _bring(site: Site, number: int) -> bool:
    """The same in the caller's hold of the outbox."""
    try:
        results = _deliver_all(site)
    except Unreachable:
        return False
    for item, error in results:
        if item.id == number and error is not None:
            raise error
    left = site.store.outbox_item(number)
    if left is not None and left.refused is not None:  # while somebody else had the outbox
        raise Conflict(left.refused)
    return left is None


def send_decision(site: Site, decision: Decision) -> bool:
    """Queue a decision and try to deliver it; False when the coordinator does not take it now. Raises its refusal."""
    body = decision.body
    path = f"/studies/{body.study}/versions/{body.version}/decisions"
    return bring(site, site.store.post(DECISION, path, decision.model_dump(mode="json")))


def consent_body(
    site: Site,
    run_id: str,
    spec: RunSpec | QueueSpec,
    decision: str,
    person: str,
    *,
    reason: str = "",
    valid_for: timedelta = DEFAULT_VALIDITY,
    check: DataCheck | None = None,
    max_rounds: int = 0,
) -> ConsentBody:
    """What this hospital signs about a run, or a queue: yes to so many rounds or contributions, no, or no longer.

    Raises:
        InvalidInput: no person is named.
    """
    if not person.strip():
        raise InvalidInput("A consent needs the name of the person who gives it.")
    now = site.now()
    return ConsentBody.model_validate(
        {
            "decision": decision,
            "coordinator_key_id": site.identity.verify_key.key_id,
            "site": site.name,
            "run_id": run_id,
            "spec_hash": spec.spec_hash,
            "dataset_fingerprint": check.fingerprint if check else "",
            "skipped": check.skipped if check else {},
            "privacy_limits": spec.options.privacy,
            "max_rounds": max_rounds,
            "issued_at": now,
            "expires_at": now + valid_for,
            "nonce": secrets.token_hex(16),
            "person": person.strip(),
            "reason": reason,
        }
    )


def _is_own_request(site: Site, run: RunAnswer) -> bool:
    own = site.store.own_request(run.request_id)
    return own is not None and own[0] == run.spec.spec_hash


def _is_open(site: Site, run: RunAnswer) -> bool:
    if site.store.consent(run.id) is not None:
        return False
    answers = run.consents or tuple(site.gateway.consents(run.id))
    own = [answer.state for answer in answers if answer.site == site.name]
    return not own or own[0] == ConsentState.PENDING


def _require_unanswered(site: Site, run_id: str) -> None:
    given = site.store.consent(run_id)
    if given is not None:
        raise Conflict(f"This hospital has answered {run_id} already: {given.state}.", run_id=run_id)


def _require_open(site: Site, run: RunAnswer) -> None:
    _require_unanswered(site, run.id)
    if run.state != RunState.CONSENTING:
        ended = " and over" if run.state in FINAL_RUN_STATES else ""
        raise Conflict(f"{run.id} is {run.state}{ended}; it no longer waits for consents.", run_id=run.id)


def _require_honest(run: RunAnswer) -> None:
    if run.spec.spec_hash != run.spec_hash or run.rounds != run.spec.options.rounds:
        raise InvalidInput(
            f"The coordinator's specification of {run.id} is not the one that its hash names; nothing was signed. Tell "
            "the coordinator.",
            run_id=run.id,
        )
