"""Keeps certificates from ending while the gateway runs: renews what is its own, and warns of what is not.

Every gateway process looks once a minute, under the lock of the state folder, so that of several one alone makes a
certificate and hands it out; the others find it there. A certificate that an operator brought, and the CA, are nothing that
a gateway can replace by itself: their end is announced 30 days before, once in the event log, and at `/ready` until it is
dealt with.
"""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from api_gateway.events import Kind
from api_gateway.handouts import hand_out
from api_gateway.models import Event
from api_gateway.state import State, Tunnel, locked, open_state, own_certificate, read_tunnel
from api_gateway.work import Gateway
from medhive.errors import MedHiveError

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
    yield Ending("ca", gateway.state.authority.certificate.not_valid_after_utc)
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
        self._tls: ssl.SSLContext | None = None
        self._shown = self._pair(gateway.state)

    def serves_with(self, tls: ssl.SSLContext) -> None:
        """Tell with what this process itself serves: a new certificate counts from the next connection on."""
        self._tls = tls

    def look(self) -> None:
        """Renew what is due, hand it out, show it; announce what ends."""
        gateway = self._gateway
        with locked(gateway.settings) as folder:
            state = open_state(gateway.settings, folder)
            if gateway.settings.handout_dir:
                hand_out(folder, gateway.settings.handout_dir)
            gateway.state = state
            self._show(state)
        if state.made:
            log.info("certificate.renewed", certificates=state.made)
            with gateway.system_write() as work:
                work.record(Kind.CERTIFICATES_RENEWED, "coordinator", certificates=list(state.made))
        self._announce_tunnel(state.tunnel)
        self._announce()

    def follow_tunnel(self) -> None:
        """Look at once when the tunnel has moved: the proxy's certificate needs its name, hospitals its address."""
        if read_tunnel(self._gateway.settings) != self._gateway.state.tunnel:
            self.look()

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
                work.record(Kind.TUNNEL_OPENED, f"tunnel {tunnel.address}", address_trust=self._gateway.address_trust)
                log.info("tunnel.opened", address=tunnel.address)

    def _show(self, state: State) -> None:
        pair = self._pair(state)
        if pair != self._shown and self._tls is not None:
            self._tls.load_cert_chain(state.certificate_file, state.key_file)
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


def _said(ending: Ending) -> Select[int]:
    return select(Event.number).where(Event.kind == Kind.CERTIFICATE_ENDS, Event.subject == ending.subject)


def _tunnel_said(session: Session) -> str | None:
    """The address that the log says is open."""
    query = select(Event.kind, Event.subject).where(Event.kind.in_((Kind.TUNNEL_OPENED, Kind.TUNNEL_LOST)))
    row = session.execute(query.order_by(Event.number.desc()).limit(1)).first()
    return row.subject.removeprefix("tunnel ") if row and row.kind == Kind.TUNNEL_OPENED else None
