"""Training many sites' small models as one computation, for simulations: a batch of models, not one after the other.

Batches, their order and the random changes are those of `fl_client.tasks.training.Job`; `torch.func.vmap` carries a step of
all models at once. Sums are taken in another order, so that the weights agree with those of one site after the other but
for rounding.

A small model's step is a hundred small operations, which cost a GPU more time to be told of than to do. So one step is
recorded there as a CUDA graph (Nguyen et al., "Accelerating PyTorch with CUDA Graphs", 2021) and replayed: nothing but the
examples' places goes there meanwhile.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from fl_client.tasks.base import FloatArray, RoundPlan, TrainResult, Weights, completed
from fl_client.tasks.errors import TrainingDiverged, WrongOption
from fl_client.tasks.models import require_same_layout
from fl_client.tasks.products import as_products

if TYPE_CHECKING:
    from fl_client.tasks.training import Classifier, ClassifierWorkspace, Plain

CHUNK_STEPS = 256
"""Steps whose batches are put together at a time: enough to keep a GPU busy, and a few megabytes."""
MOST_ON_CPU = 2**17
"""Numbers that the layers of one site's model pass on in a step. With more, a CPU has enough to do with one site, and would
have to fetch from memory what of one site lies in its caches: as one computation it takes longer (docs/benchmarks.md)."""
WARM_UP_STEPS = 3
"""Before a step is recorded: libraries choose their ways and take their memory in the first ones."""


def require_together(classifier: "Classifier") -> "Plain":
    """The recipe, where models of this kind can be trained together.

    Raises:
        WrongOption: the study has another recipe than `plain`, or the model draws or remembers something of its own in a
            step (dropout, batch normalisation).
    """
    model = classifier.build(seed=0)
    own = {name for name, _ in model.named_parameters()} != set(model.state_dict())
    draws = any(isinstance(module, _DropoutNd) for module in model.modules())
    if classifier.plain is None or own or draws:
        raise WrongOption(
            "Clients can be trained together with the study's option recipe=plain and a model without dropout and batch "
            "normalisation, such as cnn or resnet-gn; leave out --together, or change these.",
            option="recipe",
        )
    return classifier.plain


def train_together(
    workspaces: "Sequence[ClassifierWorkspace]", weights: Weights, plans: Sequence[RoundPlan]
) -> list[TrainResult | TrainingDiverged]:
    """One round of sites that share a classifier, from the same weights; see `fl_client.tasks.base.Together`.

    As one computation, but for steps so large that a CPU is quicker with one site after the other.

    Raises:
        NotEnoughExamples: a site has none to train on.
        WrongArchitecture: the weights, or a correction, are of another model.
        WrongOption: as `require_together`.
    """
    classifier = workspaces[0].model
    if not _worth_it(workspaces, plans[0].batch_size):
        return [_alone(workspace, weights, plan) for workspace, plan in zip(workspaces, plans, strict=True)]
    settings = Settings.of(plans)
    cohort = classifier.cohort
    if cohort is None or cohort.size < len(workspaces) or cohort.settings != settings:
        cohort = classifier.cohort = Cohort(classifier, len(workspaces), settings)
    return cohort.train(workspaces, weights, plans)


def _worth_it(workspaces: "Sequence[ClassifierWorkspace]", batch_size: int) -> bool:
    """Whether the models shall take their steps as one: on a CPU only where a step of one site is small."""
    classifier = workspaces[0].model
    if classifier.device.type != "cpu":
        return True
    if classifier.passed_on is None:
        classifier.passed_on = _passed_on(workspaces[0])
    examples = (len(workspace.indices("train")) for workspace in workspaces)
    longest = max(math.ceil(count / math.ceil(count / batch_size)) for count in examples)
    return longest * classifier.passed_on <= MOST_ON_CPU


def _passed_on(workspace: "ClassifierWorkspace") -> int:
    """How many numbers the layers of the model pass on of one example."""
    classifier, sizes = workspace.model, list[int]()
    model = classifier.build(seed=0)
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _given, found: sizes.append(found.numel()))
    pixels = workspace.pixels(workspace.indices("train")[:1])
    with torch.no_grad():
        model(classifier.normalised(classifier.augment(pixels, torch.zeros(1, classifier.random_numbers))))
    return sum(sizes)


def _alone(workspace: "ClassifierWorkspace", weights: Weights, plan: RoundPlan) -> TrainResult | TrainingDiverged:
    try:
        return completed(workspace.train(weights, plan))
    except TrainingDiverged as error:
        return error


@dataclass(frozen=True)
class Settings:
    """What a step is made of, the same for all steps of a run."""

    batch_size: int
    mu: float
    corrected: bool

    @classmethod
    def of(cls, plans: Sequence[RoundPlan]) -> "Settings":
        return cls(plans[0].batch_size, plans[0].mu, any(plan.correction is not None for plan in plans))


@dataclass(frozen=True)
class _Steps:
    """The batches of some steps, filled up to one length.

    places, labels: (steps, sites, n); drawn: (steps, sites, n, k); counts: (steps, sites) examples that are none to fill up.
    """

    places: Tensor
    labels: Tensor
    drawn: Tensor
    counts: Tensor

    @classmethod
    def room(cls, steps: int, sites: int, n: int, numbers: int, device: torch.device) -> "_Steps":
        return cls(
            torch.zeros(steps, sites, n, dtype=torch.int64, device=device),
            torch.zeros(steps, sites, n, dtype=torch.int64, device=device),
            torch.zeros(steps, sites, n, numbers, device=device),
            torch.zeros(steps, sites, dtype=torch.int64, device=device),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.places, self.labels, self.drawn, self.counts


class _Batches:
    """One site's batches of a round, epoch after epoch, each filled up to the longest by examples that do not count."""

    def __init__(self, workspace: "ClassifierWorkspace", plan: RoundPlan) -> None:
        # A module of the same layer, which imports this one.
        from fl_client.tasks.training import Order  # noqa: PLC0415

        self.workspace = workspace
        self._order = Order(workspace, plan)
        self.examples = len(self._order.indices)
        self.of_epoch = self._order.batches
        self.steps = self.of_epoch * plan.local_epochs
        self.counts = torch.tensor([len(part) for part in self._order.split(self._order.indices)])
        self.longest = int(self.counts.max())
        first = self.counts.cumsum(0) - self.counts
        # (batches, longest) places in the order of an epoch.
        self._grid = (first[:, None] + torch.arange(self.longest)).clamp(max=self.examples - 1)
        self._epoch: tuple[Tensor, ...] = ()
        self._used = self.of_epoch

    def fill(self, steps: _Steps, site: int, first: int) -> None:
        """Put the next batches into the places of this site; `first` is the number of the first of these steps."""
        row, end = 0, min(len(steps.counts), self.steps - first)
        while row < end:
            rows = self._next(end - row)
            for room, given in zip(steps.tensors, rows, strict=True):
                part = room[row : row + len(given), site]
                (part[:, : self.longest] if part.ndim > 1 else part).copy_(given)
            row += len(rows[0])

    def _next(self, most: int) -> tuple[Tensor, ...]:
        """The next batches of the epoch, of the next one where it is over."""
        if self._used == self.of_epoch:
            order, drawn = self._order.epoch()
            places = order[self._grid]
            self._epoch = (places, self.workspace.labels(places), drawn[self._grid], self.counts)
            self._used = 0
        rows = slice(self._used, min(self.of_epoch, self._used + most))
        self._used = rows.stop
        return tuple(tensor[rows] for tensor in self._epoch)


