"""The way to the gateway that sites, the aggregator and the command lines share: errors, versions, resumable bytes.

One class, so that trust (the coordinator's own CA, plus a hospital's), time-outs, limits and the mapping of problem
documents back to named errors are decided in one place; and beside it `introduce`, the one exchange before there is any
trust.
"""

import hashlib
import json
import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import httpx
from pydantic import ValidationError

from medhive import __version__, errors
from medhive.errors import (
    Conflict,
    DigestMismatch,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    TooLarge,
    Unavailable,
    Unreachable,
)
from medhive.leftovers import disk_errors
from medhive.sealing import SEAL_HEADER, WANTED, SiteSealing, plain_length
from medhive.version import (
    MAX_SOFTWARE,
    PROBLEM_HEADER,
    PROTOCOL,
    PROTOCOL_HEADER,
    SOFTWARE_HEADER,
    is_number,
    require_compatible,
)
from medhive.wire import API, CoordinatorAnswer

CHUNK_BYTES: Final = 4 * 1024 * 1024  # one PUT's part: small enough to resume, large enough to run at line speed
READ_BYTES: Final = 1024 * 1024
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024  # the largest JSON answer, a list of runs, is far below
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 60.0
# An introduction holds one certificate and a few names; whoever answers is not known yet, so no more is read, nor longer.
MAX_INTRODUCTION_BYTES: Final = 256 * 1024
INTRODUCTION_S: Final = 30.0
AS_IT_IS: Final = {"Accept-Encoding": "identity"}
BUSY: Final = "upload-busy"
"""The cause in a refusal of a part while an earlier connection of the same upload is not given up yet."""
TRIES: Final = 5  # of one part of a transfer, before the caller hears of it
PLACED_WITHIN_S: Final = 300.0  # all bytes are there, and are checked beside others': what a proxy waits for that too
ASK_AGAIN_S: Final = 0.5
# What a proxy answers by itself, without a problem document, while the gateway behind it restarts.
PROXYS_OWN: Final = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)

Progress = Callable[[int, int], None]


class RemoteError(MedHiveError):
    """The gateway refused for a reason that this side has no name for (it may be newer)."""

    code = "remote-error"


def _known_errors() -> dict[str, type[MedHiveError]]:
    found: dict[str, type[MedHiveError]] = {}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, MedHiveError):
            found[value.code] = value
    return found


KNOWN_ERRORS: Final = _known_errors()


