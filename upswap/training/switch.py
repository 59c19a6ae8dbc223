"""The original resizes again, for a while: the patched model against itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..nn.sampling.positions import Mapping, Mode
from ..plan.site import Site
from ..surgery.apply import original_layer, plan_of
from ..surgery.wrappers import patched_models

M = TypeVar("M", bound=nn.Module)


@contextlib.contextmanager
def disabled(model: M) -> Iterator[M]:
    """Inside, a patched model runs its original resizes: `with upswap.disabled(model): before = model(x)`.

    It computes then what `unpatch` would give, with the host's weights as they are. Nothing else of the model changes; training
    inside reaches the host alone. A model is disabled for the whole process, not for one thread.

    Args:
        model: a patched model, or one that holds patched ones: wrapped, compiled, a LightningModule.

    Raises:
        PlanError: the model is not patched.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for patched in patched_models(model).values():
            for site in plan_of(patched).swapped:
                upsampler = patched.get_submodule(cast(str, site.module))
                changed.append((upsampler, upsampler.__dict__.get("forward")))
                upsampler.__dict__["forward"] = functools.partial(_resize, site, original_layer(upsampler))
        yield model
    finally:
        for upsampler, before in reversed(changed):
            if before is None:
                del upsampler.__dict__["forward"]
            else:
                upsampler.__dict__["forward"] = before


def _resize(
    site: Site, layer: nn.Module | None, x: torch.Tensor, size: Any = None, scale_factor: Any = None
) -> torch.Tensor:
    """The resize that an upsampler stands for, as its call asks for it; that of its layer where the call asks for nothing."""
    if layer is not None and size is None and scale_factor is None:
        return cast(torch.Tensor, layer.forward(x))  # its hooks run for the upsampler
    return Mapping(cast(Mode, site.mode), site.align_corners).resize(x, size, scale_factor)
