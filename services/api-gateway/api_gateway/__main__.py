"""`medhive-gateway serve`: opens the state folder, brings the database up to date, serves over TLS until told to stop."""

import argparse
import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import TextIO

import structlog
import uvicorn
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from api_gateway import accounts, auth, migrate
from api_gateway.app import create_app
from api_gateway.blobstore import BlobStore
from api_gateway.db import Database
from api_gateway.handouts import hand_out
from api_gateway.hub import Hub
from api_gateway.models import Account, Version
from api_gateway.patience import guarded_protocol
from api_gateway.renewal import Renewal
from api_gateway.settings import PREFIX, Settings, load_settings, read_secret_file
from api_gateway.state import State, locked, open_state
from api_gateway.tls import BUNDLE, fingerprint
from api_gateway.work import Gateway
from medhive import __version__
from medhive.errors import InvalidInput, MedHiveError

GRACEFUL_S = 1  # answers take milliseconds and parts of blobs are resumed; idle TLS connections use all of it
BACKLOG = 512
MIN_PASSWORD = 12  # as for every account
KEEP_ALIVE_S = 75  # hospitals poll; a connection that is kept saves them a TLS handshake


class _Server(uvicorn.Server):
    """Ends the event streams as soon as it is told to stop, and then leaves with success."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        former = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A peer that keeps an idle connection does not read, and so would never answer the closing of its TLS.
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._hub.close()
        self.handle_exit(number, frame)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="medhive-gateway", description="MedHive's control plane.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help=f"serve; the settings are environment variables that begin with {PREFIX}")
    commands.add_parser(
        "tunnel", help="keep an ngrok tunnel to the proxy open; its settings begin with MEDHIVE_TUNNEL_"
    )
    renew = commands.add_parser(
        "renew", help="renew the CA or the coordinator's signing key, beside gateways that run; settings as for serve"
    )
    renew.add_argument("what", choices=["ca", "key"])
    renew.add_argument(
        "--at-once",
        action="store_true",
        help="of the CA: let the new one take over now, and trust the former no longer",
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "tunnel":
            _keep_tunnel()
        elif options.command == "renew":
            _renew(load_settings(), options.what, at_once=options.at_once, out=sys.stdout)
        else:
            serve(load_settings(), sys.stdout)
    except MedHiveError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _keep_tunnel() -> None:
    from api_gateway import tunnel  # noqa: PLC0415 - pyngrok is nothing for the gateway's own process

    keeper = tunnel.serve()
    if keeper is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: keeper.stop())
        keeper.run()


def _renew(settings: Settings, what: str, *, at_once: bool, out: TextIO) -> None:
    """Renew CA or key in the state folder; gateways that serve from it see that within a second.

    Raises:
        InvalidInput: there is no coordinator yet, or a setting cannot be used.
        Conflict: a successor of the CA is announced already.
    """
    if not (settings.state_dir / "tls" / BUNDLE).exists():
        raise InvalidInput(f"{PREFIX}STATE_DIR names {settings.state_dir}, which holds no coordinator yet.")
    if what == "key" and at_once:
        raise InvalidInput("A new key counts at once; --at-once is for the CA.")
    gateway, _ = build(settings)
    configure_logging()
    renewal = Renewal(gateway)
    if what == "key":
        former = gateway.key.public.key_id
        renewal.renew_key()
        out.write(
            f"The coordinator signs with key {gateway.key.public.key_id}; key {former} has named it its successor.\n"
        )
        return
    renewal.renew_ca(at_once=at_once)
    authority = gateway.state.authority
    successor = authority.successor
    if successor is None:
        out.write(f"The CA is another one now, SHA-256 {authority.fingerprint.hex()}; no other is trusted.\n")
    else:
        takes_over = authority.takes_over(successor, settings.ca_overlap)
        out.write(
            f"A successor of the CA is trusted from now on, SHA-256 {fingerprint(successor)}. It takes over on "
            f"{takes_over:%Y-%m-%d}; the present one is trusted until {takes_over + settings.ca_overlap:%Y-%m-%d}.\n"
        )


def serve(settings: Settings, out: TextIO) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        InvalidInput: a setting cannot be used, the port is taken, or the database does not answer.
        IncompatibleVersion: the database belongs to a newer version.
    """
    sock = bind(settings)
    with sock:
        gateway, password = build(settings)
        configure_logging()
        _announce(gateway, sock, password, out)
        app = create_app(gateway)
        config = uvicorn.Config(
            app,
            ssl_certfile=str(gateway.state.certificate_file),
            ssl_keyfile=str(gateway.state.key_file),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACEFUL_S,
            timeout_keep_alive=KEEP_ALIVE_S,
            http=guarded_protocol(settings.head_s),
        )
        config.load()
        if config.ssl is not None:
            app.state.renewal.serves_with(config.ssl)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_Server(config, gateway.hub).serve(sockets=[sock]))


