"""How good a model is on one part of one hospital's data, with the uncertainty that so few patients leave.

Everything is computed from labels and class probabilities, by the definitions of scikit-learn's metrics, which the tests
compare with: importing those takes a trainer as long as importing torch, each time it starts. Intervals are two-sided 95%:
Wilson's for proportions (Wilson 1927), DeLong's for the area under the ROC curve (DeLong et al. 1988), and a bootstrap over
examples for macro F1, which has no closed form.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.tasks.base import Judging, Part, Weights, completed
from fl_client.tasks.errors import NotEnoughExamples

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

Z95 = 1.959963984540054  # 97.5% point of the normal distribution
BOOTSTRAP_SAMPLES = 1000  # the interval's ends then vary by less than a tenth of its width
BOOTSTRAP_SEED = 0  # fixed, so that the same predictions give the same interval
CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv:1706.04599
SMALLEST_PROBABILITY = 1e-7  # one wrong certainty shall not make the loss infinite


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassEvaluation:
    """One class against the rest; None where the part holds no example to tell it by."""

    examples: int
    sensitivity: Estimate | None
    specificity: Estimate | None
    auc: Estimate | None


@dataclass(frozen=True)
class Scores:
    """What a round says of a model, on so many examples: the values of `Evaluation` alone.

    Intervals take many times as long, and a round has no room for them.
    """

    examples: int
    accuracy: float
    loss: float
    macro_f1: float
    ece: float
    confusion: npt.NDArray[np.int64]

    def metrics(self) -> dict[str, float]:
        """The numbers by their names."""
        return {"accuracy": self.accuracy, "loss": self.loss, "macro_f1": self.macro_f1, "ece": self.ece}

    def recalls(self, classes: Sequence[str]) -> dict[str, float]:
        """Each class's sensitivity, but for those without an example."""
        rows = zip(classes, self.confusion, range(len(classes)), strict=True)
        return {name: float(row[place] / row.sum()) for name, row, place in rows if row.sum()}


@dataclass(frozen=True)
class Evaluation:
    """A model judged on `examples` examples.

    Attributes:
        loss: mean cross-entropy in nats.
        macro_f1: mean F1 of the classes that occur as label or prediction.
        ece: expected calibration error over 15 bins of confidence, 0 to 1.
        brier: mean squared distance of the probabilities from the truth, summed over classes, 0 to 2.
        confusion: confusion[i][j] examples of class i were taken for class j, in the order of `classes`.
    """

    examples: int
    accuracy: Estimate
    loss: float
    macro_f1: Estimate
    per_class: Mapping[str, ClassEvaluation]
    ece: float
    brier: float
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples: accuracy of the first minus that of the second, and McNemar's exact p."""

    examples: int
    difference: Estimate
    only_first_right: int
    only_second_right: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return asdict(self)


def score(labels: Labels, probabilities: Floats) -> Scores:
    """Judge predictions: (n,) indices of classes, and (n, k) whose rows sum to one.

    Raises:
        NotEnoughExamples: n is 0.
    """
    return _scores(labels, _clipped(labels, probabilities))


def _scores(labels: Labels, clipped: Floats) -> Scores:
    confusion = np.zeros((clipped.shape[1],) * 2, np.int64)
    np.add.at(confusion, (labels, clipped.argmax(axis=1)), 1)
    return Scores(
        examples=len(labels),
        accuracy=int(np.trace(confusion)) / len(labels),
        loss=float(-np.log(clipped[np.arange(len(labels)), labels]).mean()),
        macro_f1=float(_mean_f1(confusion[np.newaxis])[0]),
        ece=calibration_error(labels, clipped),
        confusion=confusion,
    )


def evaluate(labels: Labels, probabilities: Floats, classes: Sequence[str]) -> Evaluation:
    """Judge predictions, with the intervals of all figures.

    Args:
        labels: (n,) indices into `classes`.
        probabilities: (n, k), rows sum to one.
        classes: the k names.

    Raises:
        NotEnoughExamples: n is 0.
    """
    clipped = _clipped(labels, probabilities)
    scores = _scores(labels, clipped)
    confusion = scores.confusion
    return Evaluation(
        examples=scores.examples,
        accuracy=wilson(int(np.trace(confusion)), len(labels)),
        loss=scores.loss,
        macro_f1=_macro_f1(scores.macro_f1, confusion),
        per_class={name: _one_class(i, labels, clipped, confusion) for i, name in enumerate(classes)},
        ece=scores.ece,
        brier=float(np.square(clipped - np.eye(len(classes))[labels]).sum(axis=1).mean()),
        classes=tuple(classes),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
    )


def _clipped(labels: Labels, probabilities: Floats) -> Floats:
    if len(labels) == 0:
        raise NotEnoughExamples(
            "There is no example to evaluate on; add data or enlarge this part's share in the study."
        )
    clipped = np.clip(probabilities.astype(np.float64), SMALLEST_PROBABILITY, None)
    scaled: Floats = clipped / clipped.sum(axis=1, keepdims=True)
    return scaled


def compare(labels: Labels, first: Floats, second: Floats) -> Comparison:
    """Compare two models' class probabilities, each (n, k), on the same examples.

    The interval is Agresti and Min's (2005) adjusted Wald interval for matched proportions, which stays sensible when the
    models hardly differ.

    Raises:
        NotEnoughExamples: n is 0.
    """
    from scipy.stats import binomtest  # noqa: PLC0415 - most of a second of imports, which no round needs

    n = len(labels)
    if n == 0:
        raise NotEnoughExamples("There is no example to compare two models on; add data or enlarge this part's share.")
    right_first, right_second = first.argmax(axis=1) == labels, second.argmax(axis=1) == labels
    b, c = int((right_first & ~right_second).sum()), int((~right_first & right_second).sum())
    centre = (b - c) / (n + 2)
    spread = Z95 * np.sqrt((b + c + 1) - (b - c) ** 2 / (n + 2)) / (n + 2)
    p = float(binomtest(min(b, c), b + c).pvalue) if b + c else 1.0
    low, high = max(-1.0, float(centre - spread)), min(1.0, float(centre + spread))
    return Comparison(n, Estimate((b - c) / n, low, high), b, c, p)


class InOneGo(ABC):
    """What a workspace that judges step by step offers to who has the time; `base.Workspace` describes the methods."""

    classes: tuple[str, ...]

    @abstractmethod
    def judge(self, weights: Weights, part: Part) -> Judging:
        """Have a model look at one part of the data, step by step."""

    def evaluate(self, weights: Weights, part: Part) -> Evaluation:
        """Judge `weights` on one part of the data."""
        judged = completed(self.judge(weights, part))
        return evaluate(judged.labels, judged.probabilities, self.classes)

    def compare(self, first: Weights, second: Weights, part: Part) -> Comparison:
        """Judge two models on the same examples."""
        one, other = (completed(self.judge(weights, part)) for weights in (first, second))
        return compare(one.labels, one.probabilities, other.probabilities)


def wilson(hits: int, n: int) -> Estimate:
    """Wilson's score interval of the proportion hits / n, n > 0."""
    p = hits / n
    denominator = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / denominator
    half = Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / denominator
    return Estimate(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def auc_interval(positive: npt.NDArray[np.bool_], scores: Floats) -> Estimate | None:
    """Area under the ROC curve with DeLong's interval; None when one side is empty.

    A perfect ranking has no DeLong variance; its lower end is then Wilson's for as many examples as the smaller side has.
    """
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        return None
    # Mann and Whitney's statistic: how often a positive example has the higher score, ties counted half.
    value = float((_ranks(scores)[positive].sum() - m * (m + 1) / 2) / (m * n))
    spread = Z95 * float(np.sqrt(_delong_variance(scores[positive], scores[~positive])))
    if spread > 0:
        return Estimate(value, max(0.0, value - spread), min(1.0, value + spread))
    few = wilson(round(value * min(m, n)), min(m, n))
    return Estimate(value, min(few.low, value), max(few.high, value))


def _delong_variance(positive: Floats, negative: Floats) -> float:
    m, n = len(positive), len(negative)
    if m < 2 or n < 2:
        return 0.0
    ranks = _ranks(np.concatenate([positive, negative]))
    beaten = (ranks[:m] - _ranks(positive)) / n
    beating = 1 - (ranks[m:] - _ranks(negative)) / m
    return float(beaten.var(ddof=1) / m + beating.var(ddof=1) / n)


def _ranks(values: Floats) -> Floats:
    """Each value's place in ascending order, from 1; equal ones share the mean of theirs."""
    _distinct, of, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[of])


def calibration_error(labels: Labels, probabilities: Floats) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equal bins of confidence."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    sums = np.bincount(bins, weights=confidence - right, minlength=CALIBRATION_BINS)
    return float(np.abs(sums).sum() / len(labels))


def _macro_f1(value: float, confusion: npt.NDArray[np.int64]) -> Estimate:
    """Resampling examples with replacement is drawing a new confusion matrix from a multinomial."""
    n = int(confusion.sum())
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    samples = rng.multinomial(n, confusion.ravel() / n, size=BOOTSTRAP_SAMPLES).reshape(-1, *confusion.shape)
    low, high = np.quantile(_mean_f1(samples), [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value))


def _mean_f1(confusions: npt.NDArray[np.int64]) -> Floats:
    """(s,) mean F1 of the classes that occur as label or prediction in each of (s, k, k) confusion matrices."""
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    totals = confusions.sum(axis=1) + confusions.sum(axis=2)
    f1 = np.divide(2 * hits, totals, out=np.zeros(hits.shape), where=totals > 0)
    return np.asarray(f1.sum(axis=1) / np.maximum((totals > 0).sum(axis=1), 1))


def _one_class(index: int, labels: Labels, probabilities: Floats, confusion: npt.NDArray[np.int64]) -> ClassEvaluation:
    n = int(confusion.sum())
    here = int(confusion[index].sum())
    hits = int(confusion[index, index])
    false_alarms = int(confusion[:, index].sum()) - hits
    return ClassEvaluation(
        examples=here,
        sensitivity=wilson(hits, here) if here else None,
        specificity=wilson(n - here - false_alarms, n - here) if here < n else None,
        auc=auc_interval(labels == index, probabilities[:, index]),
    )
