"""A hospital's PACS over DICOMweb: what it has (QIDO-RS), and the files themselves (WADO-RS), as they come.

The standard is DICOM PS3.18, sections 10.4 and 10.6. Nothing is held whole but one page of answers: files go from the
network to the disk piece by piece, with a limit on every size and time, since an archive may be slow, broken or not what it
is taken for. What identifies a patient stands in addresses and answers; so neither enters a message or a log, and errors
carry no text of the other side.
"""

import json
import logging
import re
import shutil
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from ipaddress import ip_address
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, TypeVar
from urllib.parse import quote

import httpx
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from fl_client.settings import Settings
from fl_client.tasks.dicom import MAX_FILE_BYTES
from medhive.client import Trust
from medhive.errors import InvalidInput, MedHiveError, NoSpace, NotAllowed, Unavailable, Unreachable
from medhive.leftovers import temporary_beside
from medhive.terminal import read_secret

PAGE: Final = 200  # answers asked for at a time; a study's answer is about 2 kB
SMALLEST_CAP: Final = 10  # a PACS may give fewer than it is asked for, but none is known that gives less than this
MAX_PAGE_BYTES: Final = 16 * 2**20  # where a PACS knows no pages, some thousand answers at once
MAX_ANSWERS: Final = 100_000  # to one question; one that has more is too wide
CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 120.0  # a PACS that fetches from slow storage is silent for a minute
GRACE_S: Final = 60.0  # after which an answer must have come at this pace on the average
SLOWEST_BYTES_PER_S: Final = 20_000
TRIES: Final = 3
PAUSES_S: Final = (1.0, 5.0)  # between them
LONGEST_PAUSE_S: Final = 60.0  # however long the PACS asks to be left alone
# Files come as they are stored: whether they can be read is decided when they are, and nothing is converted on the way.
WANTED: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'
QIDO_HEADERS: Final = {"Accept": "application/dicom+json", "Accept-Encoding": "identity"}
WADO_HEADERS: Final = {"Accept": WANTED, "Accept-Encoding": "identity"}
# All that may stand in a question as it is (RFC 3986): Orthanc 1.10 takes percent signs as they are, and finds nothing.
UNQUOTED: Final = "*?/:@!$'(),;"
NEEDS_QUOTING: Final = re.compile(rf"[^A-Za-z0-9_.~{re.escape(UNQUOTED)}-]")
BUSY: Final = frozenset({429, 502, 503, 504})
UID: Final = re.compile(r"[0-9]+(?:\.[0-9]+)*")
MAX_UID: Final = 64

STUDY_UID, SERIES_UID, INSTANCE_UID = "0020000D", "0020000E", "00080018"
STUDY_DATE, DESCRIPTION, ACCESSION, PATIENT = "00080020", "00081030", "00080050", "00100020"
MODALITY, FILES_IN_SERIES = "00080060", "00201209"

# They print addresses, in which patients are asked for, and what was wrong with a header.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)
logging.getLogger("python_multipart").addHandler(logging.NullHandler())
logging.getLogger("python_multipart").propagate = False

Result = TypeVar("Result")
Item = Mapping[str, Any]


class PacsUnreachable(Unreachable):
    """The PACS does not answer, or its certificate is not trusted."""

    code = "pacs-unreachable"


class PacsBusy(Unavailable):
    """The PACS says that it cannot answer now."""

    code = "pacs-busy"


class PacsRefuses(NotAllowed):
    """The PACS does not let this hospital in, or not to this."""

    code = "pacs-refuses"


class NotDicomWeb(InvalidInput):
    """What answers at PACS_URL does not speak DICOMweb."""

    code = "not-dicomweb"


class RetrievalFailed(MedHiveError):
    """One answer with files is broken, cut or refused; `reason` is the word that it is counted under."""

    code = "retrieval-failed"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, reason=reason)
        self.reason = reason


@dataclass(frozen=True)
class StudyFound:
    """A study as the PACS describes it; all but `uid` may be empty."""

    uid: str
    date: str
    description: str
    accession: str
    patient: str


@dataclass(frozen=True)
class SeriesFound:
    """A series as the PACS describes it; `files` is None where it does not say how many there are."""

    study: str
    uid: str
    modality: str
    files: int | None


