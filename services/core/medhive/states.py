"""The states of requests, runs, versions and decisions, and the only steps between them.

The gateway's database code asks `require_transition` before it writes, so that no path through the system, however
concurrent, can bring an object into a state that these tables do not allow.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from medhive.errors import IllegalTransition


class RequestState(StrEnum):
    """A training request: somebody's wish for one run of a study."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """One execution of a specification."""

    CONSENTING = "consenting"
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class VersionState(StrEnum):
    """A model version, as the coordinator offers it."""

    CANDIDATE = "candidate"
    HELD = "held"
    RELEASED = "released"
    RETIRED = "retired"


class DecisionState(StrEnum):
    """What one site says of one version."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class ConsentState(StrEnum):
    """What one site says of one run; `pending` until it has answered."""

    PENDING = "pending"
    GRANTED = "granted"
    DECLINED = "declined"
    WITHDRAWN = "withdrawn"


class SiteState(StrEnum):
    """A hospital's standing with the coordinator."""

    INVITED = "invited"
    ACTIVE = "active"
    REVOKED = "revoked"
    LEFT = "left"


class RoundState(StrEnum):
    """One round of a run."""

    OPEN = "open"
    CLOSED = "closed"
    FAILED = "failed"


class Role(StrEnum):
    """What a caller may do; `server` is the aggregator's own, never a person's."""

    ADMIN = "admin"
    ANALYST = "analyst"
    SITE = "site"
    SERVER = "server"


class Activity(StrEnum):
    """What a site does about one task of one run right now, for "who trains now" and for deadlines."""

    QUEUED = "queued"
    FETCHING = "fetching"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SENDING = "sending"
    DONE = "done"


State = TypeVar("State", bound=StrEnum)

REQUEST_TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    RequestState.PENDING: frozenset({RequestState.APPROVED, RequestState.REJECTED, RequestState.CANCELLED}),
    RequestState.APPROVED: frozenset(),
    RequestState.REJECTED: frozenset(),
    RequestState.CANCELLED: frozenset(),
}

RUN_TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.CONSENTING: frozenset({RunState.READY, RunState.EXPIRED, RunState.CANCELLED}),
    RunState.READY: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.RUNNING: frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED}),
    RunState.COMPLETED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
    RunState.EXPIRED: frozenset(),
}

VERSION_TRANSITIONS: Mapping[VersionState, frozenset[VersionState]] = {
    VersionState.CANDIDATE: frozenset({VersionState.HELD, VersionState.RELEASED, VersionState.RETIRED}),
    VersionState.HELD: frozenset({VersionState.CANDIDATE, VersionState.RETIRED}),
    # A released version may be offered again: the coordinator's roll-back.
    VersionState.RELEASED: frozenset({VersionState.CANDIDATE, VersionState.RETIRED}),
    # An older version comes back by roll-back too, as long as its bytes are kept.
    VersionState.RETIRED: frozenset({VersionState.CANDIDATE}),
}

DECISION_TRANSITIONS: Mapping[DecisionState, frozenset[DecisionState]] = {
    DecisionState.PENDING: frozenset({DecisionState.ACCEPTED, DecisionState.REJECTED}),
    # A hospital may change its mind: rolling back rejects what it had accepted, and the other way round.
    DecisionState.ACCEPTED: frozenset({DecisionState.REJECTED}),
    # Back to pending: the coordinator offers the version anew.
    DecisionState.REJECTED: frozenset({DecisionState.ACCEPTED, DecisionState.PENDING}),
}

CONSENT_TRANSITIONS: Mapping[ConsentState, frozenset[ConsentState]] = {
    ConsentState.PENDING: frozenset({ConsentState.GRANTED, ConsentState.DECLINED}),
    ConsentState.GRANTED: frozenset({ConsentState.WITHDRAWN}),
    ConsentState.DECLINED: frozenset(),
    ConsentState.WITHDRAWN: frozenset(),
}

SITE_TRANSITIONS: Mapping[SiteState, frozenset[SiteState]] = {
    SiteState.INVITED: frozenset({SiteState.ACTIVE, SiteState.REVOKED}),
    SiteState.ACTIVE: frozenset({SiteState.REVOKED, SiteState.LEFT}),
    SiteState.REVOKED: frozenset(),
    SiteState.LEFT: frozenset(),
}

FINAL_RUN_STATES = frozenset(state for state, after in RUN_TRANSITIONS.items() if not after)


def require_transition(table: Mapping[State, frozenset[State]], old: State, new: State, what: str) -> None:
    """Refuse a step that the table does not have.

    Raises:
        IllegalTransition: `what` cannot go from `old` to `new`.
    """
    if new not in table[old]:
        allowed = ", ".join(sorted(table[old])) or "nothing more"
        raise IllegalTransition(
            f"{what} is {old} and cannot become {new}; possible from here: {allowed}.",
            old=str(old),
            new=str(new),
        )
