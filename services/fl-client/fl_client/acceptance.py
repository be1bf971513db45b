"""Whether this hospital does what it is asked: every task is judged here before anything is fetched or computed.

A task counts when the coordinator signed it for this site, an own consent covers its run, its specification is exactly
the one consented to, and its round lies ahead of what was done. What is refused is answered with a signed refusal that
carries a code and a sentence of this module, never a text in which a file's name could stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Literal

from fl_client.consents import valid_consent
from fl_client.site import Site
from fl_client.store import GivenConsent
from medhive import __version__
from medhive.consent import covers_round
from medhive.envelope import Contribution, ContributionBody, Task, TaskBody, TaskHead, TaskType
from medhive.errors import BadSignature, Conflict, Expired, InvalidInput, MedHiveError, NotAllowed, TooLarge
from medhive.signing import sign
from medhive.version import PROTOCOL

# The gateway's own limit of a blob; a task that names more is a mistake or an attempt to fill the disk.
MAX_MODEL_BYTES = 2 * 1024**3

NEED_BASE = frozenset({TaskType.TRAIN, TaskType.EVALUATE})

UNKNOWN_REASON = "The site could not do it; its own messages say why."
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "bad-signature": "The task's signature does not hold, or it was made for another site or specification.",
        "not-allowed": "The site has not consented to this run, or no longer does.",
        "evaluates-only": "The site only evaluates; it has no data to train on.",
        "expired": "The site's consent has expired.",
        "invalid-input": "The task does not fit the run that the site consented to.",
        "round-passed": "The site has gone on to a later round of this run.",
        "already-trained": "The site has trained this round from other weights already.",
        "incompatible-version": f"The versions do not fit; the site has MedHive {__version__}, protocol {PROTOCOL}.",
        "too-large": "The weights are larger than the site takes.",
        "data-changed": "The site's data were changed since they were consented to.",
        "data-folder-missing": "The site's data folder is missing.",
        "missing-class": "A class of the study is missing at the site.",
        "empty-class": "A class of the study has no readable example at the site.",
        "unknown-class": "The site's data hold a class that the study does not know.",
        "wrong-columns": "The site's table does not have the study's columns.",
        "not-enough-examples": "The site has too few examples.",
        "unknown-task": "The site's software does not have this task; upgrade the hospital.",
        "unknown-model": "The site's software does not have this model; upgrade the hospital.",
        "wrong-architecture": "The weights are of another architecture than the study's.",
        "wrong-layout": "The weights are of another architecture than the study's.",
        "corrupt-weights": "The weights cannot be read.",
        "digest-mismatch": "The weights are not the announced ones.",
        "seal-broken": "Sealed weights were changed on their way between the coordinator and the site.",
        "training-diverged": "The training's loss was no longer a finite number.",
        "deadline-passed": "The deadline passed during training.",
        "out-of-memory": "The site's trainer ran out of memory.",
        "trainer-crashed": "The site's trainer ended unexpectedly.",
        "trainer-stuck": "The site's trainer did not come up in time.",
        "device-unavailable": "The device that the site has set is not there.",
        "no-space": "The site's disk is full.",
        "wrong-optimiser-state": "The site's kept optimiser state is damaged.",
    }
)


class EvaluatesOnly(NotAllowed):
    """A task that uses data for training, at a site whose data are a test set."""

    code = "evaluates-only"


class RoundPassed(Conflict):
    """A task of a round that lies behind."""

    code = "round-passed"


class AlreadyTrained(Conflict):
    """A second training of one round, from other weights."""

    code = "already-trained"


@dataclass(frozen=True)
class Order:
    """A task that this hospital will do, with the consent that covers it."""

    task: TaskBody
    consent: GivenConsent

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes two tasks the same: run, type, round, base digest."""
        return (self.task.run_id, self.task.type.value, self.task.round, self.task.base_digest)


def check_task(site: Site, task: Task, now: datetime) -> Order:
    """Accept a task.

    Args:
        now: the time by which the own consent is judged.

    Raises:
        BadSignature: not the coordinator's, or for another site or specification.
        NotAllowed, Expired: no consent covers it.
        EvaluatesOnly: it is more than an evaluation, at a site that does nothing else.
        InvalidInput, TooLarge: it does not fit the run.
        RoundPassed, AlreadyTrained: its round lies behind.
    """
    body = task.verify(site.identity.task_key(task.key_id, now))
    if body.site != site.name:
        raise BadSignature(f"The task is for the site {body.site}.", site=body.site)
    consent = valid_consent(site, body.run_id, now)
    _require_fitting(body, consent)
    if site.identity.evaluates_only and body.type is not TaskType.EVALUATE:
        raise EvaluatesOnly(f"This site only evaluates; {body.run_id} asks it for more ({body.type}).")
    if not covers_round(consent.signed.body, body.round, now):
        raise Expired(f"The consent to {body.run_id} does not cover round {body.round}.", round=body.round)
    order = Order(body, consent)
    if body.type is TaskType.TRAIN:
        _require_ahead(site, order)
    return order


def _require_fitting(body: TaskBody, consent: GivenConsent) -> None:
    spec = consent.spec
    if body.spec_hash != spec.spec_hash or body.study != spec.study:
        raise BadSignature(f"The task for {body.run_id} has another specification than the one consented to.")
    first = 1 if body.type is TaskType.TRAIN else 0
    if body.rounds != spec.options.rounds or not first <= body.round <= body.rounds:
        raise InvalidInput(f"The task for {body.run_id} names round {body.round} of {body.rounds}.", round=body.round)
    if body.type in NEED_BASE and not (body.base_digest and body.base_size_bytes):
        raise InvalidInput(f"The task for {body.run_id} names no weights to start from.")
    if body.base_size_bytes > MAX_MODEL_BYTES:
        raise TooLarge(f"The weights of {body.run_id} are larger than {MAX_MODEL_BYTES} bytes.", limit=MAX_MODEL_BYTES)


def _require_ahead(site: Site, order: Order) -> None:
    task = order.task
    done = site.store.highest_round(task.run_id, task.type.value)
    if task.round > done or site.store.reply(*order.key) is not None:
        return
    if task.round == done:
        raise AlreadyTrained(f"Round {task.round} of {task.run_id} was trained from other weights.", round=task.round)
    raise RoundPassed(f"Round {task.round} of {task.run_id} lies behind; the last was {done}.", round=task.round)


def answer_without_update(
    site: Site, task: TaskBody | TaskHead, outcome: Literal["failed", "refused"], code: str
) -> Contribution:
    """A signed answer that says why there is nothing to add up."""
    body = ContributionBody(
        protocol=PROTOCOL,
        type=task.type,
        run_id=task.run_id,
        site=site.name,
        round=task.round,
        spec_hash=task.spec_hash,
        base_digest=task.base_digest,
        outcome=outcome,
        reason_code=code[:60],
        reason=REASONS.get(code, UNKNOWN_REASON),
        issued_at=site.now(),
    )
    return sign(body, site.consent_key)


def code_of(error: MedHiveError) -> str:
    """The reason code of an error, that of its cause when a job failed."""
    return str(getattr(error, "cause_code", error.code))
