"""An archive that is slow, broken, or not what it is taken for: what is whole stays, the rest is counted, and nothing more.

A real one does these things too seldom to be tested with; so a small server misbehaves as each test says.
"""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from made_scans import chest, write_series
from pydicom import dcmread

from fl_client import pacs as pacs_module
from fl_client.pacs import NotDicomWeb, Pacs, PacsBusy, PacsRefuses, PacsUnreachable
from fl_client.pull import Outcome, Plan, Selection, fetch, only_pull, plan
from fl_client.settings import Settings
from medhive.errors import InvalidInput

STUDY, SERIES = "1.2.3", "1.2.3.4"
KIND = 'multipart/related; type="application/dicom"; boundary="a=b"'
JSON = "application/dicom+json"


class Answer:
    """One answer of the archive: a status, headers, and the body in pieces; `cut` leaves out its end."""

    def __init__(self, body: bytes = b"", kind: str = JSON, status: int = 200, cut: int = 0, **headers: str) -> None:
        self.body, self.status, self.cut, self.piece = body, status, cut, 65536
        self.headers = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}


def found(*items: dict[str, Any]) -> Answer:
    """An answer to a question."""
    return Answer(
        json.dumps([{tag: {"vr": "UN", "Value": [value]} for tag, value in item.items()} for item in items]).encode()
    )


def files(*contents: bytes, end: bytes = b"\r\n--a=b--") -> Answer:
    """An answer with files."""
    head = b"\r\nContent-Type: application/dicom\r\n\r\n"
    return Answer(b"".join(b"\r\n--a=b" + head + content for content in contents) + end, KIND)


