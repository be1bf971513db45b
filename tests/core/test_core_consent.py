"""A consent counts for exactly one run, one specification, one coordinator, and only for a time."""

from datetime import UTC, datetime, timedelta

import pytest

from medhive.consent import ConsentBody, check_consent, covers_round
from medhive.errors import BadSignature, Expired, InvalidInput
from medhive.signing import SigningKey, sign

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = SigningKey.generate()
RUN = {"site": "hospital-a", "run_id": "RUN_1", "spec_hash": "a" * 64, "coordinator_key_id": "c" * 16}


def body(**changes: object) -> ConsentBody:
    values: dict[str, object] = {
        **RUN,
        "decision": "granted",
        "max_rounds": 3,
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=30),
        "nonce": "0" * 32,
        "person": "Radiology",
    }
    return ConsentBody.model_validate({**values, **changes})


def check(statement: ConsentBody, *, now: datetime = NOW, rounds: int = 3, key: SigningKey = KEY) -> ConsentBody:
    expected = {name: value for name, value in RUN.items() if name != "coordinator_key_id"}
    ids = (RUN["coordinator_key_id"], "f" * 16)
    return check_consent(sign(statement, key), KEY.public, rounds=rounds, now=now, coordinator_key_ids=ids, **expected)


def test_a_consent_to_a_former_key_of_the_coordinator_holds() -> None:
    assert check(body(coordinator_key_id="f" * 16)).coordinator_key_id == "f" * 16


def test_a_fitting_consent_is_returned() -> None:
    assert check(body()).person == "Radiology"


@pytest.mark.parametrize(
    ("field", "value"),
    [("site", "hospital-b"), ("run_id", "RUN_2"), ("spec_hash", "b" * 64), ("coordinator_key_id", "d" * 16)],
)
def test_a_consent_for_something_else_is_refused(field: str, value: str) -> None:
    with pytest.raises(BadSignature, match=field):
        check(body(**{field: value}))


def test_another_key_is_refused() -> None:
    with pytest.raises(BadSignature):
        check(body(), key=SigningKey.generate())


def test_time_limits() -> None:
    with pytest.raises(Expired, match="expired"):
        check(body(), now=NOW + timedelta(days=30))
    with pytest.raises(Expired, match="clock"):
        check(body(), now=NOW - timedelta(minutes=10))
    assert check(body(), now=NOW - timedelta(minutes=4))
    with pytest.raises(InvalidInput, match="within a year"):
        check(body(expires_at=NOW + timedelta(days=400)))
    with pytest.raises(InvalidInput, match="after it is issued"):
        check(body(expires_at=NOW - timedelta(days=1)))


def test_too_few_rounds_are_refused_only_for_a_granted_consent() -> None:
    with pytest.raises(InvalidInput, match="2 rounds"):
        check(body(max_rounds=2))
    assert check(body(decision="declined", max_rounds=0)).decision == "declined"


def test_rounds_covered() -> None:
    assert covers_round(body(), 3, NOW)
    assert not covers_round(body(), 4, NOW)
    assert not covers_round(body(), 3, NOW + timedelta(days=31))
    assert not covers_round(body(decision="withdrawn"), 1, NOW)
