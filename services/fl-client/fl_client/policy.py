"""The policy file: what a named person allows to be consented to without asking anybody again.

It is signed with the hospital's consent key, so that a file that somebody edited or copied from another hospital counts
for nothing. Whatever it does not plainly allow waits for a person.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, ValidationError

from fl_client.site import Site
from medhive.consent import MAX_VALIDITY
from medhive.errors import BadSignature, InvalidInput
from medhive.queues import QUEUE_STRATEGY, QueueSpec
from medhive.signing import Signed, SignedBody, VerifyKey, sign
from medhive.spec import MAX_LOCAL_EPOCHS, MAX_ROUNDS, Name, RunSpec, explain

FILE = "policy.json"
MAX_FILE_BYTES = 256 * 1024
MAX_PERSON = 120


class PolicyBody(SignedBody):
    """What may be consented to by itself. An empty `strategies` allows every strategy."""

    DOMAIN = "medhive.policy.v1"
    site: Name
    coordinator_key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    studies: tuple[Name, ...] = Field(min_length=1, max_length=100)
    max_rounds: int = Field(ge=1, le=MAX_ROUNDS)
    max_local_epochs: int = Field(MAX_LOCAL_EPOCHS, ge=1, le=MAX_LOCAL_EPOCHS)
    min_sites: int = Field(1, ge=1, le=10_000)
    strategies: tuple[Annotated[str, Field(max_length=63)], ...] = Field((), max_length=50)
    issued_at: AwareDatetime
    expires_at: AwareDatetime
    person: str = Field(min_length=1, max_length=MAX_PERSON)


Policy = Signed[PolicyBody]


def sign_policy(
    site: Site,
    *,
    person: str,
    studies: tuple[str, ...],
    max_rounds: int,
    valid_for: timedelta,
    max_local_epochs: int = MAX_LOCAL_EPOCHS,
    min_sites: int = 1,
    strategies: tuple[str, ...] = (),
) -> Policy:
    """Sign a policy and put it in force, in place of an earlier one.

    Raises:
        InvalidInput: a value is out of range; the text names it.
    """
    if not timedelta(0) < valid_for <= MAX_VALIDITY:
        raise InvalidInput("A policy must end, within a year.")
    now = site.now()
    try:
        body = PolicyBody(
            site=site.name,
            coordinator_key_id=site.identity.verify_key.key_id,
            studies=studies,
            max_rounds=max_rounds,
            max_local_epochs=max_local_epochs,
            min_sites=min_sites,
            strategies=tuple(name.lower() for name in strategies),
            issued_at=now,
            expires_at=now + valid_for,
            person=person,
        )
    except ValidationError as error:
        raise InvalidInput(f"The policy does not fit: {explain(error)}.") from error
    policy = sign(body, site.consent_key)
    path = policy_path(site)
    part = path.with_suffix(".part")
    part.write_text(policy.model_dump_json(indent=2) + "\n", "utf-8")
    part.chmod(0o600)
    part.replace(path)
    return policy


def policy_path(site: Site) -> Path:
    """Where the policy in force lies."""
    return site.settings.state_dir / FILE


def load_policy(site: Site) -> PolicyBody | None:
    """The policy in force, or None when there is no file.

    Raises:
        InvalidInput: the file is no policy.
        BadSignature: it was not signed by this hospital for this coordinator, or was edited afterwards.
    """
    path = policy_path(site)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(f"{path} is too large for a policy; sign a new one with `medhive-site policy`.")
        policy = Policy.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InvalidInput(
            f"{path} is no policy: {explain(error)}. Sign a new one with `medhive-site policy`."
        ) from error
    return check_policy(policy, site.consent_key.public, site.name, site.identity.key_ids)


def check_policy(policy: Policy, key: VerifyKey, site: str, coordinator_key_ids: Sequence[str]) -> PolicyBody:
    """Return the body of a policy that this hospital signed for this coordinator.

    Raises:
        BadSignature: somebody else did, for somebody else, or it was edited.
    """
    body = policy.verify(key)
    if body.site != site or body.coordinator_key_id not in coordinator_key_ids:
        raise BadSignature("The policy was signed for another site or coordinator; sign a new one.")
    return body


def remove_policy(site: Site) -> bool:
    """Take the policy out of force; False when there was none."""
    path = policy_path(site)
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def objection(policy: PolicyBody, spec: RunSpec | QueueSpec, now: datetime) -> str | None:
    """Why a policy does not allow a run, or a queue, by itself; None when it does.

    A queue has no rounds: an agreement to it covers as many contributions as the policy allows rounds.
    """
    options = spec.options
    what, strategy = ("run", spec.options.strategy) if isinstance(spec, RunSpec) else ("queue", QUEUE_STRATEGY)
    rounds = spec.options.rounds if isinstance(spec, RunSpec) else 0
    reasons = (
        (not policy.issued_at - timedelta(minutes=5) <= now < policy.expires_at, "the policy is not valid now"),
        (spec.study not in policy.studies, f"the policy does not name the study {spec.study}"),
        (rounds > policy.max_rounds, f"the run has {rounds} rounds, the policy allows {policy.max_rounds}"),
        (
            options.local_epochs > policy.max_local_epochs,
            f"the {what} has {options.local_epochs} local epochs, the policy allows {policy.max_local_epochs}",
        ),
        (options.min_sites < policy.min_sites, f"the policy wants at least {policy.min_sites} sites in a {what}"),
        (
            bool(policy.strategies) and strategy not in policy.strategies,
            f"the policy does not name the strategy {strategy}",
        ),
    )
    return next((text for wrong, text in reasons if wrong), None)