def configure_logging() -> None:
    """JSON lines on stderr, with fixed event names; what libraries have to say too."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def bind(settings: Settings) -> socket.socket:
    """Take the port before anything else is touched.

    Raises:
        InvalidInput: it is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named because asyncio switches Nagle's algorithm off only then; with it each answer waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        place = f"{settings.host}:{settings.port}"
        if error.errno == errno.EADDRINUSE:
            raise InvalidInput(
                f"Port {settings.port} on {settings.host} is in use by another program; stop it, or choose another with "
                f"{PREFIX}PORT."
            ) from error
        raise InvalidInput(f"Cannot listen on {place}: {error.strerror or error}; check {PREFIX}HOST.") from error
    return sock


def build(settings: Settings) -> tuple[Gateway, str | None]:
    """Open everything; returns the first admin's password when it was made up just now.

    Raises:
        InvalidInput: the state folder or the database cannot be used.
    """
    with locked(settings) as folder:
        state = open_state(settings, folder)
        if settings.handout_dir:
            hand_out(folder, settings.handout_dir)
        database = Database(settings.database_address)
        try:
            migrate.upgrade(database)
        except SQLAlchemyError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise InvalidInput(f"The database cannot be used: {cause}. Check {PREFIX}DATABASE_URL.") from error
        gateway = assemble(settings, state, database)
        return gateway, _first_admin(gateway)


def assemble(settings: Settings, state: State, database: Database) -> Gateway:
    """Put the parts together."""
    return Gateway(settings, state, database, BlobStore(state.blobs), Hub(), lambda: datetime.now(UTC))


def _first_admin(gateway: Gateway) -> str | None:
    with gateway.database.read() as session:
        if session.scalar(select(func.count()).select_from(Account)):
            return None
    path = gateway.settings.admin_password_file
    given = read_secret_file(path, "ADMIN_PASSWORD_FILE") if path else None
    if given is not None and len(given) < MIN_PASSWORD:
        raise InvalidInput(f"{PREFIX}ADMIN_PASSWORD_FILE holds fewer than {MIN_PASSWORD} characters.")
    password = given or auth.new_password()
    with gateway.system_write() as work:
        made = accounts.first_admin(work, auth.hash_password(password))
    return password if made and not given else None


def _announce(gateway: Gateway, sock: socket.socket, password: str | None, out: TextIO) -> None:
    host, port = sock.getsockname()[:2]
    lines = [
        f"MedHive gateway {__version__}, {gateway.settings.coordinator_name}",
        f"address: https://{f'[{host}]' if ':' in host else host}:{port}",
        f"state folder: {gateway.state.folder.resolve()}",
        f"database: {gateway.database.engine.url.render_as_string(hide_password=True)}",
        f"fleet address told to hospitals: {gateway.settings.fleet_address}",
        f"CA certificate: {(gateway.state.folder / 'tls' / 'ca.crt').resolve()}",
        # What `medhive-admin login` shows to a person, who compares the two.
        f"CA fingerprint: {gateway.state.authority.fingerprint.hex()}",
    ]
    if password is not None:
        lines += [f"first start: log in as {accounts.FIRST_ADMIN}; this password is shown only now"]
        lines += [f"admin password: {password}"]
    lines += [f"newest versions: {_newest(gateway) or 'none yet'}"]
    out.write("\n".join(lines) + "\n")
    out.flush()


def _newest(gateway: Gateway) -> str:
    query = select(Version.study, func.max(Version.number)).group_by(Version.study).order_by(Version.study)
    with gateway.database.read() as session:
        return ", ".join(f"{study} version {number}" for study, number in session.execute(query))


if __name__ == "__main__":
    sys.exit(main())
