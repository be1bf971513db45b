"""The contribution queue: what a hospital consents to, what it signs, and how what waits becomes the next global model.

For hospitals that cannot be online together: each trains when it likes, from the newest global model, and uploads; the
aggregator averages when enough have arrived. Every decision about that is here and pure: the specification and its hash,
when an average is due, which contributions it takes, and what each of them counts.

A contribution that began from an older version is not mixed in as it stands, which would pull the model back to where it was
then. What counts is its change (weights minus base), shrunk by its staleness, as in FedBuff (Nguyen et al., "Federated
Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1 and section 5.1, with s(t) = 1/sqrt(1+t)):

    next = newest + sum over i of (n_i / N) * s(t_i) * (weights_i - base_i),   N = sum of the example counts n_i

Where all began from the newest version this is the mean of the weights by example count, exactly.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import AwareDatetime, Field, FiniteFloat

from medhive.consent import Consent, ConsentBody, check_consent
from medhive.contribution import believable
from medhive.errors import BadSignature, Conflict, InvalidInput
from medhive.packing import Flat, FlatWriter, Layout, WeightsFile, squared_norm, windows
from medhive.signing import Signed, SignedBody, VerifyKey, digest_of
from medhive.spec import MAX_BATCH_SIZE, MAX_LOCAL_EPOCHS, Digest, Frozen, Name, Privacy, StudyData, explain
from medhive.states import ConsentState
from medhive.strategies import MAX_EXAMPLES, AggregateNotFinite
from medhive.wire import MAX_TEXT, Answer, Fenced

QUEUE_PREFIX = "QUEUE_"
"""Of the names of queues, by which consents, versions and commands tell them from runs."""
QUEUE_STRATEGY = "fedavg"
"""The strategy of every queue, by its name in runs."""
MAX_CAPACITY = 1000
"""A hundred times the default; more hospitals are served by more executions."""
MAX_STALENESS = 1000
"""Versions. A change that is a thousand versions old says nothing about the newest one."""
VARIANCES = "running_var"
"""How PyTorch's batch normalisation ends the name of what it keeps."""
MAX_METRICS = 40
"""Plain metrics of a contribution; figures of a thousand classes belong into a run, whose envelope has room for them."""


class TooStale(Conflict):
    """The contribution began from a version that is too old by now."""

    code = "too-stale"


class NotForQueues(InvalidInput):
    """What a run may ask for and a queue cannot have, for a reason that the text gives."""

    code = "not-for-queues"


class NothingToAverage(Conflict):
    """Too few contributions, or of too few hospitals, wait."""

    code = "nothing-to-average"


# ---- the specification ---------------------------------------------------------------------------------------------


class QueueOptions(Frozen):
    """What an admin chooses when a queue is opened.

    `capacity` contributions of at least `min_sites` hospitals make an average due. `max_staleness` counts versions.
    """

    capacity: int = Field(10, ge=1, le=MAX_CAPACITY)
    min_sites: int = Field(2, ge=1, le=MAX_CAPACITY)
    max_staleness: int = Field(10, ge=0, le=MAX_STALENESS)
    local_epochs: int = Field(5, ge=1, le=MAX_LOCAL_EPOCHS)
    batch_size: int = Field(32, ge=1, le=MAX_BATCH_SIZE)
    lr: float | None = Field(None, gt=0, le=100)
    seed: int = Field(42, ge=0, lt=2**32)
    penalty: Literal["l2", "none"] = "l2"
    C: float = Field(1.0, gt=0, le=1e6)
    max_norm: float | None = Field(None, gt=0)
    privacy: Privacy = Privacy()

    def require_supported(self) -> None:
        """Refuse what a queue cannot do, and what this version cannot do.

        Raises:
            NotForQueues: secure aggregation.
            InvalidInput: differential privacy.
        """
        if self.privacy.secagg:
            raise NotForQueues(
                "A queue has no secure aggregation: its masks cancel only when all hospitals of a round exchange keys and "
                "stay until the sum is made, and a queue is for hospitals that are never there together. Use a run."
            )
        self.privacy.require_supported()


