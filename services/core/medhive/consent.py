"""Consent: a hospital's own signature under one run, and everything that must hold before it counts.

The same checks run on both sides. The coordinator's gateway refuses a consent that does not hold, the aggregator addresses
only sites whose consent holds, and the hospital's node refuses any task that its own consent does not cover.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Literal

from pydantic import AwareDatetime, Field

from medhive.errors import BadSignature, Expired, InvalidInput
from medhive.signing import Signed, SignedBody, VerifyKey
from medhive.spec import MAX_ROUNDS, Digest, Name, Privacy

# A consent is valid for a run, not for ever: the longest that a person may sign for.
MAX_VALIDITY = timedelta(days=365)
# Clocks of hospitals are off by minutes; a consent "from the future" within this is honoured.
CLOCK_TOLERANCE = timedelta(minutes=5)


class ConsentBody(SignedBody):
    """What a hospital signs: exactly this run, this specification, these data, this long."""

    DOMAIN: ClassVar[str] = "medhive.consent.v1"
    decision: Literal["granted", "declined", "withdrawn"]
    coordinator_key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    site: Name
    run_id: Name
    spec_hash: Digest
    # HMAC-SHA256 under the site's own secret: says "the same data as before" and nothing else.
    dataset_fingerprint: Digest | Literal[""] = ""
    # Counts by reason of the files that check-data left out; never a name.
    skipped: dict[Name, int] = Field(default_factory=dict, max_length=100)
    privacy_limits: Privacy = Privacy()
    max_rounds: int = Field(ge=0, le=MAX_ROUNDS)
    issued_at: AwareDatetime
    expires_at: AwareDatetime
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    person: str = Field(min_length=1, max_length=120)
    reason: str = Field("", max_length=500)


Consent = Signed[ConsentBody]


def check_consent(
    consent: Consent,
    key: VerifyKey,
    *,
    site: str,
    run_id: str,
    spec_hash: str,
    rounds: int,
    coordinator_key_ids: Sequence[str],
    now: datetime | None = None,
) -> ConsentBody:
    """Return the consent's body when it covers this run, and refuse it otherwise.

    Args:
        key: the site's consent key, as recorded at its join.
        rounds: the rounds that are to be trained; the consent must allow as many.
        coordinator_key_ids: of the coordinator's present key, first, and of those that it has followed.
        now: the time to judge by; the present when left out.

    Raises:
        BadSignature: signed by another key, or made for another site, run, specification or coordinator.
        Expired: outside its validity.
        InvalidInput: its validity or its rounds make no sense.
    """
    body = consent.verify(key)
    named = body.coordinator_key_id
    expected = {
        "site": site,
        "run_id": run_id,
        "spec_hash": spec_hash,
        "coordinator_key_id": named if named in coordinator_key_ids else coordinator_key_ids[0],
    }
    for field, value in expected.items():
        if getattr(body, field) != value:
            raise BadSignature(
                f"The consent is for {field} {getattr(body, field)}, not for {value}; sign a consent for this run.",
                field=field,
            )
    moment = now or datetime.now(UTC)
    if body.expires_at <= body.issued_at or body.expires_at - body.issued_at > MAX_VALIDITY:
        raise InvalidInput("A consent must expire after it is issued, within a year.")
    if body.issued_at > moment + CLOCK_TOLERANCE:
        raise Expired(
            f"The consent is dated {body.issued_at.isoformat()}, which lies in the future; set the hospital's clock."
        )
    if body.decision == "granted":
        if moment >= body.expires_at:
            raise Expired(f"The consent expired at {body.expires_at.isoformat()}; sign a new one.", run_id=run_id)
        if body.max_rounds < rounds:
            raise InvalidInput(
                f"The consent allows {body.max_rounds} rounds, the run has {rounds}; sign one that allows as many.",
                max_rounds=body.max_rounds,
                rounds=rounds,
            )
    return body


def covers_round(body: ConsentBody, round_number: int, now: datetime) -> bool:
    """Whether a granted consent still covers one round at one moment."""
    return body.decision == "granted" and round_number <= body.max_rounds and now < body.expires_at