@dataclass(frozen=True)
class Received:
    """One file that has come whole: where it lies for now; None where it was larger than any that is read, and is gone."""

    path: Path | None


# ---- who asks, and whom ----------------------------------------------------------------------------------------------


def require_url(settings: Settings) -> str:
    """The address of the PACS, without a slash at its end.

    Raises:
        InvalidInput: it is missing, holds a secret, or leads over an open line.
    """
    if not settings.pacs_url:
        raise InvalidInput(
            "PACS_URL is missing: the address of the PACS' DICOMweb, such as https://pacs.example/dicom-web."
        )
    try:
        url = httpx.URL(settings.pacs_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"https", "http"} or not url.host:
        raise InvalidInput("PACS_URL must be an address such as https://pacs.example/dicom-web.")
    if url.userinfo or url.query or url.fragment:
        raise InvalidInput(
            "PACS_URL must hold neither a password nor a question; use PACS_USER and PACS_PASSWORD_FILE."
        )
    if url.scheme == "http" and not settings.pacs_plain_http and not _is_this_machine(url.host):
        raise InvalidInput(
            "PACS_URL begins with http://, so that scans and passwords would pass open; use https://, or set "
            "MEDHIVE_SITE_PACS_PLAIN_HTTP=true where the line itself is safe."
        )
    return str(url).rstrip("/")


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _context(settings: Settings) -> ssl.SSLContext:
    """Whom to trust: the hospital's own bundle alone where there is one, else the system's roots."""
    names = {"PACS_CA_FILE": settings.pacs_ca_file, "PACS_CERT_FILE": settings.pacs_cert_file}
    name = "PACS_CA_FILE"
    try:
        context = Trust(extra_ca_file=settings.pacs_ca_file, system=settings.pacs_ca_file is None).context()
        name = "PACS_CERT_FILE"
        if settings.pacs_cert_file:
            context.load_cert_chain(settings.pacs_cert_file, settings.pacs_key_file)
    except (OSError, ssl.SSLError) as error:
        reason = "it is no PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise InvalidInput(f"{name}: cannot use {names[name]}: {reason}.") from error
    return context


