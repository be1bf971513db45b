"""Looks that are answered when there is something to see, and not before.

Flower's nodes, ServerApps and superexec ask the SuperLink again and again whether there is anything for them, and each
look costs it about 10 ms of processor time: with many hospitals that is a core for nothing, and what comes waits for the
next look. So a look that says how long it may be held (`HOLD_HEADER`) and finds nothing is kept open, here in front of
Flower's own application, until something comes that it asked for, or until its time is up. Others are passed on untouched.

Nothing is decided here: a look that is woken is put to Flower once more, with its signature, and gets Flower's answer.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from medhive.version import HOLD_HEADER

LONGEST_HOLD_S = 25.0
"""Proxies between a hospital and its coordinator end connections that are silent for 30 s; ours wait longer."""

MAX_LOOK_BYTES = 256 * 1024
"""A look names a node, or the messages of a cohort, 64 bytes each. What is longer, or does not say, is not held."""

OK = 200

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class News:
    """What a request has brought about: there is something for `told`; `dismissed` wait no longer."""

    told: frozenset[str] = frozenset()
    dismissed: frozenset[str] = frozenset()


Asked = Callable[[bytes], frozenset[str]]
"""The names that a look, by its body, waits for; none for what cannot be read."""
Happened = Callable[[bytes, bytes], News]
"""The news of a request that was answered with success, by its body and the answer's."""


@dataclass(eq=False)
class _Look:
    names: frozenset[str]
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False


class Board:
    """Who looks for what; used from the event loop alone.

    Args:
        looks: how to read a look, by path.
        news: how to read what brings something about, by path.
    """

    def __init__(self, looks: Mapping[str, Asked], news: Mapping[str, Happened]) -> None:
        self.looks, self.news = MappingProxyType(dict(looks)), MappingProxyType(dict(news))
        self._open: dict[str, list[_Look]] = {}
        self._left: set[str] = set()  # dismissed before their last look arrived, which is then over as well
        self._closed = False

    def open(self, names: frozenset[str]) -> _Look:
        """A new look, of which nobody knows yet whose it is."""
        look = _Look(names, over=self._closed)
        for name in names:
            self._open.setdefault(name, []).append(look)
        return look

    def admit(self, look: _Look) -> None:
        """The application has taken the look for genuine. Older ones for the same are over: whoever looked is gone, or has
        given up waiting."""
        look.over |= bool(look.names & self._left)
        self._left -= look.names
        self._dismiss(look.names, but=look)

    def leave(self, look: _Look) -> None:
        """The look has its answer."""
        for name in look.names:
            self._open[name].remove(look)
            if not self._open[name]:
                del self._open[name]

    def tell(self, news: News) -> None:
        """Wake those whom it concerns."""
        for name in news.told:
            for look in self._open.get(name, ()):
                look.woken.set()
        self._left |= news.dismissed - self._open.keys()
        self._dismiss(news.dismissed)

    def close(self) -> None:
        """Answer every look now, and hold none any more: the service is going down."""
        self._closed = True
        self._dismiss(list(self._open))

    def _dismiss(self, names: Iterable[str], but: _Look | None = None) -> None:
        for name in names:
            for look in self._open.get(name, ()):
                if look is not but:
                    look.over = True
                    look.woken.set()


