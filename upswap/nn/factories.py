"""The factories of the two upsamplers that upswap has: what fits a site, and the module made for it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..errors import OptionError
from ..plan.plan import Options
from ..plan.site import Site
from .carafe import CARAFE
from .composed import _cascaded
from .dysample import DySample
from .registry import register_upsampler


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