class _Bearer(httpx.Auth):
    """A token that is read for each request, since tokens end and something else renews them."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._read()}"
        yield request


def _credentials(settings: Settings) -> httpx.Auth | None:
    token, password = settings.pacs_token, settings.pacs_password
    has_token = token is not None or settings.pacs_token_file is not None
    if has_token and settings.pacs_user:
        raise InvalidInput("PACS_USER and PACS_TOKEN exclude each other: set the one that the PACS asks for.")
    if settings.pacs_token_file is not None:
        file = settings.pacs_token_file
        return _Bearer(lambda: read_secret(file))
    if token is not None:
        return _Bearer(lambda: token.get_secret_value().strip())
    if not settings.pacs_user:
        return None
    if settings.pacs_password_file is not None:
        return httpx.BasicAuth(settings.pacs_user, read_secret(settings.pacs_password_file))
    if password is None:
        raise InvalidInput("PACS_USER is set, and neither PACS_PASSWORD_FILE nor PACS_PASSWORD.")
    return httpx.BasicAuth(settings.pacs_user, password.get_secret_value())


# ---- the PACS --------------------------------------------------------------------------------------------------------


class Pacs:
    """A connection to one PACS. Close it when done.

    Raises (from every method): PacsUnreachable, PacsBusy, PacsRefuses, NotDicomWeb.
    """

    def __init__(self, settings: Settings, pause: Callable[[float], None] = time.sleep) -> None:
        """Connect lazily.

        Raises:
            InvalidInput: a setting is missing or wrong; the text begins with its name.
        """
        self.url = require_url(settings)
        self._pause = pause
        self._answered = False
        self._keep_free = settings.pull_keep_free_bytes
        self._has_credentials = (credentials := _credentials(settings)) is not None
        # The archive is inside the hospital: neither the proxy to the outside nor a forgotten .netrc has a part in this.
        self._http = httpx.Client(
            verify=_context(settings),
            auth=credentials,
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def studies(self, question: Mapping[str, str]) -> Iterator[StudyFound]:
        """The studies that answer a question, given by attribute names and what is to match; in the order of the PACS."""
        for item in self._found("/studies", {**question, "includefield": DESCRIPTION}, STUDY_UID):
            yield StudyFound(
                _uid(item, STUDY_UID),
                _value(item, STUDY_DATE),
                _value(item, DESCRIPTION),
                _value(item, ACCESSION),
                _value(item, PATIENT),
            )

    def series(self, study: str, question: Mapping[str, str]) -> Iterator[SeriesFound]:
        """The series of a study that answer a question."""
        asked = {**question, "includefield": FILES_IN_SERIES}
        for item in self._found(f"/studies/{study}/series", asked, SERIES_UID):
            yield SeriesFound(study, _uid(item, SERIES_UID), _value(item, MODALITY), _count(item))

    def study_of_series(self, uid: str) -> str | None:
        """The study that a series belongs to, or None when there is no such series."""
        for item in self._found("/series", {"SeriesInstanceUID": uid, "includefield": STUDY_UID}, SERIES_UID):
            if _uid(item, SERIES_UID) == uid:
                return _uid(item, STUDY_UID)
        return None

    def files(self, study: str, series: str, expected: int | None = None) -> set[str]:
        """The SOPInstanceUIDs of a series; `expected` saves a last question where the PACS has said how many there are."""
        path = f"/studies/{study}/series/{series}/instances"
        return {_uid(item, INSTANCE_UID) for item in self._found(path, {}, INSTANCE_UID, expected)}

    def retrieve(self, path: str, folder: Path, most: int) -> Iterator[Received]:
        """Fetch what lies at a path of the PACS into temporary files of a folder, each yielded once it is whole.

        Whoever takes a file moves or deletes it.

        Args:
            most: files that may come.

        Raises:
            RetrievalFailed: the answer is broken, cut, refused or holds more; what was yielded is whole.
            NoSpace: there is too little room on the disk.
        """
        parts = _Parts(folder, most, self._keep_free)
        try:
            with self._answer(path, {}, WADO_HEADERS) as answer:
                _require_files(answer)
                feed = parts.feeder(answer.headers.get("Content-Type", ""))
                for chunk in _paced(answer):
                    feed(chunk)
                    yield from parts.taken()
                parts.finish()
                yield from parts.taken()
        except httpx.ReadTimeout as error:
            raise RetrievalFailed("timeout", "The PACS fell silent.") from error
        except (httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise RetrievalFailed("truncated", "The answer was cut.") from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            parts.drop()

    # ---- exchanges

    def _found(self, path: str, question: Mapping[str, str], key: str, expected: int | None = None) -> Iterator[Item]:
        """All answers to a question, page by page; a PACS that knows no pages gives the same one again, which ends it."""
        seen: set[str] = set()
        while expected is None or len(seen) < expected:
            params = {**question, "limit": str(PAGE), "offset": str(len(seen))}
            page = self._tried(lambda params=params: self._page(path, params))  # type: ignore[misc]
            fresh = [item for item in page if _uid(item, key) not in seen]
            seen.update(_uid(item, key) for item in fresh)
            if len(seen) > MAX_ANSWERS:
                raise InvalidInput(f"The PACS finds more than {MAX_ANSWERS} answers; ask for less.")
            yield from fresh
            if not fresh or len(page) < SMALLEST_CAP:
                return

    def _tried(self, ask: Callable[[], Result]) -> Result:
        """Try a few times where waiting can help."""
        for pause_s in PAUSES_S:
            try:
                return ask()
            except (PacsBusy, PacsUnreachable) as error:
                self.wait_after(error, pause_s)
        return ask()

    def wait_after(self, error: MedHiveError, pause_s: float) -> None:
        """Leave a PACS alone that was busy or away, for as long as it says; raise the error where it never answered."""
        if not self._answered:
            raise error
        self._pause(min(LONGEST_PAUSE_S, float(error.data.get("retry_after_s") or pause_s)))

    def _page(self, path: str, params: Mapping[str, str]) -> list[Item]:
        try:
            with self._answer(path, params, QIDO_HEADERS) as answer:
                if answer.status_code == httpx.codes.NO_CONTENT:
                    return []
                _require_questions(answer, self.url)
                content = _bounded(answer)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        try:
            page = json.loads(content)
        except (ValueError, RecursionError):
            page = None
        if not isinstance(page, list) or not all(isinstance(item, dict) for item in page):
            raise _no_dicomweb(self.url)
        return page

    @contextmanager
    def _answer(self, path: str, params: Mapping[str, str], headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        question = "&".join(f"{name}={quote(value, safe=UNQUOTED)}" for name, value in params.items())
        request = self._http.build_request(
            "GET", f"{self.url}{path}{'?' if question else ''}{question}", headers=headers
        )
        answer = self._http.send(request, stream=True)
        try:
            self._answered = True
            self._require_welcome(answer)
            yield answer
        finally:
            answer.close()

    def _require_welcome(self, answer: httpx.Response) -> None:
        if answer.status_code in {401, 403}:
            if not self._has_credentials:
                raise PacsRefuses(
                    f"The PACS at {self.url} answers {answer.status_code}: set PACS_USER and PACS_PASSWORD_FILE, or "
                    "PACS_TOKEN_FILE."
                )
            raise PacsRefuses(
                f"The PACS at {self.url} answers {answer.status_code}: it does not accept the name and the password, or the "
                "token, for this."
            )
        if answer.is_redirect:
            raise NotDicomWeb(f"{self.url} leads elsewhere, and is not followed; set PACS_URL to where it leads.")
        if answer.status_code in BUSY:
            after = answer.headers.get("Retry-After", "")
            raise PacsBusy(
                f"The PACS at {self.url} cannot answer now ({answer.status_code}); try later.",
                retry_after_s=int(after) if after.isascii() and after.isdigit() and len(after) < 10 else None,
            )

    def _unreachable(self, error: httpx.TransportError) -> PacsUnreachable:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return PacsUnreachable(
                    f"The PACS at {self.url} shows a certificate that is not trusted here ({cause.verify_message}); set "
                    "PACS_CA_FILE to the hospital's CA."
                )
            cause = cause.__cause__ or cause.__context__
        return PacsUnreachable(f"The PACS at {self.url} does not answer ({str(error) or type(error).__name__}).")


def loosely(text: str) -> str:
    """A pattern that also matches what a text or pattern matches, in letters that need no percent signs on their way."""
    return NEEDS_QUOTING.sub(lambda found: "?" if found[0].isascii() else "*", text)


def _no_dicomweb(url: str) -> NotDicomWeb:
    return NotDicomWeb(
        f"What answers at {url} does not speak DICOMweb; check the path of PACS_URL (Orthanc's is /dicom-web, dcm4chee's "
        "/dcm4chee-arc/aets/NAME/rs)."
    )


def _require_questions(answer: httpx.Response, url: str) -> None:
    """An answer to a question that holds JSON; the path is wrong where there is none."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if answer.is_server_error:
        raise PacsBusy(f"The PACS at {url} failed to answer a question ({answer.status_code}); ask its administrator.")
    if answer.status_code == httpx.codes.BAD_REQUEST:
        raise InvalidInput(f"The PACS at {url} does not understand the question; leave out a filter.")
    if answer.is_error or kind not in {"application/dicom+json", "application/json"}:
        raise _no_dicomweb(url)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _no_dicomweb(url)


