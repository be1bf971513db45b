"""What people read of a run must say of which weights a figure is: a round's metrics are of those that it began with."""

from datetime import UTC, datetime, timedelta

import pytest

from medhive.follow import RunFollower, Source
from medhive.spec import RunOptions, RunSpec, StudyData
from medhive.states import RoundState, RunState, SiteState
from medhive.terminal import Terminal
from medhive.version import OLDEST_PROTOCOL, PROTOCOL
from medhive.views import round_line, rounds_table, runs_table, software_text
from medhive.wire import RoundAnswer, RunAnswer, SiteAnswer, SiteRound

AT = datetime(2026, 11, 1, tzinfo=UTC)
SITES = (SiteRound(site="a", answered=True), SiteRound(site="b", answered=True), SiteRound(site="c", dropped="late"))


def a_round(number: int, accuracy: float, state: RoundState = RoundState.CLOSED) -> RoundAnswer:
    metrics = {"val_accuracy": accuracy, "val_loss": 1 - accuracy, "train_loss": 0.5} if state == "closed" else {}
    return RoundAnswer(number=number, state=state, opened_at=AT, seconds=5.0, metrics=metrics, sites=SITES)


def a_run(**fields: object) -> RunAnswer:
    spec = RunSpec(study="s", task="image-folder", data=StudyData(classes=("x", "y")), options=RunOptions(rounds=2))
    given: dict[str, object] = {
        "id": "RUN_1", "request_id": "REQ_1", "study": "s", "state": RunState.RUNNING, "spec": spec, "rounds": 2,
        "spec_hash": spec.spec_hash, "created_at": AT, "consent_deadline": AT + timedelta(days=7), "updated_at": AT,
    }  # fmt: skip
    return RunAnswer.model_validate(given | fields)


def accuracies(capsys: pytest.CaptureFixture[str], rounds: list[RoundAnswer], final: dict[str, float]) -> list[str]:
    rounds_table(Terminal(), rounds, final)
    head, _, *lines = capsys.readouterr().out.splitlines()
    end = head.index("accuracy") + len("accuracy")
    return [line[end - len("accuracy") : end].strip() for line in lines]


def test_a_line_of_the_table_shows_the_model_after_its_round(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [a_round(1, 0.25), a_round(2, 0.5)]
    assert accuracies(capsys, rounds, {"val_accuracy": 0.75}) == ["0.5000", "0.7500"]


def test_what_is_not_known_yet_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracies(capsys, [a_round(1, 0.25), a_round(2, 0, RoundState.OPEN)], {}) == ["", ""]
    assert accuracies(capsys, [a_round(1, 0.25)], {}) == [""]


def test_a_closed_round_says_what_it_began_with() -> None:
    assert round_line(a_round(2, 0.5), 3) == (
        "round 2/3: 2 of 3 sites answered (a, b), val_accuracy 0.5000, val_loss 0.5000 before it, train_loss 0.5000, 5.0 s, "
        "dropped c: late"
    )


class OneRun:
    """The part of a source that a follower of an ended run reads."""

    def run(self, run_id: str) -> RunAnswer:
        assert run_id == "RUN_1"
        return a_run(state=RunState.COMPLETED, version=3, metrics={"val_accuracy": 0.75, "val_loss": 0.25})

    def rounds(self, _run_id: str) -> list[RoundAnswer]:
        return []


def test_the_last_line_says_how_good_the_version_is() -> None:
    said: list[str] = []
    source: Source = OneRun()  # type: ignore[assignment] - what is not read is not there
    RunFollower(source, "RUN_1", lambda _value, text: said.append(text)).look()
    assert said == ["RUN_1 is completed: version 3 of s, val_accuracy 0.7500, val_loss 0.2500"]


def test_runs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    runs_table(Terminal(), [a_run()])
    assert "RUN_1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        (None, "0.0.9"),
        (PROTOCOL, "0.0.9"),
        (OLDEST_PROTOCOL - 1, f"0.0.9, protocol {OLDEST_PROTOCOL - 1}, not {PROTOCOL}: upgrade the hospital"),
        (PROTOCOL + 1, f"0.0.9, protocol {PROTOCOL + 1}, not {PROTOCOL}: upgrade the coordinator"),
    ],
)
def test_a_hospital_whose_version_does_not_fit_stands_out(protocol: int | None, said: str) -> None:
    assert software_text(SiteAnswer(name="north", state=SiteState.ACTIVE, software="0.0.9", protocol=protocol)) == said
