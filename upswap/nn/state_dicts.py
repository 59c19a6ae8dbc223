"""Upsamplers known by the names and shapes of their tensors, where nothing else is left of them: in a state dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import OptionError
from ..plan.site import Site
from .configs import Shapes
from .registry import config_class, imported_names, make_upsampler

#: An upsampler's own tensors have names of up to four parts: `init_pos`, `conv_offset.1.norm.weight`. One part more shows
#: another module.
_PARTS = 5


def upsamplers_in(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The paths in a state dict at which the tensors of upsamplers stand, as their names and shapes have it.

    >>> from upswap import DySample
    >>> upsamplers_in({f"decoder.up.{name}": tensor for name, tensor in DySample(64).state_dict().items()})
    ['decoder.up']
    """
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for at in range(max(len(parts) - _PARTS, 1), len(parts)):
            groups.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = tuple(tensor.shape)
    configs = [config_class(name) for name in imported_names()]
    return [path for path, group in groups.items() if any(cls.is_of(group) for cls in configs)]


def options_in(site: Site, shapes: Shapes, upsampler: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and options of upsamplers whose tensors at a site have these names and shapes, those of `upsampler` first."""
    for name in dict.fromkeys((upsampler, *imported_names())):
        for options in config_class(name).candidates(shapes):
            if shapes_at(site, name, options) == shapes:
                yield name, options


def shapes_at(site: Site, upsampler: str, options: Mapping[str, Any]) -> Shapes:
    """The names and shapes of the tensors of an upsampler with these options at a site; none where it cannot be made."""
    try:
        with torch.device("meta"):
            made = make_upsampler(dataclasses.replace(site, config=options), upsampler)
    except OptionError:
        return {}
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
