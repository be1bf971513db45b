"""What an endpoint works with: the process's parts (`Gateway`), the exchange (`Call`), and its unit of work (`Work`).

An endpoint opens one unit, `with call.write(Role.ADMIN) as work:`; who calls is found out inside the same transaction, so
that a revoked token or site has no last word. The unit commits when the block ends well, and only then are others told.
"""

import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from api_gateway import events
from api_gateway.blobstore import BlobStore
from api_gateway.db import Base, Database
from api_gateway.events import Kind
from api_gateway.hub import Hub
from api_gateway.models import Account, Member, Site, Study, Token
from api_gateway.settings import Settings
from api_gateway.state import State, Tunnel
from medhive.errors import IllegalTransition, NotAllowed, NotAuthenticated, NotFound
from medhive.introduction import asks_at, authority_of
from medhive.signing import SigningKey, VerifyKey
from medhive.states import Role, SiteState
from medhive.wire import AddressTrust

SEEN_EVERY = timedelta(seconds=30)  # how exactly a site's last sign of life is kept: not a write for each exchange
SYSTEM = "system"
SERVER_NAME = "server"

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Caller:
    """Who asks. `site` is set for a hospital's machine and for its people."""

    role: Role
    name: str
    site: str | None = None
    token_id: int | None = None

    @property
    def actor(self) -> str:
        """How events name the caller."""
        return self.name if self.role is Role.SERVER or self.name == SYSTEM else f"{self.role}:{self.name}"

    def require(self, *roles: Role) -> None:
        """Refuse any other role.

        Raises:
            NotAllowed: the caller has another role.
        """
        if self.role not in roles:
            raise NotAllowed(
                f"This needs the role {' or '.join(roles)}; {self.name} has the role {self.role}.", role=self.role
            )

    @property
    def sees_all(self) -> bool:
        """Whether the caller sees every object: everybody but a hospital does."""
        return self.role is not Role.SITE

    @property
    def is_admin(self) -> bool:
        """Whether the caller is an admin."""
        return self.role is Role.ADMIN


ANYBODY = (Role.ADMIN, Role.ANALYST, Role.SITE, Role.SERVER)
PEOPLE_AND_SITES = (Role.ADMIN, Role.ANALYST, Role.SITE)
READERS = (Role.ADMIN, Role.ANALYST)


@dataclass
class Gateway:
    """The parts of one gateway process, built once at its start; `state` is replaced as its certificates and keys are."""

    settings: Settings
    state: State
    database: Database
    blobs: BlobStore
    hub: Hub
    clock: Clock
    _replacing: threading.Lock = field(default_factory=threading.Lock)

    def use(self, state: State) -> None:
        """Go on with a state that was read under the folder's lock, which is still held."""
        with self._replacing:
            self.state = state

    def follow_key(self) -> None:
        """Sign with the key that is in the folder now: another process may have changed it a moment ago."""
        with self._replacing:
            self.state = self.state.with_present_key()

    @property
    def key(self) -> SigningKey:
        """The coordinator's key."""
        return self.state.coordinator_key

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of its present key, first, and of those before it: what is signed to any of them is signed to it."""
        return self.state.key_ids

    def tunnel_at(self, host: str, nonce: str = "") -> Tunnel | None:
        """The tunnel by which somebody has come who asks this host, by what the request says or its nonce means."""
        tunnel = self.state.tunnel
        if tunnel is None or (authority_of(host) != tunnel.authority and not asks_at(nonce, tunnel.authority)):
            return None
        return tunnel

    def address_trust(self, host: str, nonce: str = "") -> AddressTrust:
        """Who ends TLS on the way by which somebody has come."""
        tunnel = self.tunnel_at(host, nonce)
        return AddressTrust.TUNNEL if tunnel and tunnel.ends_tls else self.state.address_trust

    @property
    def widest_trust(self) -> AddressTrust:
        """Who may end TLS at any of its addresses: an invite serves for all of them."""
        return self.address_trust(self.state.tunnel.authority if self.state.tunnel else "")

    def fleet_address(self, host: str = "", nonce: str = "") -> str:
        """HOST:PORT at which a hospital reaches Flower that has come so: the proxy serves both at one place."""
        tunnel = self.tunnel_at(host, nonce)
        return tunnel.authority if tunnel else self.settings.fleet_address

    @contextmanager
    def system_write(self) -> Iterator["Work"]:
        """A writing unit of the gateway's own, for what falls due without anybody asking."""
        with self.unit(self.database.write, Caller(Role.ADMIN, SYSTEM), "") as work:
            yield work

    @contextmanager
    def unit(self, opener: Callable[[], Any], caller: Caller, source: str) -> Iterator["Work"]:
        """Open a unit of work for a caller who is known already.

        The key changes in writing units alone, so that in one it is the same from here to the commit.
        """
        with opener() as session:
            self.follow_key()
            work = Work(session, self, caller, source, self.clock())
            yield work
        work.finish()


