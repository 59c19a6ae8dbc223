"""The registry of upsamplers: a name, the options it has, and a factory that makes the module for one site.

    @dataclasses.dataclass(frozen=True)
    class MineConfig(upswap.nn.UpsamplerConfig):
        kernel: int = 3

    @upswap.register_upsampler("mine", options=MineConfig)
    def mine(site: Site, config: MineConfig) -> nn.Module: ...

    upswap.patch(model, upsampler="mine", kernel=5)

The module is called as `module(x)`, `module(x, size)` or `module(x, None, scale_factor)` with x of shape (N, C, H, W), as
`F.interpolate` would be, and gives (N, C, H', W'). A size below that of x is its own to handle. At step 0 it computes what
the original resize computed, or is registered with `exact=False`. `docs/upsamplers.md` has all of it, with an example.

Names that are not registered are looked for among upswap's own and among the entry points that installed packages have in the
group `upswap.upsamplers`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..errors import OptionError
from ..plan.plan import Plan
from ..plan.site import Site
from .arguments import positive_int, scale_pair
from .composed import ByChannels
from .configs import Init, UpsamplerConfig, from_plain, option_types
from .sampling.positions import Mode

#: Makes the module for one site with the options that fit it.
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

#: The group of entry points that name modules which register an upsampler.
ENTRY_POINTS = "upswap.upsamplers"

#: upswap's own, and the modules whose import registers them.
OWN = {
    "dysample": "dysample",
    "carafe": "kernels.carafe",
    "lda_aqu": "kernels.lda_aqu",
    "fade": "kernels.fade",
    "fade-lite": "kernels.fade",
    "sapa-b": "kernels.sapa",
    "freqfusion": "kernels.freqfusion",
}


class _Registered(NamedTuple):
    factory: Callable[..., nn.Module]
    config: type[UpsamplerConfig]
    exact: bool | Callable[[Any], bool]
    guided: bool


_FACTORIES: dict[str, _Registered] = {}


def register_upsampler(
    name: str,
    *,
    options: type[UpsamplerConfig] = UpsamplerConfig,
    exact: bool | Callable[[Any], bool] = True,
    guided: bool = False,
) -> Callable[[Factory], Factory]:
    """Decorator: make a factory known under a name.

    Args:
        name: what `upsampler=` takes.
        options: the class of its options; by default it has none. The factory gets an instance that fits the site.
        exact: whether a model patched with it computes at step 0 what it did before, or from the options whether it does.
            `upswap convert` refuses to save a model that is declared so and is not. Of one that is not declared so it checks
            that it runs and that shapes and types are the same.
        guided: whether its modules take a guide, the feature that their output is fused with, as `module(x, guide=feature)`.
            The factory then gets the channels of that as a third argument. `patch` gives it to the sites that have a guide.

    Raises:
        OptionError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise OptionError(f"an upsampler named {name!r} is registered already; choose another name")
        option_types(options)
        _FACTORIES[name] = _Registered(factory, options, exact, guided)
        return factory

    return register


def upsampler_names() -> list[str]:
    """The names that `upsampler=` takes: the registered ones and those of installed packages, which are not imported."""
    return sorted({*_FACTORIES, *OWN, *importlib.metadata.entry_points(group=ENTRY_POINTS).names})


def imported_names() -> list[str]:
    """The names of upswap's own upsamplers and of those that have been registered; no package is asked for others."""
    return list(dict.fromkeys((*OWN, *_FACTORIES)))


def is_own(name: str) -> bool:
    """Whether the upsampler of that name is one of upswap's own."""
    return name in OWN


def config_class(name: str) -> type[UpsamplerConfig]:
    """The class of an upsampler's options; `OptionError` where no upsampler has that name."""
    return _registered(name).config


def name_of(config: UpsamplerConfig) -> str:
    """The name of the upsampler whose options these are; `OptionError` where none is registered with them."""
    for name in imported_names():
        if config_class(name) is type(config) is not UpsamplerConfig:
            return name
    raise OptionError(f"no upsampler is registered with options of the class {type(config).__qualname__}")


def make_config(name: str, values: Mapping[str, Any], also: Iterable[str] = ()) -> UpsamplerConfig:
    """The options of the upsampler `name` with these values, plain data.

    Raises `OptionError` for a name that no upsampler has, for an option that it does not have, with near names (those in `also`
    among them), and for a value that cannot be.
    """
    cls = config_class(name)
    known = list(option_types(cls))
    for option in values:
        if option not in known:
            near = difflib.get_close_matches(option, [*known, *also], n=3)
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise OptionError(
                f"upsampler {name!r} has no option {option!r}; " + (f"near it: {', '.join(near)}" if near else has)
            )
    return from_plain(cls, values)


