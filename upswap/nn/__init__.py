"""Modules that take a resize's place, and the registry that makes one for a Site.

DySample, chains of upsamplers and tables of them by channel count; `kernels/` has those that weigh a neighbourhood. `configs` has
their options and needs no torch; `sampling/` is functions of tensors only. Nothing here knows a model, a file or source code. A
new upsampler is a file here, with its factory registered at the end, a config in the `configs` beside it, and a row in
`registry.OWN`.

The classes below are part of the file format under the address they have here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composed import ByChannels, Cascade
    from .configs import DySampleConfig, UpsamplerConfig
    from .dysample import DySample
    from .kernels.carafe import CARAFE
    from .kernels.configs import (
        CARAFEConfig,
        FADEConfig,
        FADELiteConfig,
        FreqFusionConfig,
        LDAAQUConfig,
        SAPAConfig,
    )
    from .kernels.fade import FADE
    from .kernels.freqfusion import FreqFusion
    from .kernels.lda_aqu import LDAAQU
    from .kernels.sapa import SAPA
    from .projection import Affine, Projection
    from .registry import create_upsampler, register_upsampler

__all__ = [
    "CARAFE",
    "FADE",
    "LDAAQU",
    "SAPA",
    "Affine",
    "ByChannels",
    "CARAFEConfig",
    "Cascade",
    "DySample",
    "DySampleConfig",
    "FADEConfig",
    "FADELiteConfig",
    "FreqFusion",
    "FreqFusionConfig",
    "LDAAQUConfig",
    "Projection",
    "SAPAConfig",
    "UpsamplerConfig",
    "create_upsampler",
    "register_upsampler",
]

# Imported when they are first asked for: the command line reads the configs and must not load torch.
_HOMES = {
    "Affine": "projection",
    "ByChannels": "composed",
    "CARAFE": "kernels.carafe",
    "CARAFEConfig": "kernels.configs",
    "Cascade": "composed",
    "DySample": "dysample",
    "DySampleConfig": "configs",
    "FADE": "kernels.fade",
    "FADEConfig": "kernels.configs",
    "FADELiteConfig": "kernels.configs",
    "FreqFusion": "kernels.freqfusion",
    "FreqFusionConfig": "kernels.configs",
    "LDAAQU": "kernels.lda_aqu",
    "LDAAQUConfig": "kernels.configs",
    "Projection": "projection",
    "SAPA": "kernels.sapa",
    "SAPAConfig": "kernels.configs",
    "UpsamplerConfig": "configs",
    "create_upsampler": "registry",
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
