"""How accurate federated training is beside pooled training: the figures behind docs/benchmarks.md.

The hospitals' own task code runs in one process, sites after each other, and the weighted mean is taken in plain numpy: no
network and no services, so what is measured is the recipe. Prints one JSON document.

    python bench/accuracy.py --data brain_mri --seeds 3                                  # three sites, equal mixes
    python bench/accuracy.py --data brain_mri --partition iid dirichlet:0.5 --jobs 2     # both, two trainings at a time
    python bench/accuracy.py --data brain_mri --test unseen/                             # judged on a folder of its own
    python bench/accuracy.py --task tabular --data heart_disease --seeds 5               # four hospitals, one file each
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fl_client.partition import SitePart, split_dataset
from fl_client.tasks import Prediction, RoundPlan, Workspace, finish, load_task
from fl_client.tasks.base import FloatArray, Weights
from fl_client.tasks.evaluation import Z95, evaluate
from fl_client.tasks.tables import csv_files
from medhive.spec import StudyData

POOLED = "pooled"
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
    partition: tuple[str, ...]
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
    jobs: int
    threads: int
    keep: Path | None


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
    sites: Sequence[Workspace], make_plan: Callable[..., RoundPlan], rounds: int, name: str | None = None
) -> dict[str, FloatArray]:
    """All rounds; one site is pooled training with the same recipe. With a name, each round is told on stderr."""
    weights = sites[0].initial_weights(42)
    states: list[bytes | None] = [None] * len(sites)
    for number in range(1, rounds + 1):
        started = time.monotonic()
        plans = [make_plan(number, optimiser_state=state) for state in states]
        results = [finish(site.train(weights, own)) for site, own in zip(sites, plans, strict=True)]
        states = [result.optimiser_state for result in results]
        weights = weighted_mean([(result.weights, result.examples) for result in results])
        if name is not None:
            log_round(f"{name}, round {number}/{rounds}", sites, weights, time.monotonic() - started)
    return weights


def log_round(where: str, sites: Sequence[Workspace], weights: Weights, seconds: float) -> None:
    judged = [site.evaluate(weights, "validation") for site in sites]
    accuracy = sum(e.accuracy.value * e.examples for e in judged) / sum(e.examples for e in judged)
    print(f"  {where}: validation accuracy {accuracy:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)


def images(chosen: Chosen) -> dict[str, Any]:
    """The federations and the pooled data, per seed, on the same unseen images; each training is a process of its own."""
    kinds = [*chosen.partition[:1], *([POOLED] if chosen.pooled else []), *chosen.partition[1:]]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        folders = divided(chosen, Path(folder))
        seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
        jobs = {(kind, seed): pool.submit(image_run, chosen, folders, kind, seed) for kind in kinds for seed in seeds}
        runs = {kind: [jobs[kind, seed].result() for seed in seeds] for kind in kinds}
    return image_summary(chosen, runs)


@dataclass(frozen=True)
class Folders:
    """Images to train on, images to judge on, and where the sites' parts are put."""

    train: Path
    test: Path
    sites: Path


