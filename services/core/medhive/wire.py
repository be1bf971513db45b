"""The bodies of the gateway's HTTP API, one model for both ends of each exchange.

Times are ISO 8601 with a zone, sizes in bytes, durations in seconds. Unknown fields are refused in requests and ignored
in answers, so that an older hospital can read a newer coordinator.
"""

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from medhive.consent import Consent
from medhive.sealing import SealingKeyBody
from medhive.signing import Signed, SignedBody
from medhive.spec import Digest, Frozen, Name, RunSpec, StudyData
from medhive.states import (
    Activity,
    ConsentState,
    DecisionState,
    RequestState,
    Role,
    RoundState,
    RunState,
    SiteState,
    VersionState,
)

MAX_TEXT = 500
API = "/api/v1"


class Answer(BaseModel):
    """Base of answers: fields that a newer server adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# ---- identity ------------------------------------------------------------------------------------------------------


class Login(Frozen):
    """POST /login."""

    username: Name
    password: str = Field(min_length=1, max_length=200)


class TokenAnswer(Answer):
    """A bearer token; shown once, kept only as a hash."""

    token: str
    role: Role
    name: str
    expires_at: AwareDatetime


class NewAccount(Frozen):
    """POST /accounts. A `site` account needs the site whose people use it."""

    username: Name
    role: Literal["admin", "analyst", "site"]
    site: Name | None = None
    password: str | None = Field(None, min_length=12, max_length=200)


class AccountAnswer(Answer):
    """An account; `password` only in the answer that made it up."""

    username: str
    role: Role
    site: str | None = None
    created_at: AwareDatetime
    disabled: bool = False
    password: str | None = None


class AddressTrust(StrEnum):
    """Who ends TLS at the coordinator's public address, and so whose roots a hospital needs for it."""

    PINNED = "pinned"
    """The coordinator, with a certificate of its own CA; nothing else is trusted."""
    PUBLIC = "public"
    """The coordinator, with a certificate of a public CA."""
    TUNNEL = "tunnel"
    """Somebody else, with a public certificate; who passes on what he reads."""


class IntroductionBody(SignedBody):
    """What the coordinator signs about itself whenever it is asked: whom to trust there, and where Flower answers.

    `nonce` is the asker's, so that an old introduction cannot be shown again. All `authorities` (PEM) count; the first
    one issues.
    """

    DOMAIN = "medhive.introduction.v1"
    authorities: tuple[str, ...] = Field(min_length=1, max_length=4)
    address_trust: AddressTrust
    fleet_address: str = Field(max_length=300)
    nonce: str = Field(pattern=r"^[0-9a-f]{0,64}$")
    issued_at: AwareDatetime


class SuccessionBody(SignedBody):
    """An old coordinator's key names the one that comes after it; signed with the old one."""

    DOMAIN = "medhive.succession.v1"
    old_public_key: str = Field(max_length=100)
    new_public_key: str = Field(max_length=100)
    issued_at: AwareDatetime


MAX_SUCCESSIONS = 100  # a key a year outlasts everything else here

Introduction = Signed[IntroductionBody]
Succession = Signed[SuccessionBody]


class CoordinatorAnswer(Answer):
    """GET /coordinator?nonce=: who this is; open to everybody.

    Only what `introduction` and `successions` say is signed (`medhive.introduction` checks them); `ca_certificate` is the
    first authority, for a person who compares its fingerprint.
    """

    name: str
    version: str
    protocol: int
    oldest_protocol: int
    key_id: str
    public_key: str
    ca_certificate: str
    time: AwareDatetime
    introduction: Introduction
    successions: tuple[Succession, ...] = Field((), max_length=MAX_SUCCESSIONS)
    sealing_key: Signed[SealingKeyBody] | None = None


class TunnelAnswer(Answer):
    """GET /tunnel: the public address of the tunnel, none without one."""

    address: str | None = None
    address_trust: AddressTrust


# ---- sites ---------------------------------------------------------------------------------------------------------


class NewInvite(Frozen):
    """POST /invites."""

    site: Name
    studies: tuple[Name, ...] = ()
    evaluates_only: bool = False
    expires_in_s: float = Field(7 * 24 * 3600, gt=0, le=90 * 24 * 3600)


class InviteAnswer(Answer):
    """An invite; `token` (the JOIN_TOKEN) only in the answer that made it."""

    id: int
    site: str
    studies: tuple[str, ...]
    evaluates_only: bool = False
    created_at: AwareDatetime
    expires_at: AwareDatetime
    used_at: AwareDatetime | None = None
    token: str | None = None


