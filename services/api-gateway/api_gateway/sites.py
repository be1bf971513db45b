"""Hospitals: invited, joined, revoked, gone; and how each proves who it is.

A hospital's two keys are made at the hospital. At the join it proves that it holds both, over one statement that also names
the invite and this coordinator, so that nothing of it can be used elsewhere or again.
"""

import base64
import secrets
from datetime import datetime, timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete, select, update

from api_gateway import auth, members
from api_gateway.events import Kind
from api_gateway.models import Invite, Member, Site, Study, UsedNonce
from api_gateway.state import TOKEN_BYTES
from api_gateway.work import Call, Gateway, Work, token_hash
from medhive import __version__
from medhive.errors import BadSignature, ClockSkew, Conflict, Expired, InvalidInput, MedHiveError, NotAllowed, NotFound
from medhive.sealing import SealingKeyBody
from medhive.signing import Signed, SignedBody, SigningKey, VerifyKey, canonical_json, sign
from medhive.states import SITE_TRANSITIONS, Role, SiteState, require_transition
from medhive.version import OLDEST_PROTOCOL, PROTOCOL, require_compatible
from medhive.wire import (
    CoordinatorAnswer,
    IntroductionBody,
    InviteAnswer,
    Join,
    JoinAnswer,
    JoinProof,
    LeaveBody,
    NewInvite,
    NodeAnswer,
    NodeReport,
    SiteAnswer,
    SiteTokenProof,
    TokenAnswer,
    TunnelAnswer,
)

CLOCK_TOLERANCE = timedelta(minutes=5)  # of a signed statement's age: clocks are off, but a statement is used at once
TOKEN_PREFIX = "mh2"  # noqa: S105  (the format of JOIN_TOKEN)
REFUSED_PER_SOURCE = 20  # joins in a window, before an address has to wait
REPORTED_PER_SOURCE = 10  # refused joins in a window that become events


def coordinator(gateway: Gateway, nonce: str = "", host: str = "") -> CoordinatorAnswer:
    """Who this is, for everybody; signed over the asker's nonce."""
    body = IntroductionBody(
        authorities=gateway.state.authorities,
        address_trust=gateway.address_trust(host, nonce),
        fleet_address=gateway.fleet_address(host, nonce),
        nonce=nonce,
        issued_at=gateway.clock(),
    )
    return CoordinatorAnswer(
        name=gateway.settings.coordinator_name,
        version=__version__,
        protocol=PROTOCOL,
        oldest_protocol=OLDEST_PROTOCOL,
        key_id=gateway.key.public.key_id,
        public_key=gateway.key.public.text,
        ca_certificate=body.authorities[0],
        time=body.issued_at,
        introduction=sign(body, gateway.key),
        successions=gateway.state.successions,
        sealing_key=sign(SealingKeyBody(public_key=gateway.state.sealing_key.public), gateway.key),
    )


def tunnel(gateway: Gateway) -> TunnelAnswer:
    """The tunnel that is open now."""
    found = gateway.state.tunnel
    return TunnelAnswer(address=found.address if found else None, address_trust=gateway.widest_trust)


# ---- invites -------------------------------------------------------------------------------------------------------


def invite(work: Work, body: NewInvite) -> InviteAnswer:
    """Make a one-time invite; its token, which holds a key to sign the join with, is in this answer alone.

    Raises:
        Conflict: a site of that name has joined already, was revoked or has left, or was invited to the other role.
        NotFound: a study does not exist.
    """
    _require_free(work, body.site, evaluates_only=body.evaluates_only)
    for study in body.studies:
        if work.session.get(Study, study) is None:
            raise NotFound(f"There is no study {study}.", study=study)
    seed = secrets.token_bytes(TOKEN_BYTES)
    row = Invite(
        site=body.site,
        studies=list(dict.fromkeys(body.studies)),
        key_sha256=token_hash(SigningKey.from_seed(seed).public.text),
        created_at=work.now,
        expires_at=work.now + timedelta(seconds=body.expires_in_s),
    )
    work.session.add(row)
    work.session.flush()
    work.record(Kind.INVITE_CREATED, f"site {body.site}", invite=row.id, expires_at=row.expires_at.isoformat())
    parts = (TOKEN_PREFIX, _text(seed), _text(work.gateway.key.public.raw), work.gateway.widest_trust)
    return _invite_answer(work, row, ".".join(parts))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _require_free(work: Work, name: str, *, evaluates_only: bool) -> None:
    site = work.session.get(Site, name)
    if site is None:
        facts = {"node_online": False, "evaluates_only": evaluates_only}
        work.session.add(Site(name=name, state=SiteState.INVITED, created_at=work.now, **facts))
        work.session.flush()
    elif site.state == SiteState.ACTIVE:
        raise Conflict(f"A site named {name} has joined already; choose another name.", site=name)
    elif site.state != SiteState.INVITED:
        raise Conflict(f"The site {name} is {site.state}; its name cannot be used again, choose another.", site=name)
    elif site.evaluates_only != evaluates_only:
        # Members and invites that are out already count on it.
        role = "to evaluate only" if site.evaluates_only else "to train"
        raise Conflict(f"The site {name} was invited {role}; choose another name for the other.", site=name)