class Holding:
    """ASGI middleware around Flower's application: holds looks, and wakes them by what passes through."""

    def __init__(self, app: Application, board: Board) -> None:
        self._app = app
        self._board = board

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path in self._board.news:
            await self._watch(self._board.news[path], scope, receive, send)
        elif path in self._board.looks and (seconds := _hold_of(scope)) > 0:
            await self._hold(self._board.looks[path], seconds, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _watch(self, happened: Happened, scope: Event, receive: Receive, send: Send) -> None:
        """Pass on, and tell what came of it once the answer is out."""
        request, answer = bytearray(), _Answer()

        async def hear() -> Event:
            event = await receive()
            request.extend(event.get("body", b""))
            return event

        async def say(event: Event) -> None:
            await answer.take(event)
            await send(event)

        await self._app(scope, hear, say)
        if answer.status == OK:
            self._board.tell(happened(bytes(request), answer.body))

    async def _hold(self, asked: Asked, seconds: float, scope: Event, receive: Receive, send: Send) -> None:
        body = await _body_of(receive)
        gone = asyncio.ensure_future(receive())  # completes when the caller has hung up
        look = self._board.open(asked(body))
        try:
            answer = await self._look(look, seconds, scope, body, gone)
            if not gone.done():
                await answer.give(send)
        finally:
            self._board.leave(look)
            gone.cancel()

    async def _look(
        self, look: _Look, seconds: float, scope: Event, body: bytes, gone: "asyncio.Future[Event]"
    ) -> "_Answer":
        """Flower's answer: its first one that is not empty, or the last within the time.

        A caller that has hung up is looked for no more: Flower hands a message out once, and it would be lost.
        """
        end = asyncio.get_running_loop().time() + seconds
        while True:
            look.woken.clear()  # before Flower is asked, so that nothing is missed that comes while it looks
            answer = _Answer()
            await self._app(_copy(scope), _again(body, gone), answer.take)
            if answer.status == OK:
                self._board.admit(look)
            if answer.status != OK or answer.body or look.over or not look.names:
                return answer
            await _first(look.woken, gone, end - asyncio.get_running_loop().time())
            if not look.woken.is_set() or look.over or gone.done():
                return answer


class _Answer:
    """An answer of the application, kept until it is known whether it is the one to give."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def take(self, event: Event) -> None:
        self.events.append(event)

    async def give(self, send: Send) -> None:
        for event in self.events:
            await send(event)

    @property
    def status(self) -> int:
        return next((int(event["status"]) for event in self.events if event["type"] == "http.response.start"), 0)

    @property
    def body(self) -> bytes:
        return b"".join(event.get("body", b"") for event in self.events if event["type"] == "http.response.body")


def _hold_of(scope: Event) -> float:
    """How long the look may be held, in seconds; 0 for not at all."""
    headers = dict(scope["headers"])
    try:
        seconds = float(headers.get(HOLD_HEADER.lower().encode(), b"0"))
        short = int(headers.get(b"content-length", MAX_LOOK_BYTES + 1)) <= MAX_LOOK_BYTES
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_HOLD_S) if short and seconds > 0 else 0.0


async def _body_of(receive: Receive) -> bytes:
    """The whole body, which the web server keeps to its announced length."""
    body, more = bytearray(), True
    while more:
        event = await receive()
        body.extend(event.get("body", b""))
        more = bool(event.get("more_body", False))
    return bytes(body)


def _again(body: bytes, gone: "asyncio.Future[Event]") -> Receive:
    """The request once more: its body, then nothing until the caller hangs up."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Event:
        return left.pop() if left else await asyncio.shield(gone)

    return receive


def _copy(scope: Event) -> Event:
    """The application writes into its scope; each time it gets one that it has not seen."""
    return {**scope, "state": dict(scope.get("state", {}))}


async def _first(woken: asyncio.Event, gone: "asyncio.Future[Event]", seconds: float) -> None:
    """Wait until woken, hung up on, or so many seconds have passed."""
    waking = asyncio.ensure_future(woken.wait())
    either: set[asyncio.Future[Any]] = {waking, gone}
    try:
        await asyncio.wait(either, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waking.cancel()
        with suppress(asyncio.CancelledError):
            await waking


@asynccontextmanager
async def closing(board: Board, on_end: Callable[[Callable[[], object]], None]) -> AsyncIterator[None]:
    """While the service runs: have `on_end` call the board's end in this event loop, from whatever thread or signal."""
    loop = asyncio.get_running_loop()
    on_end(lambda: loop.call_soon_threadsafe(board.close))
    yield
