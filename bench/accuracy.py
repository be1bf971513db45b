"""How accurate federated training is beside pooled training: the figures behind docs/benchmarks.md.

The hospitals' own task code runs in one process, sites after each other, and the weighted mean is taken in plain numpy: no
network and no services, so what is measured is the recipe. Prints one JSON document.

    python bench/accuracy.py --data brain_mri --seeds 3                      # three sites, equal mixes
    python bench/accuracy.py --data brain_mri --alpha 0.5 --test unseen/     # Dirichlet(0.5), own test folder
    python bench/accuracy.py --task tabular --data heart_disease --seeds 5   # four hospitals, one file each
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fl_client.partition import split_dataset
from fl_client.tasks import Prediction, RoundPlan, Workspace, finish, load_task
from fl_client.tasks.base import FloatArray, Weights
from fl_client.tasks.evaluation import Z95, evaluate
from fl_client.tasks.tables import csv_files
from medhive.spec import StudyData

TEST_SHARE = 0.12  # of the images, chosen by a hash of their content, where no test folder is given
ALLOWED_GAP = 0.01  # how much federated may be below pooled
IMAGE_GOAL = 0.95
TABLE_GOAL = 0.785
TABLE_PARTS = {"validation_share": 0.05, "heldout_share": 0.3}  # a table's test part is its held-out part
POOLED_ITERATIONS = 100  # a logistic regression has converged long before

HEART = """age  sex:0,1  cp:1,2,3,4  trestbps  chol  fbs:0,1  restecg:0,1,2  thalach  exang:0,1  oldpeak  slope:1,2,3
    ca:0,1,2,3  thal:3,6,7  num"""  # columns in the order of the files; a categorical one with its categories


@dataclass(frozen=True)
class Chosen:
    """What the command line asks for."""

    data: Path
    task: str
    test: Path | None
    sites: int
    alpha: float | None
    rounds: int
    local_epochs: int
    batch_size: int
    lr: float | None
    mu: float
    C: float
    size: int
    seeds: int
    first_seed: int
    pooled: bool


def plan(chosen: Chosen, number: int, seed: int, **changes: Any) -> RoundPlan:
    values: dict[str, Any] = {
        "round": number,
        "rounds": chosen.rounds,
        "local_epochs": chosen.local_epochs,
        "batch_size": chosen.batch_size,
        "lr": chosen.lr,
        "mu": chosen.mu,
        "C": chosen.C,
        "seed": seed,
    }
    return RoundPlan(**{**values, **changes})


def weighted_mean(parts: Sequence[tuple[Weights, int]]) -> dict[str, FloatArray]:
    """FedAvg: the mean weighted by examples, summed in float64."""
    total = sum(examples for _, examples in parts)
    return {
        name: np.sum([weights[name].astype(np.float64) * (n / total) for weights, n in parts], axis=0).astype(
            np.float32
        )
        for name in parts[0][0]
    }


def train(
    sites: Sequence[Workspace], make_plan: Callable[..., RoundPlan], rounds: int, *, quiet: bool = False
) -> dict[str, FloatArray]:
    """All rounds; one site is pooled training with the same recipe."""
    weights = sites[0].initial_weights(42)
    states: list[bytes | None] = [None] * len(sites)
    for number in range(1, rounds + 1):
        started = time.monotonic()
        plans = [make_plan(number, optimiser_state=state) for state in states]
        results = [finish(site.train(weights, own)) for site, own in zip(sites, plans, strict=True)]
        states = [result.optimiser_state for result in results]
        weights = weighted_mean([(result.weights, result.examples) for result in results])
        if not quiet:
            log_round(number, rounds, sites, weights, time.monotonic() - started)
    return weights


def log_round(number: int, rounds: int, sites: Sequence[Workspace], weights: Weights, seconds: float) -> None:
    judged = [site.evaluate(weights, "validation") for site in sites]
    accuracy = sum(e.accuracy.value * e.examples for e in judged) / sum(e.examples for e in judged)
    print(
        f"  round {number}/{rounds}: validation accuracy {accuracy:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True
    )


def images(chosen: Chosen) -> dict[str, Any]:
    """Three sites and the pooled data, per seed, on the same unseen images."""
    with tempfile.TemporaryDirectory() as folder:
        data, test = divided(chosen, Path(folder))
        runs = [image_seed(chosen, data, test, Path(folder), chosen.first_seed + i) for i in range(chosen.seeds)]
    return image_summary(chosen, runs)


def divided(chosen: Chosen, folder: Path) -> tuple[Path, Path]:
    """Training and test folder; without --test, images are told apart by their content, and duplicates go together."""
    if chosen.test is not None:
        return chosen.data, chosen.test
    for path in sorted(p for p in chosen.data.rglob("*") if p.is_file()):
        position = int(hashlib.sha256(path.read_bytes()).hexdigest()[:8], 16) / 2**32
        target = folder / ("test" if position < TEST_SHARE else "train") / path.relative_to(chosen.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder / "train", folder / "test"


@dataclass(frozen=True)
class Judged:
    """Predictions of one model on the test images."""

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    classes: tuple[str, ...]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.probabilities.argmax(axis=1) == self.labels)

    def figures(self) -> dict[str, Any]:
        evaluation = evaluate(self.labels, self.probabilities, self.classes)
        recall = {name: item.sensitivity.value for name, item in evaluation.per_class.items() if item.sensitivity}
        return {"accuracy": evaluation.accuracy.value, "macro_f1": evaluation.macro_f1.value, "recall": recall}


def image_seed(chosen: Chosen, data: Path, test: Path, folder: Path, seed: int) -> dict[str, Any]:
    classes = tuple(sorted(p.name for p in data.iterdir() if p.is_dir()))
    study = StudyData(classes=classes, options={"image_size": chosen.size})
    parts = split_dataset(data, folder / f"sites_{seed}", chosen.sites, alpha=chosen.alpha, seed=seed)
    print(f"seed {seed}: {[part.classes for part in parts]}", file=sys.stderr, flush=True)
    # One secret for all, here alone: the pooled training part is then exactly the union of the sites'.
    secret = f"bench {seed}".encode()
    task = load_task(chosen.task)
    started = time.monotonic()
    sites = [task.open(part.folder, study, secret) for part in parts]
    federated = judge(sites[0], train(sites, lambda n, **kw: plan(chosen, n, seed, **kw), chosen.rounds), test, classes)
    result: dict[str, Any] = {"seed": seed, "federated": federated, "seconds": time.monotonic() - started}
    if chosen.pooled:
        pool = task.open(data, study, secret)
        weights = train([pool], lambda n, **kw: plan(chosen, n, seed, **{**kw, "mu": 0.0}), chosen.rounds)
        result["pooled"] = judge(pool, weights, test, classes)
    return result


def judge(workspace: Workspace, weights: Weights, test: Path, classes: tuple[str, ...]) -> Judged:
    labels, rows = [], []
    for label, name in enumerate(classes):
        for item in workspace.predict(weights, sorted(p for p in (test / name).iterdir() if p.is_file())):
            if isinstance(item, Prediction):
                labels.append(label)
                rows.append([item.probabilities[c] for c in classes])
    return Judged(np.array(labels), np.array(rows), classes)


def image_summary(chosen: Chosen, runs: list[dict[str, Any]]) -> dict[str, Any]:
    mean = float(np.mean([run["federated"].right.mean() for run in runs]))
    summary: dict[str, Any] = {"federated_accuracy": mean, "reached": mean >= IMAGE_GOAL}
    if chosen.pooled:
        # Per image, over the seeds: the same images judge both, so their difference is paired.
        gain = np.mean([run["federated"].right.astype(float) - run["pooled"].right for run in runs], axis=0)
        half = Z95 * float(gain.std(ddof=1)) / np.sqrt(len(gain))
        summary["pooled_accuracy"] = float(np.mean([run["pooled"].right.mean() for run in runs]))
        summary["difference"] = {"value": float(gain.mean()), "low": gain.mean() - half, "high": gain.mean() + half}
        summary["not_significantly_below"] = bool(gain.mean() + half >= -ALLOWED_GAP)
    summary["seeds"] = [{k: v.figures() if isinstance(v, Judged) else v for k, v in run.items()} for run in runs]
    return summary


def heart_study() -> StudyData:
    """UCI heart disease: 13 features, the grade above 0 is disease."""
    columns = []
    for name, _, categories in (column.partition(":") for column in HEART.split()):
        kind = {"type": "categorical", "categories": categories.split(",")} if categories else {}
        columns.append({"name": name, **kind})
    table = {"columns": columns, "label": {"name": "num", "positive_above": 0}, "has_header": False, "missing": ["?"]}
    return StudyData.model_validate({"classes": ["healthy", "disease"], "table": table, **TABLE_PARTS})


def tables(chosen: Chosen) -> dict[str, Any]:
    """Every file is a hospital: federated, pooled and each hospital's own model on the pooled test rows."""
    runs = [table_seed(chosen, chosen.first_seed + i) for i in range(chosen.seeds)]
    means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    best_own = max(value for name, value in means.items() if name.startswith("only "))
    reached = means["federated"] >= TABLE_GOAL and means["federated"] >= best_own
    return {"mean": means, "best_single_hospital": best_own, "reached": reached, "seeds": runs}


