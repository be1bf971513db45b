"""Training many sites' small models as one computation, for simulations: a batch of models, not one after the other.

The batches and their order are those of `fl_client.tasks.training.Job`, a model for each site; `torch.func.vmap` carries
a step of all of them at once. Sums are taken in another order, so that the weights agree with those of one site after the
other to about 1e-5, and not to the bit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from fl_client.tasks.base import RoundPlan, TrainResult, Weights
from fl_client.tasks.errors import TrainingDiverged, WrongOption

if TYPE_CHECKING:
    from fl_client.tasks.training import ClassifierWorkspace, Job, Plain


def require_together(model: nn.Module, plain: "Plain | None", mu: float) -> "Plain":
    """The recipe, where models of this kind can be trained together.

    Raises:
        WrongOption: the study has another recipe than `plain`, there is a pull, or the model draws or remembers something of
            its own in a step (dropout, batch normalisation).
    """
    own = {name for name, _ in model.named_parameters()} != set(model.state_dict())
    draws = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())
    if plain is None or mu > 0 or own or draws:
        raise WrongOption(
            "Clients can be trained together with the study's option recipe=plain, without FedProx' pull, and a model "
            "without dropout and batch normalisation, such as cnn or resnet-gn; leave out --together, or change these.",
            option="recipe",
        )
    return plain


class Together:
    """One round of several sites from the same weights."""

    def __init__(self, workspaces: "Sequence[ClassifierWorkspace]", weights: Weights, plan: RoundPlan) -> None:
        """Every site has examples to train on; raises as `require_together`."""
        self._jobs: Sequence[Job] = [workspace.job(weights, plan) for workspace in workspaces]
        self._model = self._jobs[0].model
        self._plain = require_together(self._model, workspaces[0].model.plain, plan.mu)
        self._plan = plan
        count = len(workspaces)
        # Laid out plainly: vmap knows no channels-last.
        plainly = torch.contiguous_format
        self._parameters = {
            name: value.detach().expand(count, *value.shape).clone(memory_format=plainly)
            for name, value in self._model.named_parameters()
        }
        self._moments = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._step_of_all = vmap(grad_and_value(self._loss, has_aux=True))

    def run(self) -> list[TrainResult | TrainingDiverged]:
        """Train; a site whose loss is not finite has its error in place of a result."""
        self._model.train()
        for _ in range(self._plan.local_epochs):
            totals = torch.zeros(3, len(self._jobs), dtype=torch.float64)
            batches = [job.epoch_batches() for job in self._jobs]
            for step in range(max(map(len, batches))):
                totals += self._step([of_site[step] if step < len(of_site) else None for of_site in batches])
        return [self._result(place, *map(float, totals[:, place])) for place in range(len(self._jobs))]

    def _loss(self, parameters: Mapping[str, Tensor], pixels: Tensor, labels: Tensor, real: Tensor) -> Any:
        logits = functional_call(self._model, dict(parameters), (pixels,)).float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        right = ((logits.argmax(dim=1) == labels) * real).sum()
        return (losses * real).sum() / real.sum().clamp(min=1), right

    def _step(self, batches: Sequence[Tensor | None]) -> Tensor:
        """One step of every site that has a batch left; (3, sites) sums of loss, right answers, examples."""
        pixels, labels, real = self._stacked(batches)
        gradients, (losses, right) = self._step_of_all(self._parameters, pixels, labels, real)
        counts = real.sum(dim=1)
        rate = self._jobs[0].rate()
        for name, gradient in gradients.items():
            active = (counts > 0).view(-1, *([1] * (gradient.ndim - 1)))
            step = gradient + self._plain.weight_decay * self._parameters[name]
            moment = torch.where(active, self._plain.momentum * self._moments[name] + step, self._moments[name])
            self._moments[name] = moment
            self._parameters[name] = torch.where(active, self._parameters[name] - rate * moment, self._parameters[name])
        return torch.stack([losses.detach() * counts, right, counts]).double().cpu()

    def _stacked(self, batches: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Batches of one length: (sites, n, ...) pixels, (sites, n) labels, and 1 for what counts, 0 for what fills up."""
        given = [
            job.batch_of(batch) if batch is not None else None for job, batch in zip(self._jobs, batches, strict=True)
        ]
        first = next(item for item in given if item is not None)
        longest = max(len(item[1]) for item in given if item is not None)
        pixels = first[0].new_zeros((len(given), longest, *first[0].shape[1:]))
        labels = first[1].new_zeros((len(given), longest))
        real = first[0].new_zeros((len(given), longest))
        for place, item in enumerate(given):
            if item is not None:
                count = len(item[1])
                pixels[place, :count], labels[place, :count], real[place, :count] = item[0], item[1], 1.0
        return pixels, labels, real

    def _result(self, place: int, loss: float, right: float, examples: float) -> TrainResult | TrainingDiverged:
        weights = {
            name: value[place].to("cpu", torch.float32).contiguous().numpy().copy()
            for name, value in self._parameters.items()
        }
        if not math.isfinite(loss):
            return TrainingDiverged("The loss is not finite; ask for a smaller learning rate (--lr).")
        metrics = {"train_loss": loss / examples, "train_accuracy": right / examples}
        return TrainResult(weights, int(examples), metrics, None)