def divided(chosen: Chosen, folder: Path) -> Folders:
    """Without --test, the images to judge on are told apart by their content, so that duplicates go together."""
    if chosen.test is not None:
        return Folders(chosen.data, chosen.test, folder)
    for path in sorted(p for p in chosen.data.rglob("*") if p.is_file()):
        position = int(hashlib.sha256(path.read_bytes()).hexdigest()[:8], 16) / 2**32
        target = folder / ("test" if position < TEST_SHARE else "train") / path.relative_to(chosen.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return Folders(folder / "train", folder / "test", folder)


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


@dataclass(frozen=True)
class ImageRun:
    """One training from its beginning to its judgement, and what it took."""

    seed: int
    judged: Judged
    seconds: float
    sites: tuple[dict[str, int], ...]

    def figures(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.judged.figures(), "seconds": self.seconds, "sites": self.sites}


def image_run(chosen: Chosen, folders: Folders, kind: str, seed: int) -> ImageRun:
    """One training; with --keep, one that an earlier call finished with the same options is read instead."""
    if chosen.keep is None:
        return trained_run(chosen, folders, kind, seed)
    recipe = {k: str(v) for k, v in vars(chosen).items() if k not in {"seeds", "partition", "pooled", "jobs", "keep"}}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = chosen.keep / f"{kind} {seed} {digest[:16]}.npz"
    if path.is_file():
        with np.load(path) as kept:
            judged = Judged(kept["labels"], kept["probabilities"], tuple(kept["classes"].tolist()))
            return ImageRun(seed, judged, float(kept["seconds"]), tuple(json.loads(str(kept["sites"]))))
    run = trained_run(chosen, folders, kind, seed)
    chosen.keep.mkdir(parents=True, exist_ok=True)
    np.savez(path, **vars(run.judged), seconds=run.seconds, sites=json.dumps(run.sites))
    return run


def trained_run(chosen: Chosen, folders: Folders, kind: str, seed: int) -> ImageRun:
    torch.set_num_threads(chosen.threads)
    classes = tuple(sorted(p.name for p in folders.train.iterdir() if p.is_dir()))
    study = StudyData(classes=classes, options={"image_size": chosen.size})
    # One secret for all, here alone: the pooled training part is then exactly the union of the sites'.
    secret, task = f"bench {seed}".encode(), load_task(chosen.task)
    parts = [] if kind == POOLED else split(chosen, folders, kind, seed)
    changes = {"mu": 0.0} if kind == POOLED else {}
    started = time.monotonic()
    sites = [task.open(part, study, secret) for part in [part.folder for part in parts] or [folders.train]]
    weights = train(sites, lambda n, **kw: plan(chosen, n, seed, **{**kw, **changes}), chosen.rounds, f"{kind} {seed}")
    seconds = time.monotonic() - started
    judged = judge(sites[0], weights, folders.test, classes)
    print(f"{kind} {seed}: {judged.right.mean():.4f} of unseen images, {seconds:.0f} s", file=sys.stderr, flush=True)
    return ImageRun(seed, judged, seconds, tuple(dict(part.classes) for part in parts))


def split(chosen: Chosen, folders: Folders, partition: str, seed: int) -> list[SitePart]:
    out = folders.sites / f"{partition} {seed}"
    return split_dataset(folders.train, out, chosen.sites, alpha=alpha_of(partition), seed=seed)


def alpha_of(partition: str) -> float | None:
    """Dirichlet's alpha in `dirichlet:0.5`; None in `iid`."""
    name, _, alpha = partition.partition(":")
    if name == "dirichlet" and alpha:
        return float(alpha)
    if partition != "iid":
        raise SystemExit(f"error: the partition {partition} is neither iid nor dirichlet:<alpha>")
    return None


def judge(workspace: Workspace, weights: Weights, test: Path, classes: tuple[str, ...]) -> Judged:
    labels, rows = [], []
    for label, name in enumerate(classes):
        for item in workspace.predict(weights, sorted(p for p in (test / name).iterdir() if p.is_file())):
            if isinstance(item, Prediction):
                labels.append(label)
                rows.append([item.probabilities[c] for c in classes])
    return Judged(np.array(labels), np.array(rows), classes)


def image_summary(chosen: Chosen, runs: dict[str, list[ImageRun]]) -> dict[str, Any]:
    pooled = runs.get(POOLED)
    federations = {kind: beside_pooled(runs[kind], pooled) for kind in chosen.partition}
    summary: dict[str, Any] = {"federated": federations}
    if pooled:
        summary["pooled"] = {"accuracy": mean_accuracy(pooled), "seeds": [run.figures() for run in pooled]}
    # The goal is for the equal mixes; what unequal ones reach is told beside it.
    first = federations[chosen.partition[0]]
    return {"reached": first["reached"] and first.get("not_significantly_below", True), **summary}


def mean_accuracy(runs: Sequence[ImageRun]) -> float:
    return float(np.mean([run.judged.right.mean() for run in runs]))


def beside_pooled(runs: Sequence[ImageRun], pooled: Sequence[ImageRun] | None) -> dict[str, Any]:
    mean = mean_accuracy(runs)
    summary: dict[str, Any] = {"accuracy": mean, "reached": mean >= IMAGE_GOAL}
    if pooled:
        # Per image, over the seeds: the same images judge both, so their difference is paired.
        pairs = zip(runs, pooled, strict=True)
        gain = np.mean([ours.judged.right.astype(float) - theirs.judged.right for ours, theirs in pairs], axis=0)
        half = Z95 * float(gain.std(ddof=1)) / np.sqrt(len(gain))
        summary["difference"] = {"value": float(gain.mean()), "low": gain.mean() - half, "high": gain.mean() + half}
        summary["not_significantly_below"] = bool(gain.mean() + half >= -ALLOWED_GAP)
    return {**summary, "seeds": [run.figures() for run in runs]}


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
        return train([alone], lambda n, **_: plan(chosen, n, seed, mu=0.0, local_epochs=POOLED_ITERATIONS), 2)

    with tempfile.TemporaryDirectory() as folder:
        pooled = Path(folder) / "pooled.csv"
        pooled.write_text("\n".join(file.read_text().strip() for file in files))
        result = {"pooled": accuracy(converged(pooled))}
        federated = train(sites, lambda n, **_: plan(chosen, n, seed), chosen.rounds)
        own = {f"only {file.stem}": accuracy(converged(file)) for file in files}
    return {"federated": accuracy(federated), **result, **own}


def parse(arguments: list[str] | None = None) -> tuple[Chosen, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders, or of one CSV per hospital")
    parser.add_argument("--task", choices=["image-folder", "tabular"], default="image-folder")
    parser.add_argument("--test", type=Path, help="folder of class folders to judge on")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--partition", nargs="+", default=["iid"], help="iid, dirichlet:<alpha>; several are compared")
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
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--threads", type=int, help="of each training; the cores divided by --jobs")
    parser.add_argument("--keep", type=Path, help="folder of finished trainings, which are not done twice")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = vars(parser.parse_args(arguments))
    given["threads"] = given["threads"] or max(1, (os.cpu_count() or 1) // given["jobs"])
    given["partition"] = tuple(given["partition"])
    for partition in given["partition"]:
        alpha_of(partition)
    out = given.pop("out")
    table = given["task"] == "tabular"
    given["rounds"] = given["rounds"] or (5 if table else 10)
    given["mu"] = given["mu"] if given["mu"] is not None else (0.0 if table else 0.1)
    return Chosen(**given), out


def main() -> int:
    """Exit 1 when the goal is missed."""
    chosen, out = parse()
    torch.set_num_threads(chosen.threads)
    summary = tables(chosen) if chosen.task == "tabular" else images(chosen)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    machine = {"cores": os.cpu_count(), "torch": torch.__version__}
    text = json.dumps({"options": options, "machine": machine, **summary}, indent=2, default=float)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return 0 if summary["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