def table_seed(chosen: Chosen, seed: int) -> dict[str, float]:
    study, task, secret = heart_study(), load_task(chosen.task), f"bench {seed}".encode()
    files = csv_files(chosen.data)
    sites = [task.open(file, study, secret) for file in files]

    def accuracy(weights: Weights) -> float:
        judged = [site.evaluate(weights, "heldout") for site in sites]
        return sum(int(np.trace(e.confusion)) for e in judged) / sum(e.examples for e in judged)

    def converged(data: Path) -> dict[str, FloatArray]:
        alone = task.open(data, study, secret)
        return train(
            [alone], lambda n, **_: plan(chosen, n, seed, mu=0.0, local_epochs=POOLED_ITERATIONS), 2, quiet=True
        )

    with tempfile.TemporaryDirectory() as folder:
        pooled = Path(folder) / "pooled.csv"
        pooled.write_text("\n".join(file.read_text().strip() for file in files))
        result = {"pooled": accuracy(converged(pooled))}
        federated = train(sites, lambda n, **_: plan(chosen, n, seed), chosen.rounds, quiet=True)
        own = {f"only {file.stem}": accuracy(converged(file)) for file in files}
    return {"federated": accuracy(federated), **result, **own}


def parse(arguments: list[str] | None = None) -> tuple[Chosen, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders, or of one CSV per hospital")
    parser.add_argument("--task", choices=["image-folder", "tabular"], default="image-folder")
    parser.add_argument("--test", type=Path, help="folder of class folders to judge on")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--alpha", type=float, help="Dirichlet's alpha; without it every site has the same mix")
    parser.add_argument("--rounds", type=int, help="10, tables 5")
    parser.add_argument("--local-epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--mu", type=float, help="0.1, tables 0")
    parser.add_argument("--C", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--no-pooled", dest="pooled", action="store_false")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = vars(parser.parse_args(arguments))
    torch.set_num_threads(given.pop("threads"))
    out = given.pop("out")
    table = given["task"] == "tabular"
    given["rounds"] = given["rounds"] or (5 if table else 10)
    given["mu"] = given["mu"] if given["mu"] is not None else (0.0 if table else 0.1)
    return Chosen(**given), out


def main() -> int:
    """Exit 1 when the goal is missed."""
    chosen, out = parse()
    summary = tables(chosen) if chosen.task == "tabular" else images(chosen)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    text = json.dumps({"options": options, "machine": machine, **summary}, indent=2, default=float)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return 0 if summary["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
