"""The one event log: audit trail, live stream, notifications and history.

Every change appends one row in its own transaction, which holds the lock of the head row; so numbers have no gaps and grow
in the order of commits, whatever the number of gateway processes. A countersignature appends none: it is about the log,
and would otherwise call for the next countersignature for ever.
"""

import json
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from api_gateway.models import HEAD_ROW, Event, EventHead, Member
from medhive.chain import event_hash
from medhive.signing import SigningKey, sign
from medhive.states import Role
from medhive.wire import EventAnswer, Head, HeadBody

MAX_LISTED = 1000
MAX_DETAIL = 400  # characters of a text inside an event
ADMINS_ONLY = ("source_address",)
"""Facts in an event's data that only admins see."""


class Kind(StrEnum):
    """Everything that is ever said in the log; the part before the dot is the kind of its subject."""

    COORDINATOR_CREATED = "coordinator.created"
    CA_ANNOUNCED = "coordinator.ca-announced"
    CA_CHANGED = "coordinator.ca-changed"
    CA_DROPPED = "coordinator.ca-dropped"
    KEY_CHANGED = "coordinator.key-changed"
    CERTIFICATES_RENEWED = "certificate.renewed"
    CERTIFICATE_ENDS = "certificate.ends"
    TUNNEL_OPENED = "tunnel.opened"
    TUNNEL_LOST = "tunnel.lost"
    ACCOUNT_CREATED = "account.created"
    ACCOUNT_DISABLED = "account.disabled"
    ACCOUNT_PASSWORD = "account.password-set"  # noqa: S105
    ACCOUNT_TOKENS_REVOKED = "account.tokens-revoked"
    LOGIN_SUCCEEDED = "login.succeeded"
    LOGIN_FAILED = "login.failed"
    INVITE_CREATED = "invite.created"
    INVITE_WITHDRAWN = "invite.withdrawn"
    JOIN_REFUSED = "join.refused"
    SITE_JOINED = "site.joined"
    SITE_CONNECTED = "site.connected"
    SITE_DISCONNECTED = "site.disconnected"
    SITE_REVOKED = "site.revoked"
    SITE_LEFT = "site.left"
    SITE_DROPPED = "site.dropped"
    STUDY_CREATED = "study.created"
    STUDY_MEMBER_ADDED = "study.member-added"
    STUDY_MEMBER_REMOVED = "study.member-removed"
    REQUEST_SENT = "request.sent"
    REQUEST_APPROVED = "request.approved"
    REQUEST_REJECTED = "request.rejected"
    REQUEST_CANCELLED = "request.cancelled"
    RUN_CREATED = "run.created"
    RUN_READY = "run.ready"
    RUN_LEASED = "run.leased"
    RUN_STARTED = "run.started"
    RUN_STOP_REQUESTED = "run.stop-requested"
    RUN_COMPLETED = "run.completed"
    RUN_FAILED = "run.failed"
    RUN_CANCELLED = "run.cancelled"
    RUN_EXPIRED = "run.expired"
    RUN_TRACKED = "run.tracked"
    CONSENT_GRANTED = "consent.granted"
    CONSENT_DECLINED = "consent.declined"
    CONSENT_WITHDRAWN = "consent.withdrawn"
    CONTRIBUTION_REFUSED = "contribution.refused"
    CONTRIBUTION_RECEIVED = "contribution.received"
    CONTRIBUTION_WITHDRAWN = "contribution.withdrawn"
    QUEUE_OPENED = "queue.opened"
    QUEUE_CLOSED = "queue.closed"
    QUEUE_CLEARED = "queue.cleared"
    EXECUTION_DUE = "execution.due"
    EXECUTION_LEASED = "execution.leased"
    EXECUTION_DONE = "execution.done"
    EXECUTION_FAILED = "execution.failed"
    ROUND_OPENED = "round.opened"
    ROUND_CLOSED = "round.closed"
    ROUND_FAILED = "round.failed"
    VERSION_CREATED = "version.created"
    VERSION_OFFERED = "version.offered"
    VERSION_EXPORTED = "version.exported"
    VERSION_RELEASED = "version.released"
    VERSION_RETIRED = "version.retired"
    DECISION_ACCEPTED = "decision.accepted"
    DECISION_REJECTED = "decision.rejected"
    CLEANUP_DONE = "cleanup.done"
    HEAD_DISPUTED = "head.disputed"


# How the coordinator is reached and trusted concerns every hospital; a node that hears of it asks for an introduction.
FOR_EVERY_SITE = (
    Kind.CA_ANNOUNCED,
    Kind.CA_CHANGED,
    Kind.CA_DROPPED,
    Kind.KEY_CHANGED,
    Kind.TUNNEL_OPENED,
    Kind.TUNNEL_LOST,
)


def append(
    session: Session,
    at: datetime,
    kind: Kind,
    actor: str,
    subject: str,
    *,
    study: str | None = None,
    run_id: str | None = None,
    site: str | None = None,
    data: dict[str, Any] | None = None,
) -> int:
    """Append one row inside the caller's transaction; returns its number."""
    head = session.get_one(EventHead, HEAD_ROW)
    answer = EventAnswer(
        number=head.number + 1,
        at=at,
        kind=kind,
        actor=actor,
        subject=subject,
        study=study,
        run_id=run_id,
        site=site,
        data=_bounded(data or {}),
        previous=head.hash,
        hash="",
    )
    digest = event_hash(answer)
    fields = answer.model_dump(exclude={"data", "hash"})
    session.add(Event(**fields, data=json.dumps(answer.data), hash=digest))
    head.number, head.hash = answer.number, digest
    return answer.number


def _bounded(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value[:MAX_DETAIL] if isinstance(value, str) else value for key, value in data.items() if value is not None
    }


def signed_head(session: Session, key: SigningKey, created_at: datetime) -> Head:
    """The newest row's number and hash under the coordinator's signature."""
    head = session.get_one(EventHead, HEAD_ROW)
    newest = session.get(Event, head.number)
    at = newest.at if newest else created_at
    return sign(HeadBody(number=head.number, hash=head.hash, at=at), key)


def head_number(session: Session) -> int:
    """The newest row's number."""
    return session.execute(select(EventHead.number).where(EventHead.id == HEAD_ROW)).scalar_one()


def listed(session: Session, role: Role, site: str | None, after: int, limit: int) -> list[EventAnswer]:
    """The rows after a number that this caller may see, oldest first."""
    query = select(Event).where(Event.number > after, _visible(role, site)).order_by(Event.number).limit(limit)
    return [to_answer(row, role) for row in session.scalars(query)]


def _visible(role: Role, site: str | None) -> ColumnElement[bool]:
    if role != Role.SITE:
        return Event.number > 0
    own_studies = select(Member.study).where(Member.site == site)
    # A study's own rows are its members' business; what another hospital did is not.
    own = and_(Event.site.is_(None), Event.study.in_(own_studies))
    return or_(Event.site == site, own, Event.kind.in_(FOR_EVERY_SITE))


def to_answer(row: Event, role: Role) -> EventAnswer:
    """The row as this caller may see it."""
    data = json.loads(row.data)
    if role not in (Role.ADMIN, Role.SERVER):
        data = {key: value for key, value in data.items() if key not in ADMINS_ONLY}
    return EventAnswer(
        number=row.number,
        at=row.at,
        kind=row.kind,
        actor=row.actor,
        subject=row.subject,
        study=row.study,
        run_id=row.run_id,
        site=row.site,
        data=data,
        previous=row.previous,
        hash=row.hash,
    )
