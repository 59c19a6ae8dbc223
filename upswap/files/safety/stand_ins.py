"""Stand-ins for what a file names: blank instances of its classes, and nothing of the file's choosing is called.

The unpickler hands these to the file in the place of classes and functions; `unseal` puts the real ones back in the model.
"""

from __future__ import annotations

import enum
import importlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...architectures.packages import inside
from ...errors import UntrustedFileError

#: Packages of layers. Their classes may be attributes of a model (`self.norm = nn.ReLU`), which its forward can call.
#: Classes of whole models may not: the constructors of some download, or evaluate text of their configuration.
LAYERS: tuple[str, ...] = (
    "torch.nn.modules",
    "torchvision.ops",
    "timm.layers",
    "monai.networks.blocks",
    "monai.networks.layers",
)

#: How a pickle names what NumPy's numbers are made by.
NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")

#: What `torch.serialization.safe_globals` takes: an object, with the name a file knows it by.
SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]


def unseal(model: torch.nn.Module) -> torch.nn.Module:
    """Put real classes and functions back, in place, where a module holds one as a value (`self.norm = nn.ReLU`).

    `UntrustedFileError` where it stands in the way of a method or hook, which would make others call it.
    """
    for module in model.modules():
        for key, value in list(vars(module).items()):
            real = opened(value)
            if real is value:
                continue
            if "_hooks" in key or hasattr(type(module), key):
                raise UntrustedFileError(f"it puts a class or function in the place of {type(module).__name__}.{key}")
            module.__dict__[key] = real
    return model


class Sealed(type):
    """The type of the stand-ins that a file gets for classes."""

    original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """What a pickle's REDUCE reaches. Enumerations look a member up this way, and namespaces are made blank."""
        if issubclass(cls.original, enum.Enum) and len(args) == 1 and not kwargs:
            # Looked up, not called: an enumeration may run code for an unknown value, and a flag keeps what it makes.
            found = next((member for member in _members(cls.original) if _is_same(member.value, args[0])), None)
            if found is not None:
                return found
        if issubclass(cls.original, types.SimpleNamespace) and not args and not kwargs:
            return types.SimpleNamespace.__new__(cls.original)
        raise UntrustedFileError(f"it tries to call {cls.original.__module__}.{cls.original.__qualname__}")


def _members(cls: type[enum.Enum]) -> Iterable[enum.Enum]:
    return cls.__members__.values()


def _is_same(value: Any, other: Any) -> bool:
    """Equality of plain values, without asking an object of the file."""
    return type(value) is type(other) and isinstance(value, str | int | float | bytes) and value == other


class SealedFunction:
    """The stand-in for a function that a model keeps as an attribute: a value until `unseal`, and never called."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, whatever the arguments."""
        raise UntrustedFileError(f"it tries to call {self.original.__module__}.{self.original.__qualname__}")


def seal(original: type) -> type:
    """The stand-in for a class: a file can have blank instances of it, and nothing else."""

    def new(cls: type, *args: Any) -> Any:
        if issubclass(original, tuple):
            return tuple.__new__(original, args)
        if args:
            raise UntrustedFileError(f"it passes arguments to {original.__module__}.{original.__qualname__}")
        return object.__new__(original)

    body = {"__new__": new, "original": original, "__module__": original.__module__}
    return Sealed(original.__name__, (), body)


def opened(value: Any) -> Any:
    """`value` with real classes for sealed ones, the same object where it holds none."""
    if isinstance(value, Sealed) and not inside(value.original.__module__, LAYERS):
        raise UntrustedFileError(f"it keeps the class {value.original.__qualname__} of models as a value, to be called")
    if isinstance(value, Sealed | SealedFunction):
        return value.original
    if isinstance(value, NumpyType):
        return value.real()
    if type(value) in (list, tuple, set):
        items = [opened(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if isinstance(value, dict):
        changed = {key: new for key, item in value.items() if (new := opened(item)) is not item}
        if changed:
            value = value.copy()
            value.update(changed)
    return value


class NumpyType:
    """The stand-in for a NumPy dtype: a kind of number, its size and byte order."""

    order = "="

    def __init__(self, text: Any) -> None:
        if not (isinstance(text, str) and re.fullmatch(r"[biufc]\d{1,2}", text)):
            raise UntrustedFileError("it holds a NumPy type that is no plain number")
        self.text = text

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in tuple("<>|=")):
            raise UntrustedFileError("it holds a NumPy type that is no plain number")
        self.order = state[1]

    def real(self) -> Any:
        """The dtype itself."""
        return importlib.import_module("numpy").dtype(self.order + self.text)


def _numpy_type(text: Any, align: Any = False, copy: Any = True) -> NumpyType:
    return NumpyType(text)


def _numpy_scalar(kind: Any, data: Any) -> Any:
    """A number from its bytes. NumPy's own function would do more with objects and other types."""
    dtype = kind.real() if isinstance(kind, NumpyType) else None
    if dtype is None or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise UntrustedFileError("it holds a NumPy scalar that is no plain number")
    return importlib.import_module("numpy").frombuffer(data, dtype)[0]


def numpy_globals(name: str) -> list[SafeGlobal]:
    """The pairs for `torch.serialization.safe_globals` for one of the names in `NUMPY`."""
    return [(_numpy_type if name == "numpy.dtype" else _numpy_scalar, name), (NumpyType, "\nnumpy")]