class Archive:
    """Answers each path as it is told to; `asked` is what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Answer | Callable[[int], Answer]] = {}
        archive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                path = self.path.partition("?")[0].removeprefix("/web")
                given = archive.answers.get(path, Answer(status=404))
                number = sum(line.partition("?")[0] == path for line in archive.asked)
                archive.asked.append(self.path.removeprefix("/web"))
                archive.send(self, given(number) if callable(given) else given)

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/web"

    @staticmethod
    def send(to: BaseHTTPRequestHandler, answer: Answer) -> None:
        to.send_response(answer.status)
        for name, value in answer.headers.items():
            to.send_header(name, value)
        to.send_header("Content-Length", str(len(answer.body)))
        to.end_headers()
        body = answer.body[: len(answer.body) - answer.cut]
        for begin in range(0, len(body), answer.piece):
            to.wfile.write(body[begin : begin + answer.piece])
            to.wfile.flush()
        to.close_connection = bool(answer.cut)

    def has(self, uids: list[str], series: int = 1) -> None:
        """Let it have one study, of series with these files."""
        self.answers["/studies"] = found({"0020000D": STUDY, "00080020": "20240101"})
        names = [f"{SERIES}{'' if number == 0 else number}" for number in range(series)]
        answer = found(*({"0020000E": name, "00080060": "CT", "00201209": len(uids)} for name in names))
        self.answers[f"/studies/{STUDY}/series"] = answer
        for name in names:
            self.answers[f"{path_of(name)}/instances"] = found(*({"00080018": uid} for uid in uids))


def path_of(series: str = SERIES) -> str:
    return f"/studies/{STUDY}/series/{series}"


@pytest.fixture
def archive() -> Iterator[Archive]:
    archive = Archive()
    thread = Thread(target=archive.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield archive
    archive.server.shutdown()
    archive.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """SOPInstanceUID → file of three slices."""
    paths = write_series(tmp_path_factory.mktemp("slices"), values=chest((3, 16, 16)))
    return {str(dcmread(path).SOPInstanceUID): path.read_bytes() for path in paths}


@pytest.fixture
def pauses() -> list[float]:
    """How long the client would have waited."""
    return []


@pytest.fixture
def pacs(archive: Archive, pauses: list[float]) -> Iterator[Pacs]:
    with Pacs(Settings(pacs_url=archive.url, pull_keep_free_bytes=0), pause=pauses.append) as pacs:
        yield pacs


def look(pacs: Pacs, tmp_path: Path, selection: Selection | None = None) -> Plan:
    return plan(pacs, selection or Selection(), tmp_path / "out")


def pull(pacs: Pacs, tmp_path: Path) -> Outcome:
    wanted = look(pacs, tmp_path).series
    with only_pull(tmp_path / "out"):
        return fetch(pacs, wanted, tmp_path / "out", lambda _done, _total: None)


def here(tmp_path: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (tmp_path / "out").rglob("*.dcm")}


def nothing_half(tmp_path: Path) -> bool:
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    return not [name for name in names if not name.endswith(".dcm") and name != ".pull.lock"]


# ---- answers with files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_files_come_whatever_the_pieces(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes], piece: int
) -> None:
    archive.has(list(slices))
    answer = files(*slices.values())
    answer.piece = piece
    archive.answers[path_of()] = answer
    outcome = pull(pacs, tmp_path)
    assert (outcome.fetched, outcome.fetched_bytes) == (3, sum(map(len, slices.values())))
    assert here(tmp_path) == slices


def test_an_answer_that_is_cut_is_completed_file_by_file(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]
) -> None:
    archive.has(list(slices))
    archive.answers[path_of()] = files(*slices.values())
    archive.answers[path_of()].cut = 40  # type: ignore[union-attr]
    for uid, content in slices.items():
        archive.answers[f"{path_of()}/instances/{uid}"] = files(content)
    assert pull(pacs, tmp_path).is_complete
    assert here(tmp_path) == slices
    assert [line for line in archive.asked if "/instances/" in line] == [f"{path_of()}/instances/{list(slices)[2]}"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: files(content, end=b""), "truncated"),
        (lambda content: files(content[:100], end=b"\r\n--a=c--"), "truncated"),
        (lambda _: files(b"", end=b"\r\n--a=b--"), "empty"),
        (lambda _: files(b"<html>" * 1000), "not-dicom"),
        (lambda content: files(content, content), "garbage"),
        (lambda _: Answer(b"no boundary at all", KIND), "garbage"),
        (lambda _: Answer(b"<html>", "text/html"), "garbage"),
        (lambda _: Answer(b"", "multipart/related"), "garbage"),
        (lambda _: Answer(b"", KIND, Content_Encoding="gzip"), "garbage"),
        (lambda _: Answer(status=404), "gone"),
        (lambda _: Answer(status=500), "refused"),
    ],
)
def test_what_is_broken_is_counted_and_nothing_half_stays(  # noqa: PLR0917
    archive: Archive,
    pacs: Pacs,
    tmp_path: Path,
    slices: dict[str, bytes],
    change: Callable[[bytes], Answer],
    reason: str,
) -> None:
    uid, content = next(iter(slices.items()))
    archive.has([uid])
    archive.answers[path_of()] = archive.answers[f"{path_of()}/instances/{uid}"] = change(content)
    outcome = pull(pacs, tmp_path)
    complete = uid in here(tmp_path)  # what came whole before the rest was found to be wrong is kept
    assert outcome.failed == ({} if complete else {reason: 1})
    assert nothing_half(tmp_path)
    assert here(tmp_path).items() <= slices.items()


def test_a_file_that_was_not_asked_for_is_dropped(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]
) -> None:
    wanted, other = list(slices)[:2]
    archive.has([wanted])
    archive.answers[path_of()] = archive.answers[f"{path_of()}/instances/{wanted}"] = files(slices[other])
    assert pull(pacs, tmp_path).failed == {"missing": 1}
    assert not here(tmp_path)
    assert nothing_half(tmp_path)


def test_a_single_file_without_parts(archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]) -> None:
    uid, content = next(iter(slices.items()))
    archive.has([uid])
    archive.answers[path_of()] = Answer(content, "application/dicom")
    assert pull(pacs, tmp_path).fetched == 1
    assert here(tmp_path) == {uid: content}


def test_a_file_that_is_too_large_is_left_at_the_archive(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_module, "MAX_FILE_BYTES", 5000)
    large, *small = slices
    archive.has(list(slices))
    archive.answers[path_of()] = files(slices[large] + bytes(10_000), *(slices[uid] for uid in small))
    archive.answers[f"{path_of()}/instances/{large}"] = files(slices[large] + bytes(10_000))
    outcome = pull(pacs, tmp_path)
    assert (outcome.failed, outcome.is_complete) == ({"too-large": 1}, True)
    assert here(tmp_path) == {uid: slices[uid] for uid in small}
    assert nothing_half(tmp_path)
    assert len([line for line in archive.asked if large in line]) == 1


def test_memory_does_not_grow_with_what_comes(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]
) -> None:
    uid, content = next(iter(slices.items()))
    archive.has([uid])
    archive.answers[path_of()] = files(content + bytes(40_000_000))
    wanted = look(pacs, tmp_path).series
    with only_pull(tmp_path / "out"):
        tracemalloc.start()
        fetch(pacs, wanted, tmp_path / "out", lambda _done, _total: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(here(tmp_path)[uid]) > 40_000_000
    assert peak < 10_000_000


def test_an_answer_that_never_ends_is_left(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = next(iter(slices))
    archive.has([uid])
    archive.answers[path_of()] = archive.answers[f"{path_of()}/instances/{uid}"] = files(bytes(1_000_000))
    monkeypatch.setattr(pacs_module, "GRACE_S", 0)
    monkeypatch.setattr(pacs_module, "SLOWEST_BYTES_PER_S", 1e15)
    with pytest.raises(PacsUnreachable, match="too slowly"):
        look(pacs, tmp_path)
    monkeypatch.setattr(pacs_module, "GRACE_S", 1e9)
    wanted = look(pacs, tmp_path).series
    monkeypatch.setattr(pacs_module.Pacs, "files", lambda *_: {uid})
    monkeypatch.setattr(pacs_module, "GRACE_S", 0)
    with only_pull(tmp_path / "out"):
        outcome = fetch(pacs, wanted, tmp_path / "out", lambda _done, _total: None)
    assert outcome.failed == {"timeout": 1}


def test_an_archive_that_fails_all_is_not_asked_for_ever(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]
) -> None:
    archive.has(list(slices), series=20)
    with pytest.raises(PacsBusy, match="5 series in a row"):
        pull(pacs, tmp_path)


# ---- answers to questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(b"<html>", "text/html"), NotDicomWeb),
        (Answer(b"[{", JSON), NotDicomWeb),
        (Answer(b"[" * 100_000, JSON), NotDicomWeb),
        (Answer(b'{"error": 1}', JSON), NotDicomWeb),
        (Answer(b"[1]", JSON), NotDicomWeb),
        (found({"0020000D": "../../etc/passwd"}), NotDicomWeb),
        (found({"0020000D": "1." + "2" * 80}), NotDicomWeb),
        (found({"00080020": "20240101"}), NotDicomWeb),
        (Answer(b"[]", JSON, Content_Encoding="gzip"), NotDicomWeb),
        (Answer(b"", JSON, status=302, Location="/web/elsewhere"), NotDicomWeb),
        (Answer(b"", JSON, status=404), NotDicomWeb),
        (Answer(b"", JSON, status=400), InvalidInput),
        (Answer(b"", JSON, status=401), PacsRefuses),
        (Answer(b"", JSON, status=500), PacsBusy),
        (Answer(b"[" + b" " * (17 * 2**20), JSON), InvalidInput),
    ],
)
def test_wrong_answers_are_named(
    archive: Archive, pacs: Pacs, tmp_path: Path, answer: Answer, error: type[Exception]
) -> None:
    archive.answers["/studies"] = answer
    with pytest.raises(error) as raised:
        look(pacs, tmp_path)
    assert raised.type is error
    assert "/elsewhere" not in archive.asked


def test_a_busy_archive_is_given_the_time_that_it_asks_for(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes], pauses: list[float]
) -> None:
    archive.has(list(slices))
    good = archive.answers["/studies"]
    assert isinstance(good, Answer)
    archive.answers["/studies"] = lambda number: good if number else Answer(status=503, Retry_After="7")
    archive.answers[path_of()] = lambda number: (
        files(*slices.values()) if number else Answer(status=429, Retry_After="100000")
    )
    assert pull(pacs, tmp_path).fetched == 3
    assert pauses == [7.0, 60.0]


def test_what_the_archive_offers_beside_the_question_is_left_out(
    archive: Archive, pacs: Pacs, tmp_path: Path, slices: dict[str, bytes]
) -> None:
    from datetime import date  # noqa: PLC0415

    from fl_client.pull import Listed  # noqa: PLC0415

    archive.has(list(slices))
    archive.answers["/studies"] = found(
        *(
            {"0020000D": f"1.2.{n}", "00080020": f"202401{n + 10}", "00100020": f"p{n}", "00081030": f"d{n}"}
            for n in range(9)
        )
    )
    for n in range(9):
        archive.answers[f"/studies/1.2.{n}/series"] = found(
            {"0020000E": f"1.2.{n}.1", "00080060": "CT", "00201209": 3},
            {"0020000E": f"1.2.{n}.2", "00080060": "SR", "00201209": 1},
        )
    for selection in (
        Selection(since=date(2024, 1, 13), until=date(2024, 1, 13)),
        Selection(description="?3"),
        Selection(listed=Listed("patient", {"p3": 2})),
    ):
        wanted = look(pacs, tmp_path, selection)
        assert ([item.uid for item in wanted.series], wanted.left_out) == (["1.2.3.1"], 8)
    assert look(pacs, tmp_path, Selection(listed=Listed("patient", {"p77": 2}))).not_found == (2,)


def test_pages_end_where_an_archive_knows_none(archive: Archive, pacs: Pacs, tmp_path: Path) -> None:
    archive.answers["/studies"] = found(*({"0020000D": f"1.2.{n}"} for n in range(40)))
    for n in range(40):
        archive.answers[f"/studies/1.2.{n}/series"] = found({"0020000E": f"1.2.{n}.1", "00080060": "CT", "00201209": 3})
    assert look(pacs, tmp_path).studies == 40
    assert sum(line.startswith("/studies?") for line in archive.asked) == 2
