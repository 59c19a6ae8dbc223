"""Swap a model's fixed upsampling for learned upsampling, in one line, with nothing changed at step 0."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import freeze_host, inspect, param_groups, parameters, patch, plan_of, unpatch, upsamplers
    from .checkpoint import load, save
    from .dysample import DySample
    from .errors import (
        FilterError,
        InputError,
        NothingToSwapError,
        OptionError,
        PlanError,
        RewriteError,
        SaveError,
        ShapeError,
        SourceError,
        UntrustedFileError,
        UpswapError,
        UpswapWarning,
        VerificationError,
    )
    from .sites import Plan, Site
    from .upsamplers import register_upsampler
    from .verify import Report, verify

__all__ = [
    "DySample",
    "FilterError",
    "InputError",
    "NothingToSwapError",
    "OptionError",
    "Plan",
    "PlanError",
    "Report",
    "RewriteError",
    "SaveError",
    "ShapeError",
    "Site",
    "SourceError",
    "UntrustedFileError",
    "UpswapError",
    "UpswapWarning",
    "VerificationError",
    "__version__",
    "freeze_host",
    "inspect",
    "load",
    "param_groups",
    "parameters",
    "patch",
    "plan_of",
    "register_upsampler",
    "save",
    "unpatch",
    "upsamplers",
    "verify",
]

# The public names are imported when they are first asked for: `upswap --help` goes through this file and must not load torch.
_HOMES = {
    "api": ("freeze_host", "inspect", "param_groups", "parameters", "patch", "plan_of", "unpatch", "upsamplers"),
    "checkpoint": ("load", "save"),
    "dysample": ("DySample",),
    "sites": ("Plan", "Site"),
    "upsamplers": ("register_upsampler",),
    "verify": ("Report", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name, "errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing a submodule sets it on its package; those named like a public function must not hide that."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
