"""The image classifiers that a study can name, behind one function, so that weights are made the same way everywhere.

Batch normalisation leaks and drifts between sites, so the default model normalises by groups (Wu and He 2018,
arXiv:1803.08494); `resnet-bn` is the same net with it, for FedBN, which lets each site keep its own. Residual branches are
added as `x + f(x)`, never in place, which per-example gradients need.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fl_client.tasks.base import FloatArray
from fl_client.tasks.errors import UnknownModel, WrongArchitecture

MODELS = ("resnet-gn", "resnet-gn-wide", "resnet-bn", "cnn", "lenet", "densenet121", "efficientnet-b0")
TORCHVISION = "torchvision:"  # prefix of the backbones of the optional extra [vision], as in torchvision:resnet18
GROUPS = 8  # channels are multiples of it in every stage
WIDTHS = (32, 48, 64, 96)  # 0.38 M parameters; an epoch of 5,501 images of 96 × 96 takes 13 s on two cores
WIDE_WIDTHS = (184, 280, 368, 552)  # the same net with 12.6 M parameters (50 MB), for studies whose sites have GPUs
# In 3D most of the work lies in the first halves of the resolution, so few channels there keep an epoch cheap.
VOLUME_MODELS = ("resnet-gn", "densenet121", "resnet18")
VOLUME_WIDTHS = (16, 32, 48, 64)  # 0.54 M parameters
CONVOLUTIONS: Mapping[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NAMED_DIFFERENCES = 3  # as many as a person reads

Normalisation = Callable[[int], nn.Module]
"""Makes the layer that normalises so many channels."""


def _by_groups(width: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, width)


class _Residual(nn.Module):
    """Two convolutions of 3 pixels a side, each after normalisation and ReLU, added to their input."""

    def __init__(self, width: int, dimensions: int, norm: Normalisation) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        self.last = convolution(width, width, 3, padding=1, bias=False)
        self.branch = nn.Sequential(
            norm(width),
            nn.ReLU(),
            convolution(width, width, 3, padding=1, bias=False),
            norm(width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.last(self.branch(x))
        return x + branch


class _Halve(nn.Sequential):
    """Halve all sides, change the number of channels."""

    def __init__(self, before: int, after: int, dimensions: int, norm: Normalisation) -> None:
        halved = CONVOLUTIONS[dimensions](before, after, 3, stride=2, padding=1, bias=False)
        super().__init__(norm(before), nn.ReLU(), halved)


class CompactResNet(nn.Module):
    """The default: (n, channels, h, w) or (n, channels, d, h, w) → (n, classes) logits; sides of at least 32.

    The head sees each channel's mean and its maximum, since a small lesion hardly moves the mean. Most of the work is done
    at a quarter of the image's resolution or below, which keeps an epoch cheap without a GPU.

    Args:
        every_stage: whether the head sees the maxima of all stages, not of the last alone. What a volume's label is about
            may be a thousandth of it: its gradient then has a short way to the stage where it is still several voxels wide.
        norm: of all layers; by groups as it comes.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = WIDTHS,
        dimensions: int = 2,
        *,
        every_stage: bool = False,
        norm: Normalisation = _by_groups,
    ) -> None:
        super().__init__()
        self.stem = CONVOLUTIONS[dimensions](channels, widths[0], 5, stride=2, padding=2, bias=False)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Halve(a, b, dimensions, norm), _Residual(b, dimensions, norm))
                for a, b in pairwise(widths)
            )
        )
        self.norm = norm(widths[-1])
        early = widths[1:-1] if every_stage else ()
        self.early_norms = nn.ModuleList(norm(width) for width in early)
        self.head = nn.Linear(2 * widths[-1] + sum(early), classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Residual):
                nn.init.zeros_(module.last.weight)  # every block starts as the identity
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        maxima = []
        for number, stage in enumerate(self.stages):
            features = stage(features)
            if number < len(self.early_norms):
                maxima.append(torch.relu(self.early_norms[number](features)).flatten(start_dim=2).amax(dim=2))
        features = torch.relu(self.norm(features)).flatten(start_dim=2)
        pooled = torch.cat([features.mean(dim=2), features.amax(dim=2), *maxima], dim=1)
        logits: Tensor = self.head(pooled)
        return logits


