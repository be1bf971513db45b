"""The contribution queue at the hospital: agree, fetch the newest model, train, send the update, look.

Nobody asks for this training: a person, or a program of the hospital's own, begins it. So the hospital's own consent is
looked up here before anything is trained and again before anything is sent; a withdrawal counts from the moment that it is
written down, and stops a training that goes on.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fl_client.consents import DEFAULT_VALIDITY, QUEUE_CONSENT, DataCheck, bring, check_data, consent_body
from fl_client.jobs import Job, JobKind, Plan
from fl_client.policy import PolicyBody, load_policy, objection
from fl_client.site import Site, one_at_a_time
from fl_client.store import KnownVersion, Statement
from fl_client.trainer import Listener, Trainer
from fl_client.updates import VersionGone, fetch_version
from medhive.client import Progress
from medhive.consent import MAX_VALIDITY, Consent, ConsentBody
from medhive.errors import Conflict, InvalidInput, NotAllowed, NotFound
from medhive.queues import (
    MAX_METRICS,
    QueueAnswer,
    QueueContribution,
    QueueContributionAnswer,
    QueueContributionBody,
    QueueSpec,
    QueueStatus,
    check_queue_consent,
)
from medhive.signing import sign
from medhive.spec import MAX_ROUNDS
from medhive.states import ConsentState, VersionState

DEFAULT_CONTRIBUTIONS = 100  # a contribution a week for two years; more is a new signature
LOOK_S = 0.5  # how soon a withdrawal stops a training


class OtherInitialWeights(Conflict):
    """Version 0 is not what this hospital makes of the study's seed."""

    code = "other-initial-weights"


class TrainingPaused(Conflict):
    """The hospital has paused training, or its hours are over."""

    code = "training-paused"


class TrainingUnderWay(Conflict):
    """Another program of this hospital is training for the queue."""

    code = "training-under-way"


@dataclass(frozen=True)
class Trained:
    """A contribution that waits here to be sent."""

    contribution: QueueContribution
    file: Path

    @property
    def body(self) -> QueueContributionBody:
        """What its manifest says."""
        return self.contribution.body


# ---- consent -------------------------------------------------------------------------------------------------------


def open_queues(site: Site) -> list[QueueAnswer]:
    """The open queues of this hospital's studies."""
    found = []
    for study in site.gateway.studies():
        try:
            found.append(site.gateway.queue(study.name))
        except NotFound:
            continue
    return found


def queue_by_id(site: Site, queue_id: str) -> QueueAnswer:
    """The open queue with this number.

    Raises:
        NotFound: no study of this hospital has it.
    """
    for queue in open_queues(site):
        if queue.id == queue_id:
            return queue
    raise NotFound(f"There is no open queue {queue_id} in this hospital's studies.", queue=queue_id)


def unanswered_queues(site: Site) -> list[str]:
    """The open queues that this hospital has said nothing about yet."""
    return [queue.id for queue in open_queues(site) if is_unanswered(site, queue)]


def is_unanswered(site: Site, queue: QueueAnswer) -> bool:
    """Whether this hospital is asked for its word on a queue and has said nothing yet."""
    return any(item.site == site.name and item.state is ConsentState.PENDING for item in queue.consents)


def policy_on(site: Site, queue: QueueAnswer) -> PolicyBody | str:
    """The policy that allows to agree to this queue by itself; or, as text, why none does: empty when there is none.

    Raises:
        BadSignature, InvalidInput: the policy file is damaged or not this hospital's.
    """
    policy = load_policy(site)
    if policy is None:
        return ""
    reason = objection(policy, queue.spec, site.latest_now())
    return policy if reason is None else reason


def agree_by_policy(site: Site, trainer: Trainer, queue: QueueAnswer, policy: PolicyBody) -> Consent:
    """Agree to a queue in the name of who signed the policy, to as many contributions as it allows rounds.

    Raises:
        JobFailed: the data do not fit the study.
        MedHiveError: as `grant_queue`.
    """
    check = check_data(site, trainer, queue.spec)
    return grant_queue(site, queue, person=policy.person, check=check, contributions=policy.max_rounds)


