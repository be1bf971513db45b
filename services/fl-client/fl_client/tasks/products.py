"""Convolutions as products of matrices, each window of an image a column (Chellapilla et al. 2006, "High Performance
Convolutional Neural Networks for Document Processing").

For many models at a time under `torch.func.vmap` on a GPU: the library's own way there is a convolution in as many groups as
there are models, which is slow, most of all backwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = Sequence[int]
"""Of height and width."""


def as_products(model: nn.Module) -> nn.Module:
    """Have all plain 2D convolutions of a model computed so; it is changed, and keeps names and weights."""
    for module in model.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        if plain and module.dilation == (1, 1) and not isinstance(module.padding, str):
            module.__class__ = _ProductConv2d
    return model


class _ProductConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        found: Tensor
        found, _columns = Convolution.apply(input, self.weight, self.stride, self.padding)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias[:, None, None]


class Convolution(torch.autograd.Function):
    """(n, c, h, w) pixels and (o, c, kh, kw) weights → (n, o, h', w'); stride and padding of height and width."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pixels: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
        """The result, and the windows, which the way back needs."""
        columns, sides = _columns(pixels, weight.shape[2:], stride, padding)
        found = _for_each(weight.flatten(1), len(pixels)) @ columns
        return found.reshape(*found.shape[:2], *sides), columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pixels, weight, ctx.stride, ctx.padding = inputs
        ctx.sides = pixels.shape[2:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _of_columns: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        weight, columns = ctx.saved_tensors
        flat = gradient.flatten(2)
        # Example by example, then their sum: one product over all would be long sums that few of a GPU's units share.
        of_weight = (flat @ columns.mT).sum(dim=0).view_as(weight)
        of_pixels = None
        if ctx.needs_input_grad[0]:
            of_columns = _for_each(weight.flatten(1).mT, len(flat)) @ flat
            of_pixels = functional.fold(of_columns, ctx.sides, weight.shape[2:], padding=ctx.padding, stride=ctx.stride)
        return of_pixels, of_weight, None, None


def _columns(pixels: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tensor, tuple[int, int]]:
    """(n, c · kh · kw, places) windows, and how many places there are along each side.

    What `unfold` of torch gives, which would be told of each example by itself.
    """
    padded = functional.pad(pixels, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2), (windows.shape[2], windows.shape[3])


def _for_each(matrix: Tensor, count: int) -> Tensor:
    return matrix.expand(count, *matrix.shape)