class JoinProof(SignedBody):
    """What a joining site signs with its consent key; the node key signs the same canonical bytes (ECDSA, SHA-384).

    The invite's key signs it too: the invite itself is never sent, so that nobody on the way can use it.
    """

    DOMAIN = "medhive.join.v2"
    INVITE_DOMAIN: ClassVar[str] = "medhive.join-invite.v1"
    """Under which the invite's key signs the same body."""
    site: Name
    invite_public_key: str = Field(max_length=100)
    coordinator_key_id: str
    node_public_key: str = Field(max_length=2000)
    consent_public_key: str = Field(max_length=100)
    issued_at: AwareDatetime


class Join(Frozen):
    """POST /join."""

    protocol: int
    software: str = Field(max_length=50)
    invite_signature: str = Field(max_length=128)
    proof: Signed[JoinProof]
    node_signature: str = Field(max_length=400)


class JoinAnswer(Answer):
    """What a site keeps from its join. `fleet_address` is HOST:PORT or a URL's authority for Flower's fleet API."""

    site: str
    coordinator: CoordinatorAnswer
    fleet_address: str
    token: TokenAnswer
    evaluates_only: bool = False


class SiteTokenProof(SignedBody):
    """A site's machine asks for a fresh token by signing with its consent key."""

    DOMAIN = "medhive.token.v1"
    site: Name
    coordinator_key_id: str
    issued_at: AwareDatetime
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")


class SiteAnswer(Answer):
    """A hospital. `node_online` is what the aggregator saw last; addresses only for admins."""

    name: str
    state: SiteState
    evaluates_only: bool = False
    studies: tuple[str, ...] = ()
    joined_at: AwareDatetime | None = None
    last_seen_at: AwareDatetime | None = None
    node_online: bool = False
    software: str | None = None
    protocol: int | None = None
    source_address: str | None = None
    consent_key_id: str | None = None
    consent_public_key: str | None = None
    fleet_address: str | None = None


class LeaveBody(SignedBody):
    """A hospital goes for good; signed with its consent key, since a token may have been read on its way."""

    DOMAIN = "medhive.leave.v1"
    site: Name
    coordinator_key_id: str
    reason: str = Field("", max_length=MAX_TEXT)
    issued_at: AwareDatetime


class Reason(Frozen):
    """A person's words for a rejection, revocation, withdrawal, stop or cancellation."""

    reason: str = Field("", max_length=MAX_TEXT)


# ---- studies -------------------------------------------------------------------------------------------------------


class NewStudy(Frozen):
    """POST /studies. `defaults` are fields of `RunOptions`."""

    name: Name
    title: str = Field("", max_length=200)
    task: Name
    data: StudyData
    defaults: dict[str, Any] = Field(default_factory=dict, max_length=30)
    members: tuple[Name, ...] = ()


class StudyAnswer(Answer):
    """A study."""

    name: str
    title: str
    task: str
    data: StudyData
    defaults: dict[str, Any]
    members: tuple[str, ...]
    newest_version: int | None = None
    created_at: AwareDatetime


# ---- requests, runs, consents --------------------------------------------------------------------------------------


class NewRequest(Frozen):
    """POST /requests. `options` are fields of `RunOptions`; `base_version` left out is the newest not retired."""

    study: Name
    options: dict[str, Any] = Field(default_factory=dict, max_length=30)
    base_version: int | None = Field(None, ge=0)
    note: str = Field("", max_length=MAX_TEXT)


class RequestAnswer(Answer):
    """A training request; `id` is REQ_n."""

    id: str
    study: str
    requested_by: str
    site: str | None = None
    state: RequestState
    spec: RunSpec
    spec_hash: str
    note: str = ""
    created_at: AwareDatetime
    source_address: str | None = None
    decided_by: str | None = None
    decided_at: AwareDatetime | None = None
    reason: str = ""
    run_id: str | None = None


class ConsentAnswer(Answer):
    """One member site's standing in one run."""

    site: str
    state: ConsentState
    evaluates_only: bool = False
    consent: Consent | None = None
    consent_public_key: str | None = None
    answered_at: AwareDatetime | None = None


