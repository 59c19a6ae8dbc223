"""Modules that take a resize's place, and the registry that makes one for a Site.

DySample, CARAFE, chains of them and tables of them by channel count. `configs` has their options and needs no torch; `sampling/`
below is functions of tensors only. Nothing here knows a model, a file or source code. A new upsampler is a file here, with
its factory registered at the end, a config in `configs`, and a row in `registry.OWN`.

The classes below are part of the file format under the address they have here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .carafe import CARAFE
    from .composed import ByChannels, Cascade
    from .configs import CARAFEConfig, DySampleConfig, UpsamplerConfig
    from .dysample import DySample
    from .projection import Projection
    from .registry import register_upsampler

__all__ = [
    "CARAFE",
    "ByChannels",
    "CARAFEConfig",
    "Cascade",
    "DySample",
    "DySampleConfig",
    "Projection",
    "UpsamplerConfig",
    "register_upsampler",
]

# Imported when they are first asked for: the command line reads the configs and must not load torch.
_HOMES = {
    "CARAFE": "carafe",
    "ByChannels": "composed",
    "Cascade": "composed",
    "CARAFEConfig": "configs",
    "DySampleConfig": "configs",
    "UpsamplerConfig": "configs",
    "DySample": "dysample",
    "Projection": "projection",
    "register_upsampler": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