def is_exact(plan: Plan) -> bool:
    """Whether a model patched as `plan` says computes at step 0 what it did, as its upsampler declares."""
    if not plan.swapped:
        return _is_exact(plan.options.upsampler, plan.options.config)
    return all(_is_exact(plan.upsampler_of(site), site.config) for site in plan.swapped)


def _is_exact(name: str, config: Mapping[str, Any]) -> bool:
    exact = _registered(name).exact
    return exact if isinstance(exact, bool) else exact(make_config(name, config))


def make_upsampler(site: Site, name: str) -> nn.Module:
    """The module for one site, with the options in `site.config`.

    A site with several channel counts gets one for each. Raises `OptionError` as `make_config`, and for an upsampler that takes
    a guide at a site that has none.
    """
    factory, _, _, guided = _registered(name)
    config = make_config(name, site.config)
    if guided:
        if site.guide is None:
            raise OptionError(f"upsampler {name!r} takes a guide, and the site {site.name} has none")
        return factory(site, config.fit(site)[0], site.guide.channels)

    def make(one: Site) -> nn.Module:
        return factory(one, config.fit(one)[0])

    if not site.other_channels:
        return make(site)
    return ByChannels({one.channels: make(one) for one in by_channels(site)})


def is_guided(name: str) -> bool:
    """Whether an upsampler takes a guide, the feature that its output is fused with; `OptionError` where none has that name."""
    return _registered(name).guided


def create_upsampler(
    name: str,
    channels: int,
    guide_channels: int | None = None,
    scale: float | Sequence[float] = 2,
    init: Init = "match",
    *,
    mode: Mode = "bilinear",
    align_corners: bool = False,
    **options: Any,
) -> nn.Module:
    """An upsampler by its name, for a model of your own.

    Args:
        name: "dysample", "carafe", "lda_aqu", "fade", "fade-lite", "sapa-b", "freqfusion", or of one that is registered or in an
            installed package.
        channels: of the map that is upsampled.
        guide_channels: of the guide, for one that takes a guide; None for as many.
        scale: the factor, or (vertical, horizontal) factors, at least 1.
        init: "match" to start at the resize of `mode`, "paper" to start as published.
        mode: the resize that it starts at: nearest, nearest-exact, area, bilinear or bicubic.
        align_corners: of that resize.
        options: those of the upsampler; docs/upsamplers.md has them.

    Returns:
        A module that is called as `module(x)`, `module(x, size=(h, w))` or `module(x, scale_factor=factor)`; one that takes a
        guide as `module(x, guide=feature)`, with these arguments or without.

    Raises:
        OptionError: no upsampler has that name, or it has no such option, or not with such a value.

    >>> import torch
    >>> import upswap
    >>> up = upswap.create_upsampler("fade", 64, guide_channels=32, gating=False)
    >>> up(torch.randn(1, 64, 12, 16), guide=torch.randn(1, 32, 24, 32)).shape
    torch.Size([1, 64, 24, 32])
    """
    registered = _registered(name)
    if "init" in option_types(registered.config) or init != "match":
        options = {**options, "init": init}
    factors = tuple(map(float, scale_pair(scale)))
    config = make_config(name, options)
    site = Site(
        name=name,
        owner="",
        owner_class="torch.nn.Upsample",
        ordinal=0,
        kind="feature",
        op="module",
        mode=mode,
        align_corners=align_corners,
        antialias=False,
        sized_by="scale_factor",
        scale=(factors[0], factors[1]),
        fixed_ratio=True,
        channels=positive_int("channels", channels),
        other_channels=(),
        in_shape=(),
        out_shape=(),
        dtype="float32",
        calls=1,
        location=None,
    )
    fitted, notes = config.fit(site)
    if any(getattr(fitted, option) != getattr(config, option) for option in options):
        raise OptionError(f"{name}: {'; '.join(notes)}. Give these options, or leave them out")
    if registered.guided:
        return registered.factory(site, fitted, site.channels if guide_channels is None else guide_channels)
    if guide_channels is not None:
        raise OptionError(f"upsampler {name!r} takes no guide: leave guide_channels out")
    return registered.factory(site, fitted)


def by_channels(site: Site) -> list[Site]:
    """The site once for each channel count it has."""
    counts = (site.channels, *site.other_channels)
    return [dataclasses.replace(site, channels=count, other_channels=()) for count in counts]


def _registered(name: str) -> _Registered:
    """What is registered under `name`, by an installed package's module if by none that is imported already."""
    if name not in _FACTORIES and name in OWN:
        importlib.import_module(f".{OWN[name]}", __package__)
    if name not in _FACTORIES:
        _import_announced(name)
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, upsampler_names(), n=3)
        raise OptionError(
            f"no upsampler named {name!r}; {'near it: ' + ', '.join(near) + '; ' if near else ''}known are "
            f"{', '.join(upsampler_names())}. One of your own has to be imported, or "
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