def _require_files(answer: httpx.Response) -> None:
    if answer.status_code in {404, 410}:
        raise RetrievalFailed("gone", "The PACS no longer has it.")
    if answer.is_error:
        raise RetrievalFailed("refused", f"The PACS answers {answer.status_code}.")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise RetrievalFailed("garbage", "The PACS answers in an encoding that was not asked for.")


def _paced(answer: httpx.Response) -> Iterator[bytes]:
    """The bytes of an answer as they come, since what waits for more is lost with the line; at a pace that can end."""
    began, size = time.monotonic(), 0
    for chunk in answer.iter_raw():
        size += len(chunk)
        yield chunk
        if (time.monotonic() - began - GRACE_S) * SLOWEST_BYTES_PER_S > size:
            raise RetrievalFailed("timeout", "The answer comes too slowly.")


def _bounded(answer: httpx.Response) -> bytes:
    content = b""
    try:
        for chunk in _paced(answer):
            content += chunk
            if len(content) > MAX_PAGE_BYTES:
                raise InvalidInput(f"The PACS answers with more than {MAX_PAGE_BYTES} bytes at once; ask for less.")
    except RetrievalFailed as error:
        raise PacsUnreachable("The PACS answers too slowly.") from error
    return content


# ---- answers ---------------------------------------------------------------------------------------------------------


