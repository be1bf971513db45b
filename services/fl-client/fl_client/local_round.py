"""One site's part of one round, whoever asks for it: judge the weights that came, train from them, say what there is to say.

The trainer of a hospital does this step by step among other work, a simulation does it for one client after the other; both
run exactly this, so that a study that was tried out is the study that is deployed.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from fl_client.tasks.base import (
    Divisible,
    EpochProgress,
    FloatArray,
    Judged,
    Personal,
    RoundPlan,
    Together,
    Weights,
    Workspace,
    completed,
)
from fl_client.tasks.errors import NotEnoughExamples, WrongOption
from medhive.errors import MedHiveError

if TYPE_CHECKING:
    from fl_client.tasks.evaluation import Evaluation, Scores


@dataclass(frozen=True)
class Validated:
    """What weights are worth on a site's validation part; without such a part there is nothing to say."""

    metrics: dict[str, float] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    examples: int = 0


@dataclass(frozen=True)
class LocalRound:
    """What a site made of a round.

    weights: after training; examples: trained on; metrics: of the validation before it (`val_*`) and of the training;
    confusion: of the validation; optimiser_state: for the site's own next round; rate_sum: of the training; own: layers that
    the site keeps to itself, where it does.
    """

    weights: dict[str, FloatArray]
    examples: int
    metrics: dict[str, float]
    confusion: list[list[int]]
    optimiser_state: bytes | None
    rate_sum: float = 0.0
    own: Weights | None = None


LocalRoundSteps = Generator[EpochProgress | None, None, LocalRound]


def local_round(workspace: Workspace, base: Weights, plan: RoundPlan, own: Weights | None = None) -> LocalRoundSteps:
    """Judge `base` on the validation part, then train from it; yields as training does, and raises as its two steps.

    Args:
        workspace: the site's data and model.
        base: the global weights.
        plan: what to do.
        own: the layers that the site keeps to itself, as the last training left them, empty before the first; None where
            it keeps none.

    Raises:
        WrongOption: it shall keep its batch normalisation, and the model has none.
    """
    names = own_layers(workspace) if own is not None else frozenset()
    start = with_own(base, own)
    before = yield from validated(workspace, start)
    result = yield from workspace.train(start, plan)
    return LocalRound(
        weights=result.weights,
        examples=result.examples,
        metrics={**before.metrics, **result.metrics},
        confusion=before.confusion,
        optimiser_state=result.optimiser_state,
        rate_sum=result.rate_sum,
        own={name: result.weights[name] for name in sorted(names)} if names else None,
    )


def with_own(weights: Weights, own: Weights | None) -> Weights:
    """Global weights with a site's own layers in their places."""
    return {**weights, **own} if own else weights


def own_layers(workspace: Workspace) -> frozenset[str]:
    """What a site keeps to itself with FedBN.

    Raises:
        WrongOption: there is nothing to keep.
    """
    names = workspace.own_layers if isinstance(workspace, Personal) else frozenset()
    if not names:
        raise WrongOption(
            "FedBN lets each site keep its batch normalisation, and this study's model has none; ask for another strategy, "
            "such as fedavg.",
            option="strategy",
        )
    return names


def local_rounds_together(
    workspaces: Sequence[Together], base: Weights, plans: Sequence[RoundPlan]
) -> list[LocalRound | MedHiveError]:
    """The rounds of several sites from the same base as one computation; an error in the place of who failed.

    The plans, one for each site, differ in nothing but their corrections.
    """
    before = [completed(validated(workspace, base)) for workspace in workspaces]
    results = workspaces[0].train_together(workspaces[1:], base, plans)
    return [
        result
        if isinstance(result, MedHiveError)
        else LocalRound(
            result.weights,
            result.examples,
            {**said.metrics, **result.metrics},
            said.confusion,
            optimiser_state=None,
            rate_sum=result.rate_sum,
        )
        for said, result in zip(before, results, strict=True)
    ]


def has_training_examples(workspace: Workspace) -> bool:
    """Whether a site of many has anything to train on."""
    return isinstance(workspace, Divisible) and "train" in workspace.examples.parts


def validated(workspace: Workspace, weights: Weights) -> Generator[None, None, Validated]:
    """Validation metrics under their names in a contribution; raises as `Workspace.judge`, but for an empty part."""
    try:
        judged = yield from workspace.judge(weights, "validation")
    except NotEnoughExamples:
        return Validated()
    scores = scored(judged)
    own = {f"val_{name}": value for name, value in finite(judged.metrics).items()}
    yield None
    return Validated(
        {**validation_metrics(scores, workspace.classes), **own},
        scores.confusion.tolist(),
        scores.examples,
    )


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """A task's own figures without those that the data do not allow, such as the mean over no pair."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def evaluated(workspace: Workspace, judged: Judged) -> "Evaluation":
    """The figures of what a model said."""
    from fl_client.tasks.evaluation import evaluate  # noqa: PLC0415 - came with the task's own libraries

    return evaluate(judged.labels, judged.probabilities, workspace.classes)


def scored(judged: Judged) -> "Scores":
    """The same without intervals, as rounds say them."""
    from fl_client.tasks.evaluation import score  # noqa: PLC0415 - came with the task's own libraries

    return score(judged.labels, judged.probabilities)


def validation_metrics(scores: "Scores", classes: Sequence[str]) -> dict[str, float]:
    """The numbers of a validation under their names in a contribution."""
    recalls = {f"val_recall/{name}": value for name, value in scores.recalls(classes).items()}
    return {**{f"val_{name}": value for name, value in scores.metrics().items()}, **recalls}


class Memory(StrEnum):
    """What a site keeps from round to round of one run, each in a file bound to its round."""

    OPTIMISER = "optimiser"  # the optimiser's state
    OWN = "own"  # the layers that it keeps to itself


def memory_file(folder: Path, kind: Memory, round_number: int) -> Path:
    """Where a site keeps something of a round."""
    return folder / f"{kind}-{round_number}.safetensors"


def newest_memory(folder: Path, kind: Memory, before: int) -> Path | None:
    """What the own last round before this one left. Bound to its round, so that a resumed round uses the same."""
    rounds = (int(file.stem.removeprefix(f"{kind}-")) for file in folder.glob(f"{kind}-*.safetensors"))
    newest = max((number for number in rounds if number < before), default=None)
    return memory_file(folder, kind, newest) if newest is not None else None


def needed_memory(folder: Path, round_number: int) -> set[Path]:
    """The files of a run that this round, or its repetition, may still read or write."""
    found = {memory_file(folder, kind, number) for kind in Memory for number in (round_number, round_number - 1)}
    return found | {path for kind in Memory if (path := newest_memory(folder, kind, round_number)) is not None}
