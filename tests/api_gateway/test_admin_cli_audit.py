"""`audit`: a log that was changed, shortened or written anew does not fit what was signed; one that grows does."""

import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from api_gateway.admin.audit import Finding, check_log, write_log
from medhive.chain import ZERO_HASH, event_hash
from medhive.client import GatewayClient
from medhive.signing import SigningKey, sign
from medhive.wire import Countersignature, CountersignBody, EventAnswer, Head, HeadBody

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COORDINATOR, NORTH, STRANGER = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()


def log(length: int, actor: str = "admin") -> list[EventAnswer]:
    """A log that fits together."""
    rows: list[EventAnswer] = []
    for number in range(1, length + 1):
        row = EventAnswer(
            number=number,
            at=NOW,
            kind="study.created",
            actor=actor,
            subject="s",
            data={},
            previous=rows[-1].hash if rows else ZERO_HASH,
            hash="",
        )
        rows.append(row.model_copy(update={"hash": event_hash(row)}))
    return rows


def wrong(rows: Sequence[EventAnswer], seen: EventAnswer, *, site_key: SigningKey = NORTH) -> dict[str, str]:
    """What is found wrong with a log whose newest row is signed, when the site north has signed the row `seen`."""
    head = sign(HeadBody(number=rows[-1].number, hash=rows[-1].hash, at=NOW), COORDINATOR)
    body = CountersignBody(site="north", number=seen.number, hash=seen.hash, seen_at=NOW)
    findings: list[Finding] = check_log(rows, head, COORDINATOR.public, [sign(body, site_key)], {"north": NORTH.public})
    assert [item.what for item in findings] == ["hash chain", "coordinator's signature", "countersignatures of north"]
    return {item.what: item.detail for item in findings if not item.right}


def test_an_honest_log_is_right() -> None:
    rows = log(5)
    assert wrong(rows, rows[2]) == {}


def test_a_shortened_log_lacks_what_a_site_has_signed() -> None:
    rows = log(5)
    found = wrong(rows[:3], rows[4])
    assert list(found) == ["countersignatures of north"]
    assert "row 5 was signed and is gone" in found["countersignatures of north"]


def test_a_log_written_anew_is_another_than_the_one_that_a_site_has_signed() -> None:
    found = wrong(log(5, actor="nobody"), log(5)[3])
    assert list(found) == ["countersignatures of north"]
    assert "row 4 is another than the one that was signed" in found["countersignatures of north"]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_changed_row_breaks_the_chain(number: int) -> None:
    rows = log(5)
    rows[number - 1] = rows[number - 1].model_copy(update={"actor": "nobody"})
    assert f"Row {number} " in wrong(rows, rows[0])["hash chain"]


def test_a_row_that_was_left_out_breaks_the_chain() -> None:
    rows = log(5)
    assert "Row 3 " in wrong([*rows[:1], *rows[2:]], rows[0])["hash chain"]


def test_a_countersignature_by_somebody_else_does_not_count() -> None:
    rows = log(3)
    assert "countersignatures of north" in wrong(rows, rows[1], site_key=STRANGER)


def test_a_head_that_another_key_signed_does_not_count() -> None:
    rows = log(3)
    head = sign(HeadBody(number=3, hash=rows[-1].hash, at=NOW), STRANGER)
    findings = check_log(rows, head, COORDINATOR.public, [], {})
    assert [item.right for item in findings] == [True, False]


class BusyCoordinator:
    """Answers what an export asks for; each answer is followed by another event, which a site sees and signs at once."""

    def __init__(self) -> None:
        self.rows = log(3)

    def get(self, path: str, **params: Any) -> Any:
        answer = self._answer(path, params.get("after", 0))
        self.rows = log(len(self.rows) + 1)
        return answer

    def _answer(self, path: str, after: int) -> Any:
        newest = {"number": self.rows[-1].number, "hash": self.rows[-1].hash}
        if path.endswith("/head"):
            return sign(HeadBody(**newest, at=NOW), COORDINATOR).model_dump(mode="json")
        if path.endswith("/countersignatures"):
            return [sign(CountersignBody(site="north", **newest, seen_at=NOW), NORTH).model_dump(mode="json")]
        return [row.model_dump(mode="json") for row in self.rows[after : after + 2] if len(self.rows) < 12]


def test_what_is_exported_of_a_busy_log_is_of_one_moment() -> None:
    file = io.StringIO()
    count = write_log(cast("GatewayClient", BusyCoordinator()), file)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    rows = [EventAnswer.model_validate(line) for line in lines[:count]]
    head = Head.model_validate(lines[count]["head"])
    signatures = [Countersignature.model_validate(line["countersignature"]) for line in lines[count + 1 :]]
    findings = check_log(rows, head, COORDINATOR.public, signatures, {"north": NORTH.public})
    assert len(findings) == 3 and [item for item in findings if not item.right] == []
