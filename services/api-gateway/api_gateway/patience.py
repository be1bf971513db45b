"""How long a peer may take to say what it wants: a request's head must end, and its body must go on arriving.

A connection costs a socket and some memory. Whoever opens many and sends a byte a minute on each could keep every hospital
out (slow loris). What is limited is progress, never the whole time: an update may come for hours over a thin line, and an
event stream, which waits for the gateway and not for its peer, is not touched.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import structlog
from starlette.types import Message, Receive
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from medhive.errors import TooSlow

MAX_HEAD_BYTES = 256 * 1024  # a manifest of a contribution, the longest that is sent, has a few kilobytes

log = structlog.get_logger(__name__)


# ---- bodies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """At least `window_bytes` of a body in every `window_s` seconds of waiting for it, or its end."""

    window_s: float
    window_bytes: int


class Arrival:
    """One body on its way. Only the waiting counts: what the gateway itself takes to write the bytes is not the peer's."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._waited_s = 0.0
        self._bytes = 0
        self.complete = False

    async def next(self, receive: Receive) -> Message:
        """The next piece. Once the body is complete, whatever comes then is waited for without a limit.

        Raises:
            TooSlow: a window went by without enough of the body.
        """
        if self.complete:
            return await receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._pace.window_s - self._waited_s)):
                message = await receive()
        except TimeoutError as error:
            raise self._too_slow() from error
        self._count(len(message.get("body", b"")), time.monotonic() - began)
        self.complete = not message.get("more_body", False)
        return message

    def _count(self, count: int, waited_s: float) -> None:
        self._bytes += count
        self._waited_s += waited_s
        if self._bytes >= self._pace.window_bytes:
            self._bytes, self._waited_s = 0, 0.0

    def _too_slow(self) -> TooSlow:
        return TooSlow(
            f"Fewer than {self._pace.window_bytes} bytes of the body came within {self._pace.window_s:g} seconds. Send it "
            "again; a blob goes on where it stopped.",
            window_s=self._pace.window_s,
            window_bytes=self._pace.window_bytes,
        )


# ---- heads ---------------------------------------------------------------------------------------------------------


class HeadGuard(asyncio.Protocol):
    """Put before one of uvicorn's protocols: cuts a connection on which a request does not begin in time.

    uvicorn limits only the quiet between two requests, and forgets even that with the first byte of the next one. Here the
    time runs from the connecting, or from that first byte, until the head is whole. uvicorn does not limit a head's length
    either, and keeps all of it until it ends.
    """

    head_s: ClassVar[float]
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any
    _deadline: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer is there; what it wants it must say soon."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Part of a head, or of a body, whose pace is watched where it is read."""
        went_on = self._in_head
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if went_on and self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._cut("http.head-too-long", limit=MAX_HEAD_BYTES)
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        else:
            self._await_head()

    def on_message_begin(self) -> None:
        """The parser has the first byte of a head."""
        self._in_head = True
        super().on_message_begin()  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        """It has the last one."""
        self._in_head = False
        super().on_headers_complete()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_s, self._out_of_time)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _out_of_time(self) -> None:
        self._deadline = None
        self._cut("http.no-head-in-time", seconds=self.head_s)

    def _cut(self, why: str, **facts: float) -> None:
        log.info(why, **facts)
        # Not closed politely: a peer that does not send does not answer the end of its TLS either.
        self.transport.abort()


def guarded_protocol(head_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol of this installation, with the guard before it."""
    return type("GuardedProtocol", (HeadGuard, AutoHTTPProtocol), {"head_s": head_s})
