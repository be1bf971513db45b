"""What a person who follows a run reads of a refused contribution."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from medhive.states import RoundState
from medhive.views import round_line
from medhive.wire import Refusal, RoundAnswer, SiteRound


def test_the_line_of_a_round_names_what_was_refused() -> None:
    item = RoundAnswer(
        number=2,
        state=RoundState.CLOSED,
        opened_at=datetime(2026, 11, 1, tzinfo=UTC),
        sites=(SiteRound(site="a", answered=True),),
        refusals=(Refusal(site="a", code="bad-signature"),),
    )
    assert round_line(item, 3) == "round 2/3: 1 of 1 sites answered (a), 0.0 s, refused in the name of a: bad-signature"


@pytest.mark.parametrize("code", ["", "Mr. Miller", "scan_0815.png", "a" * 61, "1"])
def test_a_code_is_no_place_for_anything_else(code: str) -> None:
    with pytest.raises(ValidationError):
        Refusal(site="a", code=code)
