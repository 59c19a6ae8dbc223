"""Swap a model's fixed upsampling for learned upsampling, in one line, with nothing changed at step 0."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import (
        Conversion,
        convert,
        inspect,
        is_patched,
        patch,
        plan_of,
        unpatch,
    )
    from .errors import (
        ExportError,
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
    from .export.export import Exported, export_onnx
    from .export.exportable import exportable
    from .files.checkpoint import load, save
    from .nn.configs import DySampleConfig
    from .nn.dysample import DySample
    from .nn.registry import create_upsampler, register_upsampler
    from .plan.plan import Options, Plan
    from .plan.site import KINDS, Site
    from .surgery.checking.verification import Report, capture, compare, verify
    from .training.groups import add_to_optimizer, freeze_host, param_groups, parameters, upsamplers
    from .training.status import Status, status
    from .training.switch import disabled

__all__ = [
    "KINDS",
    "Conversion",
    "DySample",
    "DySampleConfig",
    "ExportError",
    "Exported",
    "FilterError",
    "InputError",
    "NothingToSwapError",
    "Offsets",
    "OptionError",
    "Options",
    "Plan",
    "PlanError",
    "Report",
    "RewriteError",
    "SaveError",
    "ShapeError",
    "Site",
    "SourceError",
    "Status",
    "UntrustedFileError",
    "UpswapError",
    "UpswapWarning",
    "VerificationError",
    "__version__",
    "add_to_optimizer",
    "capture",
    "compare",
    "convert",
    "create_upsampler",
    "disabled",
    "export_onnx",
    "exportable",
    "freeze_host",
    "inspect",
    "is_patched",
    "load",
    "offsets",
    "param_groups",
    "parameters",
    "patch",
    "plan_of",
    "register_upsampler",
    "save",
    "status",
    "unpatch",
    "upsamplers",
    "verify",
]

# The public names are imported when they are first asked for: `upswap --help` goes through this file and must not load torch.
_HOMES = {
    "api": (
        "Conversion",
        "convert",
        "inspect",
        "is_patched",
        "patch",
        "plan_of",
        "unpatch",
    ),
    "export.export": ("Exported", "export_onnx"),
    "export.exportable": ("exportable",),
    "files.checkpoint": ("load", "save"),
    "nn": ("DySample", "DySampleConfig", "create_upsampler", "register_upsampler"),
    "plan.plan": ("Options", "Plan"),
    "plan.site": ("KINDS", "Site"),
    "surgery.checking.verification": ("Report", "capture", "compare", "verify"),
    "training.groups": ("add_to_optimizer", "freeze_host", "param_groups", "parameters", "upsamplers"),
    "training.offsets": ("Offsets", "offsets"),
    "training.status": ("Status", "status"),
    "training.switch": ("disabled",),
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
