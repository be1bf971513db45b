"""A coordinator's public address whose TLS ends at a certificate that MedHive's CA did not issue.

The CA is made for the test and given to hospitals by SSL_CERT_FILE or EXTRA_CA_FILE: it stands in for the public ones. The
address passes the bytes on to a gateway, as a proxy with a certificate of its own does, or a tunnel that ends TLS.
"""

import contextlib
import datetime
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from api_gateway.tls import Authority

PIECE = 65536
Hand = Callable[[bool, bytes], bytes | None]


class PublicCa:
    """A CA of its own, and a certificate for a name in `<folder>/public.crt` with its key."""

    def __init__(self, folder: Path, days: float = 90, name: str = "localhost") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "ca.crt"
        self.authority = Authority.open(folder, "somebody else")
        now = datetime.datetime.now(datetime.UTC)
        validity = datetime.timedelta(days=days)
        self.authority.ensure_leaf(folder, "public", (name,), now, validity)

    @property
    def certificate(self) -> Path:
        return self.folder / "public.crt"

    @property
    def key(self) -> Path:
        return self.folder / "public.key"


@contextmanager
def public_address(
    ca: PublicCa, port: int, upstream: ssl.SSLContext, hand: Hand = lambda _up, piece: piece
) -> Iterator[str]:
    """Serve https://localhost with the public certificate, passing everything on to the gateway at this port.

    Everything goes through `hand`: it is told whether a piece goes up to the gateway, and says what is passed on instead;
    None cuts the connection.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(ca.certificate, ca.key)
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()
    thread = threading.Thread(target=_accept, args=(listener, server, port, upstream, stopped, hand))
    thread.start()
    try:
        yield f"https://localhost:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        thread.join()
        listener.close()


def _accept(  # noqa: PLR0917
    listener: socket.socket,
    server: ssl.SSLContext,
    port: int,
    upstream: ssl.SSLContext,
    stopped: threading.Event,
    hand: Hand,
) -> None:
    pipes: list[threading.Thread] = []
    listener.settimeout(0.1)
    while not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            inner, _ = listener.accept()
            pipes.append(threading.Thread(target=_pipe, args=(inner, server, port, upstream, stopped, hand)))
            pipes[-1].start()
    for pipe in pipes:
        pipe.join()


def _pipe(  # noqa: PLR0917
    plain: socket.socket,
    server: ssl.SSLContext,
    port: int,
    upstream: ssl.SSLContext,
    stopped: threading.Event,
    hand: Hand,
) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        stack.enter_context(plain)
        near = stack.enter_context(server.wrap_socket(plain, server_side=True))
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        far = stack.enter_context(upstream.wrap_socket(raw, server_hostname="localhost"))
        while not stopped.is_set():
            ready = [side for side in (near, far) if side.pending()] or select.select([near, far], [], [], 0.1)[0]
            for side in ready:
                try:
                    piece = _piece(side)
                except ssl.SSLWantReadError:
                    continue
                passed = hand(side is near, piece) if piece else None
                if passed is None:
                    return
                (far if side is near else near).sendall(passed)


def _piece(side: ssl.SSLSocket) -> bytes:
    """What has come; what can be read may be TLS's own word, after which waiting here would hold up the other side."""
    side.setblocking(False)
    try:
        return side.recv(PIECE)
    finally:
        side.setblocking(True)
