"""The table of a run's rounds, as other programs read it."""

import csv
import io
from datetime import UTC, datetime

from medhive.curves import lines_of, rounds_csv
from medhive.states import RoundState
from medhive.wire import NOT_ADDRESSED, RoundAnswer, SiteRound

NOW = datetime(2026, 11, 1, tzinfo=UTC)
SITES = (
    SiteRound(site="a", answered=True, training_s=2.0),
    SiteRound(site="b", answered=True, dropped="its update was refused", training_s=5.0),
    SiteRound(site="c", dropped=NOT_ADDRESSED + "it declined"),
)


def a_round(number: int, state: RoundState = RoundState.CLOSED, **metrics: float) -> RoundAnswer:
    return RoundAnswer(
        number=number,
        state=state,
        opened_at=NOW,
        seconds=3.0,
        bytes_up=7,
        metrics=metrics,
        sites=SITES if number else (),
    )


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_test_set_speaks_of_the_model_after_the_round_and_validation_of_the_one_before() -> None:
    rounds = [
        a_round(0),
        a_round(1, val_accuracy=0.1, test_accuracy=0.15, train_loss=2.0),
        a_round(2, val_accuracy=0.2, test_accuracy=0.25, train_loss=1.0),
    ]
    rows = read(rounds_csv(lines_of(rounds, {"val_accuracy": 0.3, "test_accuracy": 0.35})))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["state"] for row in rows] == ["closed", "closed", "closed", "final"]
    assert [row["test_accuracy"] for row in rows] == ["", "0.25", "0.35", ""]
    assert [row["val_accuracy"] for row in rows] == ["", "0.1", "0.2", "0.3"]
    assert [row["train_loss"] for row in rows] == ["", "2.0", "1.0", ""]
    assert (rows[1]["asked"], rows[1]["answered"], rows[1]["training_s"]) == ("2", "1", "2.0")
    assert (rows[1]["seconds"], rows[1]["bytes_up"], rows[3]["seconds"]) == ("3.0", "7", "")


def test_what_goes_on_has_no_end_yet() -> None:
    rounds = [a_round(0), a_round(1, val_accuracy=0.1), a_round(2, RoundState.OPEN)]
    assert [row["round"] for row in read(rounds_csv(lines_of(rounds, {})))] == ["0", "1"]
    assert read(rounds_csv(lines_of([], {}))) == []