def _value(item: Item, tag: str) -> str:
    """The first value of an attribute, empty where there is none; DICOM PS3.18, annex F."""
    attribute = item.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    first = values[0] if isinstance(values, list) and values else None
    return str(first).strip() if isinstance(first, str | int) else ""


def _uid(item: Item, tag: str) -> str:
    uid = _value(item, tag)
    if len(uid) > MAX_UID or not UID.fullmatch(uid):  # it becomes part of a path, here and there
        raise NotDicomWeb("The PACS answers with something that is no identifier of DICOM; ask its administrator.")
    return uid


def _count(item: Item) -> int | None:
    text = _value(item, FILES_IN_SERIES)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else None


class _Parts:
    """Writes the files of one answer to the disk as the bytes come; what is whole waits to be taken."""

    def __init__(self, folder: Path, most: int, keep_free: int) -> None:
        self._folder, self._most, self._keep_free = folder, most, keep_free
        self._whole: list[Received] = []
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._size = self._number = 0
        self._ended = False
        self._single = False

    def feeder(self, content_type: str) -> Callable[[bytes], None]:
        """What takes the bytes of an answer of this type."""
        said = Message()
        said["Content-Type"] = content_type
        kind, boundary = said.get_content_type(), said.get_param("boundary")
        if kind == "application/dicom":  # not by the standard, but usual for a single file
            self._single = True
            self._begin()
            return self._write
        if kind != "multipart/related" or not isinstance(boundary, str):
            raise RetrievalFailed("garbage", "The PACS answers with something else than files.")
        callbacks = {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self._write(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._close,
        }
        try:
            parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # the four that are needed
        except FormParserError as error:
            raise RetrievalFailed("garbage", "The PACS separates files by what is no boundary.") from error
        return lambda chunk: self._parse(parser, chunk)

    def _parse(self, parser: MultipartParser, chunk: bytes) -> None:
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise RetrievalFailed("garbage", "The answer is no series of files.") from error

    def _begin(self) -> None:
        self._number += 1
        if self._number > self._most:
            raise RetrievalFailed("garbage", "The PACS sends more files than it has.")
        if shutil.disk_usage(self._folder).free < self._keep_free + MAX_FILE_BYTES:
            raise NoSpace(
                f"The disk that pulled scans go to has hardly more than {self._keep_free} bytes free; make room, or lower "
                "MEDHIVE_SITE_PULL_KEEP_FREE_BYTES. What has come is kept."
            )
        self._path = temporary_beside(self._folder / "file")
        self._file = self._path.open("xb")
        self._size = 0

    def _write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MAX_FILE_BYTES and self._file is not None:
            self._file.write(data)
        elif self._most == 1:
            raise RetrievalFailed("too-large", "The file is larger than any that is read.")

    def _end(self) -> None:
        if self._file is not None and self._path is not None:
            self._file.close()
            if self._size > MAX_FILE_BYTES:
                self._path.unlink()
                self._path = None
            self._whole.append(Received(self._path))
            self._file = self._path = None

    def _close(self) -> None:
        self._ended = True

    def finish(self) -> None:
        """The answer has ended; raises RetrievalFailed when it should not have."""
        if self._single:
            self._end()
        elif not self._ended:
            raise RetrievalFailed("truncated", "The answer was cut.")

    def taken(self) -> list[Received]:
        """The files that have become whole since."""
        whole, self._whole = self._whole, []
        return whole

    def drop(self) -> None:
        """Delete what is not whole, and what nobody has taken."""
        if self._file is not None:
            self._file.close()
        for path in (self._path, *(item.path for item in self._whole)):
            if path is not None:
                path.unlink(missing_ok=True)