class Cohort:
    """Room for the models of so many sites on the device, and the step that they take together.

    Kept from round to round, since a GPU's recording takes longer than a round of a small model.

    Args:
        classifier: the study's model.
        size: sites at most.
        settings: of the run.
    """

    def __init__(self, classifier: "Classifier", size: int, settings: Settings) -> None:
        """Raises WrongOption: as `require_together`."""
        self.size, self.settings = size, settings
        self._plain = require_together(classifier)
        self._classifier = classifier
        model = classifier.build(seed=0).train()
        self._model = as_products(model) if classifier.device.type == "cuda" else model
        self._shapes = {name: tuple(value.shape) for name, value in self._model.named_parameters()}
        # All of a site's parameters in one row, so that an update of all sites is one operation.
        ends = np.cumsum([0, *(math.prod(shape) for shape in self._shapes.values())])
        self._spans = dict(zip(self._shapes, pairwise(map(int, ends)), strict=True))
        room = next(self._model.parameters()).new_zeros((size, int(ends[-1])))
        self._parameters, self._moments = room, torch.zeros_like(room)
        self._base = torch.zeros_like(room[0])
        self._corrections = torch.zeros_like(room) if settings.corrected else None
        self._rate = torch.zeros((), dtype=room.dtype, device=room.device)
        self._gradients = vmap(grad_and_value(self._loss, has_aux=True))
        self._recorded: _Recorded | None = None

    def train(
        self, workspaces: "Sequence[ClassifierWorkspace]", weights: Weights, plans: Sequence[RoundPlan]
    ) -> list[TrainResult | TrainingDiverged]:
        """One round; a site whose loss is not finite has its error in place of a result."""
        batches = [_Batches(workspace, plan) for workspace, plan in zip(workspaces, plans, strict=True)]
        # Who takes most steps first: those that still have one are always the first rows.
        ranked = sorted(range(len(batches)), key=lambda place: -batches[place].steps)
        with self._classifier.exactly():
            recorded = self._recorded_on(batches)
            self._begin(weights, [plans[place] for place in ranked])
            told = self._run([batches[place] for place in ranked], recorded)
        rows = self._parameters.to("cpu", torch.float32).numpy()
        results: dict[int, TrainResult | TrainingDiverged] = {}
        for row, place in enumerate(ranked):
            results[place] = self._result(rows[row], told[:, :, row], batches[place], plans[place])
        return [results[place] for place in range(len(batches))]

    def _begin(self, weights: Weights, plans: Sequence[RoundPlan]) -> None:
        self._base.copy_(self._row(weights))
        self._parameters.copy_(self._base.expand_as(self._parameters))
        self._moments.zero_()
        self._rate.fill_(self._plain.rate(plans[0]))
        if self._corrections is not None:
            self._corrections.zero_()
            for row, plan in zip(self._corrections, plans, strict=False):
                if plan.correction is not None:
                    row.copy_(self._row(plan.correction))

    def _row(self, weights: Weights) -> Tensor:
        require_same_layout(self._shapes, weights)
        return torch.from_numpy(
            np.concatenate([np.asarray(weights[name], np.float32).ravel() for name in self._shapes])
        )

    def _recorded_on(self, batches: Sequence[_Batches]) -> "_Recorded | None":
        """The recorded step on a GPU where all sites' examples lie in one place, recorded anew for other examples.

        Before the first weights are in place, since it takes a few steps itself.
        """
        images = batches[0].workspace.resident
        if images is None or not images.is_cuda or any(item.workspace.resident is not images for item in batches):
            return None
        if self._recorded is None or self._recorded.images is not images:
            self._recorded = _Recorded(self, images, self._classifier.random_numbers)
        return self._recorded

    def _run(self, batches: Sequence[_Batches], recorded: "_Recorded | None") -> Tensor:
        """Take all steps; (2, steps, sites) losses and right answers of each batch."""
        # What was recorded is for all sites that there is room for, and for whole batches.
        sites = self.size if recorded else len(batches)
        longest = self.settings.batch_size if recorded else max(item.longest for item in batches)
        told = []
        for first in range(0, batches[0].steps, CHUNK_STEPS):
            count = min(CHUNK_STEPS, batches[0].steps - first)
            steps = _Steps.room(count, sites, longest, self._classifier.random_numbers, torch.device("cpu"))
            for site, item in enumerate(batches):
                item.fill(steps, site, first)
            told.append(recorded.run(steps) if recorded else self._one_by_one(batches, steps))
        return torch.cat(told, dim=1)

    def _one_by_one(self, batches: Sequence[_Batches], steps: _Steps) -> Tensor:
        told = torch.zeros(2, *steps.counts.shape)
        device = self._classifier.device
        for row in range(len(steps.counts)):
            places, labels, drawn, counts = (tensor[row] for tensor in steps.tensors)
            active = int((counts > 0).sum())
            n = int(counts.max())
            seen = [item.workspace.pixels(of_site[:n]) for item, of_site in zip(batches, places[:active], strict=False)]
            losses, right = self.step(
                torch.cat(seen),
                labels[:active, :n].to(device),
                drawn[:active, :n].to(device),
                counts[:active].to(device),
            )
            told[:, row, :active] = torch.stack([losses, right]).cpu()
        return told

    def step(self, pixels: Tensor, labels: Tensor, drawn: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the first sites.

        Args:
            pixels: (sites · n, channels, ...) bytes; labels: (sites, n); drawn: (sites, n, k).
            counts: (sites,) how many of n examples are none to fill up; who has none at all keeps its weights.

        Returns:
            (sites,) mean losses and (sites,) right answers.
        """
        sites, n = labels.shape
        seen = self._classifier.normalised(self._classifier.augment(pixels, drawn.flatten(0, 1)))
        real = (torch.arange(n, device=counts.device) < counts[:, None]).to(seen.dtype)
        mine = self._parameters[:sites]
        views = {name: mine[:, a:b].view(sites, *self._shapes[name]) for name, (a, b) in self._spans.items()}
        found, (losses, right) = self._gradients(views, seen.view(sites, n, *seen.shape[1:]), labels, real)
        gradient = torch.cat([found[name].flatten(1) for name in self._spans], dim=1)
        if self.settings.mu > 0:
            gradient.add_(mine - self._base, alpha=self.settings.mu)
        if self._plain.weight_decay > 0:
            gradient.add_(mine, alpha=self._plain.weight_decay)
        if self._plain.momentum > 0:
            gradient = self._moments[:sites].mul_(self._plain.momentum).add_(gradient)
        rates = (self._rate * (counts > 0))[:, None]
        mine.addcmul_(gradient, rates, value=-1)
        if self._corrections is not None:
            mine.addcmul_(self._corrections[:sites], rates, value=-1)
        return losses.detach(), right

    def _loss(self, parameters: Mapping[str, Tensor], pixels: Tensor, labels: Tensor, real: Tensor) -> Any:
        logits = functional_call(self._model, dict(parameters), (pixels,))
        losses = functional.cross_entropy(logits, labels, reduction="none")
        right = ((logits.argmax(dim=1) == labels) * real).sum()
        return (losses * real).sum() / real.sum().clamp(min=1), right

    def _result(
        self, row: FloatArray, told: Tensor, batches: _Batches, plan: RoundPlan
    ) -> TrainResult | TrainingDiverged:
        """What came of one site; `told` are (2, steps) losses and right answers of all its batches."""
        losses, right = told[:, : batches.steps].double()
        if not bool(losses.isfinite().all()):
            step = int((~losses.isfinite()).nonzero()[0]) + 1
            return TrainingDiverged(
                f"The loss is {float(losses[step - 1])} in step {step}; ask for a smaller learning rate (--lr).",
                step=step,
            )
        return TrainResult(
            weights={name: row[a:b].reshape(self._shapes[name]).copy() for name, (a, b) in self._spans.items()},
            examples=batches.examples,
            metrics={
                "train_loss": float((losses[-batches.of_epoch :] * batches.counts).sum()) / batches.examples,
                "train_accuracy": float(right[-batches.of_epoch :].sum()) / batches.examples,
            },
            optimiser_state=None,
            rate_sum=self._plain.rate(plan) * batches.steps,
        )


class _Recorded:
    """A step of a whole cohort as a CUDA graph, and the room on the device that it reads from and writes to.

    The places of all examples of a chunk lie there before it begins, and the step itself counts on, so that the processor
    says nothing but how often.
    """

    def __init__(self, cohort: Cohort, images: Tensor, numbers: int) -> None:
        self.images = images
        self._cohort = cohort
        size, n = cohort.size, cohort.settings.batch_size
        self._room = _Steps.room(CHUNK_STEPS, size, n, numbers, images.device)
        self._told = torch.zeros(2, CHUNK_STEPS, size, device=images.device)
        self._at = torch.zeros(1, dtype=torch.int64, device=images.device)
        self._graph = torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        places, labels, drawn, counts = (tensor.index_select(0, self._at)[0] for tensor in self._room.tensors)
        losses, right = self._cohort.step(self.images[places.flatten()], labels, drawn, counts)
        self._told.index_copy_(1, self._at, torch.stack([losses, right])[:, None])
        self._at.add_(1)

    def run(self, steps: _Steps) -> Tensor:
        """Take these steps; (2, steps, sites) losses and right answers."""
        count = len(steps.counts)
        for room, given in zip(self._room.tensors, steps.tensors, strict=True):
            room[:count].copy_(given)
        self._at.zero_()
        for _ in range(count):
            self._graph.replay()
        return self._told[:, :count].cpu()