class ActivityReport(Frozen):
    """POST /runs/{run}/activity, by a site: what it does about a round right now."""

    round: int = Field(ge=0)
    activity: Activity
    epoch: int = Field(0, ge=0)
    epochs: int = Field(0, ge=0)
    loss: float | None = None
    accuracy: float | None = None
    examples: int = Field(0, ge=0)


class ActivityAnswer(ActivityReport):
    """The same as others see it; `started_at` is when training of this round began at the site."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    site: str
    started_at: AwareDatetime | None = None
    updated_at: AwareDatetime


NOT_ADDRESSED = "not addressed: "
"""Begins the reason of a site that consented but could not be asked, which tells it from one that did not answer."""


class SiteRound(Answer):
    """What one site gave to one round; `dropped` names the reason when it did not count."""

    site: str
    answered: bool = False
    dropped: str | None = None
    examples: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    confusion: list[list[int]] = Field(default_factory=list)
    training_s: float = 0.0
    bytes_up: int = 0


class Refusal(Answer):
    """A contribution in a site's name that was refused, and the error's code; the site's own may have counted."""

    site: Name
    code: str = Field(pattern=r"^[a-z][a-z0-9-]{0,59}$")


class RoundFacts(BaseModel):
    """What there is to say of a round: the aggregator reports it, everybody else reads it.

    `sites` are those that train; `evaluators` only judged the weights that the round began with. Metrics `test_*` are
    theirs, all others those of `sites`.
    """

    state: RoundState
    opened_at: AwareDatetime
    closed_at: AwareDatetime | None = None
    seconds: float = 0.0
    overhead_s: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    sites: tuple[SiteRound, ...] = ()
    evaluators: tuple[SiteRound, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    weights_digest: Digest | None = None


class RoundAnswer(Answer, RoundFacts):
    """One round. Round 0 is the preparation (initial weights, statistics)."""

    number: int


class RunAnswer(Answer):
    """A run; `id` is RUN_n."""

    id: str
    request_id: str
    study: str
    state: RunState
    spec: RunSpec
    spec_hash: str
    round: int = 0
    rounds: int
    created_at: AwareDatetime
    consent_deadline: AwareDatetime
    started_at: AwareDatetime | None = None
    ended_at: AwareDatetime | None = None
    reason: str = ""
    stop_requested: bool = False
    requested_by: str = ""
    request_site: str | None = None
    base_digest: str | None = None
    version: int | None = None
    mlflow_run_id: str | None = None
    updated_at: AwareDatetime
    # What the sites said of the final weights, each on its own validation part; empty until the run has ended.
    metrics: dict[str, float] = Field(default_factory=dict)
    confusion: list[list[int]] = Field(default_factory=list)
    sites: tuple[SiteRound, ...] = ()
    evaluators: tuple[SiteRound, ...] = ()
    consents: tuple[ConsentAnswer, ...] = ()
    activity: tuple[ActivityAnswer, ...] = ()


# ---- the aggregator's own exchange ---------------------------------------------------------------------------------


class NodeAnswer(Answer):
    """GET /server/nodes: the node keys that should be registered at the SuperLink, and those that should not."""

    site: str
    node_public_key: str
    wanted: bool
    node_id: str | None = None
    online: bool = False
    software: str | None = None
    protocol: int | None = None


class NodeReport(Frozen):
    """PUT /server/nodes/{site}: the SuperLink's own id for a key (never shown to sites), and whether it is online."""

    node_id: str | None = None
    online: bool = False


class LeaseRequest(Frozen):
    """POST /server/lease: ask for one ready run, or for one whose holder died."""

    holder: Name


class Lease(Answer):
    """A lease on a run. `fence` grows with each holder: a report with an older one is refused (409)."""

    run_id: str
    fence: int
    expires_at: AwareDatetime


class Fenced(Frozen):
    """Base of what only the present holder of a lease may report."""

    fence: int


class RoundReport(Fenced, RoundFacts):
    """PUT /server/runs/{run}/rounds/{n}: idempotent; an open round may be reported again, a closed one only the same."""


class VersionZero(Fenced):
    """POST /server/runs/{run}/version-zero: the study's initial weights, a blob of this run, and its statistics."""

    digest: Digest
    statistics: dict[str, list[float]] = Field(default_factory=dict)


class RunEnd(Fenced):
    """POST /server/runs/{run}/end. `completed` needs the digest of the final weights, a blob of this run."""

    state: Literal["completed", "failed", "cancelled"]
    reason: str = Field("", max_length=MAX_TEXT)
    digest: Digest | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    confusion: list[list[int]] = Field(default_factory=list)
    sites: tuple[SiteRound, ...] = ()
    evaluators: tuple[SiteRound, ...] = ()
    # What was refused since the last round's report: in the final evaluation, or in a round that ended without a report.
    refusals: tuple[Refusal, ...] = ()
    statistics: dict[str, list[float]] = Field(default_factory=dict)


# ---- versions ------------------------------------------------------------------------------------------------------


class ManifestBody(SignedBody):
    """What goes with a version's weights; signed by the coordinator, so that a hospital can check it for ever."""

    DOMAIN = "medhive.manifest.v1"
    study: Name
    version: int = Field(ge=0)
    task: Name
    data: StudyData
    digest: Digest
    size_bytes: int = Field(ge=0)
    run_id: str | None = None
    spec_hash: Digest | None = None
    base_version: int | None = None
    rounds: int = 0
    sites: tuple[Name, ...] = ()
    examples: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    statistics: dict[str, list[float]] = Field(default_factory=dict)
    created_at: AwareDatetime


Manifest = Signed[ManifestBody]


class DecisionAnswer(Answer):
    """What one site says of one version."""

    site: str
    state: DecisionState
    reason: str = ""
    person: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    decided_at: AwareDatetime | None = None


class DecisionBody(SignedBody):
    """A site's decision on a version, signed with its consent key."""

    DOMAIN = "medhive.decision.v1"
    site: Name
    study: Name
    version: int = Field(ge=0)
    digest: Digest
    decision: Literal["accepted", "rejected"]
    reason: str = Field("", max_length=MAX_TEXT)
    person: str = Field(min_length=1, max_length=120)
    metrics: dict[str, float] = Field(default_factory=dict, max_length=200)
    issued_at: AwareDatetime


Decision = Signed[DecisionBody]


class VersionAnswer(Answer):
    """A model version. `confusion` is summed over the sites' validation parts."""

    study: str
    version: int
    state: VersionState
    digest: str
    size_bytes: int
    run_id: str | None = None
    rounds: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    confusion: list[list[int]] = Field(default_factory=list)
    created_at: AwareDatetime
    manifest: Manifest
    decisions: tuple[DecisionAnswer, ...] = ()
    bytes_kept: bool = True


class Comparison(Answer):
    """GET /studies/{study}/compare?a=&b=."""

    a: VersionAnswer
    b: VersionAnswer
    metric_differences: dict[str, float]
    same_architecture: bool


class Statistics(Answer):
    """GET /statistics."""

    runs: int
    runs_by_state: dict[str, int]
    success_rate: float | None
    mean_accuracy: float | None
    sites: int
    images: int
    versions: int
    bytes_down: int
    bytes_up: int
    blob_bytes: int


class Export(Frozen):
    """POST /studies/{study}/versions/{n}/export: offer an older or newer version to one site."""

    site: Name


class Cleanup(Frozen):
    """POST /cleanup: retire old versions and delete what nothing refers to. Accepted versions are always kept."""

    study: Name | None = None
    keep: int = Field(5, ge=1, le=1000)
    dry_run: bool = False


class CleanupAnswer(Answer):
    """What a clean-up removed, or would remove."""

    versions: tuple[str, ...]
    blobs: int
    bytes_freed: int


# ---- events --------------------------------------------------------------------------------------------------------


class EventAnswer(Answer):
    """One row of the append-only log. `hash` is SHA-256 over the canonical JSON of the row with `previous`."""

    number: int
    at: AwareDatetime
    kind: str
    actor: str
    subject: str
    study: str | None = None
    run_id: str | None = None
    site: str | None = None
    data: dict[str, Any]
    previous: str
    hash: str


class HeadBody(SignedBody):
    """The coordinator's signature under the newest row of its log."""

    DOMAIN = "medhive.head.v1"
    number: int = Field(ge=0)
    hash: Digest
    at: AwareDatetime


Head = Signed[HeadBody]


class CountersignBody(SignedBody):
    """A site's signature under a head that it has seen."""

    DOMAIN = "medhive.countersign.v1"
    site: Name
    number: int = Field(ge=0)
    hash: Digest
    seen_at: AwareDatetime


Countersignature = Signed[CountersignBody]


class Problem(Answer):
    """RFC 9457. `type` ends in the error's stable code; `data` holds its facts."""

    type: str
    title: str
    status: int
    detail: str = ""
    data: dict[str, Any] = Field(default_factory=dict)
