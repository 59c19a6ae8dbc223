"""When functions with a backward of their own can be used, and how often they can be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def plain_functions_wanted() -> bool:
    """Whether whoever runs the code needs functions it knows: a compiler, a trace, `torch.func` or forward-mode autograd."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether a trace is for export. Older torch compiles `torch.compiler.is_exporting()` as True whatever it compiles for."""
    return torch.compiler._is_exporting_flag


def differentiable_once(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """torch's `once_differentiable`, for what was saved too.

    torch's own refuses second derivatives only where the incoming gradient needs one. Of a sum's gradient, which is a
    constant, those by the map and the weights would silently be left out.
    """
    refusing = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def refusing_all(ctx: Any, grad: Tensor) -> Any:
        return refusing(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    return refusing_all
