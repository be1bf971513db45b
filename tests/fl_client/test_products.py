"""Convolutions as products of matrices: the same numbers as the library's, forwards and backwards, for many models."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from fl_client.tasks.models import build_model
from fl_client.tasks.products import Convolution, as_products


@pytest.mark.parametrize("side", [11, 12])
@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1), (0, 0)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (0, 1)), ((3, 3), (0, 0))]
)
def test_it_is_the_librarys_convolution(side: int, stride: tuple[int, int], padding: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 4, 3, side, side + 1, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 6, 3, 3, 4, dtype=torch.float64, generator=generator)

    def ours(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (Convolution.apply(pixels, weight, stride, padding)[0] ** 3).sum()

    def theirs(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (nn.functional.conv2d(pixels, weight, None, stride, padding) ** 3).sum()

    found, expected = (vmap(grad_and_value(loss, argnums=(0, 1)))(pixels, weights) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet-gn"])
def test_a_whole_model_computes_the_same(name: str) -> None:
    model, other = (build_model(name, channels=3, classes=4, seed=1, side=32).double() for _ in range(2))
    assert as_products(other) is other
    assert any(type(module).__name__ == "_ProductConv2d" for module in other.modules())
    pixels = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = {key: torch.stack([value.detach(), value.detach() * 1.1]) for key, value in model.named_parameters()}

    def gradients(of: nn.Module) -> object:
        def loss(parameters: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
            return (functional_call(of, parameters, (batch,)) ** 2).sum()

        return vmap(grad_and_value(loss))(weights, pixels)

    torch.testing.assert_close(gradients(other), gradients(model))


def test_what_it_cannot_do_is_left_as_it_was() -> None:
    kinds = [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same")]
    model = as_products(nn.Sequential(*kinds, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")))
    assert all(type(module) is nn.Conv2d for module in model)