def grant_queue(
    site: Site,
    queue: QueueAnswer,
    *,
    person: str,
    check: DataCheck,
    valid_for: timedelta = DEFAULT_VALIDITY,
    contributions: int = DEFAULT_CONTRIBUTIONS,
) -> Consent:
    """Agree to a queue, until a date and for so many contributions; a new statement takes the place of an earlier one.

    Raises:
        InvalidInput: the specification is not what its hash says or asks what this version cannot honour, or the limits of
            the consent make no sense.
        MedHiveError: the coordinator's refusal; nothing was kept.
    """
    _require_honest(queue)
    queue.spec.options.require_supported()
    if not timedelta(0) < valid_for <= MAX_VALIDITY or not 1 <= contributions <= MAX_ROUNDS:
        raise InvalidInput(f"A consent must expire within a year, and cover 1 to {MAX_ROUNDS} contributions.")
    return _state(site, queue, "granted", person, check=check, valid_for=valid_for, max_rounds=contributions)


def decline_queue(site: Site, queue: QueueAnswer, *, person: str, reason: str = "") -> Consent:
    """Refuse to take part in a queue; raises as `grant_queue`."""
    return _state(site, queue, "declined", person, reason=reason)


def withdraw_queue(site: Site, queue_id: str, *, person: str, reason: str = "") -> bool:
    """Take a consent back; counts here at once. False when the coordinator does not answer: the node delivers it.

    Raises:
        NotFound: this hospital has agreed to no such queue.
        MedHiveError: the coordinator's refusal; the withdrawal counts here all the same.
    """
    for key in _keys(site):
        kept = site.store.fact(key)
        if kept and kept["queue_id"] == queue_id and kept["state"] == "granted":
            break
    else:
        raise NotFound(f"This hospital has given no consent to {queue_id}.", queue=queue_id)
    spec = QueueSpec.model_validate(kept["spec"])
    signed = sign(consent_body(site, queue_id, spec, "withdrawn", person, reason=reason), site.consent_key)
    path = f"/studies/{spec.study}/queue/consents"
    statement = Statement(QUEUE_CONSENT, path, signed.model_dump(mode="json"))
    number = site.store.change_fact(key, lambda consent: {**consent, "state": "withdrawn"}, statement)
    return bring(site, number)


def _keys(site: Site) -> list[str]:
    return list(site.store.fact("queue-studies") or [])


def _key(study: str) -> str:
    return f"queue-consent/{study}"


def _state(site: Site, queue: QueueAnswer, decision: str, person: str, **more: Any) -> Consent:
    signed = sign(consent_body(site, queue.id, queue.spec, decision, person, **more), site.consent_key)
    site.gateway.post(f"/studies/{queue.study}/queue/consents", signed)
    kept = {
        "queue_id": queue.id,
        "state": decision,
        "signed": signed.model_dump(mode="json"),
        "spec": queue.spec.model_dump(mode="json"),
        "made": 0,
    }
    site.store.set_fact("queue-studies", sorted({*_keys(site), _key(queue.study)}))
    site.store.set_fact(_key(queue.study), kept)
    return signed


def valid_queue_consent(site: Site, queue: QueueAnswer, now: datetime) -> ConsentBody:
    """The own consent that covers one more contribution to this queue now.

    Raises:
        NotAllowed: there is none, it was declined or withdrawn, or its contributions are used up.
        Expired, BadSignature, InvalidInput: it does not hold (any more).
    """
    _require_honest(queue)
    kept = site.store.fact(_key(queue.study))
    if kept is None or kept["queue_id"] != queue.id or kept["state"] != "granted":
        standing = "not agreed" if kept is None or kept["queue_id"] != queue.id else kept["state"]
        raise NotAllowed(
            f"This hospital's consent to {queue.id} is: {standing}. Look at it, then agree with: medhive-site consent "
            f"{queue.id}",
            queue=queue.id,
        )
    body = check_queue_consent(
        Consent.model_validate(kept["signed"]),
        site.consent_key.public,
        site=site.name,
        queue_id=queue.id,
        spec=queue.spec,
        coordinator_key_ids=site.identity.key_ids,
        now=now,
    )
    if kept["made"] >= body.max_rounds:
        raise NotAllowed(f"The consent to {queue.id} covers {body.max_rounds} contributions; give a new one.")
    return body


def _require_honest(queue: QueueAnswer) -> None:
    if queue.spec.spec_hash != queue.spec_hash or queue.spec.study != queue.study:
        raise InvalidInput(
            f"The coordinator's specification of {queue.id} is not the one that its hash names; nothing was done. Tell the "
            "coordinator.",
            queue=queue.id,
        )


