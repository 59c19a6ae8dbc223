"""Libraries whose trainers build a model anew, and upswap's module that keeps a patch there.

A patched model of such a library carries a mark, an object of that module. So the module is imported where a model of the library
is patched, and where a pickle of a patched one is opened, be it by the library itself. Nothing else imports it.
"""

from __future__ import annotations

import importlib
import warnings

from torch import nn

from ..errors import UpswapWarning

#: By the package that a model's class is in. Each module has a class `Mark`.
_INTEGRATIONS = {"ultralytics": "upswap.integrations.ultralytics"}

_MARK = "_upswap_mark"


def mark(model: nn.Module) -> None:
    """Let a patched model be known to its library's trainers, where they need it."""
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package in _INTEGRATIONS.keys() & packages:
        try:
            module = importlib.import_module(_INTEGRATIONS[package])
        except ImportError as error:  # of a release that has moved what the module needs
            warnings.warn(
                f"{package}, as it is installed here, will build this {type(model).__name__} without its upsamplers where it "
                f"trains it: {_INTEGRATIONS[package]} cannot be imported ({error}). Use another release of {package}",
                UpswapWarning,
                stacklevel=2,
            )
        else:
            model.__dict__[_MARK] = module.Mark()


def unmark(model: nn.Module) -> None:
    """Undo `mark`."""
    model.__dict__.pop(_MARK, None)
