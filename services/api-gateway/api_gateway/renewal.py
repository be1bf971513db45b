"""Keeps certificates, CA and key from ending while the gateway runs: renews what is its own, and warns of what is not.

Every gateway process looks once a minute, under the lock of the state folder, so that of several one alone makes a
certificate and hands it out; the others find it there. What the folder holds is the truth; the event log is told of it
afterwards, once, by whichever process finds it untold, so that a process that was killed in between costs nothing. A
certificate that an operator brought is nothing that a gateway can replace by itself: its end is announced 30 days before,
once in the event log, and at `/ready` until it is dealt with.
"""

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from api_gateway import signing_key, versions
from api_gateway.events import Kind
from api_gateway.handouts import hand_out
from api_gateway.models import Event
from api_gateway.state import (
    State,
    Tunnel,
    locked,
    open_authority,
    open_state,
    own_certificate,
    read_keys,
    read_tunnel,
)
from api_gateway.tls import CaStep, ServedCertificate, fingerprint
from api_gateway.work import Gateway
from medhive.errors import Conflict, MedHiveError
from medhive.signing import VerifyKey

ALARM_BEFORE = timedelta(days=30)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Ending:
    """A certificate that ends soon and that the gateway cannot renew by itself."""

    certificate: str
    ends_at: datetime

    @property
    def subject(self) -> str:
        """How the log names it; another certificate of the same place is another subject."""
        return f"certificate {self.certificate} until {self.ends_at.isoformat()}"


def endings(gateway: Gateway) -> list[Ending]:
    """What needs a person within 30 days, the most pressing first."""
    now = gateway.clock()
    found = [each for each in _not_renewed(gateway) if each.ends_at <= now + ALARM_BEFORE]
    return sorted(found, key=lambda each: each.ends_at)


def _not_renewed(gateway: Gateway) -> Iterator[Ending]:
    authority = gateway.state.authority
    if authority.successor is None:  # else it takes over by itself
        yield Ending("ca", authority.certificate.not_valid_after_utc)
    try:
        own = own_certificate(gateway.settings)
    except MedHiveError as error:  # an operator is just replacing it
        log.warning("certificate.unreadable", reason=str(error))
    else:
        if own is not None:
            yield Ending("own", own.not_valid_after_utc)