def invites(work: Work) -> list[InviteAnswer]:
    """All invites that were not withdrawn, newest first."""
    query = select(Invite).where(Invite.withdrawn_at.is_(None)).order_by(Invite.id.desc())
    return [_invite_answer(work, row) for row in work.session.scalars(query)]


def withdraw_invite(work: Work, number: int) -> None:
    """Make an unused invite worthless.

    Raises:
        Conflict: it was used already.
    """
    row = work.session.get(Invite, number)
    if row is None or row.withdrawn_at is not None:
        raise NotFound(f"There is no invite {number}.", invite=number)
    if row.used_at is not None:
        raise Conflict(f"The invite {number} was used already; revoke the site {row.site} instead.", site=row.site)
    row.withdrawn_at = work.now
    work.record(Kind.INVITE_WITHDRAWN, f"site {row.site}", invite=number)


def _invite_answer(work: Work, row: Invite, token: str | None = None) -> InviteAnswer:
    return InviteAnswer(
        id=row.id,
        site=row.site,
        studies=tuple(row.studies),
        evaluates_only=work.session.get_one(Site, row.site).evaluates_only,
        created_at=row.created_at,
        expires_at=row.expires_at,
        used_at=row.used_at,
        token=token,
    )


# ---- joining -------------------------------------------------------------------------------------------------------


def join(call: Call, body: Join) -> JoinAnswer:
    """Let a hospital in that holds an invite and both its keys; a refusal becomes an event with its source address.

    The same hospital may send the same join again, for the answer may have been lost on the way.

    Raises:
        MedHiveError: see `_admit`.
        TooManyAttempts: too many refused joins from this address.
    """
    keys = ((f"join@{call.source}", REFUSED_PER_SOURCE),)
    with call.anonymous(call.gateway.database.read) as work:
        auth.require_not_throttled(work.session, work.now, keys)
    try:
        with call.anonymous(call.gateway.database.write, body.proof.body.site) as work:
            return _admit(work, body)
    except MedHiveError as error:
        _refused(call, body, error, keys)
        raise


def _refused(call: Call, body: Join, error: MedHiveError, keys: tuple[tuple[str, int], ...]) -> None:
    count = auth.count_failure(call.gateway.database, call.gateway.clock(), keys)
    if count <= REPORTED_PER_SOURCE:
        with call.anonymous(call.gateway.database.write) as work:
            subject = f"site {body.proof.body.site}"
            work.record(Kind.JOIN_REFUSED, subject, cause=error.code, source_address=work.source)


def _admit(work: Work, body: Join) -> JoinAnswer:
    require_compatible(body.protocol, "the coordinator", "the hospital", body.software)
    proof = body.proof.body
    invitation = _invitation(work, body)
    key = VerifyKey.from_text(proof.consent_public_key)
    _check_statement(work, body.proof, key, proof.coordinator_key_id)
    _check_node_key(proof, body.node_signature)
    site = work.session.get_one(Site, proof.site)
    if invitation.used_at is None:
        _enter(work, site, invitation, body, key)
    elif site.node_public_key != proof.node_public_key or site.consent_public_key != key.text:
        raise Conflict("This invite was used already; ask the coordinator for a new one.", site=site.name)
    if site.state != SiteState.ACTIVE:
        raise NotAllowed(f"Site {site.name} is {site.state}.", site=site.name, state=site.state)
    token = auth.issue(work, Role.SITE, site.name, auth.SITE_TOKEN_LIFE, site=site.name)
    return JoinAnswer(
        site=site.name,
        coordinator=coordinator(work.gateway),
        fleet_address=work.gateway.fleet_address(),
        token=token,
        evaluates_only=site.evaluates_only,
    )