# ---- the four steps ------------------------------------------------------------------------------------------------


class QueueClient:
    """Training without appointment, for a hospital's own programs; the commands of `medhive-site` are the same.

    Args:
        site: the hospital's opened installation.
        trainer: does the work in a process of its own.
        study: whose queue; the only one with a queue when left out.
    """

    def __init__(self, site: Site, trainer: Trainer, study: str | None = None) -> None:
        self._site = site
        self._trainer = trainer
        self.study = study or _only_queue(site)

    def check_server_status(self) -> QueueStatus:
        """How full the queue is and whether there is a model; names only of this hospital."""
        return self._site.gateway.queue_status(self.study)

    def download_global_model(self, on_progress: Progress | None = None) -> KnownVersion:
        """Fetch the newest global model, unless it lies here, and check it against the coordinator's signature.

        Raises:
            NotFound: there is none yet; `train_federated` makes the first.
            BadSignature, DigestMismatch: it is not what the coordinator signed.
        """
        site = self._site
        offered = [item for item in site.gateway.versions(self.study) if item.state is not VersionState.HELD]
        newest = max((item for item in offered if item.bytes_kept), key=lambda item: item.version, default=None)
        if newest is None:
            raise NotFound(f"The study {self.study} has no model yet; train, and it begins with the study's own seed.")
        known = site.store.version(self.study, newest.version)
        if known is not None and known.file.exists() and known.digest == newest.digest:
            return known
        return fetch_version(site, newest, on_progress)

    def train_federated(self, listener: Listener | None = None) -> Trained:
        """Train from the newest model on the own data and keep the update here; a former one that was not sent is replaced.

        A queue that nobody has answered is agreed to first where a policy allows it.

        Raises:
            NotAllowed, Expired: this hospital's own consent does not cover it.
            TrainingPaused: the hospital has paused training.
            TrainingUnderWay: another program of it is training for this queue.
            OtherInitialWeights: version 0 is not what this software makes of the study's seed.
            JobFailed: the training failed, or the data are not those that were consented to.
        """
        site, queue = self._site, self._site.gateway.queue(self.study)
        if is_unanswered(site, queue) and isinstance(policy := policy_on(site, queue), PolicyBody):
            agree_by_policy(site, self._trainer, queue, policy)
        consent = valid_queue_consent(site, queue, site.latest_now())
        if not site.limits().may_train(datetime.now()):
            raise TrainingPaused("Training is paused here, or its hours are over; see medhive-site settings.")
        folder = self._folder()
        with one_at_a_time(folder / ".train.lock", 0.0) as held:
            if not held:
                raise TrainingUnderWay(
                    f"Another training for the queue of {self.study} is under way here; wait for its end."
                )
            base = self._base(queue, consent, listener)
            result = self._work(queue, self._job(queue, consent, base, folder / "new.safetensors"), listener)
            return self._kept(queue, base, result, folder)

    def send_update_to_server(self, on_progress: Progress | None = None) -> QueueContributionAnswer:
        """Send the update that waits here, going on where an earlier try stopped; returns what the coordinator keeps.

        Raises:
            NotFound: nothing waits here.
            NotAllowed, Expired: this hospital's own consent does not cover it (any more).
            MedHiveError: the coordinator's refusal.
        """
        site, kept = self._site, self._site.store.fact(self._update_key)
        if kept is None:
            raise NotFound(f"No update for {self.study} waits here; train first.", study=self.study)
        contribution = QueueContribution.model_validate(kept["contribution"])
        queue = site.gateway.queue(self.study)
        valid_queue_consent(site, queue, site.latest_now())
        file = site.settings.state_dir / kept["file"]
        site.gateway.send_contribution(contribution, file, on_progress)
        answer = self._acknowledged(contribution)
        site.store.change_fact(_key(self.study), lambda consent: {**consent, "made": consent["made"] + 1})
        site.store.set_fact(self._update_key, None)
        file.unlink(missing_ok=True)
        return answer

    def contributions(self) -> list[QueueContributionAnswer]:
        """What this hospital has sent, newest first, and what became of it."""
        return self._site.gateway.contributions(self.study)

    @property
    def waits_to_be_sent(self) -> bool:
        """Whether a trained update lies here."""
        return self._site.store.fact(self._update_key) is not None

    # ---- steps of these ------------------------------------------------------------------------------------------

    @property
    def _update_key(self) -> str:
        return f"queue-update/{self.study}"

    def _folder(self) -> Path:
        folder = self._site.folder("queue") / self.study
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _acknowledged(self, contribution: QueueContribution) -> QueueContributionAnswer:
        digest = contribution.body.content_digest
        return next(item for item in self.contributions() if item.digest == digest)

    def _base(self, queue: QueueAnswer, consent: ConsentBody, listener: Listener | None) -> KnownVersion:
        """The newest model; a study that has none gets its initial weights, which this hospital makes and others compare."""
        try:
            base = self.download_global_model()
        except NotFound as error:
            if isinstance(error, VersionGone):
                raise
            file, digest = self._initial(queue, consent, listener)
            self._site.gateway.send_version_zero(self.study, file, digest)
            base = self.download_global_model()
        if base.version == 0 and self._initial(queue, consent, listener)[1] != base.digest:
            raise OtherInitialWeights(
                f"Version 0 of {self.study} is not what this hospital makes of the study's seed: the software differs. "
                "Compare the versions of MedHive, and tell the coordinator."
            )
        return base

    def _initial(self, queue: QueueAnswer, consent: ConsentBody, listener: Listener | None) -> tuple[Path, str]:
        out = self._folder() / "initial.safetensors"
        job = Job(
            id=f"queue-{secrets.token_hex(4)}",
            kind=JobKind.INITIALISE,
            source=self._site.source(self.study, queue.spec.task, queue.spec.data),
            device=self._site.limits().device,
            fingerprint=consent.dataset_fingerprint,
            out=out,
        )
        return out, str(self._work(queue, job, listener)["digest"])

    def _job(self, queue: QueueAnswer, consent: ConsentBody, base: KnownVersion, out: Path) -> Job:
        options, statistics = queue.spec.options, base.manifest.body.statistics
        return Job(
            id=f"queue-{secrets.token_hex(4)}",
            kind=JobKind.TRAIN,
            source=self._site.source(self.study, queue.spec.task, queue.spec.data, dict(statistics)),
            device=self._site.limits().device,
            fingerprint=consent.dataset_fingerprint,
            weights={"base": base.file},
            plan=Plan(
                round=1,
                rounds=1,
                local_epochs=options.local_epochs,
                batch_size=options.batch_size,
                lr=options.lr,
                seed=options.seed,
                penalty=options.penalty,
                C=options.C,
            ),
            out=out,
        )

    def _work(self, queue: QueueAnswer, job: Job, listener: Listener | None) -> dict[str, Any]:
        ticket = self._trainer.submit(job, listener) if listener else self._trainer.submit(job)
        try:
            while not ticket.wait(LOOK_S):
                valid_queue_consent(self._site, queue, self._site.latest_now())
            # Once more: short work is done before the first look.
            valid_queue_consent(self._site, queue, self._site.latest_now())
            return ticket.result()
        finally:
            self._trainer.cancel(ticket)

    def _kept(self, queue: QueueAnswer, base: KnownVersion, result: Mapping[str, Any], folder: Path) -> Trained:
        site = self._site
        body = QueueContributionBody(
            queue_id=queue.id,
            study=self.study,
            site=site.name,
            spec_hash=queue.spec_hash,
            base_version=base.version,
            base_digest=base.digest,
            content_digest=result["digest"],
            content_size_bytes=result["size_bytes"],
            examples=result["examples"],
            metrics=_plain(result["metrics"]),
            training_s=result["training_s"],
            issued_at=site.now(),
        )
        contribution = sign(body, site.consent_key)
        file = folder / f"{body.content_digest}.safetensors"
        (folder / "new.safetensors").replace(file)
        kept = {
            "contribution": contribution.model_dump(mode="json"),
            "file": str(file.relative_to(site.settings.state_dir)),
        }
        site.store.set_fact(self._update_key, kept)
        for other in folder.glob("*.safetensors"):
            if other != file:
                other.unlink()
        return Trained(contribution, file)


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a manifest has room for: no class's own."""
    finite = {name: value for name, value in metrics.items() if "/" not in name and math.isfinite(value)}
    return dict(list(finite.items())[:MAX_METRICS])


def _only_queue(site: Site) -> str:
    found = open_queues(site)
    if len(found) == 1:
        return found[0].study
    if not found:
        raise NotFound("No study of this hospital has an open queue.")
    raise InvalidInput(f"Several studies have a queue ({', '.join(item.study for item in found)}); name one.")
