"""The task `survival`: Cox' proportional hazards model on a CSV, judged by Harrell's concordance index.

Every hospital keeps its own baseline hazard (a model stratified by hospital), so that only coefficients are shared. Each local
epoch is one Newton step of the hospital's partial likelihood (Cox 1972), with Breslow's handling of ties; being Newton, it
needs no scaling of the features.
"""

import csv
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fl_client.tasks import DataReport, EpochProgress, Judged, Prediction, Skipped, TrainResult
from fl_client.tasks.base import part_of, read_options
from fl_client.tasks.errors import DataFolderMissing, NotEnoughExamples, TrainingDiverged, WrongArchitecture, WrongColumns
from fl_client.tasks.evaluation import InOneGo

MAX_FILE_BYTES = 100 * 2**20
RIDGE = 1e-3  # keeps a step finite where a hospital's patients are few or alike
MAX_STEP = 1.0  # of a coefficient; Newton overshoots far from the optimum


@dataclass(frozen=True)
class Options:
    """A study's options: names of columns; `features` separated by spaces."""

    time: str = "time"
    event: str = "event"
    patient: str = ""
    features: str = "age"


def read_rows(path, options):
    """Each line of the CSV as (name, features and time and event, patient); what cannot be used as Skipped."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataFolderMissing(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
        lines = list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFolderMissing(f"{path} cannot be read as a CSV file: {error}.") from error
    wanted = [*options.features.split(), options.time, options.event, *filter(None, [options.patient])]
    if missing := set(wanted) - set(lines[0] if lines else ()):
        raise WrongColumns(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    for number, line in enumerate(lines, 2):
        try:
            values = np.array([float(line[name]) for name in [*options.features.split(), options.time, options.event]])
            good = np.isfinite(values).all() and values[-2] > 0 and values[-1] in (0, 1)
        except (TypeError, ValueError):
            good = False
        name = f"{path.name}:{number}"
        yield (name, values, line[options.patient] if options.patient else None) if good else Skipped(name, "not-a-number")


def newton_step(beta, x, times, events):
    """One step up the partial likelihood of (n, d) features; returns the new coefficients and the loss before it."""
    order = np.argsort(-times, kind="stable")
    x, times, events = x[order], times[order], events[order]
    scores = x @ beta
    weights = np.exp(scores - scores.max())
    # Everybody who is still under observation at a time: the sums up to the last patient of that time.
    last = np.searchsorted(-times, -times, side="right") - 1
    s0 = np.cumsum(weights)[last]
    s1 = np.cumsum(weights[:, None] * x, axis=0)[last]
    s2 = np.cumsum(weights[:, None, None] * x[:, :, None] * x[:, None, :], axis=0)[last]
    died = events == 1
    mean = s1[died] / s0[died, None]
    gradient = (x[died] - mean).sum(axis=0)
    information = (s2[died] / s0[died, None, None] - mean[:, :, None] * mean[:, None, :]).sum(axis=0)
    loss = -(scores[died] - scores.max() - np.log(s0[died])).sum() / max(1, died.sum())
    scale = np.diag(np.maximum(np.diag(information), 1e-12))
    step = np.linalg.solve(information + RIDGE * scale, gradient)
    return beta + step / max(1.0, np.abs(step * x.std(axis=0)).max() / MAX_STEP), float(loss)


def concordance(times, events, scores):
    """Harrell's index: of all pairs of which one is known to have died first, the share whose scores say so; ties half."""
    earlier = (times[:, None] < times[None, :]) & (events[:, None] == 1)
    right = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    return float(right[earlier].mean()) if earlier.any() else float("nan")


