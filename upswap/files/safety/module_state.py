"""What the modules of a stranger's file may hold: plain names, and nothing in the place of a method or hook."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...architectures.packages import inside
from ...errors import UntrustedFileError
from ...shown import one_line
from ...surgery.routes.names import odd_names

#: Objects of these hook a layer that they normalise; torch's own `spectral_norm` and `weight_norm` do.
_HOOKING = ("torch.nn.utils",)
#: What keeps a hook together with the module it is for.
_WRAPPER: Any = nn.modules.module._WrappedHook


def check_modules(model: nn.Module, trusted: tuple[str, ...] = ()) -> None:
    """`UntrustedFileError` for a name that could be read as code, and for a value that Python or torch would call unasked.

    Args:
        model: as a file gave it, with stand-ins for the classes in it.
        trusted: the packages whose functions and objects may be hooks.
    """
    odd = next(odd_names(model), None)
    if odd is not None:
        raise UntrustedFileError(f"it names a part of a {odd[0]} {odd[1][:80]!r}, which is no plain name or number")
    for module in model.modules():
        cls = type(module)
        for key, value in vars(module).items():
            if not isinstance(key, str):
                raise UntrustedFileError(f"a {cls.__name__} in it has an attribute whose name is no text")
            if _shadows(cls, key, value):
                raise UntrustedFileError(f"it puts {_told(value)} in the place of {cls.__name__}.{key}")
            if "_hooks" in key and isinstance(value, dict):
                for hook in value.values():
                    if not _may_hook(hook, trusted):
                        raise UntrustedFileError(f"it puts {_told(hook)} among the hooks of a {cls.__name__}")


def _shadows(cls: type, key: str, value: Any) -> bool:
    """Whether an attribute of an instance hides one of its class that is code, or is code and hides any."""
    for base in cls.__mro__:
        if key in vars(base):
            own = vars(base)[key]
            is_code = callable(own) or hasattr(type(own), "__get__")
            # Slots and the instance's own `__dict__` are data; a value there is what they are for.
            return (is_code and not hasattr(type(own), "__set__")) or callable(value)
    return False


def _may_hook(hook: Any, trusted: tuple[str, ...]) -> bool:
    """Whether a value in a table of hooks is data (a flag), an object that torch hooks with, or from a trusted package."""
    if isinstance(hook, _WRAPPER):
        return _may_hook(hook.hook, trusted)
    if not callable(hook):
        return True
    defined = hook.__module__ if hasattr(hook, "__qualname__") else type(hook).__module__
    if inside(str(defined), trusted):
        return True
    return not (hasattr(hook, "__qualname__") or isinstance(hook, nn.Module)) and inside(str(defined), _HOOKING)


def _told(value: Any) -> str:
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    return one_line(getattr(value, "__qualname__", None) or f"a {type(value).__name__}", 80)
