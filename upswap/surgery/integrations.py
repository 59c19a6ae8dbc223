"""Libraries whose trainers build a model anew, and the module of `upswap.integrations` that keeps a patch there.

A patched model of such a library carries a mark, an object of that module. So the module is imported where a model of the library
is patched, and where a pickle of a patched one is opened, be it by the library itself. Nothing else imports it. Which libraries
these are is known in that room, which is above this one and so looked up by its name.
"""

from __future__ import annotations

import importlib
import warnings

from torch import nn

from ..errors import UpswapWarning

_ROOM = "upswap.integrations"

_MARK = "_upswap_mark"


def mark(model: nn.Module) -> None:
    """Let a patched model be known to its library's trainers, where they need it."""
    modules: dict[str, str] = importlib.import_module(_ROOM).MARKING
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package in modules.keys() & packages:
        try:
            module = importlib.import_module(modules[package])
        except ImportError as error:  # of a release that has moved what the module needs
            warnings.warn(
                f"{package}, as it is installed here, will build this {type(model).__name__} without its upsamplers where it "
                f"trains it: {modules[package]} cannot be imported ({error}). Use another release of {package}",
                UpswapWarning,
                stacklevel=2,
            )
        else:
            model.__dict__[_MARK] = module.Mark()


def unmark(model: nn.Module) -> None:
    """Undo `mark`."""
    model.__dict__.pop(_MARK, None)
