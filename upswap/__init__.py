"""Swap a model's fixed upsampling for learned upsampling, in one line, with nothing changed at step 0."""

from ._version import __version__
from .api import (
    freeze_host,
    inspect,
    param_groups,
    parameters,
    patch,
    plan_of,
    unpatch,
    upsamplers,
)
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
