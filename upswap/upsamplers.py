"""The registry of upsamplers: a name, and a factory that makes the module for one site.

    @upswap.register_upsampler("mine")
    def mine(site: Site, options: Options) -> nn.Module: ...

    upswap.patch(model, upsampler="mine")

The module is called as `module(x)`, `module(x, size)` or `module(x, None, scale_factor)` with x of shape (N, C, H, W), as
`F.interpolate` would be, and gives (N, C, H', W'). A size below that of x is its own to handle. At step 0 it computes what
the original resize computed, or is registered with `exact=False`. `docs/upsamplers.md` has all of it, with an example.

Names that are not registered are looked for among the entry points that installed packages have in the group
`upswap.upsamplers`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .carafe import CARAFE
from .dysample import DySample
from .errors import OptionError, ShapeError
from .sites import Options, Site

Factory = Callable[[Site, Options], nn.Module]

#: The group of entry points that name modules which register an upsampler.
ENTRY_POINTS = "upswap.upsamplers"


class _Registered(NamedTuple):
    factory: Factory
    exact: bool | Callable[[Options], bool]


_FACTORIES: dict[str, _Registered] = {}


def register_upsampler(name: str, *, exact: bool | Callable[[Options], bool] = True) -> Callable[[Factory], Factory]:
    """Decorator: make a factory known under `name`. A name already taken is an `OptionError`.

    `exact` declares whether a model patched with it computes at step 0 what it did before, or from the options whether it
    does. `upswap convert` refuses to save a model that is declared so and is not; of one that is not declared so it checks that
    it runs and that shapes and types are the same.
    """

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise OptionError(f"an upsampler named {name!r} is registered already; choose another name")
        _FACTORIES[name] = _Registered(factory, exact)
        return factory

    return register


def upsampler_names() -> list[str]:
    """The names that `upsampler=` takes: the registered ones and those of installed packages, which are not imported."""
    return sorted({*_FACTORIES, *importlib.metadata.entry_points(group=ENTRY_POINTS).names})


def is_exact(options: Options) -> bool:
    """Whether the upsampler that `options` name declares that it computes the original resize at step 0."""
    exact = _registered(options.upsampler).exact
    return exact if isinstance(exact, bool) else exact(options)


def make_upsampler(site: Site, options: Options) -> nn.Module:
    """The module for one site; `OptionError` for a name that is not registered."""
    factory = _registered(options.upsampler).factory
    if not site.other_channels:
        return factory(site, options)
    alone = [dataclasses.replace(site, channels=count, other_channels=()) for count in site.other_channels]
    return ByChannels({one.channels: factory(one, options) for one in (site, *alone)})


def _registered(name: str) -> _Registered:
    """What is registered under `name`, by an installed package's module if by none that is imported already."""
    if name not in _FACTORIES:
        _import_announced(name)
    if name not in _FACTORIES:
        raise OptionError(
            f"no upsampler named {name!r}; known are {', '.join(upsampler_names())}. One of your own has to be imported, or "
            f"its package installed with an entry point of that name in the group {ENTRY_POINTS}"
        )
    return _FACTORIES[name]


def _import_announced(name: str) -> None:
    """Import the module that an installed package announces as that of the upsampler `name`, if one does."""
    found = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
    if len(found) > 1:
        places = ", ".join(sorted(f"{entry.value} ({_package(entry)})" for entry in found))
        raise OptionError(
            f"several installed packages have an upsampler named {name!r}: {places}; import the one meant"
        )
    for entry in found:
        try:
            entry.load()
        except Exception as error:  # importing runs a package's own code
            raise OptionError(
                f"upsampler {name!r}: importing {entry.value}, which {_package(entry)} names for it, fails: "
                f"{type(error).__name__}: {error}"
            ) from error
        if name not in _FACTORIES:
            raise OptionError(
                f"upsampler {name!r}: {entry.value}, which {_package(entry)} names for it, registers none of that name; "
                f"decorate its factory with @upswap.register_upsampler({name!r})"
            )


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return "an installed package" if entry.dist is None else entry.dist.name


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


@register_upsampler("dysample", exact=lambda options: options.init == "match" and not options.cascade)
def _dysample(site: Site, options: Options) -> nn.Module:
    settings, _ = dysample_settings(site, options)
    scale = settings.pop("scale")
    return _cascaded(scale, options, lambda factor: DySample(site.channels, factor, **_resize(site), **settings))


@register_upsampler("carafe", exact=False)
def _carafe(site: Site, options: Options) -> nn.Module:
    given = {"style": options.style != "lp", "groups": options.groups is not None, "dyscope": options.dyscope}
    foreign = ", ".join(name for name, is_given in given.items() if is_given)
    if foreign:
        raise OptionError(f"upsampler 'carafe' has none of dysample's options; leave out: {foreign}")
    return _cascaded(_nominal_scale(site), options, lambda factor: CARAFE(site.channels, factor, **_resize(site)))


def _resize(site: Site) -> dict[str, Any]:
    """What an upsampler is told of the resize it stands in for."""
    return {"mode": site.mode, "align_corners": site.align_corners}


def _cascaded(scale: Sequence[float], options: Options, make: Callable[[Any], nn.Module]) -> nn.Module:
    """The upsampler that `make` makes for a ratio, or with `options.cascade` several of them in a chain."""
    factors = _cascade_factors(scale) if options.cascade else []
    return Cascade(make(factor) for factor in factors) if len(factors) > 1 else make(scale)


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
