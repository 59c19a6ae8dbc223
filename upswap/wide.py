"""Convolutions of half-precision maps in full precision, which keep the half-precision map for their backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_functions_wanted() -> bool:
    """Whether whoever runs the code needs functions it knows: a compiler, a trace, or a transform of `torch.func`."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or tracing or torch._C._are_functorch_transforms_active()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias)` with a 1x1 kernel, in the dtype of `weight` whatever the dtype of `x`.

    Args:
        x: (B, C, H, W), floating point.
        weight: (D, C, 1, 1).
        bias: (D,), of weight's dtype.

    Returns:
        (B, D, H, W), of weight's dtype.
    """
    if x.dtype == weight.dtype or not torch.is_grad_enabled() or plain_functions_wanted():
        return F.conv2d(x.to(weight.dtype), weight, bias)
    out: Tensor = _Pointwise.apply(x, weight, bias)
    return out


class _Pointwise(torch.autograd.Function):
    """autograd would keep the wide copy of `x`, two to four times its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x.to(weight.dtype), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad,
            x.to(weight.dtype),
            weight,
            [weight.shape[0]],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            ctx.needs_input_grad,
        )
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias
