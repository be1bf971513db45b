"""Federated logistic regression: the numerical side of the task `tabular`.

The model file says everything that a prediction needs: coefficients, and per feature the share of present values and the
first two moments, from which missing values are filled in and features scaled. Moments are kept as means over a site's
rows, so that the weighted mean which makes the global model pools them exactly: a first round from a model without them
sends them and trains nothing, and no row is ever seen outside its hospital.
"""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fl_client.tasks.base import (
    EpochProgress,
    Examples,
    FloatArray,
    Judged,
    Judging,
    LocalOptions,
    OnProgress,
    Part,
    Prediction,
    RoundPlan,
    Skipped,
    Training,
    TrainResult,
    Weights,
)
from fl_client.tasks.errors import (
    DataFolderMissing,
    DeadlinePassed,
    NotEnoughExamples,
    TrainingDiverged,
    WrongColumns,
)
from fl_client.tasks.evaluation import InOneGo, score
from fl_client.tasks.models import require_same_layout
from fl_client.tasks.tables import Features, Table, TableOptions, read_features, read_table, table_format
from medhive.spec import StudyData

# A variance below this share of the second moment is float32's rounding, not spread.
VARIANCE_FLOOR = 1e-6
SMALLEST_SPREAD = 1e-6

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def open_workspace(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    *,
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> "TabularWorkspace":
    """Read the table; raises as `tables.read_table`."""
    return TabularWorkspace(read_table(data_dir, study, secret, on_progress=on_progress, local=local), study)


@dataclass(frozen=True)
class Moments:
    """Per feature (d,): share of rows where it is present, mean and mean square where absent values count as 0."""

    present: Floats
    first: Floats
    second: Floats

    @classmethod
    def of(cls, values: Floats) -> "Moments":
        """Moments of (n, d) features with NaN for missing numbers."""
        filled = np.nan_to_num(values)
        return cls((~np.isnan(values)).mean(axis=0), filled.mean(axis=0), (filled**2).mean(axis=0))

    @classmethod
    def from_weights(cls, weights: Weights) -> "Moments":
        """Moments that came with a model; all zero in one that never met data."""
        parts = (weights[f"moments.{name}"].astype(np.float64) for name in ("present", "first", "second"))
        return cls(*parts)

    @property
    def known(self) -> bool:
        """Whether any site's data are in them."""
        return bool(self.present.any())

    def to_weights(self) -> dict[str, FloatArray]:
        """As tensors of the model."""
        named = {"present": self.present, "first": self.first, "second": self.second}
        return {f"moments.{name}": array.astype(np.float32) for name, array in named.items()}

    def scaled(self, values: Floats, numeric: npt.NDArray[np.bool_]) -> Floats:
        """(n, d) features → (n, d + numeric): numbers standardised, missing ones the mean, then their indicators.

        The 0/1 columns are centred but not scaled: scaling would blow up a category that is rare everywhere and frequent
        in one hospital, and the averaged coefficients would follow that hospital.
        """
        share = np.maximum(self.present, np.finfo(np.float64).tiny)
        mean, square = self.first / share, self.second / share
        variance = np.maximum(square - mean**2, VARIANCE_FLOOR * square)
        spread = np.where(numeric, np.maximum(np.sqrt(variance), SMALLEST_SPREAD), 1.0)
        missing = np.isnan(values)
        seen = (self.present > 0) & (self.second > 0)
        standard = np.where(missing | ~seen, 0.0, (values - mean) / spread)
        lacking = 1 - self.present[numeric]
        informative = (lacking > VARIANCE_FLOOR) & (lacking < 1 - VARIANCE_FLOOR)
        indicators = np.where(informative, missing[:, numeric] - lacking, 0.0)
        return np.concatenate([standard, indicators], axis=1)


class TabularModel:
    """A study's classifier without a table; `fl_client.tasks.base.Predictor` describes the methods."""

    def __init__(self, study: StudyData) -> None:
        """Take the features from the study; raises WrongOption as `tables.table_format`."""
        self.classes = study.classes
        self._study = study
        self._features = Features.of(table_format(study), TableOptions.of(study).group_column)
        self._numeric = np.array(self._features.numeric, dtype=bool)

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each CSV file with the class probabilities of its rows; one of several that is no such table is skipped.

        Raises:
            DataFolderMissing, WrongColumns: the only file cannot be used.
        """
        require_same_layout(self._shapes(), weights)
        for path in paths:
            try:
                found = self._predict_file(weights, path)
            except (DataFolderMissing, WrongColumns) as error:
                if len(paths) == 1:
                    raise
                found = [Skipped(path.name, error.code)]
            yield path, found

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """Class probabilities of every row of CSV files; a row's name is file:line."""
        return [item for _path, items in self.predict_files(weights, paths) for item in items]

    def _predict_file(self, weights: Weights, path: Path) -> list[Prediction | Skipped]:
        try:
            rows = list(read_features(path, self._study))
        except OSError as error:
            raise DataFolderMissing(f"{path} cannot be read: {error.strerror}.", folder=str(path)) from error
        usable = [values for _name, values in rows if not isinstance(values, Skipped)]
        found = iter(self._probabilities(weights, np.array(usable)) if usable else ())
        return [values if isinstance(values, Skipped) else self._prediction(name, next(found)) for name, values in rows]

    def _prediction(self, name: str, row: Floats) -> Prediction:
        return Prediction(name, {label: float(p) for label, p in zip(self.classes, row, strict=True)})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d = len(self._features.names)
        outputs = 1 if len(self.classes) == 2 else len(self.classes)
        moments = {f"moments.{name}": (d,) for name in ("present", "first", "second")}
        return {"coefficients": (outputs, d + int(self._numeric.sum())), "intercepts": (outputs,), **moments}

    def _probabilities(self, weights: Weights, values: Floats) -> Floats:
        require_same_layout(self._shapes(), weights)
        features = Moments.from_weights(weights).scaled(values, self._numeric)
        probabilities: Floats = np.exp(log_softmax(_logits(_Linear.from_weights(weights), features), axis=1))
        return probabilities


class TabularWorkspace(TabularModel, InOneGo):
    """A site's table in memory; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(self, table: Table, study: StudyData) -> None:
        super().__init__(study)
        self.report = table.report
        self.examples = Examples(table.labels, table.parts, table.names)
        self._table = table
        self._pooled: Moments | None = None

    def share(self, places: Labels, parts: npt.NDArray[np.str_], labels: Labels | None = None) -> Self:
        """The same with the rows at these places alone; see `base.Divisible.share`."""
        other = copy(self)
        own = self._table.labels[places] if labels is None else labels
        names = [self._table.names[place] for place in places]
        other._table = replace(self._table, values=self._table.values[places], labels=own, parts=parts, names=names)
        other.examples = Examples(own, parts, names)
        return other

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:  # noqa: ARG002 - a convex problem starts anywhere
        """All zeros, whatever the seed: moments that say they are unknown, and coefficients that prefer no class."""
        return {name: np.zeros(shape, dtype=np.float32) for name, shape in self._shapes().items()}

    def statistics(self) -> dict[str, Floats]:
        """Sums over the training rows, which sites may add up: examples, present, sum, sum_of_squares."""
        values = self._table.values[self._rows("train")]
        filled = np.nan_to_num(values)
        return {
            "examples": np.array([float(len(values))]),
            "present": (~np.isnan(values)).sum(axis=0).astype(np.float64),
            "sum": filled.sum(axis=0),
            "sum_of_squares": (filled**2).sum(axis=0),
        }

    def use_statistics(self, pooled: Mapping[str, Floats]) -> None:
        """Take the sums of all sites; from then on training starts with them instead of asking for them."""
        n = float(pooled["examples"][0])
        if n <= 0:
            raise NotEnoughExamples("The pooled statistics hold no example; let the sites send theirs again.")
        self._pooled = Moments(pooled["present"] / n, pooled["sum"] / n, pooled["sum_of_squares"] / n)

    def train(self, weights: Weights, plan: RoundPlan) -> Training:
        """One round; see `base.Workspace.train`."""
        require_same_layout(self._shapes(), weights)
        return self._train(weights, plan)

    def judge(self, weights: Weights, part: Part) -> Judging:
        """Have a model look at one part of the rows; one product of matrices, so one step."""
        rows = self._rows(part)
        probabilities = self._probabilities(weights, self._table.values[rows])
        yield None
        return Judged(self._table.labels[rows], probabilities)

    def _rows(self, part: Part) -> npt.NDArray[np.bool_]:
        rows: npt.NDArray[np.bool_] = self._table.parts == part
        if not rows.any():
            raise NotEnoughExamples(f"The {part} part of the table is empty; add rows.", part=part)
        return rows

    def _train(self, weights: Weights, plan: RoundPlan) -> Training:
        started = time.monotonic()
        if plan.deadline is not None and time.time() > plan.deadline:
            raise DeadlinePassed(
                f"The deadline of round {plan.round} passed before training; ask for a later one (--deadline-s).",
                round=plan.round,
            )
        rows = self._rows("train")
        values, labels = self._table.values[rows], self._table.labels[rows]
        moments = self._pooled or Moments.from_weights(weights)
        model = _Linear.from_weights(weights)
        if not moments.known:
            moments = Moments.of(values)
        else:
            yield None
            model = fit(model, moments.scaled(values, self._numeric), labels, len(self.classes), plan)
        changed = {**model.to_weights(), **moments.to_weights()}
        judged = score(labels, self._probabilities(changed, values))
        seconds = time.monotonic() - started
        yield EpochProgress(plan.local_epochs, plan.local_epochs, judged.loss, judged.accuracy, len(labels), seconds)
        metrics = {"train_loss": judged.loss, "train_accuracy": judged.accuracy}
        return TrainResult(changed, len(labels), metrics, None)


@dataclass(frozen=True)
class _Linear:
    """A linear classifier: (1 or k, d) coefficients and (1 or k,) intercepts; one row means two classes."""

    coefficients: Floats
    intercepts: Floats

    @classmethod
    def from_weights(cls, weights: Weights) -> "_Linear":
        return cls(weights["coefficients"].astype(np.float64), weights["intercepts"].astype(np.float64))

    def to_weights(self) -> dict[str, FloatArray]:
        if not (np.isfinite(self.coefficients).all() and np.isfinite(self.intercepts).all()):
            raise TrainingDiverged("The fit is not finite; ask for the penalty l2 or a smaller C.")
        return {
            "coefficients": self.coefficients.astype(np.float32),
            "intercepts": self.intercepts.astype(np.float32),
        }


def fit(start: _Linear, features: Floats, labels: Labels, classes: int, plan: RoundPlan) -> _Linear:
    """`plan.local_epochs` iterations of L-BFGS from `start`.

    scikit-learn's solver does it; a proximal term, or a site without examples of some class, which that solver does not
    know, are minimised here with the same method.
    """
    with threadpool_limits(limits=1):  # the products are tiny: threads would only wait for each other
        if plan.mu == 0 and len(np.unique(labels)) == classes:
            return _fit_sklearn(start, features, labels, plan)
        return _fit_proximal(start, features, labels, plan)


def _fit_sklearn(start: _Linear, features: Floats, labels: Labels, plan: RoundPlan) -> _Linear:
    c = math.inf if plan.penalty == "none" else plan.C
    solver = LogisticRegression(C=c, solver="lbfgs", max_iter=plan.local_epochs, warm_start=True)
    solver.coef_, solver.intercept_ = start.coefficients.copy(), start.intercepts.copy()
    solver.classes_ = np.unique(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a round shall stop early; the next one goes on
        solver.fit(features, labels)
    return _Linear(solver.coef_, solver.intercept_)


def _fit_proximal(start: _Linear, features: Floats, labels: Labels, plan: RoundPlan) -> _Linear:
    """Minimise mean cross-entropy + |w|²/(2·C·n) + μ/2·|w - w_global|² (Li et al. 2020, arXiv:1812.06127)."""
    n, shape = len(labels), start.coefficients.shape
    anchor = np.concatenate([start.coefficients, start.intercepts[:, None]], axis=1)
    with_one = np.concatenate([features, np.ones((n, 1))], axis=1)
    decay = 0.0 if plan.penalty == "none" else 1 / (plan.C * n)

    def objective(flat: Floats) -> tuple[float, Floats]:
        w = flat.reshape(anchor.shape)
        logits = _logits(_Linear(w[:, :-1], w[:, -1]), features)
        logs = log_softmax(logits, axis=1)
        error = np.exp(logs)
        error[np.arange(n), labels] -= 1
        pulled = w - anchor
        penalised = np.concatenate([w[:, :-1], np.zeros((len(w), 1))], axis=1)
        loss = -logs[np.arange(n), labels].mean() + (decay * (penalised**2).sum() + plan.mu * (pulled**2).sum()) / 2
        gradient = error[:, -shape[0] :].T @ with_one / n + decay * penalised + plan.mu * pulled
        return float(loss), gradient.ravel()

    found = minimize(objective, anchor.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": plan.local_epochs})
    w = found.x.reshape(anchor.shape)
    return _Linear(w[:, :-1], w[:, -1])


def _logits(model: _Linear, features: Floats) -> Floats:
    """(n, k) logits; with one row of coefficients they are those of the second of two classes, the first has 0."""
    logits: Floats = features @ model.coefficients.T + model.intercepts
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if logits.shape[1] == 1 else logits