@dataclass
class Work:
    """One unit of work: a session, who asks, and one moment that counts for all of it."""

    session: Session
    gateway: Gateway
    caller: Caller
    source: str
    now: datetime
    _recorded: bool = False
    _after_commit: list[Callable[[], None]] = field(default_factory=list)

    def record(
        self,
        kind: Kind,
        subject: str,
        *,
        study: str | None = None,
        run_id: str | None = None,
        site: str | None = None,
        **data: Any,
    ) -> None:
        """Append an event in this transaction."""
        events.append(
            self.session,
            self.now,
            kind,
            self.caller.actor,
            subject,
            study=study,
            run_id=run_id,
            site=site,
            data=data,
        )
        self._recorded = True

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do this once the change is durable, and not at all when it fails."""
        self._after_commit.append(step)

    def finish(self) -> None:
        """Called after the commit."""
        for step in self._after_commit:
            step()
        if self._recorded:
            self.gateway.hub.wake()

    # ---- objects, as far as the caller may know of them

    def own_site(self) -> str:
        """The caller's site.

        Raises:
            NotAllowed: the caller is nobody's hospital.
        """
        if self.caller.site is None:
            raise NotAllowed("Only a hospital can do this.")
        return self.caller.site

    def site(self, name: str) -> Site:
        """A site by name.

        Raises:
            NotFound: there is none that the caller may see.
        """
        found = self.session.get(Site, name)
        if found is None or (not self.caller.sees_all and self.caller.site != name):
            raise NotFound(f"There is no site {name}.", site=name)
        return found

    def study(self, name: str) -> Study:
        """A study by name.

        Raises:
            NotFound: there is none that the caller may see.
        """
        found = self.session.get(Study, name)
        if found is None or (not self.caller.sees_all and not self.is_member(name, self.caller.site)):
            raise NotFound(f"There is no study {name}.", study=name)
        return found

    def consent_key(self, site: str) -> VerifyKey:
        """The key with which this site signs.

        Raises:
            NotFound: the site is unknown or has not joined.
        """
        row = self.session.get(Site, site)
        if row is None or row.consent_public_key is None:
            raise NotFound(f"Site {site} has not joined yet.", site=site)
        return VerifyKey.from_text(row.consent_public_key)

    def is_member(self, study: str, site: str | None) -> bool:
        """Whether a site takes part in a study."""
        return site is not None and self.session.get(Member, (study, site)) is not None

    def active_members(self, study: str) -> list[Site]:
        """The sites of a study that have joined and were not revoked, in the order of their names."""
        query = select(Site).join(Member, Member.site == Site.name)
        query = query.where(Member.study == study, Site.state == SiteState.ACTIVE).order_by(Site.name)
        return list(self.session.scalars(query))

    def training_members(self, study: str) -> list[Site]:
        """The same without those that only evaluate."""
        return [site for site in self.active_members(study) if not site.evaluates_only]


def transition(session: Session, column: InstrumentedAttribute[str], row: Base, new: str) -> None:
    """Change a row's state from what was read to `new`, unless somebody else was first.

    Which steps are legal the caller asks `medhive.states.require_transition` before.

    Raises:
        IllegalTransition: the state in the database is no longer the one that was read.
    """
    old = getattr(row, column.key)
    identity = [key == getattr(row, key.name) for key in row.__table__.primary_key]
    statement = update(type(row)).where(*identity, column == old).values({column.key: new})
    changed = session.execute(statement.execution_options(synchronize_session=False))
    if changed.rowcount != 1:  # type: ignore[attr-defined]
        raise IllegalTransition("Somebody else was first: the state has changed in the meantime; look again.")
    session.refresh(row, [column.key])


@dataclass(frozen=True)
class Spoken:
    """What a caller says of its own version: its MedHive, and the number of its protocol."""

    software: str
    protocol: int


@dataclass(frozen=True)
class Call:
    """One exchange: the gateway, the bearer token as sent, where it comes from, and what version the caller says it has."""

    gateway: Gateway
    token: str | None
    source: str
    host: str = ""
    spoken: Spoken | None = None

    @contextmanager
    def read(self, *roles: Role) -> Iterator[Work]:
        """A reading unit for callers with one of these roles.

        Raises:
            NotAuthenticated: no token, or one that is unknown, expired or revoked.
            NotAllowed: another role, or a site that was revoked or has left.
        """
        with self._unit(self.gateway.database.read, roles) as work:
            yield work
        self._seen(work.caller, work.now)

    @contextmanager
    def write(self, *roles: Role) -> Iterator[Work]:
        """A writing unit; raises as `read`."""
        with self._unit(self.gateway.database.write, roles) as work:
            yield work
        self._seen(work.caller, work.now)

    @contextmanager
    def touch(self, *roles: Role) -> Iterator[Work]:
        """A unit that writes volatile facts and appends no event; raises as `read`."""
        with self._unit(self.gateway.database.touch, roles) as work:
            yield work
        self._seen(work.caller, work.now)

    @contextmanager
    def anonymous(self, opener: Callable[[], Any], name: str = "anonymous") -> Iterator[Work]:
        """A unit for somebody who is not known yet: a login, a join."""
        # The role has no rights in itself: these units ask for none.
        with self.gateway.unit(opener, Caller(Role.SITE, name), self.source) as work:
            yield work

    @contextmanager
    def _unit(self, opener: Callable[[], Any], roles: tuple[Role, ...]) -> Iterator[Work]:
        with self.gateway.unit(opener, Caller(Role.SITE, "nobody"), self.source) as work:
            work.caller = authenticate(work, self.token)
            work.caller.require(*roles)
            yield work

    def _seen(self, caller: Caller, now: datetime) -> None:
        if caller.role is not Role.SITE or caller.site is None or caller.name != caller.site:
            return
        with self.gateway.database.read() as session:
            site = session.get(Site, caller.site)
            fresh = site and site.last_seen_at and site.last_seen_at > now - SEEN_EVERY
            values = {"source_address": self.source, **(asdict(self.spoken) if self.spoken else {})}
            if site is None or (fresh and all(getattr(site, name) == value for name, value in values.items())):
                return
        with self.gateway.database.touch() as session:
            session.execute(update(Site).where(Site.name == caller.site).values(last_seen_at=now, **values))


def token_hash(token: str) -> str:
    """What is kept of a token. It is random and long, so that a plain hash hides it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def authenticate(work: Work, token: str | None) -> Caller:
    """Find out who holds this token.

    Raises:
        NotAuthenticated: nobody does.
        NotAllowed: the site that holds it was revoked or has left.
    """
    if not token:
        raise NotAuthenticated("This needs a login: send the token as `Authorization: Bearer TOKEN`.")
    digest = token_hash(token)
    if hmac.compare_digest(digest, work.gateway.state.server_token_sha256):
        return Caller(Role.SERVER, SERVER_NAME)
    row = work.session.scalar(select(Token).where(Token.sha256 == digest))
    if row is None or row.revoked_at is not None:
        raise NotAuthenticated("The token is unknown or was revoked; log in again.")
    if row.expires_at <= work.now:
        raise NotAuthenticated("The token has expired; log in again.", expired=True)
    _require_account(work, row)
    _require_active(work, row.site)
    return Caller(Role(row.role), row.name, row.site, row.id)


def _require_account(work: Work, token: Token) -> None:
    account = work.session.get(Account, token.account) if token.account else None
    if account is not None and account.disabled:
        raise NotAuthenticated("The account is disabled; ask an admin of the coordinator.")


def _require_active(work: Work, name: str | None) -> None:
    site = work.session.get(Site, name) if name else None
    if site is not None and site.state != SiteState.ACTIVE:
        raise NotAllowed(
            f"Site {site.name} is {site.state} and can do nothing more here; ask the coordinator.",
            site=site.name,
            state=site.state,
        )