def _invitation(work: Work, body: Join) -> Invite:
    proof = body.proof.body
    row = work.session.scalar(select(Invite).where(Invite.key_sha256 == token_hash(proof.invite_public_key)))
    if row is None or row.withdrawn_at is not None:
        raise NotAllowed("This invite is unknown here or was withdrawn; ask the coordinator for a new one.")
    VerifyKey.from_text(proof.invite_public_key).verify(proof.INVITE_DOMAIN, proof.body(), body.invite_signature)
    if row.site != proof.site:
        raise NotAllowed(f"This invite is for another site than {proof.site}; check CLIENT_ID.", site=proof.site)
    if row.used_at is None and row.expires_at <= work.now:
        raise Expired(
            f"This invite expired at {row.expires_at.isoformat()}; ask the coordinator for a new one.", site=row.site
        )
    return row


def _check_statement(
    work: Work, statement: "Signed[JoinProof] | Signed[SiteTokenProof] | Signed[LeaveBody]", key: VerifyKey, to: str
) -> None:
    body: SignedBody = statement.verify(key)
    if to not in work.gateway.key_ids:
        raise BadSignature(f"This {body.DOMAIN} was made for another coordinator.", key_id=to)
    require_fresh(work, statement.body.issued_at)


def require_fresh(work: Work, issued_at: datetime) -> None:
    """Refuse a signed statement that is not of now.

    Raises:
        ClockSkew: it is too old, or from the future; `data.server_time` is the coordinator's clock.
    """
    age = work.now - issued_at
    if abs(age) > CLOCK_TOLERANCE:
        raise ClockSkew(
            f"The hospital's clock differs from the coordinator's by {age.total_seconds():+.0f} s; set it right.",
            server_time=work.now.isoformat(),
            difference_s=round(age.total_seconds(), 3),
        )


