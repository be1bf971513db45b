"""The signed envelopes that travel through Flower: tasks outward, contributions back.

Flower does not check that a reply's sender is the authenticated node, and weights do not travel in its messages. So an
envelope says who asks whom for what, names the weights by their SHA-256, and carries a signature of the institution that
vouches for it; the bytes themselves come from the blob store.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from medhive.errors import BadSignature, InvalidInput, TooLarge
from medhive.signing import Signed, SignedBody, VerifyKey
from medhive.spec import Digest, Name, explain
from medhive.version import require_compatible

# The sums over the widest table fit, and the metrics of a thousand classes. The way in for nodes' messages takes twice that.
MAX_ENVELOPE_BYTES = 512 * 1024
# The most classes of which a confusion matrix fits; it grows with their square.
MAX_MATRIX_CLASSES = 400


class TaskType(StrEnum):
    """What a site is asked to do."""

    INITIALISE = "initialise"  # make the study's initial weights from its seed, answer with their digest
    STATISTICS = "statistics"  # sums over the own training rows, for federated mean and variance
    TRAIN = "train"  # evaluate the base on the validation part, train, answer with an update
    EVALUATE = "evaluate"  # evaluate the base on the validation part


class TaskBody(SignedBody):
    """The coordinator's order to one site for one step of one run."""

    DOMAIN: ClassVar[str] = "medhive.task.v1"
    protocol: int
    type: TaskType
    run_id: Name
    study: Name
    site: Name
    round: int = Field(ge=0)
    rounds: int = Field(ge=1)
    spec_hash: Digest
    base_digest: Digest | Literal[""] = ""
    base_size_bytes: int = Field(0, ge=0)
    # Of SCAFFOLD: the vector to correct each step by, made for this site alone.
    correction_digest: Digest | Literal[""] = ""
    correction_size_bytes: int = Field(0, ge=0)
    statistics: dict[str, list[FiniteFloat]] = Field(default_factory=dict)
    deadline_s: float = Field(gt=0)
    issued_at: AwareDatetime
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")


class ContributionBody(SignedBody):
    """One site's answer to one task; `outcome` other than `ok` carries a reason and nothing to add up."""

    DOMAIN: ClassVar[str] = "medhive.contribution.v1"
    protocol: int
    type: TaskType
    run_id: Name
    site: Name
    round: int = Field(ge=0)
    spec_hash: Digest
    base_digest: Digest | Literal[""] = ""
    content_digest: Digest | Literal[""] = ""
    content_size_bytes: int = Field(0, ge=0)
    examples: int = Field(0, ge=0, le=10**9)
    # The sum of the learning rates of all steps, where the task takes such steps.
    rate_sum: FiniteFloat = Field(0.0, ge=0)
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict, max_length=4000)
    statistics: dict[str, list[FiniteFloat]] = Field(default_factory=dict)
    # Rows are the true classes, columns the predicted ones, over the site's validation part.
    confusion: list[list[int]] = Field(default_factory=list)
    outcome: Literal["ok", "failed", "refused"] = "ok"
    reason_code: str = Field("", max_length=60)
    reason: str = Field("", max_length=300)
    training_s: float = Field(0.0, ge=0)
    issued_at: AwareDatetime


class TaskHead(BaseModel):
    """What a task says in every version of the exchange: enough to answer that it cannot be read."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    type: TaskType
    run_id: Name
    round: int = Field(ge=0)
    spec_hash: Digest
    base_digest: Digest | Literal[""] = ""


Task = Signed[TaskBody]
Contribution = Signed[ContributionBody]
PEER: Mapping[type, tuple[str, str]] = {
    Task: ("this hospital", "the coordinator"),
    Contribution: ("the coordinator", "the hospital"),
}
"""Who reads an envelope, and who made it."""
Envelope = TypeVar("Envelope", Task, Contribution)


def to_bytes(envelope: Task | Contribution) -> bytes:
    """Write an envelope for the wire.

    Raises:
        TooLarge: it is above `MAX_ENVELOPE_BYTES`.
    """
    raw = envelope.model_dump_json().encode()
    _limit(len(raw))
    return raw


def from_bytes(kind: type[Envelope], raw: bytes) -> Envelope:
    """Read an envelope; its signature is not checked yet.

    Raises:
        TooLarge: it is above `MAX_ENVELOPE_BYTES`.
        IncompatibleVersion: whoever made it speaks another protocol; the text says which side to upgrade.
        InvalidInput: it is no such envelope.
    """
    _limit(len(raw))
    # Before the rest, which may have fields that this version does not know.
    require_compatible(_outline(_OfAny, raw).body.protocol, *PEER[kind])
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise InvalidInput(f"The envelope cannot be read: {explain(error)}.") from error


def head_of(raw: bytes) -> TaskHead:
    """What can be read of a task that another version made; nothing of it is verified. Raises `InvalidInput`."""
    return _outline(_OfTask, raw).body


class _Spoken(BaseModel):
    protocol: int


class _OfAny(BaseModel):
    body: _Spoken


class _OfTask(BaseModel):
    body: TaskHead


Outline = TypeVar("Outline", _OfAny, _OfTask)


def _outline(kind: type[Outline], raw: bytes) -> Outline:
    """The known fields of an envelope, whatever else is in it."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise InvalidInput(f"The envelope cannot be read: {explain(error)}.") from error


def _limit(size: int) -> None:
    if size > MAX_ENVELOPE_BYTES:
        raise TooLarge(f"The envelope has {size} bytes; the limit is {MAX_ENVELOPE_BYTES}.", size_bytes=size)


def matrix_to_send(confusion: list[list[int]]) -> list[list[int]]:
    """A confusion matrix, or none where it would not fit: then each class's recall says what can be said."""
    return confusion if len(confusion) <= MAX_MATRIX_CLASSES else []


def check_contribution_envelope(envelope: Contribution, key: VerifyKey, task: TaskBody) -> ContributionBody:
    """Return the body of a contribution that the addressed site itself made for exactly this task.

    Raises:
        BadSignature: another site's key, or an answer to another task (a replay).
    """
    body = envelope.verify(key)
    for field in ("type", "run_id", "site", "round", "spec_hash", "base_digest"):
        if getattr(body, field) != getattr(task, field):
            raise BadSignature(
                f"The contribution says {field} {getattr(body, field)!r}, the task said {getattr(task, field)!r}; it was "
                "made for another task.",
                field=field,
            )
    return body