class _ChannelNorm(nn.Module):
    """Local response normalisation (Krizhevsky et al. 2012) over 9 channels: x / (1 + 0.001 · their mean square) ^ 0.75.

    The sum over neighbouring channels is a product with a banded matrix: torch's own way, a pooling in 3D, takes several
    times as long as the convolutions around it.
    """

    def __init__(self, width: int, channels: int = 9, alpha: float = 0.001) -> None:
        super().__init__()
        places = torch.arange(width)
        near = (places[:, None] - places[None, :]).abs() <= channels // 2
        band = near.float().mul(alpha / channels).view(width, width, 1, 1)
        self.register_buffer("band", band, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        root = (1 + nn.functional.conv2d(x * x, self.get_buffer("band"))).sqrt()
        normed: Tensor = x / (root * root.sqrt())
        return normed


class ConvNet(nn.Sequential):
    """The small CNN of TensorFlow's CIFAR-10 tutorial, which McMahan et al. 2017 (arXiv:1602.05629) trained by FedAvg.

    (n, channels, side, side) → (n, classes) logits; 1,068,298 parameters for colour, 24 pixels a side and 10 classes.
    """

    def __init__(self, channels: int, classes: int, side: int) -> None:
        halved = (side + 1) // 2
        quarter = (halved + 1) // 2

        def stage(before: int) -> list[nn.Module]:
            return [nn.Conv2d(before, 64, 5, padding=2), nn.ReLU()]

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, padding=1)

        def norm() -> nn.Module:
            return _ChannelNorm(64)

        super().__init__(
            *stage(channels),
            pool(),
            norm(),
            *stage(64),
            norm(),
            pool(),
            nn.Flatten(),
            nn.Linear(64 * quarter * quarter, 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
            nn.Linear(192, classes),
        )


class LeNet(nn.Sequential):
    """The smaller CNN of Li et al. 2022 (arXiv:2102.02079) and of Flower's baseline niid_bench, after LeCun et al. 1998.

    (n, channels, side, side) → (n, classes) logits; 62,006 parameters for colour, 32 pixels a side and 10 classes.
    """

    def __init__(self, channels: int, classes: int, side: int) -> None:
        halved = (side - 4) // 2
        quarter = (halved - 4) // 2
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * quarter * quarter, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )


SMALL: Mapping[str, Callable[[int, int, int], nn.Module]] = {"cnn": ConvNet, "lenet": LeNet}
COMPACT: Mapping[str, Callable[[int, int], nn.Module]] = {
    "resnet-gn": CompactResNet,
    "resnet-gn-wide": partial(CompactResNet, widths=WIDE_WIDTHS),
    "resnet-bn": partial(CompactResNet, norm=nn.BatchNorm2d),
}


def build_model(name: str, *, channels: int, classes: int, seed: int, side: int = 96) -> nn.Module:
    """A model with weights that depend on `seed` alone; the global random state is left as it was.

    `side` is that of the images, in pixels, which `cnn` and `lenet` depend on.

    Raises:
        UnknownModel: no model has that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in COMPACT:
            return COMPACT[name](channels, classes)
        if name in SMALL:
            return SMALL[name](channels, classes, side)
        if name == "densenet121":
            from monai.networks.nets import DenseNet121  # noqa: PLC0415 - seconds of imports for one of three models

            dense: nn.Module = DenseNet121(spatial_dims=2, in_channels=channels, out_channels=classes)
            return dense
        if name == "efficientnet-b0":
            from monai.networks.nets import EfficientNetBN  # noqa: PLC0415

            efficient: nn.Module = EfficientNetBN(
                "efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=channels, num_classes=classes
            )
            return efficient
        if name.startswith(TORCHVISION):
            return _torchvision_model(name.removeprefix(TORCHVISION), channels=channels, classes=classes)
    raise UnknownModel(
        f"No model {name!r} is known; the study's option 'model' may be {', '.join(MODELS)}, or {TORCHVISION}NAME with "
        "the extra [vision].",
        model=name,
    )


def build_volume_model(name: str, *, classes: int, seed: int) -> nn.Module:
    """The same for volumes of one channel.

    MONAI's DenseNet121 and ResNet18 normalise by batches, as published; the default by groups.

    Raises:
        UnknownModel: no model has that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "resnet-gn":
            return CompactResNet(1, classes, VOLUME_WIDTHS, dimensions=3, every_stage=True)
        if name == "densenet121":
            from monai.networks.nets import DenseNet121  # noqa: PLC0415 - seconds of imports for one of three models

            dense: nn.Module = DenseNet121(spatial_dims=3, in_channels=1, out_channels=classes)
            return dense
        if name == "resnet18":
            from monai.networks.nets import resnet18  # noqa: PLC0415

            residual: nn.Module = resnet18(spatial_dims=3, n_input_channels=1, num_classes=classes)
            return residual
    raise UnknownModel(
        f"No 3D model {name!r} is known; the study's option 'model' may be {', '.join(VOLUME_MODELS)}.", model=name
    )