class QueueSpec(Frozen):
    """The canonical description of a queue; its SHA-256 is what hospitals consent to. Its strategy is always FedAvg."""

    format: Literal[1] = 1
    kind: Literal["queue"] = "queue"
    study: Name
    task: Name
    data: StudyData
    options: QueueOptions

    @property
    def spec_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return digest_of(self.model_dump(mode="json"))


class QueueState(StrEnum):
    """How full a queue is."""

    EMPTY = "empty"
    PARTIAL = "partial"
    FULL = "full"
    OVERFLOW = "overflow"


def queue_state(size: int, capacity: int) -> QueueState:
    """The word for so many contributions in a queue of this capacity."""
    if size == 0:
        return QueueState.EMPTY
    if size < capacity:
        return QueueState.PARTIAL
    return QueueState.FULL if size == capacity else QueueState.OVERFLOW


def check_queue_consent(
    consent: Consent,
    key: VerifyKey,
    *,
    site: str,
    queue_id: str,
    spec: QueueSpec,
    coordinator_key_ids: Sequence[str],
    now: AwareDatetime,
) -> ConsentBody:
    """Return the consent's body when it covers this queue; its `run_id` is QUEUE_n, its `max_rounds` counts contributions.

    Raises:
        BadSignature, Expired, InvalidInput: as `medhive.consent.check_consent`.
    """
    return check_consent(
        consent,
        key,
        site=site,
        run_id=queue_id,
        spec_hash=spec.spec_hash,
        rounds=1,
        coordinator_key_ids=coordinator_key_ids,
        now=now,
    )


# ---- contributions -------------------------------------------------------------------------------------------------


class QueueContributionBody(SignedBody):
    """What goes with the whole weights (no difference) of one contribution, signed with the site's consent key."""

    DOMAIN: ClassVar[str] = "medhive.queue-contribution.v1"
    queue_id: Name
    study: Name
    site: Name
    spec_hash: Digest
    base_version: int = Field(ge=0)
    base_digest: Digest
    content_digest: Digest
    content_size_bytes: int = Field(ge=1)
    examples: int = Field(ge=1, le=MAX_EXAMPLES)
    metrics: dict[Name, FiniteFloat] = Field(default_factory=dict, max_length=MAX_METRICS)
    training_s: float = Field(0.0, ge=0)
    issued_at: AwareDatetime


QueueContribution = Signed[QueueContributionBody]


def check_queue_contribution(
    contribution: QueueContribution, key: VerifyKey, *, site: str, queue_id: str, spec: QueueSpec
) -> QueueContributionBody:
    """Return the body of a contribution that this site itself made for exactly this queue.

    Raises:
        BadSignature: another key, or made for another site, study, queue or specification; `data.field` names it.
    """
    body = contribution.verify(key)
    expected = {"site": site, "study": spec.study, "queue_id": queue_id, "spec_hash": spec.spec_hash}
    for field, value in expected.items():
        if getattr(body, field) != value:
            raise BadSignature(
                f"The contribution says {field} {getattr(body, field)}, the queue is for {value}; train for this queue and "
                "upload that.",
                field=field,
            )
    return body


# ---- the average ---------------------------------------------------------------------------------------------------


def staleness_of(base_version: int, newest_version: int) -> int:
    """How many versions of the study came after the one that a contribution began from.

    Raises:
        InvalidInput: it began from a version that does not exist yet.
    """
    if base_version > newest_version:
        raise InvalidInput(f"Version {base_version} does not exist; the newest is {newest_version}.")
    return newest_version - base_version


def staleness_weight(staleness: int) -> float:
    """s(t) = 1/sqrt(1+t) of FedBuff's experiments: 1 for a contribution that began from the newest version."""
    return 1.0 / math.sqrt(1.0 + staleness)


