"""What stands around every endpoint: versions, limits, strict JSON, logs, and who is calling from where.

Anything that a body could hold and a database, a canonical form or JSON itself could not take (NaN, a number beyond a float,
half of a character, a NUL, a nesting without end) is refused here once, so that no service has to think of it.
"""

import ipaddress
import json
import math
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import structlog
from fastapi import Depends, Path, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_gateway.errors import problem_of
from api_gateway.patience import Arrival, Pace
from api_gateway.runs import MAX_NUMBER
from api_gateway.work import Call, Gateway, Spoken
from medhive import __version__
from medhive.errors import InvalidInput, MedHiveError, TooLarge, TooSlow
from medhive.queues import UPLOAD
from medhive.spec import Digest
from medhive.version import MAX_SOFTWARE, PROTOCOL, PROTOCOL_HEADER, SOFTWARE_HEADER, is_number, require_compatible
from medhive.wire import API

MAX_JSON_BYTES = 1024 * 1024  # the largest body, a round's report of hundreds of sites, is a fraction of it
MAX_JSON_DEPTH = 60
READING = ("GET", "HEAD", "OPTIONS")
INTRODUCTION = f"{API}/coordinator"
"""Answered to every version: it says which ones are understood, and each side's own words name the side to upgrade."""
AT_THE_ROOT = (UPLOAD, "/download")
"""Of the queue; other programs may call them too, and say no version."""
# Ids are written as people read them; 12 digits stay within every integer on the way.
RequestId = Annotated[str, Path(pattern=r"^REQ_[1-9][0-9]{0,11}$")]
RunId = Annotated[str, Path(pattern=r"^RUN_[1-9][0-9]{0,11}$")]
VersionNumber = Annotated[int, Path(ge=0, le=MAX_NUMBER)]
BlobDigest = Annotated[Digest, Path()]
Count = Callable[[str, str, int, float], None]

log = structlog.get_logger(__name__)


def number_of(identifier: str) -> int:
    """7 of REQ_7 or RUN_7."""
    return int(identifier.partition("_")[2])


# ---- the call ------------------------------------------------------------------------------------------------------


def gateway_of(request: Request) -> Gateway:
    """The process's parts."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def call_of(request: Request) -> Call:
    """The exchange as the services see it."""
    gateway = gateway_of(request)
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else None
    return Call(
        gateway, bearer, source_of(request, gateway), request.headers.get("Host", ""), spoken_of(request.headers)
    )


def spoken_of(headers: Headers) -> Spoken | None:
    """What the caller says of its version; None where it does not."""
    protocol = headers.get(PROTOCOL_HEADER, "")
    return Spoken(_software(headers), int(protocol)) if is_number(protocol) else None


def _software(headers: Headers) -> str:
    return "".join(filter(str.isprintable, headers.get(SOFTWARE_HEADER, "")))[:MAX_SOFTWARE]


def source_of(request: Request, gateway: Gateway) -> str:
    """Where the exchange comes from; a proxy is believed only when it is named in the settings."""
    peer = request.client.host if request.client else "unknown"
    if not came_through_proxy(request, gateway):
        return peer
    forwarded = request.headers["X-Forwarded-For"].rpartition(",")[2].strip()
    return forwarded[:64] or peer


def came_through_proxy(request: Request, gateway: Gateway) -> bool:
    """Whether a proxy that is named in the settings passed the exchange on; services beside it come directly."""
    trusted = gateway.settings.trusted_proxy
    if not trusted or request.client is None or "X-Forwarded-For" not in request.headers:
        return False
    try:
        peer = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    return any(peer in ipaddress.ip_network(network, strict=False) for network in trusted)


CallDep = Annotated[Call, Depends(call_of)]


# ---- strict JSON ---------------------------------------------------------------------------------------------------


class StrictRequest(Request):
    """A request whose JSON holds nothing that is not JSON."""

    async def json(self) -> Any:
        """The body.

        Raises:
            InvalidInput: it holds what could not be kept or passed on as it is.
        """
        if not hasattr(self, "_strict"):
            self._strict = parse_json(await self.body())
        return self._strict


def parse_json(raw: bytes) -> Any:
    """Read JSON as RFC 8259 means it, within `MAX_JSON_DEPTH`.

    Raises:
        InvalidInput: it is no such JSON.
        json.JSONDecodeError: it is no JSON at all.
    """
    try:
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        _check_texts(value, 0)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise InvalidInput(
            "The body holds a number or text that JSON cannot carry, or is nested too deeply."
        ) from error
    return value


def _no_constant(name: str) -> float:
    raise InvalidInput(f"{name} is not a number that JSON knows.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidInput("A number in the body is too large.")
    return value


def _check_texts(value: Any, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise InvalidInput(f"The body is nested more than {MAX_JSON_DEPTH} levels deep.")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_texts(item, depth + 1)


def _check_text(value: str) -> None:
    if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidInput("A text in the body holds a character that cannot be kept (NUL, or half a surrogate pair).")


class StrictRoute(APIRoute):
    """An endpoint that reads strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the endpoint."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


