"""Upsamplers made of others: one for each number of channels, and chains of x2 steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ShapeError
from .tracing import leaf


def make_cascaded(scale: Sequence[float], cascade: bool, make: Callable[[Any], nn.Module]) -> nn.Module:
    """The upsampler that `make` makes for a ratio, or with `cascade` several of them in a chain."""
    factors = _cascade_factors(scale) if cascade else []
    return Cascade(make(factor) for factor in factors) if len(factors) > 1 else make(scale)


def keeps_step_0(config: Any) -> bool:
    """Whether an upsampler with these options starts at the original resize. Chains of bilinear x2 do not."""
    return config.init == "match" and not getattr(config, "cascade", False)


def _cascade_factors(scale: Sequence[float]) -> list[int]:
    """x4 and x8 as the x2 steps the authors chained; any other ratio is one step."""
    if scale[0] == scale[1] and scale[0] in (4, 8):
        return [2] * int(math.log2(scale[0]))
    return []


def _reset(upsamplers: nn.Module) -> None:
    for upsampler in upsamplers.children():
        reset: Any = getattr(upsampler, "reset_parameters", None)  # one of one's own need not have it
        if reset is not None:
            reset()


class ByChannels(nn.Module):
    """An upsampler for each number of channels that one call, or one layer used at several places, has.

    Its state-dict keys have the number in them: `16.offset.weight`.
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    def __init__(self, upsamplers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for count, upsampler in upsamplers.items():
            self.add_module(str(count), upsampler)

    def reset_parameters(self) -> None:
        """Initialise each upsampler."""
        _reset(self)

    @leaf
    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None, scale_factor: Any = None) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H', W'), by the upsampler for C channels; `ShapeError` where there is none."""
        upsampler = self._modules.get(str(int(x.shape[1])))
        if upsampler is None:
            counts = ", ".join(self._modules)
            raise ShapeError(f"these upsamplers take (N, C, H, W) with C one of {counts}, got {tuple(x.shape)}")
        return upsampler(x, size, scale_factor)


class Cascade(nn.Sequential):
    """Unshared x2 upsamplers in a chain, as DySample's authors replaced x4 and x8 in SegFormer.

    A chain of bilinear x2 steps is not a bilinear x4: unlike one module, it changes the model a little at step 0.
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    def __init__(self, steps: Any) -> None:
        super().__init__(*steps)

    def reset_parameters(self) -> None:
        """Initialise each step."""
        _reset(self)

    @leaf
    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None, scale_factor: Any = None) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H', W'); the last step goes to `size` exactly."""
        if size is None and scale_factor is not None:
            factors = (scale_factor, scale_factor) if isinstance(scale_factor, int | float) else scale_factor
            size = [math.floor(n * f) for n, f in zip(x.shape[-2:], factors, strict=True)]
        *first, last = self
        for step in first:
            x = step(x)
        return last(x) if size is None else last(x, size)
