"""Training and judging classifiers of pictures of any kind: the recipe that all tasks on torch share.

Augmentation works on whole batches with a generator that belongs to the job, so that several runs may take turns in one
process and a repeated round gives the same bits.

The recipe decides what federated averaging reaches: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) whose moments the
site keeps from round to round, one learning-rate schedule over the whole run (short linear warm-up, then half a cosine to
zero), light augmentation, label smoothing, and logits shifted during training by the logarithm of the local class
frequencies (Menon et al. 2021, arXiv:2007.07314), so that hospitals with different case mixes do not pull the model apart.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional

from fl_client.tasks.base import (
    DataReport,
    EpochProgress,
    Examples,
    FloatArray,
    Judged,
    Judging,
    Part,
    Prediction,
    RoundPlan,
    Skipped,
    Training,
    TrainResult,
    Weights,
)
from fl_client.tasks.errors import (
    DeadlinePassed,
    DeviceUnavailable,
    NotEnoughExamples,
    TrainingDiverged,
    WrongOptimiserState,
)
from fl_client.tasks.evaluation import InOneGo
from fl_client.tasks.models import batch_normalisation, export_weights, load_backbone, load_weights, require_same_layout
from fl_client.tasks.together import Cohort, require_together, train_together

DEFAULT_LR = 5e-3  # peak, for batches of 32; found on brain MRI with three sites
PLAIN_LR = 0.1  # of the plain recipe
DEFAULT_LR_BATCH = 32  # other batches: by the square root (Malladi et al. 2022, arXiv:2205.10287)
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the run; AdamW's moments are still noise there
LABEL_SMOOTHING = 0.05
MAX_CLASS_WEIGHT = 5.0  # a class of three images shall not drown the rest
PRIOR_FLOOR = 1.0  # examples that an absent class is counted as, so that its logarithm is finite


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda[:n]` as a device.

    Raises:
        DeviceUnavailable: it is no device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailable(f"{name!r} is no device; use cpu, cuda, cuda:0 or auto.", device=name) from error
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        return device
    raise DeviceUnavailable(f"This machine has no {name}; use cpu, or auto for the best there is.", device=name)


@dataclass(frozen=True)
class Plain:
    """The recipe of published studies in place of the one above: SGD from a fresh start each round, plain cross-entropy.

    `lr_decay` multiplies the rate after each round; `weight_decay` and FedProx' pull are part of the gradient.
    """

    momentum: float = 0.0
    lr_decay: float = 1.0
    weight_decay: float = 0.0

    def rate(self, plan: RoundPlan) -> float:
        """The learning rate of a round."""
        return (plan.lr or PLAIN_LR) * self.lr_decay ** (plan.round - 1)


@dataclass
class _Totals:
    loss: float = 0.0
    right: int = 0
    examples: int = 0


class Classifier(ABC):
    """A study's model and how it takes its input; opens no data.

    Attributes:
        device: where it computes.
        classes: the study's, in the order of the outputs.
        memory_format: how its weights lie in memory.
        plain: the plain recipe, where the study asks for it.
        cohort: room for the models of many sites, from the last time that they were trained together.
        passed_on: how many numbers its layers pass on of one example, once that was asked.
    """

    memory_format: torch.memory_format
    plain: Plain | None = None

    def __init__(self, classes: tuple[str, ...], device: str) -> None:
        """Raises DeviceUnavailable, UnknownModel: it cannot be built here."""
        self.classes = classes
        self.device = resolve_device(device)
        self._spare = [self.build(seed=0)]
        self.cohort: Cohort | None = None
        self.passed_on: int | None = None

    @abstractmethod
    def network(self, seed: int) -> nn.Module:
        """The bare network with seeded weights; raises UnknownModel."""

    @abstractmethod
    def evaluation_batch(self) -> int:
        """How many examples are judged at a time."""

    @property
    @abstractmethod
    def random_numbers(self) -> int:
        """How many `augment` takes of an example."""

    @abstractmethod
    def augment(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        """A batch of bytes → floats 0 to 255, each example changed a little, as its own row of `drawn` says.

        `drawn` are (n, `random_numbers`) of [0, 1), drawn on the CPU, so that a GPU gets the same.
        """

    @abstractmethod
    def normalised(self, pixels: Tensor) -> Tensor:
        """Floats 0 to 255 → what the network takes."""

    def build(self, seed: int) -> nn.Module:
        """A model with seeded weights, on the device."""
        model = self.network(seed)
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]

    def new_model(self, weights: Weights) -> nn.Module:
        """A model of its own for one job: the last that was given back, or a new one."""
        model = self._spare.pop() if self._spare else self.build(seed=0)
        load_weights(model, weights)
        return model

    def give_back(self, model: nn.Module) -> None:
        """Keep a model that a job is done with for the next one: building one draws all its numbers in vain."""
        model.zero_grad(set_to_none=True)
        self._spare[:] = [model]

    def probabilities(self, model: nn.Module, pixels: Tensor) -> npt.NDArray[np.float64]:
        """(n, channels, ...) bytes on the device → (n, classes)."""
        model.eval()
        with torch.inference_mode(), self.forwards():
            logits = model(self.normalised(pixels.float()))
        found: npt.NDArray[np.float64] = logits.double().softmax(dim=1).cpu().numpy()
        return found

    def exactly(self) -> AbstractContextManager[None]:
        """On a GPU the plain recipe computes in full precision, and again with the same bits, as a CPU always does.

        Its figures are compared with published ones. The other recipe leaves a GPU free to be quick.
        """
        if self.device.type == "cpu" or self.plain is None:
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)

    def forwards(self) -> AbstractContextManager[None]:
        """How the network is computed; backwards it is `exactly`."""
        if self.device.type == "cuda" and self.plain is None:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return self.exactly()

    def prediction(self, name: str, row: npt.NDArray[np.float64]) -> Prediction:
        """One row of probabilities under its name."""
        return Prediction(name, {label: float(p) for label, p in zip(self.classes, row, strict=True)})

    @abstractmethod
    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """See `base.Predictor.predict_files`."""

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """The same in one go and in one list."""
        return [item for _path, items in self.predict_files(weights, paths) for item in items]


class ClassifierWorkspace(InOneGo):
    """A site's examples of one study; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(
        self,
        model: Classifier,
        *,
        report: DataReport,
        labels: Tensor,
        parts: npt.NDArray[np.str_],
        names: Sequence[str],
        backbone: Path | None = None,
    ) -> None:
        self.report = report
        self.model = model
        self.device = model.device
        self.classes = model.classes
        self.examples = Examples(labels.numpy(), parts, names)
        self._backbone = backbone
        self._labels = labels
        self._of_part = _by_part(np.arange(len(parts)), parts)

    def share(
        self,
        places: npt.NDArray[np.int64],
        parts: npt.NDArray[np.str_],
        labels: npt.NDArray[np.int64] | None = None,
    ) -> Self:
        """The same with the examples at these places alone; see `base.Divisible.share`."""
        other = copy(self)
        other._of_part = _by_part(places, parts)
        if labels is not None:
            other._labels = self._labels.clone()
            other._labels[torch.from_numpy(places)] = torch.from_numpy(labels)
        names = self.examples.names
        other.examples = Examples(other._labels.numpy()[places], parts, [names[place] for place in places])
        return other

    @property
    @abstractmethod
    def resident(self) -> Tensor | None:
        """(all, channels, ...) bytes where all examples of the data lie on the device; shared with `share`."""

    @abstractmethod
    def pixels(self, indices: Tensor) -> Tensor:
        """(n, channels, ...) bytes on the device."""

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """The study's seeded first weights, over which a local backbone file is laid where the site names one."""
        model = self.model.build(seed)
        if self._backbone is not None:
            load_backbone(model, self._backbone)
        return export_weights(model)

    def statistics(self) -> None:
        """Pictures need none."""
        return

    def use_statistics(self, pooled: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Pictures need none; nothing is kept."""

    def train(self, weights: Weights, plan: RoundPlan) -> Training:
        """One round of local training; see `base.Workspace.train`."""
        return Job(self, weights, plan).run()

    @cached_property
    def own_layers(self) -> frozenset[str]:
        """The names of the tensors of all batch normalisation; see `base.Personal`. Found once: it takes a model."""
        return batch_normalisation(self.model.build(seed=0))

    def require_together(self) -> None:
        """Raise `WrongOption` where sites of this study cannot be trained together; see `base.Together`."""
        require_together(self.model)

    def train_together(
        self, others: Sequence[Self], weights: Weights, plans: Sequence[RoundPlan]
    ) -> list[TrainResult | TrainingDiverged]:
        """This site's round and those of others as one computation; see `base.Together`."""
        return train_together([self, *others], weights, plans)

    def judge(self, weights: Weights, part: Part) -> Judging:
        """Have a model of its own look at one part of the data, a batch a step."""
        indices = self.indices(part)
        if not len(indices):
            raise NotEnoughExamples(f"The {part} part of the data is empty; add data.", part=part)
        model = self.model.new_model(weights)
        batches = []
        for chunk in torch.split(indices, self.model.evaluation_batch()):
            batches.append(self.model.probabilities(model, self.pixels(chunk)))
            yield None
        self.model.give_back(model)
        return Judged(self._labels[indices].numpy(), np.concatenate(batches))

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Files with their examples' class probabilities."""
        return self.model.predict_files(weights, paths)

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """Class probabilities of files."""
        return self.model.predict(weights, paths)

    def indices(self, part: Part) -> Tensor:
        """Positions of a part's examples."""
        return self._of_part.get(part, torch.empty(0, dtype=torch.int64))

    def labels(self, indices: Tensor) -> Tensor:
        """(n,) class indices."""
        return self._labels[indices]


def _by_part(places: npt.NDArray[np.int64], parts: npt.NDArray[np.str_]) -> dict[str, Tensor]:
    return {str(name): torch.from_numpy(places[parts == name]) for name in np.unique(parts)}


class Order:
    """A site's training examples in the order of one round, with the random numbers that change them.

    Attributes:
        indices: (n,) of the examples that the site trains on.
        batches: of an epoch.
        generator: of this round alone. A site's images differ from another's, so equal seeds do no harm.
    """

    def __init__(self, workspace: ClassifierWorkspace, plan: RoundPlan) -> None:
        """Raises NotEnoughExamples: there are none."""
        self.indices = workspace.indices("train")
        if not len(self.indices):
            raise NotEnoughExamples("The train part of the data is empty; add data.", part="train")
        self.batches = math.ceil(len(self.indices) / plan.batch_size)
        self.generator = torch.Generator().manual_seed(_stream(plan, 0))
        self._random_numbers = workspace.model.random_numbers

    def epoch(self) -> tuple[Tensor, Tensor]:
        """(n,) the examples of the next epoch, in an order drawn anew, and (n, k) the random numbers of each."""
        order = self.indices[torch.randperm(len(self.indices), generator=self.generator)]
        return order, torch.rand(len(order), self._random_numbers, generator=self.generator)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """(n, ...) of an epoch by batches, nearly equal: a last one of one would break batch normalisation and weigh too
        much.
        """
        return torch.tensor_split(values, self.batches)


def _stream(plan: RoundPlan, number: int) -> int:
    """The seed of one of a round's random streams."""
    seed = np.random.SeedSequence([plan.seed, plan.round]).generate_state(2, np.uint64)
    return int(seed[number] >> 1)


class Job:
    """One round of one run: its own model, optimiser and random streams."""

    def __init__(self, workspace: ClassifierWorkspace, weights: Weights, plan: RoundPlan) -> None:
        self._workspace = workspace
        self._plan = plan
        self._model = workspace.model.new_model(weights)
        self._parameters = dict(self._model.named_parameters())
        # Only the proximal term looks back at where the round began.
        pulled = self._parameters.values() if plan.mu > 0 else ()
        self._anchor = [parameter.detach().clone() for parameter in pulled]
        self._plain = workspace.model.plain
        if self._plain is not None:
            self._peak = self._plain.rate(plan)
        else:
            self._peak = plan.lr or DEFAULT_LR * math.sqrt(plan.batch_size / DEFAULT_LR_BATCH)
        self._optimiser = _optimiser(self._parameters, self._peak, self._plain)
        if plan.optimiser_state is not None and isinstance(self._optimiser, torch.optim.AdamW):
            restore_moments(self._optimiser, self._parameters, plan.optimiser_state)
        self._order = Order(workspace, plan)
        counts = torch.bincount(workspace.labels(self._order.indices), minlength=len(workspace.classes)).float()
        self._class_weights = class_weights(counts).to(workspace.device)
        self._log_prior = log_prior(counts).to(workspace.device)
        self._global_state = _seeded_state(_stream(plan, 1), workspace.device)
        self._step = 0
        self._correction = self._corrected(plan.correction)
        self._rate_sum = 0.0

    def run(self) -> Training:
        plan = self._plan
        epoch_totals = _Totals()
        self._model.train()
        for epoch in range(1, plan.local_epochs + 1):
            started = time.monotonic()
            epoch_totals = _Totals()
            for batch, drawn in zip(*map(self._order.split, self._order.epoch()), strict=True):
                self._train_on(batch, drawn, epoch_totals)
                yield None
            yield self._progress(epoch, epoch_totals, time.monotonic() - started)
        result = TrainResult(
            weights=export_weights(self._model),
            examples=len(self._order.indices),
            metrics={
                "train_loss": epoch_totals.loss / epoch_totals.examples,
                "train_accuracy": epoch_totals.right / epoch_totals.examples,
            },
            optimiser_state=self._kept_state(),
            rate_sum=self._rate_sum,
        )
        self._workspace.model.give_back(self._model)
        return result

    def _kept_state(self) -> bytes | None:
        if isinstance(self._optimiser, torch.optim.AdamW):
            return saved_moments(self._optimiser, self._parameters)
        return None

    def _progress(self, epoch: int, totals: _Totals, seconds: float) -> EpochProgress:
        n = totals.examples
        return EpochProgress(epoch, self._plan.local_epochs, totals.loss / n, totals.right / n, n, seconds)

    def _train_on(self, batch: Tensor, drawn: Tensor, totals: _Totals) -> None:
        self._require_time()
        model = self._workspace.model
        labels = self._workspace.labels(batch).to(self._workspace.device)
        pixels = model.normalised(model.augment(self._workspace.pixels(batch), drawn))
        lr = self._set_learning_rate()
        with self._own_global_state(), model.forwards():
            logits = self._model(pixels)
        logits = logits.float()
        loss = self._loss(logits, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"The loss is {value} in step {self._step + 1}; ask for a smaller learning rate (--lr).",
                step=self._step + 1,
            )
        self._optimiser.zero_grad(set_to_none=True)
        with model.exactly():
            loss.backward()  # type: ignore[no-untyped-call]
        self._pull_gradient()
        self._optimiser.step()
        self._correct(lr)
        self._pull_back(lr)
        self._step += 1
        totals.loss += value * len(batch)
        totals.right += int((logits.detach().argmax(dim=1) == labels).sum())
        totals.examples += len(batch)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._plain is not None:
            return functional.cross_entropy(logits, labels)
        shifted = logits + self._log_prior
        return functional.cross_entropy(shifted, labels, weight=self._class_weights, label_smoothing=LABEL_SMOOTHING)

    def _require_time(self) -> None:
        if self._plan.deadline is not None and time.time() > self._plan.deadline:
            raise DeadlinePassed(
                f"The deadline of round {self._plan.round} passed during training; ask for a later deadline "
                "(--deadline-s) or fewer local epochs.",
                round=self._plan.round,
            )

    def _set_learning_rate(self) -> float:
        steps = self._order.batches * self._plan.local_epochs
        done = (self._plan.round - 1 + (self._step + 0.5) / steps) / self._plan.rounds
        lr = self._peak * (learning_rate_factor(done) if self._plain is None else 1.0)
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        return lr

    def _corrected(self, correction: Weights | None) -> list[Tensor]:
        """The correction of each parameter: what has no gradient, such as running statistics, drifts by nothing."""
        if correction is None:
            return []
        own = self._model.state_dict()
        require_same_layout({name: tuple(tensor.shape) for name, tensor in own.items()}, correction)
        return [
            torch.from_numpy(np.array(correction[name], np.float32)).to(parameter.device)
            for name, parameter in self._parameters.items()
        ]

    def _correct(self, lr: float) -> None:
        """SCAFFOLD's correction as a step of its own: w ← w − lr·(c − c_i).

        With plain SGD that is the paper's step. With momentum or AdamW it takes off just what `rate_sum` and the way from
        base to update say of the drift, whatever the optimiser made of the gradient.
        """
        self._rate_sum += lr
        if self._correction:
            with torch.no_grad():
                torch._foreach_add_(list(self._parameters.values()), self._correction, alpha=-lr)

    def _pull_gradient(self) -> None:
        """FedProx' proximal term in SGD's gradient, as published, whose momentum then carries it: + μ·(w − w_global)."""
        if self._plain is not None and self._plan.mu > 0:
            with torch.no_grad():
                for parameter, anchor in zip(self._parameters.values(), self._anchor, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter - anchor, alpha=self._plan.mu)

    def _pull_back(self, lr: float) -> None:
        """FedProx' proximal term of AdamW as a step of its own: w ← w − lr·μ·(w − w_global).

        As AdamW does with weight decay, it is kept out of the gradient: there Adam would divide it by the gradient's own
        size, which makes the pull strongest where the loss says least.
        """
        if self._plain is None and self._plan.mu > 0:
            share = min(1.0, self._plan.mu * lr)
            with torch.no_grad():
                torch._foreach_lerp_(list(self._parameters.values()), self._anchor, share)

    @contextmanager
    def _own_global_state(self) -> Iterator[None]:
        """Dropout draws from torch's global generator: lend it this job's state for one step."""
        device = self._workspace.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _set_state(self._global_state, device)
            yield
            self._global_state = _get_state(device)


def _optimiser(parameters: Mapping[str, nn.Parameter], lr: float, plain: Plain | None) -> torch.optim.Optimizer:
    """AdamW, of which biases and normalisation are not decayed; SGD for the plain recipe."""
    if plain is not None:
        return torch.optim.SGD(parameters.values(), lr=lr, momentum=plain.momentum, weight_decay=plain.weight_decay)
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def saved_moments(optimiser: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> bytes:
    """The optimiser's moments and step counts as safetensors bytes."""
    tensors = {
        f"{kind}.{name}": value.detach().to("cpu").contiguous()
        for name, parameter in parameters.items()
        for kind, value in optimiser.state[parameter].items()
    }
    return save_tensors(tensors)


def restore_moments(optimiser: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], state: bytes) -> None:
    """Put `saved_moments` back.

    Raises:
        WrongOptimiserState: the bytes are damaged or of another model.
    """
    try:
        tensors = load_tensors(state)
        for name, parameter in parameters.items():
            moments = {kind: tensors[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            if any(moment.shape != parameter.shape for moment in moments.values()):
                raise KeyError(name)
            optimiser.state[parameter] = {
                "step": tensors[f"step.{name}"],
                **{kind: moment.to(parameter.device, parameter.dtype) for kind, moment in moments.items()},
            }
    except (SafetensorError, KeyError) as error:
        raise WrongOptimiserState(
            "The kept optimiser state is damaged or of another model; delete it, and the round starts without it."
        ) from error


def learning_rate_factor(done: float) -> float:
    """Share of the peak rate when the share `done` of the whole run is done: linear warm-up, then half a cosine."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def class_weights(counts: Tensor) -> Tensor:
    """Per class: the square root of how much rarer it is than the mean, at most `MAX_CLASS_WEIGHT`."""
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).sqrt().clamp(max=MAX_CLASS_WEIGHT)


def log_prior(counts: Tensor) -> Tensor:
    """Logarithm of the local class frequencies, which training adds to the logits."""
    floored = counts.clamp(min=PRIOR_FLOOR)
    return (floored / floored.sum()).log()


def _get_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _seeded_state(seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    # torch.manual_seed also writes down, for GPUs that are not in use, where it was called from: slow.
    own = torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None
    return torch.Generator().manual_seed(seed).get_state(), own