def _torchvision_model(name: str, *, channels: int, classes: int) -> nn.Module:
    try:
        # Optional, and fails to import where torch is the CPU build; type checkers see it only where it is installed.
        from torchvision.models import get_model  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:
        raise UnknownModel(
            f"The model {TORCHVISION}{name} needs torchvision, which is not installed or not built for this torch; install "
            "medhive-site[vision] on a machine with a GPU.",
            model=name,
        ) from error
    if channels != 3:
        raise UnknownModel("torchvision's models take colour; set the study's option channels to 3.", model=name)
    try:
        model: nn.Module = get_model(name, weights=None, num_classes=classes)
    except ValueError as error:
        raise UnknownModel(f"torchvision has no model {name!r}.", model=name) from error
    return model


def batch_normalisation(model: nn.Module) -> frozenset[str]:
    """The names of all parameters and buffers of batch normalisation."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in module.state_dict()
    )


def export_weights(model: nn.Module) -> dict[str, FloatArray]:
    """All parameters and buffers as float32 arrays; integer counters too, since one format is packed and sent."""
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous().numpy().copy()
        for name, tensor in model.state_dict().items()
    }


def load_weights(model: nn.Module, weights: Mapping[str, FloatArray]) -> None:
    """Copy `weights` into `model`, back to each tensor's own type.

    Raises:
        WrongArchitecture: names or shapes are not the model's.
    """
    own = model.state_dict()
    require_same_layout({name: tuple(tensor.shape) for name, tensor in own.items()}, weights)
    for name, tensor in own.items():
        array = np.asarray(weights[name], dtype=np.float32)
        values = array if tensor.is_floating_point() else np.rint(array)
        # torch takes no array that is not to be written on without a warning.
        tensor.copy_(torch.from_numpy(np.require(values, requirements="W")))


def require_same_layout(own: Mapping[str, tuple[int, ...]], weights: Mapping[str, FloatArray]) -> None:
    """Compare names and shapes.

    Raises:
        WrongArchitecture: they differ; the text names the first differences.
    """
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    misshapen = sorted(name for name in own.keys() & weights.keys() if tuple(weights[name].shape) != own[name])
    if not (missing or unexpected or misshapen):
        return
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    parts = [f"{kind}: {', '.join(names[:NAMED_DIFFERENCES])}" for kind, names in kinds if names]
    raise WrongArchitecture(
        f"These weights belong to another model than the study's ({'; '.join(parts)}). Use a version of this study.",
        missing=missing[:NAMED_DIFFERENCES],
        unexpected=unexpected[:NAMED_DIFFERENCES],
        misshapen=misshapen[:NAMED_DIFFERENCES],
    )


def load_backbone(model: nn.Module, path: Path) -> int:
    """Start from a local safetensors file: copy every tensor of the same name and shape; the number copied.

    Raises:
        WrongArchitecture: the file is not safetensors or nothing in it fits.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - only sites with a local backbone need it
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WrongArchitecture(f"{path} is no readable safetensors file; give one, or leave it out.") from error
    own = model.state_dict()
    fitting = [name for name, tensor in own.items() if name in stored and stored[name].shape == tensor.shape]
    if not fitting:
        raise WrongArchitecture(f"No tensor in {path} fits this model by name and shape; give this model's weights.")
    for name in fitting:
        own[name].copy_(stored[name])
    return len(fitting)