@dataclass(frozen=True)
class Trust:
    """Whose certificates count: the coordinator's CAs (PEM), a hospital's own bundle, the system's.

    `ca_file` holds the coordinator's CAs where the gateway lays them; what is new in it counts from the next exchange on.
    """

    ca_pem: str | None = None
    extra_ca_file: Path | None = None
    system: bool = False
    ca_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Build the TLS context; TLS 1.2 at least, names checked."""
        context = ssl.create_default_context() if self.system else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_pem:
            context.load_verify_locations(cadata=self.ca_pem)
        if self.ca_file:
            context.load_verify_locations(cafile=self.ca_file)
        if self.extra_ca_file:
            context.load_verify_locations(cafile=self.extra_ca_file)
        return context


@dataclass(frozen=True)
class _Span:
    """Which bytes of an upload a part holds; `stop` is exclusive."""

    start: int
    stop: int
    total: int

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{self.total}"


def introduce(address: str, nonce: str = "") -> CoordinatorAnswer:
    """Ask an address who it is, before there is anything to trust it by.

    The certificate is not verified, on purpose: nothing secret is sent, and the answer counts for nothing until the caller
    has checked its signature over the nonce (`medhive.introduction`), or compared its CA with a fingerprint that came
    another way.

    Raises:
        Unreachable: nobody answers, or a proxy whose gateway is away.
        InvalidInput: whoever answers is no MedHive coordinator.
    """
    try:
        with (
            httpx.Client(verify=False, timeout=CONNECT_TIMEOUT_S) as http,  # noqa: S501 - see above
            http.stream("GET", f"{address}{API}/coordinator?nonce={nonce}", headers=AS_IT_IS) as answer,
        ):
            return CoordinatorAnswer.model_validate_json(_bounded_content(answer))
    except httpx.TransportError as error:
        raise _unreachable(address, error) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValidationError, TooLarge) as error:
        raise InvalidInput(f"{address} does not answer as a MedHive coordinator; check the address.") from error


def _bounded_content(answer: httpx.Response) -> bytes:
    if answer.status_code in PROXYS_OWN:
        raise Unavailable(f"{answer.url.host} answers {answer.status_code}: the gateway behind it is away.")
    answer.raise_for_status()
    content, deadline = b"", time.monotonic() + INTRODUCTION_S
    for chunk in answer.iter_raw():  # as sent: a small piece may be packed from a very large one
        content += chunk
        if len(content) > MAX_INTRODUCTION_BYTES or time.monotonic() > deadline:
            raise TooLarge("This is no introduction.")
    return content


def _unreachable(address: str, error: httpx.TransportError) -> Unreachable:
    return Unreachable(
        f"{address} does not answer ({error or type(error).__name__}); see docs/troubleshooting.md, "
        "'The coordinator does not answer'.",
        address=address,
    )


class GatewayClient:
    """A connection to one gateway. Not shared between threads that close it.

    Raises (from every method): `MedHiveError` subclasses named by the gateway's problem document, `Unreachable` when
    nobody answers.
    """

    def __init__(self, address: str, trust: Trust, token: str | None = None) -> None:
        """Connect lazily.

        Args:
            address: `https://HOST:PORT`, without a path.
            trust: whose certificates count.
            token: bearer token, sent with every exchange.
        """
        self.address = address.rstrip("/")
        self._former: list[httpx.Client] = []
        self._trust = trust
        self._ca_read = self._read_ca()
        self._connected = self._connection(trust)
        self.use_token(token)

    @property
    def _http(self) -> httpx.Client:
        if self._trust.ca_file is not None and self._read_ca() not in (self._ca_read, b""):
            self.use_trust(self._trust)
        return self._connected

    def _read_ca(self) -> bytes:
        """What the file of the CAs holds now; nothing where there is none, or while it is exchanged."""
        try:
            return self._trust.ca_file.read_bytes() if self._trust.ca_file else b""
        except OSError:
            return b""

    def _connection(self, trust: Trust) -> httpx.Client:
        headers = {PROTOCOL_HEADER: str(PROTOCOL), SOFTWARE_HEADER: __version__}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return httpx.Client(base_url=self.address, headers=headers, verify=trust.context(), timeout=timeout)

    @property
    def trust(self) -> Trust:
        """Whose certificates count."""
        return self._trust

    def use_trust(self, trust: Trust) -> None:
        """Count these certificates from the next exchange on; what is under way ends as it began."""
        self._trust = trust
        self._ca_read = self._read_ca()
        fresh = self._connection(trust)
        fresh.headers = self._connected.headers
        self._former.append(self._connected)
        self._connected = fresh

    def use_token(self, token: str | None) -> None:
        """Send this bearer token from now on."""
        self._connected.headers.pop("Authorization", None)
        if token:
            self._connected.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connections."""
        for http in (*self._former, self._connected):
            http.close()

    def __enter__(self) -> "GatewayClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, **params: Any) -> Any:
        """GET a JSON answer; parameters that are None are left out."""
        return self.request("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(self, path: str, body: Any = None) -> Any:
        """POST a JSON body."""
        return self.request("POST", path, body=body)

    def put(self, path: str, body: Any = None) -> Any:
        """PUT a JSON body."""
        return self.request("PUT", path, body=body)

    def delete(self, path: str) -> Any:
        """DELETE."""
        return self.request("DELETE", path)

    def request(self, method: str, path: str, *, body: Any = None, params: Mapping[str, Any] | None = None) -> Any:
        """Make one exchange; `body` is a JSON value or a pydantic model."""
        payload = body.model_dump(mode="json") if hasattr(body, "model_dump") else body
        with self._translated():
            answer = self._http.request(method, path, json=payload, params=params)
        return _json_answer(answer)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise _unreachable(self.address, error) from error

    def download(
        self,
        path: str,
        destination: Path,
        digest: str,
        *,
        max_bytes: int,
        on_progress: Progress | None = None,
        sealing: SiteSealing | None = None,
    ) -> int:
        """Fetch bytes into a file, resuming where an earlier try stopped; returns the bytes that travelled.

        The file appears under its name only when its SHA-256 is `digest`. With `sealing` the bytes come sealed for this
        call alone.

        Raises:
            DigestMismatch: the bytes are not what was announced; the partial file is deleted.
            NoSpace: the disk is full; what has come is kept.
            TooLarge: more than `max_bytes`.
            SealBroken, BadSignature: somebody on the way has changed what was sealed; what came before it is kept.
        """
        if destination.exists() and _sha256(destination) == digest:
            return 0
        destination.parent.mkdir(parents=True, exist_ok=True)
        part = destination.with_name(destination.name + ".part")
        resumed = part.exists()
        travelled = self._download_whole(path, part, max_bytes, on_progress, sealing)
        found = _sha256(part)
        if resumed and found != digest:  # nobody waited for the disk: a power cut spoils what an earlier life had
            part.unlink()
            travelled += self._download_whole(path, part, max_bytes, on_progress, sealing)
            found = _sha256(part)
        if found != digest:
            part.unlink()
            raise DigestMismatch(f"The bytes of {path} do not have the announced SHA-256 {digest}.", digest=digest)
        _durable_rename(part, destination)
        return travelled

    def _download_whole(
        self, path: str, part: Path, max_bytes: int, on_progress: Progress | None, sealing: SiteSealing | None
    ) -> int:
        """Fetch until the end, with a few tries; returns the bytes that travelled."""
        travelled = 0
        for attempt in range(TRIES):
            try:
                travelled += self._download_rest(path, part, max_bytes, on_progress, sealing)
                break
            except Unreachable:
                if attempt == TRIES - 1:
                    raise
        return travelled

    def _download_rest(
        self, path: str, part: Path, max_bytes: int, on_progress: Progress | None, sealing: SiteSealing | None
    ) -> int:
        have = part.stat().st_size if part.exists() else 0
        if sealing is not None:
            return self._download_sealed(path, part, have, max_bytes, on_progress, sealing)
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._translated(), self._http.stream("GET", path, headers=headers) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0
            if answer.is_error:
                answer.read()
                _raise_problem(answer)
            resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT
            start = have if resumed else 0
            total = start + int(answer.headers.get("Content-Length", 0))
            with disk_errors(part), part.open("ab" if resumed else "wb") as file:
                return _copy(answer.iter_bytes(READ_BYTES), file, start, total, max_bytes, on_progress)

    def _download_sealed(  # noqa: PLR0917
        self, path: str, part: Path, have: int, max_bytes: int, on_progress: Progress | None, sealing: SiteSealing
    ) -> int:
        """The rest from `have` on; what is written is authentic, so that a later try may continue it."""
        headers, opener_of = sealing.ask(path, have)
        with self._translated(), self._http.stream("GET", path, headers=headers) as answer:
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0
            if answer.is_error:
                answer.read()
                _raise_problem(answer)
            pieces = opener_of(answer.headers.get(SEAL_HEADER)).opened(answer.iter_raw(READ_BYTES))
            total = have + plain_length(int(answer.headers.get("Content-Length", 0)))
            with disk_errors(part), part.open("ab") as file:
                return _copy(pieces, file, have, total, max_bytes, on_progress)

    def upload(
        self,
        path: str,
        source: Path,
        on_progress: Progress | None = None,
        sealing: SiteSealing | None = None,
        *,
        method: Literal["PUT", "POST"] = "PUT",
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Send a file to its content-addressed place, resuming where the store stopped; returns the bytes sent.

        The store is asked first (HEAD: `Upload-Offset`, or 200 when it has the whole), then gets parts with
        `Content-Range`; with `sealing` each part is sealed for the coordinator by itself. `headers` go with each exchange.

        Raises:
            Conflict: all bytes are there, but the store does not get done with an earlier connection that brought them.
        """
        size = source.stat().st_size
        sent = 0
        failures = 0
        own = dict(headers or {})
        asking = own | ({SEAL_HEADER: WANTED} if sealing else {})
        offset = self._upload_offset(path, size, asking, on_progress)
        with source.open("rb") as file:
            while offset < size:
                file.seek(offset)
                stop = min(size, offset + CHUNK_BYTES)
                try:
                    self._send_part(method, path, file, _Span(offset, stop, size), own, sealing)
                except (Unreachable, Conflict) as error:
                    failures += 1
                    if failures >= TRIES or not _may_go_on(error):
                        raise
                    offset = self._upload_offset(path, size, asking, on_progress)
                    continue
                sent += stop - offset
                offset = stop
                if on_progress:
                    on_progress(offset, size)
        return sent

    def _upload_offset(self, path: str, size: int, headers: dict[str, str], on_progress: Progress | None) -> int:
        """Where the upload goes on; `size` only when the store has it in its place.

        Bytes that have all arrived are not there yet: an earlier connection still has them checked, and may be refused.
        """
        deadline = time.monotonic() + PLACED_WITHIN_S
        while (offset := self._ask_offset(path, headers)) is not None:
            if offset < size:
                return offset
            if time.monotonic() > deadline:
                raise Conflict(f"{self.address} is still checking these bytes; try again in some minutes.", cause=BUSY)
            if on_progress:
                on_progress(size, size)
            time.sleep(ASK_AGAIN_S)
        return size

    def _ask_offset(self, path: str, headers: dict[str, str]) -> int | None:
        """How many bytes have arrived of what is not there; None when it is there."""
        with self._translated():
            answer = self._http.head(path, headers=headers)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return int(answer.headers.get("Upload-Offset", 0))
        if answer.is_error:
            _raise_problem(answer)
        return None

    def _send_part(  # noqa: PLR0917
        self,
        method: Literal["PUT", "POST"],
        path: str,
        file: BinaryIO,
        span: "_Span",
        own: dict[str, str],
        sealing: SiteSealing | None,
    ) -> None:
        headers = own | {"Content-Range": span.content_range, "Content-Type": "application/octet-stream"}
        if sealing is None:
            chunk = file.read(span.stop - span.start)
        else:
            seal, chunk = sealing.part(path, file, span.start, span.stop, method)
            headers |= seal
        with self._translated():
            answer = self._http.request(method, path, content=chunk, headers=headers)
        if answer.is_error:
            _raise_problem(answer)

    def events(self, after: int, *, timeout_s: float = 30.0) -> Iterator[dict[str, Any]]:
        """Yield rows of the live event stream after number `after`, until the server or the time-out ends it."""
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        path = f"{API}/events"
        with self._translated(), self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if answer.is_error:
                answer.read()
                _raise_problem(answer)
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])


def _json_answer(answer: httpx.Response) -> Any:
    if len(answer.content) > MAX_ANSWER_BYTES:
        raise TooLarge(f"The answer to {answer.request.url.path} is larger than {MAX_ANSWER_BYTES} bytes.")
    if answer.is_error:
        _raise_problem(answer)
    if not answer.content:
        return None
    try:
        return answer.json()
    except ValueError as error:
        raise RemoteError(
            f"{answer.request.url.path} did not answer with JSON; is this address a MedHive coordinator?"
        ) from error


def _require_version_of(answer: httpx.Response) -> None:
    """Say which side to upgrade from here, where both versions are known, whatever the other side's words are.

    Raises:
        IncompatibleVersion: the server's protocol does not fit.
    """
    protocol = answer.headers.get(PROTOCOL_HEADER, "")
    if is_number(protocol):
        software = answer.headers.get(SOFTWARE_HEADER, "")[:MAX_SOFTWARE]
        require_compatible(int(protocol), "this program", "the coordinator", software)


def _raise_problem(answer: httpx.Response) -> None:
    try:
        problem = answer.json()
        code = str(problem["type"]).rsplit(":", 1)[-1]
        detail = str(problem.get("detail") or problem.get("title"))
        data = problem.get("data") or {}
    except (ValueError, KeyError, TypeError):
        unnamed = Unavailable.code if answer.status_code in PROXYS_OWN else RemoteError.code
        code, data = answer.headers.get(PROBLEM_HEADER, unnamed), {}  # the answer to a HEAD has no body
        detail = f"The server answered {answer.status_code} to {answer.request.method} {answer.request.url.path}."
    if code == IncompatibleVersion.code:
        _require_version_of(answer)
    kind = KNOWN_ERRORS.get(code, RemoteError)
    error = kind(detail)
    error.data.update(data if isinstance(data, dict) else {}, status=answer.status_code)
    raise error


def _may_go_on(error: MedHiveError) -> bool:
    """Whether an upload may ask anew where to go on: the line was cut, the store had more by then than it had said, or it
    still waits for the rest of a part whose sender has gone."""
    return isinstance(error, Unreachable) or "offset" in error.data or error.data.get("cause") == BUSY


def _copy(  # noqa: PLR0917
    pieces: Iterable[bytes], file: BinaryIO, start: int, total: int, max_bytes: int, on_progress: Progress | None
) -> int:
    done = start
    for chunk in pieces:
        done += len(chunk)
        if done > max_bytes:
            raise TooLarge(f"The server sends more than the announced {max_bytes} bytes.", limit=max_bytes)
        file.write(chunk)
        if on_progress:
            on_progress(done, total)
    return done - start


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _durable_rename(part: Path, destination: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(destination)
