"""What the modules of a stranger's file may hold: plain names, and nothing in the place of a method or hook."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...architectures.packages import inside
from ...errors import UntrustedFileError
from ...shown import one_line
from ...surgery.routes.names import STORED, odd_names
from .stand_ins import SealedFunction

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
    odd = next(odd_names(model, STORED), None)
    if odd is not None:
        raise UntrustedFileError(f"it names a part of a {odd[0]} {odd[1][:80]!r}, which is no plain name")
    for instance in _instances(model):
        cls = type(instance)
        for key, value in vars(instance).items():
            if not isinstance(key, str):
                raise UntrustedFileError(f"a {cls.__name__} in it has an attribute whose name is no text")
            if _shadows(cls, key, value):
                raise UntrustedFileError(f"it puts {_told(value)} in the place of {cls.__name__}.{key}")
            if "_hooks" in key and isinstance(value, dict) and isinstance(instance, nn.Module):
                for hook in value.values():
                    if not _may_hook(hook, trusted):
                        raise UntrustedFileError(f"it puts {_told(hook)} among the {key} of {cls.__name__}")


def _instances(model: nn.Module) -> Iterator[Any]:
    """Every object in a model that has attributes: modules, configurations, namespaces. Stand-ins for classes are none."""
    seen: set[int] = set()
    queue: list[Any] = [model]
    while queue:
        value = queue.pop()
        if id(value) in seen or isinstance(value, type | SealedFunction):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            queue += value
        elif not isinstance(value, enum.Enum | torch.Tensor) and isinstance(getattr(value, "__dict__", None), dict):
            yield value
            queue += vars(value).values()


def _shadows(cls: type, key: str, value: Any) -> bool:
    """Whether an attribute of an instance hides one of its class that is code, or is code and hides any."""
    if key in getattr(cls, "__dataclass_fields__", ()):
        return False  # no method: what is on the class is the default of the field
    for base in cls.__mro__:
        if key in vars(base):
            own = vars(base)[key]
            if isinstance(value, str | int | float | None) and key != "forward" and not key.startswith("_"):
                return False  # ultralytics keeps the kind of a layer as `type`; text and numbers cannot be called
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