def require_fresh_enough(base_version: int, newest_version: int, limit: int) -> int:
    """The staleness, when the queue still takes it.

    Raises:
        TooStale: it is above the limit.
        InvalidInput: as `staleness_of`.
    """
    staleness = staleness_of(base_version, newest_version)
    if staleness > limit:
        raise TooStale(
            f"The contribution began from version {base_version}, {staleness} versions ago; the queue takes {limit}. Train "
            "again from the newest one.",
            staleness=staleness,
            limit=limit,
        )
    return staleness


@dataclass(frozen=True)
class Waiting:
    """A contribution in the queue, as the decisions about it need it; `number` grows in the order of arrival."""

    number: int
    site: str
    examples: int
    base_version: int


def due(waiting: Sequence[Waiting], options: QueueOptions) -> bool:
    """Whether an average falls due by itself: the capacity is reached, and the first `capacity` are of enough hospitals."""
    return (
        len(waiting) >= options.capacity and len({item.site for item in taken(waiting, options)}) >= options.min_sites
    )


def taken(waiting: Sequence[Waiting], options: QueueOptions) -> tuple[Waiting, ...]:
    """Those that the next average takes: the oldest, up to the capacity, with room kept for `min_sites` hospitals.

    One hospital that uploads much must not hold up the others: when the oldest are of too few hospitals, the newest of them
    make room for the oldest contribution of each hospital that is missing.
    """
    ordered = sorted(waiting, key=lambda item: item.number)
    first_of: dict[str, Waiting] = {}
    for item in ordered:
        first_of.setdefault(item.site, item)
    reserved = list(first_of.values())[: min(options.min_sites, options.capacity)]
    others = [item for item in ordered if item not in reserved]
    chosen = reserved + others[: options.capacity - len(reserved)]
    return tuple(sorted(chosen, key=lambda item: item.number))


def require_enough(waiting: Sequence[Waiting], options: QueueOptions) -> tuple[Waiting, ...]:
    """Those that an average by hand takes.

    Raises:
        NothingToAverage: none wait, or of fewer hospitals than `min_sites`: a mean over one hospital would show its model.
    """
    chosen = taken(waiting, options)
    sites = len({item.site for item in chosen})
    if sites < options.min_sites:
        raise NothingToAverage(
            f"Contributions of {sites} hospitals wait; the queue needs {options.min_sites} (min_sites), so that no version "
            "shows the model of one. Wait for more.",
            sites=sites,
            min_sites=options.min_sites,
        )
    return chosen


@dataclass(frozen=True)
class Share:
    """What one contribution counts: `weight` is (n_i / N) * s(staleness), the factor before its change."""

    number: int
    staleness: int
    weight: float


def plan_average(contributions: Sequence[Waiting], newest_version: int) -> tuple[Share, ...]:
    """The share of each contribution, in the order of their numbers; depends on nothing else.

    Raises:
        NothingToAverage: there is none.
        InvalidInput: one began from a version that does not exist.
    """
    if not contributions:
        raise NothingToAverage("No contribution is left to average.")
    total = sum(item.examples for item in contributions)
    shares = []
    for item in sorted(contributions, key=lambda each: each.number):
        staleness = staleness_of(item.base_version, newest_version)
        shares.append(Share(item.number, staleness, item.examples / total * staleness_weight(staleness)))
    return tuple(shares)


@dataclass(frozen=True)
class Change:
    """One contribution's files: its weights, those it began from, and its share."""

    weights: Path
    base: Path
    weight: float


def write_average(
    newest: Path, changes: Sequence[Change], out: Path, on_window: Callable[[], None] = lambda: None
) -> tuple[str, float]:
    """Write `newest + sum of weight * (weights - base)` to `out`, atomically; returns its SHA-256 and the change's L2 norm.

    Works in double precision, window by window in the given order: memory stays at a few MiB whatever the model and however
    many the contributions, and the same files give the same bits. `on_window` is called between windows.

    Raises:
        WrongLayout, CorruptWeights, NotFound: a file is not what it should be.
        AggregateNotFinite: the result is no model; nothing was written.
        NoSpace: the disk is full; nothing was written.
    """
    start = WeightsFile.at(newest)
    files = [(_like(start.layout, item.weights), _like(start.layout, item.base), item.weight) for item in changes]
    variances = _variances(start.layout)
    square = 0.0
    with FlatWriter(out, start.layout) as writer, np.errstate(all="ignore"):
        for window in windows(start.layout.size):
            new, moved = _window(start, files, window, variances)
            if not np.isfinite(new).all():
                raise AggregateNotFinite(
                    "The average overflowed; look at the contributions' norms, and clear the queue."
                )
            square += moved
            writer.append(new)
            on_window()
    return writer.digest, math.sqrt(square)