def _check_node_key(proof: JoinProof, signature: str) -> None:
    """The node key signs the same bytes as the consent key: domain tag, zero byte, canonical JSON."""
    try:
        key = serialization.load_pem_public_key(proof.node_public_key.encode())
    except ValueError as error:
        raise InvalidInput("The node's public key is not a key in PEM.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InvalidInput("The node's key must be an elliptic curve key over NIST P-384.")
    message = proof.DOMAIN.encode() + b"\0" + canonical_json(proof.body())
    try:
        key.verify(base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise BadSignature("The node key's signature does not fit this join.", domain=proof.DOMAIN) from error


def _enter(work: Work, site: Site, invitation: Invite, body: Join, key: VerifyKey) -> None:
    if site.state != SiteState.INVITED:
        raise Conflict(f"A site named {site.name} has joined already; choose another name.", site=site.name)
    require_transition(SITE_TRANSITIONS, SiteState(site.state), SiteState.ACTIVE, f"site {site.name}")
    site.state = SiteState.ACTIVE
    site.joined_at = site.last_seen_at = work.now
    site.source_address, site.software, site.protocol = work.source, body.software, body.protocol
    site.node_public_key, site.consent_public_key = body.proof.body.node_public_key, key.text
    site.consent_key_id = key.key_id
    invitation.used_at = work.now
    subject = f"site {site.name}"
    work.record(Kind.SITE_JOINED, subject, site=site.name, consent_key_id=key.key_id, source_address=work.source)
    for study in invitation.studies:
        members.add(work, study, site.name)


def site_token(call: Call, body: Signed[SiteTokenProof]) -> TokenAnswer:
    """Give a site's machine a fresh token for its signature.

    Raises:
        NotFound: there is no such site.
        BadSignature: another key, another coordinator, or a statement that was used already.
        ClockSkew: the clocks differ too much; `data.server_time` is the coordinator's.
        NotAllowed: the site was revoked or has left.
    """
    # A stranger's forgeries are refused before they take the writers' lock.
    with call.anonymous(call.gateway.database.read) as work:
        _proven(work, body)
    with call.anonymous(call.gateway.database.write, body.body.site) as work:
        site = _proven(work, body)
        _use_nonce(work, site.name, body.body.nonce)
        return auth.issue(work, Role.SITE, site.name, auth.SITE_TOKEN_LIFE, site=site.name)


def _proven(work: Work, body: Signed[SiteTokenProof]) -> Site:
    site = work.session.get(Site, body.body.site)
    if site is None or site.consent_public_key is None:
        raise NotFound(f"There is no site {body.body.site}.", site=body.body.site)
    _check_statement(work, body, VerifyKey.from_text(site.consent_public_key), body.body.coordinator_key_id)
    if site.state != SiteState.ACTIVE:
        raise NotAllowed(f"Site {site.name} is {site.state}.", site=site.name, state=site.state)
    return site


def _use_nonce(work: Work, site: str, nonce: str) -> None:
    work.session.execute(delete(UsedNonce).where(UsedNonce.expires_at <= work.now))
    if work.session.get(UsedNonce, (site, nonce)) is not None:
        raise BadSignature("This statement was used already; sign a new one.", site=site)
    work.session.add(UsedNonce(site=site, nonce=nonce, expires_at=work.now + 3 * CLOCK_TOLERANCE))


# ---- standing ------------------------------------------------------------------------------------------------------


def listed(work: Work) -> list[SiteAnswer]:
    """The sites that the caller may see: all, or its own."""
    query = select(Site).order_by(Site.name)
    if not work.caller.sees_all:
        query = query.where(Site.name == work.own_site())
    return [to_answer(work, row) for row in work.session.scalars(query)]


def revoke(work: Work, name: str, reason: str) -> SiteAnswer:
    """Take a hospital out at once and for good: its tokens, its consents, its people's logins."""
    site = work.site(name)
    _end(work, site, SiteState.REVOKED, reason)
    work.record(Kind.SITE_REVOKED, f"site {name}", site=name, reason=reason)
    return to_answer(work, site)


def leave(work: Work, name: str, statement: Signed[LeaveBody]) -> SiteAnswer:
    """A hospital goes for good, by its own wish.

    Raises:
        NotAllowed: another hospital's.
        BadSignature, ClockSkew: the statement is not this hospital's to this coordinator, or old.
    """
    site, body = work.site(name), statement.body
    if not work.own_site() == name == body.site:
        raise NotAllowed("Only the hospital itself can leave.", site=name)
    _check_statement(work, statement, VerifyKey.from_text(str(site.consent_public_key)), body.coordinator_key_id)
    _end(work, site, SiteState.LEFT, body.reason)
    work.record(Kind.SITE_LEFT, f"site {name}", site=name, reason=body.reason)
    return to_answer(work, site)


def _end(work: Work, site: Site, state: SiteState, reason: str) -> None:
    require_transition(SITE_TRANSITIONS, SiteState(site.state), state, f"site {site.name}")
    site.state = state
    auth.revoke_tokens(work, site=site.name)
    withdrawn = update(Invite).where(Invite.site == site.name, Invite.used_at.is_(None))
    work.session.execute(withdrawn.values(withdrawn_at=work.now).execution_options(synchronize_session="fetch"))
    for study in work.session.scalars(select(Member.study).where(Member.site == site.name)).all():
        members.end_consents(work, study, site.name, reason or f"the site is {state}")


def to_answer(work: Work, site: Site) -> SiteAnswer:
    """The site as the caller may see it; addresses only for admins."""
    studies = select(Member.study).where(Member.site == site.name).order_by(Member.study)
    return SiteAnswer(
        name=site.name,
        state=SiteState(site.state),
        evaluates_only=site.evaluates_only,
        studies=tuple(work.session.scalars(studies)),
        joined_at=site.joined_at,
        last_seen_at=site.last_seen_at,
        node_online=site.node_online,
        software=site.software,
        protocol=site.protocol,
        source_address=site.source_address if work.caller.is_admin else None,
        consent_key_id=site.consent_key_id,
        consent_public_key=site.consent_public_key,
        fleet_address=work.gateway.settings.fleet_address,
    )


# ---- the aggregator's view -----------------------------------------------------------------------------------------


def nodes(work: Work) -> list[NodeAnswer]:
    """The node keys that should, or should no longer, be registered at the SuperLink."""
    query = select(Site).where(Site.node_public_key.is_not(None)).order_by(Site.name)
    return [
        NodeAnswer(
            site=site.name,
            node_public_key=site.node_public_key or "",
            wanted=site.state == SiteState.ACTIVE,
            node_id=site.node_id,
            online=site.node_online,
            software=site.software,
            protocol=site.protocol,
        )
        for site in work.session.scalars(query)
    ]


def report_node(work: Work, name: str, body: NodeReport) -> None:
    """Keep what the SuperLink says of a node; going and coming are events, with the site's last known address."""
    site = work.site(name)
    site.node_id = body.node_id
    if site.node_online == body.online:
        return
    site.node_online = body.online
    kind = Kind.SITE_CONNECTED if body.online else Kind.SITE_DISCONNECTED
    work.record(kind, f"site {name}", site=name, source_address=site.source_address)