class Renewal:
    """Looks after the certificates of one gateway process; `look` is called again and again, on any thread."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._served: ServedCertificate | None = None
        self._shown = self._pair(gateway.state)
        self._told: tuple[Tunnel | None, tuple[bytes, bytes]] = gateway.state.tunnel, gateway.state.read
        self._made: list[str] = []

    def serves_with(self, tls: ssl.SSLContext) -> None:
        """Tell with what this process itself serves: a new certificate counts from the next connection on."""
        self._served = ServedCertificate(tls)

    def look(self) -> None:
        """Renew what is due, hand it out, show it; announce what ends."""
        gateway = self._gateway
        with locked(gateway.settings) as folder:
            if self._key_is_old(folder):
                self._roll(folder)
            state = self._read_anew(folder)
            made, self._made = self._made, []
        if made:
            log.info("certificate.renewed", certificates=made)
            with gateway.system_write() as work:
                work.record(Kind.CERTIFICATES_RENEWED, "coordinator", certificates=made)
        self._tell(state)
        self._sign_anew()
        self._announce_tunnel(state.tunnel)
        self._announce()
        self._told = state.tunnel, state.read

    def _read_anew(self, folder: Path) -> State:
        gateway = self._gateway
        state = open_state(gateway.settings, folder, gateway.state)
        if gateway.settings.handout_dir:
            hand_out(folder, gateway.settings.handout_dir)
        self._made += state.made
        gateway.use(state)
        self._show(state)
        return state

    def follow(self) -> None:
        """Look at once when the tunnel has moved, or another process has changed CA or key.

        The proxy's certificate needs the tunnel's name, and the other CA and key must be shown and handed out.
        """
        settings = self._gateway.settings
        if (read_tunnel(settings), read_keys(settings.state_dir)) != self._told:
            self.look()

    def catch_up(self) -> None:
        """Serve with the CA and the key that are in the folder now.

        Whoever has heard of a change, from whichever process, and asks for an introduction, is never shown what was before.
        """
        settings = self._gateway.settings
        if read_keys(settings.state_dir) != self._gateway.state.read:
            with locked(settings) as folder:
                self._read_anew(folder)

    def renew_key(self) -> None:
        """Change the coordinator's signing key now.

        Raises:
            Conflict: hospitals could not follow one more.
        """
        with locked(self._gateway.settings) as folder:
            self._roll(folder)
        self.look()

    def _roll(self, folder: Path) -> None:
        """Change the key, and put it under what the former one has signed, while no other unit of work is under way."""
        with self._gateway.system_write() as work:
            signing_key.roll(folder / "secrets", work.now)
            self._gateway.follow_key()
            versions.sign_anew(work)

    def renew_ca(self, *, at_once: bool = False) -> None:
        """Announce a successor of the CA; `at_once` also lets it take over, and trusts the former one no longer.

        Raises:
            Conflict: one is announced already.
        """
        settings = self._gateway.settings
        steps = (CaStep.ANNOUNCE, CaStep.HAND_OVER, CaStep.DROP) if at_once else (CaStep.ANNOUNCE,)
        for step in steps:
            with locked(settings) as folder:
                authority = open_authority(settings, folder, self._gateway.clock())
                if step is CaStep.ANNOUNCE and authority.successor is not None:
                    if not at_once:
                        raise Conflict("A successor of the CA is announced already, and takes over by itself.")
                    continue
                now = self._gateway.clock()
                authority.take(step, folder / "tls", settings.coordinator_name, now, settings.ca_validity)
            # Each step is told, handed out and shown before the next.
            self.look()

    def _key_is_old(self, folder: Path) -> bool:
        gateway = self._gateway
        if not gateway.settings.key_days:
            return False
        _, successions = signing_key.open_key(folder / "secrets")
        if successions:
            since = successions[-1].body.issued_at
        else:
            with gateway.database.read() as session:
                made = session.scalar(select(Event.at).where(Event.kind == Kind.COORDINATOR_CREATED))
            since = made or gateway.clock()  # the first start is not through yet
        return gateway.clock() - since >= timedelta(days=gateway.settings.key_days)

    def _tell(self, state: State) -> None:
        """Tell the log, and so the hospitals, what CA and key have become."""
        for succession in state.successions:
            new, old = (VerifyKey.from_text(getattr(succession.body, f"{each}_public_key")) for each in ("new", "old"))
            self._once(Kind.KEY_CHANGED, f"key {new.key_id}", former=old.key_id)
        authority = state.authority
        ends_at = authority.trusted[0].not_valid_after_utc.isoformat()
        if authority.successor is not None:
            subject = _subject(fingerprint(authority.successor))
            self._once(Kind.CA_ANNOUNCED, subject, ends_at=authority.successor.not_valid_after_utc.isoformat())
        if authority.former:
            former = [fingerprint(each) for each in authority.former]
            self._once(Kind.CA_CHANGED, _subject(fingerprint(authority.certificate)), ends_at=ends_at, former=former)
        for gone in self._former() - {fingerprint(each) for each in authority.trusted}:
            self._once(Kind.CA_DROPPED, _subject(gone))

    def _former(self) -> set[str]:
        """Fingerprints of all CAs that the log says were replaced."""
        with self._gateway.database.read() as session:
            rows = session.scalars(select(Event.data).where(Event.kind == Kind.CA_CHANGED)).all()
        return {each for row in rows for each in json.loads(row)["former"]}

    def _once(self, kind: Kind, subject: str, **data: Any) -> None:
        said = select(Event.number).where(Event.kind == kind, Event.subject == subject)
        with self._gateway.database.read() as session:
            if session.scalar(said) is not None:
                return
        with self._gateway.system_write() as work:
            if work.session.scalar(said) is None:
                log.info(kind.value, subject=subject)
                work.record(kind, subject, **data)

    def _sign_anew(self) -> None:
        """Put the present key under manifests of the former one: who joins later knows no other."""
        with self._gateway.database.read() as session:
            if not versions.signed_by_another(session, self._gateway.key.public):
                return
        with self._gateway.system_write() as work:
            versions.sign_anew(work)

    def _announce_tunnel(self, tunnel: Tunnel | None) -> None:
        """Say that it was opened, moved or lost, once, whoever of several gateways sees it first."""
        with self._gateway.database.read() as session:
            if _tunnel_said(session) == (tunnel.address if tunnel else None):
                return
        with self._gateway.system_write() as work:
            said = _tunnel_said(work.session)
            if tunnel is None and said is not None:
                work.record(Kind.TUNNEL_LOST, f"tunnel {said}")
            elif tunnel is not None and tunnel.address != said:
                work.record(Kind.TUNNEL_OPENED, f"tunnel {tunnel.address}", address_trust=self._gateway.widest_trust)
                log.info("tunnel.opened", address=tunnel.address)

    def _show(self, state: State) -> None:
        pair = self._pair(state)
        if pair != self._shown and self._served is not None:
            self._served.change(state.certificate_file, state.key_file)
        self._shown = pair

    @staticmethod
    def _pair(state: State) -> tuple[bytes, bytes]:
        return state.certificate_file.read_bytes(), state.key_file.read_bytes()

    def _announce(self) -> None:
        """Say it once in the log, however many gateways look and however often they start."""
        for ending in endings(self._gateway):
            with self._gateway.database.read() as session:
                if session.scalar(_said(ending)) is not None:
                    continue
            with self._gateway.system_write() as work:
                if work.session.scalar(_said(ending)) is None:
                    log.warning("certificate.ends", certificate=ending.certificate, ends_at=ending.ends_at.isoformat())
                    work.record(Kind.CERTIFICATE_ENDS, ending.subject, ends_at=ending.ends_at.isoformat())


def _subject(ca_fingerprint: str) -> str:
    return f"CA {ca_fingerprint[:16]}"


def _said(ending: Ending) -> Select[int]:
    return select(Event.number).where(Event.kind == Kind.CERTIFICATE_ENDS, Event.subject == ending.subject)


def _tunnel_said(session: Session) -> str | None:
    """The address that the log says is open."""
    query = select(Event.kind, Event.subject).where(Event.kind.in_((Kind.TUNNEL_OPENED, Kind.TUNNEL_LOST)))
    row = session.execute(query.order_by(Event.number.desc()).limit(1)).first()
    return row.subject.removeprefix("tunnel ") if row and row.kind == Kind.TUNNEL_OPENED else None