def _like(layout: Layout, path: Path) -> WeightsFile:
    file = WeightsFile.at(path)
    layout.require(file.layout, f"the weights in {path.name}")
    return file


def _variances(layout: Layout) -> tuple[slice, ...]:
    """Where a network keeps variances of its batches."""
    places = zip(layout.names, layout.offsets, layout.shapes, strict=True)
    return tuple(slice(at, at + math.prod(shape)) for name, at, shape in places if name.endswith(VARIANCES))


def _window(
    start: WeightsFile,
    files: Sequence[tuple[WeightsFile, WeightsFile, float]],
    window: slice,
    variances: Sequence[slice],
) -> tuple[Flat, float]:
    """One window of the result, and the square of its change."""
    old = start.read(window.start, window.stop)
    change = np.zeros(old.shape, np.float64)
    for weights, base, weight in files:
        before = base.read(window.start, window.stop)
        for place in variances:
            # Mixed with the newest as they stand: a stale change of a variance could make it negative.
            inside = slice(max(place.start - window.start, 0), max(place.stop - window.start, 0))
            before[inside] = old[inside]
        change += weight * (weights.read(window.start, window.stop).astype(np.float64) - before)
    return (old + change).astype(np.float32), squared_norm(change)


def mean_metrics(contributions: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean by examples of each `train_...` metric over those that report it.

    A contribution's `val_...` figures are of the model that it began from, not of the average, so they stay in the lineage.
    """
    given = [(examples, believable(metrics)) for examples, metrics in contributions]
    names = sorted({name for _, metrics in given for name in metrics if name.startswith("train_")})
    means = {}
    for name in names:
        parts = [(examples, metrics[name]) for examples, metrics in given if name in metrics]
        means[name] = math.fsum(count * value for count, value in parts) / sum(count for count, _ in parts)
    return means


# ---- the exchange --------------------------------------------------------------------------------------------------


class ContributionState(StrEnum):
    """What became of a contribution."""

    WAITING = "waiting"
    TAKEN = "taken"
    COUNTED = "counted"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"
    CLEARED = "cleared"


CONTRIBUTION_TRANSITIONS: Mapping[ContributionState, frozenset[ContributionState]] = {
    ContributionState.WAITING: frozenset(
        {ContributionState.TAKEN, ContributionState.REFUSED, ContributionState.WITHDRAWN, ContributionState.CLEARED}
    ),
    # Back to waiting: the average that had taken it failed, and another may count it.
    ContributionState.TAKEN: frozenset(
        {
            ContributionState.WAITING,
            ContributionState.COUNTED,
            ContributionState.REFUSED,
            ContributionState.WITHDRAWN,
            ContributionState.CLEARED,
        }
    ),
    ContributionState.COUNTED: frozenset(),
    ContributionState.REFUSED: frozenset(),
    # Sent again after a new consent: the same training gives the same bytes.
    ContributionState.WITHDRAWN: frozenset({ContributionState.WAITING}),
    ContributionState.CLEARED: frozenset(),
}
IN_THE_QUEUE = (ContributionState.WAITING, ContributionState.TAKEN)


class ExecutionState(StrEnum):
    """What became of one average."""

    DUE = "due"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class QueueConsentAnswer(Answer):
    """One member site's standing in a queue; `pending` until it has answered."""

    site: str
    state: ConsentState
    consent: Consent | None = None
    answered_at: AwareDatetime | None = None


class QueueAnswer(Answer):
    """A queue; `id` is QUEUE_n. A study has one open queue at most; another specification is another queue."""

    id: str
    study: str
    open: bool
    spec: QueueSpec
    spec_hash: str
    created_at: AwareDatetime
    newest_version: int | None = None
    consents: tuple[QueueConsentAnswer, ...] = ()


class WaitingSite(Answer):
    """A hospital whose contributions wait; its address only for admins."""

    site: str
    contributions: int
    received_at: AwareDatetime
    source_address: str | None = None


class QueueStatus(Answer):
    """GET /status. `queue_size` counts what is not in a version yet; names only for those who are logged in."""

    study: str
    queue_id: str
    queue_size: int
    capacity: int
    state: QueueState
    queued_sites: int
    connected_sites: int
    model_available: bool
    newest_version: int | None = None
    averaging: bool = False
    waiting: tuple[WaitingSite, ...] = ()
    connected: tuple[str, ...] = ()


class QueueContributionAnswer(Answer):
    """POST /upload: a contribution that the coordinator keeps, and what became of it: a version's lineage line by line."""

    number: int
    queue_id: str
    study: str
    site: str
    state: ContributionState
    digest: str
    base_version: int
    examples: int
    metrics: dict[str, float] = Field(default_factory=dict)
    received_at: AwareDatetime
    execution: int | None = None
    staleness: int | None = None
    weight: float | None = None
    version: int | None = None
    reason: str = ""


class ExecutionAnswer(Answer):
    """One average of a queue."""

    execution: int
    queue_id: str
    study: str
    state: ExecutionState
    contributions: int
    asked_by: str
    created_at: AwareDatetime
    ended_at: AwareDatetime | None = None
    version: int | None = None
    reason: str = ""


class TakenContribution(Answer):
    """A contribution to be averaged, with what proves that its hospital made it for this queue and agreed to it."""

    number: int
    contribution: QueueContribution
    consent: Consent
    consent_public_key: str


class ExecutionTask(Answer):
    """POST /server/queue/lease and .../look: one average that is due, under a lease, as it stands now."""

    execution: int
    fence: int
    expires_at: AwareDatetime
    queue_id: str
    spec: QueueSpec
    newest_version: int
    newest_digest: Digest
    newest_size_bytes: int
    contributions: tuple[TakenContribution, ...]


class ExecutionEnd(Fenced):
    """POST /server/queue/executions/{n}/end. `done` needs the digest of the average, and counts all that are not refused.

    `newest_version` and the numbers say what the average was made of: when that has changed meanwhile, it is made anew.
    """

    state: Literal["done", "failed"]
    newest_version: int = Field(ge=0)
    counted: tuple[int, ...] = Field((), max_length=MAX_CAPACITY)
    refused: dict[int, str] = Field(default_factory=dict, max_length=MAX_CAPACITY)
    digest: Digest | None = None
    reason: str = Field("", max_length=MAX_TEXT)


UPLOAD = "/upload"
"""Where contributions go, at the root of the coordinator's address."""
MANIFEST_HEADER = "MedHive-Contribution"
"""Carries the signed manifest of an upload, as base64url of its JSON."""
MAX_MANIFEST_BYTES = 6000
"""As text of a header: what proxies and servers take of a header line is 8 kB."""


def manifest_to_header(contribution: QueueContribution) -> str:
    """The manifest as a header carries it.

    Raises:
        InvalidInput: it is too long.
    """
    text = base64.urlsafe_b64encode(contribution.model_dump_json(exclude_defaults=True).encode()).decode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"The manifest has {len(text)} bytes, above {MAX_MANIFEST_BYTES}; report fewer metrics.")
    return text


def manifest_from_header(text: str | None) -> QueueContribution:
    """Read it; its signature is not checked yet.

    Raises:
        InvalidInput: it is missing, too long or no manifest.
    """
    if not text or len(text) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"Send the signed manifest of the contribution in the header {MANIFEST_HEADER}.")
    try:
        return QueueContribution.model_validate_json(base64.urlsafe_b64decode(text.encode()))
    except ValueError as error:
        raise InvalidInput(f"The header {MANIFEST_HEADER} cannot be read: {explain(error)}.") from error
