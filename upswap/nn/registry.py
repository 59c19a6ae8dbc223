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
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..errors import OptionError
from ..plan.plan import Options
from ..plan.site import Site
from .composed import ByChannels

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
