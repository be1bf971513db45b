"""Training and judging image classifiers: the torch side of the task `image-folder`.

Images are resized once (MONAI) and stay in memory as bytes; augmentation works on whole batches with a generator that
belongs to the job, so that several runs may take turns in one process and a repeated round gives the same bits.

The recipe decides what federated averaging reaches: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) whose moments the
site keeps from round to round, one learning-rate schedule over the whole run (short linear warm-up, then half a cosine to
zero), light augmentation, label smoothing, and logits shifted during training by the logarithm of the local class
frequencies (Menon et al. 2021, arXiv:2007.07314), so that hospitals with different case mixes do not pull the model apart.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import Compose, Resize, ResizeWithPadOrCrop, ToNumpy
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional

from fl_client.tasks.base import (
    DataReport,
    EpochProgress,
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
    DeadlinePassed,
    DeviceUnavailable,
    NotEnoughExamples,
    TrainingDiverged,
    UnreadableExample,
    WrongOptimiserState,
)
from fl_client.tasks.evaluation import InOneGo
from fl_client.tasks.images import ImageOptions, UInt8, read_image, scan_folder
from fl_client.tasks.models import build_model, export_weights, load_backbone, load_weights
from medhive.spec import StudyData

DEFAULT_LR = 5e-3  # peak, for batches of 32; found on brain MRI with three sites
DEFAULT_LR_BATCH = 32  # other batches: by the square root (Malladi et al. 2022, arXiv:2205.10287)
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the run; AdamW's moments are still noise there
LABEL_SMOOTHING = 0.05
MAX_CLASS_WEIGHT = 5.0  # a class of three images shall not drown the rest
PRIOR_FLOOR = 1.0  # examples that an absent class is counted as, so that its logarithm is finite
PIXEL_MEAN, PIXEL_SPREAD = 0.2, 0.2  # of grey scans in 0..1: dark background, bright tissue
EVALUATION_BATCH = 128
GPU_CACHE_BYTES = 4 * 2**30  # data sets below this move to the GPU once instead of batch by batch
# Augmentation, each drawn evenly from ± its value: what differs between two positions of a head in one scanner.
MAX_ROTATION = math.radians(5)
MAX_ZOOM = 0.04
MAX_SHIFT = 0.07  # of half the image's width
MAX_CONTRAST = 0.2
MAX_BRIGHTNESS = 0.05
RANDOM_NUMBERS = 7  # per image


def open_workspace(
    data_dir: Path,
    study: StudyData,
    secret: bytes,
    *,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
    local: LocalOptions | None = None,
) -> "ImageWorkspace":
    """Read, resize and keep all usable images.

    Raises:
        MedHiveError: as `images.scan_folder`; DeviceUnavailable; UnknownModel.
    """
    model = ImageModel(study, device)
    kept: dict[str, UInt8] = {}

    def keep(digest: str, image: UInt8) -> None:
        kept[digest] = model.resize(image)

    scan = scan_folder(data_dir, study, secret, on_progress=on_progress, local=local, keep=keep)
    images = torch.from_numpy(np.stack([kept[entry.digest] for entry in scan.entries]))
    labels = torch.tensor([entry.label for entry in scan.entries])
    parts = np.array([entry.part for entry in scan.entries])
    return ImageWorkspace(
        model,
        report=scan.report,
        images=images,
        labels=labels,
        parts=parts,
        backbone=local.weights_file if local is not None else None,
    )


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


class Resizer:
    """(channels, h, w) bytes → (channels, size, size) bytes: the longer side fits, the shorter is padded with black."""

    def __init__(self, size: int) -> None:
        self._size = size
        pad = ResizeWithPadOrCrop((size, size), mode="constant")
        self._shrink = Compose([Resize(size, size_mode="longest", mode="area"), pad, ToNumpy()])
        self._grow = Compose([Resize(size, size_mode="longest", mode="bilinear"), pad, ToNumpy()])

    def __call__(self, image: UInt8) -> UInt8:
        """Resize one image."""
        transform = self._shrink if max(image.shape[1:]) >= self._size else self._grow
        resized: FloatArray = transform(image.astype(np.float32))
        return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@dataclass
class _Totals:
    loss: float = 0.0
    right: int = 0
    examples: int = 0


class ImageModel:
    """A study's classifier without images; `fl_client.tasks.base.Predictor` describes the methods."""

    def __init__(self, study: StudyData, device: str) -> None:
        """Check that the study's model can be built here.

        Raises:
            WrongOption, DeviceUnavailable, UnknownModel: it cannot.
        """
        self._options = ImageOptions.of(study)
        self.device = resolve_device(device)
        self.classes = study.classes
        self.resize = Resizer(self._options.image_size)
        self.build(seed=0)

    def build(self, seed: int) -> nn.Module:
        """A model with seeded weights."""
        options = self._options
        model = build_model(options.model, channels=options.channels, classes=len(self.classes), seed=seed)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def new_model(self, weights: Weights) -> nn.Module:
        """A model of its own for one job."""
        model = self.build(seed=0)
        load_weights(model, weights)
        return model

    def probabilities(self, model: nn.Module, pixels: Tensor) -> npt.NDArray[np.float64]:
        """(n, channels, size, size) bytes on the device → (n, classes)."""
        model.eval()
        with torch.inference_mode(), mixed_precision(self.device):
            logits = model(normalised(pixels.float()))
        found: npt.NDArray[np.float64] = logits.double().softmax(dim=1).cpu().numpy()
        return found

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each image file with its class probabilities, a batch at a time."""
        model = self.new_model(weights)
        for start in range(0, len(paths), EVALUATION_BATCH):
            batch = paths[start : start + EVALUATION_BATCH]
            for path, item in zip(batch, self._predict_batch(model, batch), strict=True):
                yield path, [item]

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """Class probabilities of image files."""
        return [item for _path, items in self.predict_files(weights, paths) for item in items]

    def _predict_batch(self, model: nn.Module, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        read = [self._read(path) for path in paths]
        images = [image for image in read if not isinstance(image, Skipped)]
        if not images:
            return [item for item in read if isinstance(item, Skipped)]
        rows = iter(self.probabilities(model, torch.from_numpy(np.stack(images)).to(self.device)))
        return [
            item if isinstance(item, Skipped) else self._prediction(path, next(rows))
            for path, item in zip(paths, read, strict=True)
        ]

    def _read(self, path: Path) -> UInt8 | Skipped:
        try:
            return self.resize(read_image(path, self._options.channels))
        except UnreadableExample as error:
            return Skipped(path.name, error.reason)

    def _prediction(self, path: Path, row: npt.NDArray[np.float64]) -> Prediction:
        return Prediction(path.name, {name: float(p) for name, p in zip(self.classes, row, strict=True)})


class ImageWorkspace(InOneGo):
    """A site's images in memory; `fl_client.tasks.base.Workspace` describes the methods."""

    def __init__(
        self,
        model: ImageModel,
        *,
        report: DataReport,
        images: Tensor,
        labels: Tensor,
        parts: npt.NDArray[np.str_],
        backbone: Path | None = None,
    ) -> None:
        self.report = report
        self.device = model.device
        self.classes = model.classes
        self._model = model
        self._backbone = backbone
        fits = self.device.type == "cuda" and images.nbytes <= GPU_CACHE_BYTES
        self._images = images.to(self.device) if fits else images
        self._labels = labels
        self._of_part = {name: torch.from_numpy(np.flatnonzero(parts == name)) for name in np.unique(parts)}

    def initial_weights(self, seed: int) -> dict[str, FloatArray]:
        """The study's seeded first weights, over which a local backbone file is laid where the site names one."""
        model = self._model.build(seed)
        if self._backbone is not None:
            load_backbone(model, self._backbone)
        return export_weights(model)

    def statistics(self) -> None:
        """Images need none."""
        return

    def use_statistics(self, pooled: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Images need none; nothing is kept."""

    def train(self, weights: Weights, plan: RoundPlan) -> Training:
        """One round of local training; see `base.Workspace.train`."""
        job = _Job(self, weights, plan)
        return job.run()

    def judge(self, weights: Weights, part: Part) -> Judging:
        """Have a model of its own look at one part of the data, a batch a step."""
        indices = self.indices(part)
        if not len(indices):
            raise NotEnoughExamples(f"The {part} part of the data is empty; add images.", part=part)
        model = self.new_model(weights)
        batches = []
        for chunk in torch.split(indices, EVALUATION_BATCH):
            batches.append(self._model.probabilities(model, self.pixels(chunk)))
            yield None
        return Judged(self._labels[indices].numpy(), np.concatenate(batches))

    def predict_files(
        self, weights: Weights, paths: Sequence[Path]
    ) -> Iterator[tuple[Path, list[Prediction | Skipped]]]:
        """Each image file with its class probabilities, a batch at a time."""
        return self._model.predict_files(weights, paths)

    def predict(self, weights: Weights, paths: Sequence[Path]) -> list[Prediction | Skipped]:
        """Class probabilities of image files."""
        return self._model.predict(weights, paths)

    def indices(self, part: Part) -> Tensor:
        """Positions of a part's images."""
        return self._of_part.get(part, torch.empty(0, dtype=torch.int64))

    def labels(self, indices: Tensor) -> Tensor:
        """(n,) class indices."""
        return self._labels[indices]

    def pixels(self, indices: Tensor) -> Tensor:
        """(n, channels, size, size) bytes on the device."""
        return self._images[indices.to(self._images.device)].to(self.device, non_blocking=True)

    def new_model(self, weights: Weights) -> nn.Module:
        """A model of its own for one job."""
        return self._model.new_model(weights)


class _Job:
    """One round of one run: its own model, optimiser and random streams."""

    def __init__(self, workspace: ImageWorkspace, weights: Weights, plan: RoundPlan) -> None:
        self._workspace = workspace
        self._plan = plan
        self._model = workspace.new_model(weights)
        self._parameters = dict(self._model.named_parameters())
        self._anchor = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._peak = plan.lr or DEFAULT_LR * math.sqrt(plan.batch_size / DEFAULT_LR_BATCH)
        self._optimiser = _optimiser(self._parameters, self._peak)
        if plan.optimiser_state is not None:
            restore_moments(self._optimiser, self._parameters, plan.optimiser_state)
        self._indices = workspace.indices("train")
        if not len(self._indices):
            raise NotEnoughExamples("The train part of the data is empty; add images.", part="train")
        counts = torch.bincount(workspace.labels(self._indices), minlength=len(workspace.classes)).float()
        self._class_weights = class_weights(counts).to(workspace.device)
        self._log_prior = log_prior(counts).to(workspace.device)
        # Streams of this job alone: a site's images differ from another's, so equal seeds do no harm.
        seed = np.random.SeedSequence([plan.seed, plan.round]).generate_state(2, np.uint64)
        self._generator = torch.Generator().manual_seed(int(seed[0] >> 1))
        self._global_state = _seeded_state(int(seed[1] >> 1), workspace.device)
        self._steps_per_epoch = math.ceil(len(self._indices) / plan.batch_size)
        self._step = 0

    def run(self) -> Training:
        plan = self._plan
        epoch_totals = _Totals()
        self._model.train()
        for epoch in range(1, plan.local_epochs + 1):
            started = time.monotonic()
            epoch_totals = _Totals()
            order = self._indices[torch.randperm(len(self._indices), generator=self._generator)]
            # Nearly equal batches: a last batch of one would break batch normalisation and weigh too much.
            for batch in torch.tensor_split(order, self._steps_per_epoch):
                self._train_on(batch, epoch_totals)
                yield None
            yield self._progress(epoch, epoch_totals, time.monotonic() - started)
        return TrainResult(
            weights=export_weights(self._model),
            examples=len(self._indices),
            metrics={
                "train_loss": epoch_totals.loss / epoch_totals.examples,
                "train_accuracy": epoch_totals.right / epoch_totals.examples,
            },
            optimiser_state=saved_moments(self._optimiser, self._parameters),
        )

    def _progress(self, epoch: int, totals: _Totals, seconds: float) -> EpochProgress:
        n = totals.examples
        return EpochProgress(epoch, self._plan.local_epochs, totals.loss / n, totals.right / n, n, seconds)

    def _train_on(self, batch: Tensor, totals: _Totals) -> None:
        self._require_time()
        device = self._workspace.device
        labels = self._workspace.labels(batch).to(device)
        pixels = augment(self._workspace.pixels(batch), self._generator)
        lr = self._set_learning_rate()
        with self._own_global_state(), mixed_precision(device):
            logits = self._model(normalised(pixels))
        logits = logits.float()
        loss = functional.cross_entropy(
            logits + self._log_prior, labels, weight=self._class_weights, label_smoothing=LABEL_SMOOTHING
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"The loss is {value} in step {self._step + 1}; ask for a smaller learning rate (--lr).",
                step=self._step + 1,
            )
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._pull_back(lr)
        self._step += 1
        totals.loss += value * len(batch)
        totals.right += int((logits.detach().argmax(dim=1) == labels).sum())
        totals.examples += len(batch)

    def _require_time(self) -> None:
        if self._plan.deadline is not None and time.time() > self._plan.deadline:
            raise DeadlinePassed(
                f"The deadline of round {self._plan.round} passed during training; ask for a later deadline "
                "(--deadline-s) or fewer local epochs.",
                round=self._plan.round,
            )

    def _set_learning_rate(self) -> float:
        steps = self._steps_per_epoch * self._plan.local_epochs
        done = (self._plan.round - 1 + (self._step + 0.5) / steps) / self._plan.rounds
        lr = self._peak * learning_rate_factor(done)
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        return lr

    def _pull_back(self, lr: float) -> None:
        """FedProx' proximal term as a step of its own: w ← w − lr·μ·(w − w_global).

        As AdamW does with weight decay, it is kept out of the gradient: there Adam would divide it by the gradient's own
        size, which makes the pull strongest where the loss says least.
        """
        if self._plan.mu > 0:
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


def _optimiser(parameters: Mapping[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW; biases and normalisation are not decayed."""
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


def normalised(pixels: Tensor) -> Tensor:
    """Bytes as floats (0 to 255) → what the models take."""
    scaled = (pixels / 255 - PIXEL_MEAN) / PIXEL_SPREAD
    return scaled.contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, rotate, zoom, shift, brighten each image of a batch on its own; (n, c, h, w) bytes → floats 0 to 255.

    All random numbers come from `generator`, which lives on the CPU, so that a GPU draws the same ones.
    """
    n = len(pixels)
    r = (torch.rand(n, RANDOM_NUMBERS, generator=generator) * 2 - 1).to(pixels.device)
    angle, zoom = r[:, 0] * MAX_ROTATION, 1 + r[:, 1] * MAX_ZOOM
    mirror = torch.where(r[:, 2] < 0, -1.0, 1.0)
    c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = (torch.stack([c * mirror, -s, r[:, 3] * MAX_SHIFT], 1), torch.stack([s * mirror, c, r[:, 4] * MAX_SHIFT], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels.float(), grid, align_corners=False)
    contrast = (1 + r[:, 5] * MAX_CONTRAST).view(-1, 1, 1, 1)
    return moved * contrast + (r[:, 6] * MAX_BRIGHTNESS * 255).view(-1, 1, 1, 1)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; full precision on a CPU, where results shall be reproducible bit for bit."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _get_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _seeded_state(seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _get_state(device)
