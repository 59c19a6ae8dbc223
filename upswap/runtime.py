"""What rewritten code calls when it runs: one resize call, sent through the upsampler of its site."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .errors import ShapeError, UpswapWarning

#: The functions that resize, with the arguments their names imply.
_IMPLIED: dict[Any, dict[str, Any]] = {
    F.interpolate: {},
    F.upsample: {},
    F.upsample_nearest: {"mode": "nearest"},
    F.upsample_bilinear: {"mode": "bilinear", "align_corners": True},
}


class Target(NamedTuple):
    """The upsampler of one site and the situation it was made for."""

    site: str
    child: str
    channels: int
    mode: str
    align_corners: bool


def resize(
    targets: tuple[Target | None, ...],
    run: list[int],
    index: int,
    owner: nn.Module,
    original: Callable[..., torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The call `original(*args, **kwargs)` of a rewritten forward.

    `targets` has an entry for each time this call runs in one forward of its owner; None, and any run beyond those, is the
    original call. `run` counts the runs of each of the forward's calls and is new in every forward.
    """
    occurrence = run[index]
    run[index] = occurrence + 1
    target = targets[occurrence] if occurrence < len(targets) else None
    if target is None:
        return original(*args, **kwargs)
    if isinstance(original, functools.partial):
        args, kwargs = (*original.args, *args), {**original.keywords, **kwargs}
        original = original.func
    if original not in _IMPLIED:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"site {target.site}: the resize was called through {original!r}, which upswap does not know; the original ran",
                UpswapWarning,
                stacklevel=3,
            )
        return original(*args, **kwargs)
    return through(target, getattr(owner, target.child), *args, **{**_IMPLIED[original], **kwargs})


def through(
    target: Target,
    upsampler: nn.Module,
    input: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Upsample `input` of shape (N, C, H, W) as `F.interpolate` would have been asked to.

    Raises `ShapeError` where the call is not the one the upsampler was made for.
    """
    if input.dim() != 4 or input.shape[1] != target.channels:
        raise ShapeError(
            f"site {target.site}: its upsampler takes (N, {target.channels}, H, W), this call has {tuple(input.shape)}; patch "
            "the model again with example_inputs that lead here, or exclude the site"
        )
    if mode != target.mode or bool(align_corners) != target.align_corners:
        raise ShapeError(
            f"site {target.site}: its upsampler stands for mode={target.mode!r}, align_corners={target.align_corners}, this call "
            f"asks for mode={mode!r}, align_corners={align_corners}; unpatch the model and patch it again in this setting"
        )
    if size is None and scale_factor is not None and recompute_scale_factor:
        factors = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor, scale_factor)
        size = [math.floor(n * factor) for n, factor in zip(input.shape[-2:], factors, strict=True)]
    if size is not None:
        return upsampler(input, size)
    return upsampler(input, None, scale_factor)