class SurvivalModel:
    """The model without data; `fl_client.tasks.base.Predictor` describes the methods."""

    def __init__(self, study):
        self.options = read_options(Options, study)
        self.classes = study.classes
        self.features = self.options.features.split()

    def beta(self, weights):
        if set(weights) != {"beta"} or weights["beta"].shape != (len(self.features),):
            raise WrongArchitecture("These weights belong to another model than the study's. Use a version of this study.")
        return weights["beta"].astype(np.float64)

    def probabilities(self, scores):
        """A rank between 0 and 1, as the classes censored and event need one; it is no calibrated risk."""
        risk = 1 / (1 + np.exp(-np.clip(scores - np.median(scores), -30, 30)))
        return np.stack([1 - risk, risk], axis=1)

    def predict_files(self, weights, paths):
        for path in paths:
            rows = list(read_rows(path, self.options))
            good = [row for row in rows if not isinstance(row, Skipped)]
            x = np.array([values[:-2] for _, values, _ in good]).reshape(len(good), -1)
            found = iter(self.probabilities(x @ self.beta(weights)) if good else ())
            yield path, [
                row if isinstance(row, Skipped) else Prediction(row[0], dict(zip(self.classes, map(float, next(found)))))
                for row in rows
            ]

    def predict(self, weights, paths):
        return [item for _, items in self.predict_files(weights, paths) for item in items]


class SurvivalWorkspace(SurvivalModel, InOneGo):
    """One hospital's patients; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(self, data_dir, study, secret):
        super().__init__(study)
        path = data_dir if data_dir.is_file() else next(iter(sorted(data_dir.glob("*.csv"))), data_dir / "data.csv")
        rows = list(read_rows(path, self.options))
        good = [row for row in rows if not isinstance(row, Skipped)]
        digests = [hashlib.sha256(values.tobytes()).hexdigest() for _, values, _ in good]
        keys = [patient or digest for (_, _, patient), digest in zip(good, digests)]
        shares = (study.validation_share, study.heldout_share)
        self.parts = np.array([part_of(secret, key.encode(), *shares) for key in keys])
        self.values = np.array([values for _, values, _ in good])
        self.report = DataReport.of(
            "survival",
            study,
            secret,
            [(int(v[-1]), str(part), digest) for (_, v, _), part, digest in zip(good, self.parts, digests)],
            skipped=[row for row in rows if isinstance(row, Skipped)],
            duplicates=(),
            groups=len(set(keys)) if self.options.patient else None,
        )

    def rows(self, part):
        """Features, times and events of one part."""
        found = self.values[self.parts == part] if len(self.values) else self.values
        if not len(found):
            raise NotEnoughExamples(f"The {part} part of the table is empty; add rows.", part=part)
        return found[:, :-2], found[:, -2], found[:, -1]

    def initial_weights(self, seed):
        return {"beta": np.zeros(len(self.features), np.float32)}

    def statistics(self):
        return None

    def use_statistics(self, pooled):
        """Newton's steps need none."""

    def train(self, weights, plan):
        beta, (x, times, events) = self.beta(weights), self.rows("train")
        return self._steps(beta, x, times, events, plan)

    def _steps(self, beta, x, times, events, plan):
        started, loss, index = time.monotonic(), 0.0, 0.0
        for epoch in range(1, plan.local_epochs + 1):
            beta, loss = newton_step(beta, x, times, events)
            if not np.isfinite(beta).all():
                raise TrainingDiverged("The fit is not finite; leave out a column that is nearly constant.")
            index = concordance(times, events, x @ beta)
            yield EpochProgress(epoch, plan.local_epochs, loss, index, len(x), time.monotonic() - started)
        metrics = {"train_loss": loss, "train_concordance": index}
        return TrainResult({"beta": beta.astype(np.float32)}, len(x), metrics, None)

    def judge(self, weights, part):
        x, times, events = self.rows(part)
        scores = x @ self.beta(weights)
        yield None
        metrics = {"concordance": concordance(times, events, scores)}
        return Judged(events.astype(np.int64), self.probabilities(scores), metrics)


class SurvivalTask:
    """See `fl_client.tasks.base.Task` for the methods."""

    name = "survival"

    def load(self):
        """numpy is all it needs."""

    def predictor(self, study, *, device="cpu"):
        return SurvivalModel(study)

    def check(self, data_dir, study, secret, *, on_progress=None, local=None):
        return self.open(data_dir, study, secret).report

    def open(self, data_dir, study, secret, *, device="cpu", on_progress=None, local=None):
        return SurvivalWorkspace(Path(data_dir), study, secret)