# ---- around everything ---------------------------------------------------------------------------------------------


class Frame:
    """ASGI middleware: protocol versions, limits of bodies, our own version on every answer, one log line and count each."""

    def __init__(self, app: ASGIApp, pace: Pace, count: Count) -> None:
        """Wrap an application; `count` is told method, path, status and seconds of every exchange that has ended."""
        self.app = app
        self._pace = pace
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one exchange."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, Arrival(self._pace))
        try:
            require_version(scope["method"], scope["path"], Headers(scope=scope))
            exchange.require_length()
        except MedHiveError as error:
            await problem_of(error)(scope, receive, exchange.send)
        else:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self._count(*exchange.log())


def require_version(method: str, path: str, headers: Headers) -> None:
    """Refuse a peer whose protocol does not fit; only who reads, or calls what is open to other programs, may say nothing.

    Raises:
        IncompatibleVersion: the text says which side to upgrade.
        InvalidInput: the header is missing or no number.
    """
    if path == INTRODUCTION or not path.startswith((API, *AT_THE_ROOT)):
        return
    text = headers.get(PROTOCOL_HEADER)
    if text is None and (method in READING or path in AT_THE_ROOT):
        return
    if text is None or not is_number(text):
        raise InvalidInput(f"Send the header {PROTOCOL_HEADER}: {PROTOCOL}, the version of the exchange.")
    require_compatible(int(text), "the coordinator", "the caller", _software(headers))


class _Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send, arrival: Arrival) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._arrival = arrival
        self._began = time.monotonic()
        self._status = 0
        self._bytes = 0
        # Weights have limits of their own and never lie in memory.
        self._limited = (scope["method"], scope["path"]) != ("POST", UPLOAD) and not (
            "/blobs/" in scope["path"] and scope["method"] == "PUT"
        )

    def require_length(self) -> None:
        length = Headers(scope=self._scope).get("Content-Length", "0")
        if self._limited and length.isdigit() and int(length) > MAX_JSON_BYTES:
            raise TooLarge(f"A body may have {MAX_JSON_BYTES} bytes.", limit=MAX_JSON_BYTES)

    async def receive(self) -> Message:
        message = await self._next()
        self._bytes += len(message.get("body", b""))
        if self._limited and self._bytes > MAX_JSON_BYTES:
            raise TooLarge(f"A body may have {MAX_JSON_BYTES} bytes.", limit=MAX_JSON_BYTES)
        return message

    async def _next(self) -> Message:
        try:
            return await self._arrival.next(self._receive)
        except TooSlow:
            if self._status:  # answered already, without the body: the peer is as good as gone
                return {"type": "http.disconnect"}
            raise

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[PROTOCOL_HEADER], headers[SOFTWARE_HEADER] = str(PROTOCOL), __version__
            headers.setdefault("Cache-Control", "no-store")
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)

    def log(self) -> tuple[str, str, int, float]:
        seconds = time.monotonic() - self._began
        facts = {"method": self._scope["method"], "path": self._scope["path"], "status": self._status}
        level = log.warning if self._status >= 500 else log.info if self._status >= 400 else log.debug
        level("http.exchange", **facts, ms=round(seconds * 1000))
        return self._scope["method"], self._scope["path"], self._status, seconds
