"""A run's rounds as a table for other programs: the same columns for a deployed run and for a simulated one.

A metric `val_...` of a line is of the model before the round, as the sites were asked; `test_...` is of the model after it.
The last line of a run that has ended, with the state `final`, is no round: it holds what was said of the final model.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from medhive.states import RoundState
from medhive.wire import NOT_ADDRESSED, RoundAnswer, RoundFacts

TEST: Final = "test_"
"""Begins the name of what a test set says."""
FINAL: Final = "final"
FIGURES: Final = ("seconds", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class RoundLine:
    """One line. `test` by names without `test_`; `training_s` of all who answered together."""

    number: int
    facts: RoundFacts | None
    metrics: Mapping[str, float]
    test: Mapping[str, float] = field(default_factory=dict)
    asked: int = 0
    answered: int = 0
    training_s: float = 0.0


def lines_of(rounds: Sequence[RoundAnswer], final: Mapping[str, float]) -> list[RoundLine]:
    """The lines of a deployed run.

    Args:
        rounds: in their order, with all their sites.
        final: metrics of the weights after the last round; empty while the run goes on.
    """
    ended = [item for item in rounds if item.state != RoundState.OPEN]
    begun_with = [_of_test(item.metrics) for item in rounds[1 : len(ended) + 1]]
    after = [*begun_with, _of_test(final)]
    lines = [_line(item, test if item.number else {}) for item, test in zip(ended, after, strict=False)]
    return [*lines, *final_line(ended[-1].number if ended else 0, final)]


def final_line(last: int, final: Mapping[str, float]) -> list[RoundLine]:
    """The line after the last round; none where nothing was said of the final model."""
    metrics = {name: value for name, value in final.items() if not name.startswith(TEST)}
    return [RoundLine(last + 1, None, metrics)] if metrics else []


def _of_test(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(TEST): value for name, value in metrics.items() if name.startswith(TEST)}


def _line(item: RoundAnswer, test: Mapping[str, float]) -> RoundLine:
    asked = [site for site in item.sites if not (site.dropped or "").startswith(NOT_ADDRESSED)]
    answered = [site for site in asked if site.answered and not site.dropped]
    return RoundLine(
        number=item.number,
        facts=item,
        metrics={name: value for name, value in item.metrics.items() if not name.startswith(TEST)},
        test=test,
        asked=len(asked),
        answered=len(answered),
        training_s=sum(site.training_s for site in answered),
    )


def rounds_csv(lines: Sequence[RoundLine]) -> str:
    """The table, with a head; what a line has not is empty."""
    metrics = sorted({name for line in lines for name in line.metrics})
    tests = sorted({name for line in lines for name in line.test})
    head = ["round", "state", "asked", "answered", "training_s", *FIGURES, *(TEST + name for name in tests), *metrics]
    rows = (
        [
            line.number,
            *_facts(line),
            *(line.test.get(name, "") for name in tests),
            *(line.metrics.get(name, "") for name in metrics),
        ]
        for line in lines
    )
    return _as_csv([head, *rows])


def _facts(line: RoundLine) -> list[object]:
    if line.facts is None:
        return [FINAL, "", "", "", *("" for _ in FIGURES)]
    figures = (getattr(line.facts, name) for name in FIGURES)
    return [str(line.facts.state), line.asked, line.answered, line.training_s, *figures]


def _as_csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()
