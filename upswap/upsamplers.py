"""The registry of upsamplers: a name, and a factory that makes the module for one site.

    @upswap.register_upsampler("mine")
    def mine(site: Site, options: Options) -> nn.Module: ...

    upswap.patch(model, upsampler="mine")

The module is called as `module(x)`, `module(x, size)` or `module(x, None, scale_factor)` with x of shape (N, C, H, W), as
`F.interpolate` would be, and gives (N, C, H', W'). A size below that of x is its own to handle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .dysample import DySample
from .errors import OptionError, ShapeError
from .sites import Options, Site

Factory = Callable[[Site, Options], nn.Module]

_FACTORIES: dict[str, Factory] = {}


def register_upsampler(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make a factory known under `name`. A name already taken is an `OptionError`."""

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise OptionError(f"an upsampler named {name!r} is registered already; choose another name")
        _FACTORIES[name] = factory
        return factory

    return register


def upsampler_names() -> list[str]:
    """The names that `upsampler=` takes."""
    return sorted(_FACTORIES)


def make_upsampler(site: Site, options: Options) -> nn.Module:
    """The module for one site; `OptionError` for a name that is not registered."""
    if options.upsampler not in _FACTORIES:
        raise OptionError(f"no upsampler named {options.upsampler!r}; registered are {', '.join(upsampler_names())}")
    factory = _FACTORIES[options.upsampler]
    if not site.other_channels:
        return factory(site, options)
    alone = [dataclasses.replace(site, channels=count, other_channels=()) for count in site.other_channels]
    return ByChannels({one.channels: factory(one, options) for one in (site, *alone)})


def dysample_settings(site: Site, options: Options) -> tuple[dict[str, Any], list[str]]:
    """The DySample options that fit one site, and what had to be changed for it, in words.

    `pl` needs channels divisible by the square of the ratio and falls back to `lp` where they are not; groups that do not
    divide the channels become the largest divisor below. With `options.strict` either is an `OptionError`.
    """
    notes: list[str] = []
    scale = tuple(int(value) if float(value).is_integer() else value for value in _nominal_scale(site))
    cells = math.prod(math.ceil(value) for value in scale)
    style = options.style
    if style == "pl" and site.channels % cells:
        if options.strict:
            raise OptionError(
                f"{site.name}: style 'pl' needs channels divisible by {cells}, the site has {site.channels}; use style 'lp', "
                "exclude the site, or drop strict"
            )
        notes.append(f"style lp, because {site.channels} channels are not divisible by {cells}")
        style = "lp"
    wanted = options.groups or (4 if style == "lp" else 8)
    groups = max(divisor for divisor in range(1, min(wanted, site.channels) + 1) if site.channels % divisor == 0)
    if groups != wanted:
        if options.strict and options.groups is not None:
            raise OptionError(
                f"{site.name}: {wanted} groups do not divide {site.channels} channels; the largest that does is {groups}"
            )
        notes.append(f"groups {groups}, the largest divisor of {site.channels} channels up to {wanted}")
    return {"scale": scale, "style": style, "groups": groups, "dyscope": options.dyscope, "init": options.init}, notes


def _nominal_scale(site: Site) -> tuple[float, float]:
    """The ratio an upsampler is built for.

    Where the ratio follows the input size there is no such ratio: offsets are then predicted at twice the source's size and
    resized to the target.
    """
    return site.scale if site.fixed_ratio is not False else (2.0, 2.0)


@register_upsampler("dysample")
def _dysample(site: Site, options: Options) -> nn.Module:
    settings, _ = dysample_settings(site, options)
    factors = _cascade_factors(settings["scale"]) if options.cascade else []
    shared = {
        "mode": site.mode,
        "align_corners": site.align_corners,
        **{k: settings[k] for k in settings if k != "scale"},
    }
    if len(factors) > 1:
        return Cascade(DySample(site.channels, factor, **shared) for factor in factors)
    return DySample(site.channels, settings["scale"], **shared)


def _cascade_factors(scale: Sequence[float]) -> list[int]:
    """x4 and x8 as the x2 steps the authors chained; any other ratio is one step."""
    if scale[0] == scale[1] and scale[0] in (4, 8):
        return [2] * int(math.log2(scale[0]))
    return []


class ByChannels(nn.Module):
    """An upsampler for each number of channels that one call, or one layer used at several places, has.

    Its state-dict keys have the number in them: `16.offset.weight`.
    """

    def __init__(self, upsamplers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for count, upsampler in upsamplers.items():
            self.add_module(str(count), upsampler)

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

    def __init__(self, steps: Any) -> None:
        super().__init__(*steps)

    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None, scale_factor: Any = None) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H', W'); the last step goes to `size` exactly."""
        if size is None and scale_factor is not None:
            factors = (scale_factor, scale_factor) if isinstance(scale_factor, int | float) else scale_factor
            size = [math.floor(n * f) for n, f in zip(x.shape[-2:], factors, strict=True)]
        *first, last = self
        for step in first:
            x = step(x)
        return last(x) if size is None else last(x, size)
