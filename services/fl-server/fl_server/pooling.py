"""How the sites' own numbers become the run's: weighted means of metrics, sums of confusion matrices and of statistics.

What a site reports is a claim. Only metrics that MedHive's own tasks report are kept, so that no hospital can bring free
text into the coordinator's records by way of a metric's name.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medhive.contribution import MAX_FIGURE, believable
from medhive.envelope import ContributionBody
from medhive.errors import InvalidInput
from medhive.strategies import MAX_EXAMPLES

PLAIN_METRIC = re.compile(r"(val|train)_[a-z0-9_]{1,40}")
RECALL = "val_recall/"
MAX_STATISTIC_NAMES = 20_000
"""Two vectors a column of the widest table."""

Confusion = list[list[int]]


class BadConfusion(InvalidInput):
    """A confusion matrix is not square over the study's classes, or holds counts that cannot be."""

    code = "bad-confusion"


@dataclass(frozen=True)
class Scores:
    """One site's numbers for one round, as far as they can be believed."""

    site: str
    examples: int
    metrics: Mapping[str, float]
    confusion: Confusion

    @classmethod
    def of(cls, body: ContributionBody, classes: Sequence[str]) -> "Scores":
        """Keep what MedHive's tasks report of a contribution.

        Raises:
            BadConfusion: the matrix does not fit the study's classes.
        """
        require_confusion(body.confusion, len(classes))
        metrics = {name: value for name, value in believable(body.metrics).items() if _known(name, classes)}
        return cls(body.site, body.examples, metrics, body.confusion)

    def weight(self, metric: str, classes: Sequence[str]) -> int:
        """How many examples a metric of this site speaks for.

        `train_*` speaks for the training examples, `val_*` for those of the validation part, which the confusion matrix
        counts, and a class's recall for the class's own; without a matrix all count by `examples`.
        """
        if not self.confusion or not metric.startswith("val_"):
            return self.examples
        if metric.startswith(RECALL):
            return sum(self.confusion[classes.index(metric.removeprefix(RECALL))])
        return sum(map(sum, self.confusion))


def _known(name: str, classes: Sequence[str]) -> bool:
    if name.startswith(RECALL):
        return name.removeprefix(RECALL) in classes
    return PLAIN_METRIC.fullmatch(name) is not None


def require_confusion(confusion: Confusion, classes: int) -> None:
    """Refuse a matrix of another shape than `classes` x `classes`, or with impossible counts; none at all is fine.

    Raises:
        BadConfusion: it is one of those.
    """
    if not confusion:
        return
    square = len(confusion) == classes and all(len(row) == classes for row in confusion)
    if not square or not all(0 <= cell <= MAX_EXAMPLES for row in confusion for cell in row):
        raise BadConfusion(f"The confusion matrix is no table of counts over the study's {classes} classes.")


def pooled_metrics(scores: Sequence[Scores], classes: Sequence[str]) -> dict[str, float]:
    """The weighted mean of each metric over the sites that report it."""
    names = sorted({name for score in scores for name in score.metrics})
    pooled = {}
    for name in names:
        parts = [(score.weight(name, classes), score.metrics[name]) for score in scores if name in score.metrics]
        total = sum(weight for weight, _ in parts)
        if total:
            pooled[name] = math.fsum(weight * value for weight, value in parts) / total
    return pooled


def pooled_confusion(confusions: Sequence[Confusion]) -> Confusion:
    """The sum of the sites' matrices; empty when none has one."""
    given = [confusion for confusion in confusions if confusion]
    if not given:
        return []
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*given, strict=True)]


def pooled_statistics(
    by_site: Mapping[str, Mapping[str, Sequence[float]]],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The element-wise sum over the sites in the order of their names, and why any site was left out.

    Sites must report vectors of the same names and lengths. What most report is taken as right, of equals what the first
    site reports.
    """
    wrong = {site: problem for site in sorted(by_site) if (problem := _problem(by_site[site]))}
    shapes = {site: _shape(by_site[site]) for site in sorted(by_site) if site not in wrong}
    if not shapes:
        return {}, wrong
    right = Counter(shapes.values()).most_common(1)[0][0]
    wrong |= {site: "its statistics have other columns than the others'" for site in shapes if shapes[site] != right}
    counted = [by_site[site] for site in shapes if site not in wrong]
    pooled = {name: _sum([item[name] for item in counted]) for name, _ in right}
    return pooled, dict(sorted(wrong.items()))


def _problem(statistics: Mapping[str, Sequence[float]]) -> str | None:
    """Why a site's statistics cannot be any table's; the other sites' go on without them."""
    if len(statistics) > MAX_STATISTIC_NAMES:
        return f"it reports more statistics ({len(statistics)}) than the {MAX_STATISTIC_NAMES} that are taken"
    if any(abs(value) > MAX_FIGURE for values in statistics.values() for value in values):
        return "its statistics hold numbers that no table gives"
    return None


def _shape(statistics: Mapping[str, Sequence[float]]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, len(values)) for name, values in statistics.items()))


def _sum(vectors: Sequence[Sequence[float]]) -> list[float]:
    total = list(vectors[0])
    for vector in vectors[1:]:
        total = [left + right for left, right in zip(total, vector, strict=True)]
    return total
