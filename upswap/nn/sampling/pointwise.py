"""1x1 convolutions in full precision: as matrix products on a CPU, and keeping half-precision maps for their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import differentiable_once, plain_functions_wanted
from .memory_format import is_channels_last


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias)` with a 1x1 kernel, in the dtype of `weight` whatever the dtype of `x`.

    Args:
        x: (B, C, H, W), floating point.
        weight: (D, C, 1, 1).
        bias: (D,), of weight's dtype.

    Returns:
        (B, D, H, W), of weight's dtype.
    """
    if plain_functions_wanted():
        return F.conv2d(x.to(weight.dtype), weight, bias)
    if not torch.is_grad_enabled() or (x.dtype == weight.dtype and not _as_product(x)):
        return _convolved(x.to(weight.dtype), weight, bias)
    out: Tensor = _Pointwise.apply(x, weight, bias)
    return out


def _as_product(x: Tensor) -> bool:
    """Whether a convolution of `x` is computed as a matrix product.

    With as few outputs as a DySample has, that takes 0.3 to 1 times what torch's convolution takes, the less the more threads
    there are (torch 2.15, NCHW; in channels_last the convolution is as fast).
    """
    return x.device.type == "cpu" and not is_channels_last(x)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not _as_product(x):
        return F.conv2d(x, weight, bias)
    batch, _, height, width = x.shape
    matrices = weight.flatten(1).expand(batch, -1, -1)
    return torch.baddbmm(bias.view(1, -1, 1), matrices, x.flatten(2)).view(batch, len(bias), height, width)


class _Pointwise(torch.autograd.Function):
    """autograd would keep what `x` is widened or laid out to, and multiply matrices in half where backward() is autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x.to(weight.dtype), weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            of_x, of_weight, of_bias = _gradients(grad, x.to(weight.dtype), weight, ctx.needs_input_grad)
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of `_convolved`, for its arguments in turn; None where it is not needed."""
    if not _as_product(x):
        geometry = [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(grad, x, weight, *geometry, needed)
        return of_x, of_weight, of_bias
    columns = grad.flatten(2)
    return (
        torch.bmm(weight.flatten(1).t().expand(x.shape[0], -1, -1), columns).view(x.shape) if needed[0] else None,
        torch.bmm(columns, x.flatten(2).transpose(1, 2)).sum(0).view(weight.shape) if needed[1] else None,
        columns.sum((0, 2)) if needed[2] else None,
    )
