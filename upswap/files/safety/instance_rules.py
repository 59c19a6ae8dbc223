"""Rules for one instance in a file, of names and plain values alone: what its parts are called, what may hide what."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from ...errors import UntrustedFileError
from ...plan.site import is_plain
from .allowed_names import check_names, check_values
from .pickle_walks import COUNTABLE
from .stand_ins import Blank, BlankNamespace

# Beside plain names, those of torchvision's RegNet (`block1-0`) and MONAI's DiNTS (`(0, 1)`). None can end a string in source
# code; and what has one is never traced (`surgery.routes.traceable`).
_HARMLESS = re.compile(r"(?!__)[\w (),-]+", re.ASCII)
#: How long the name of a module, parameter or buffer may be: a state dict has it in the names of all that is below.
LONGEST_NAME = 255

#: What `of_class` gives where a class has nothing under a name.
MISSING = object()


def check_parts(model: nn.Module, path: str) -> nn.Module:
    """`model`, which the file or folder at `path` describes; a configuration can name parts.

    Raises `UntrustedFileError` for a name that a file may not have.
    """
    for module in model.modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            try:
                check_name(type(module), name)
            except UntrustedFileError as error:
                raise UntrustedFileError(f"{path} is refused: {error}") from error
    return model


def of_class(cls: type, name: str) -> Any:
    """What a class has under a name, without asking it."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)


def is_code(value: Any) -> bool:
    """Whether what a class has under a name is code: a function, or what answers when the attribute is asked for."""
    return callable(value) or hasattr(type(value), "__get__")


def is_number(value: Any) -> bool:
    """Whether a value is a number of NumPy, numbers, or their type. NumPy is not imported for it."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    return isinstance(value, numpy.number | numpy.bool_ | numpy.dtype) or (
        type(value) is numpy.ndarray and not value.dtype.hasobject
    )


def items_of(cls: type, place: str, state: Mapping[str, Any]) -> Iterable[tuple[Any, Any]]:
    """What a module to be keeps in one of its dicts; `UntrustedFileError` where that is no dict."""
    found = state.get(place, {})
    if type(found) not in (dict, OrderedDict):
        raise UntrustedFileError(f"it has {named(found)} in the place of {cls.__qualname__}.{place}")
    return type(found).items(found)


def check_counts(cls: type, state: Mapping[str, Any]) -> None:
    """`UntrustedFileError` for a tensor or number of NumPy to which the code that restores an instance could count too far.

    Plain numbers were seen in the pickle (`pickle_scan`), these have their values elsewhere.
    """
    for values in (state, *(state.get(place) or {} for place in ("_parameters", "_buffers"))):
        for name, value in values.items():
            number = _whole_number(value)
            if number is not None and abs(number) > COUNTABLE:
                raise UntrustedFileError(
                    f"it gives a {cls.__qualname__} the {shown_name(name)} {number}, which is too large"
                )


def _whole_number(value: Any) -> int | None:
    """The number that a tensor or value of NumPy can be used as in the place of a plain one."""
    if isinstance(value, torch.Tensor):
        whole = value.layout == torch.strided and not (value.is_floating_point() or value.is_complex())
        return int(value) if whole and value.numel() == 1 and not value.is_meta else None
    return int(value) if is_number(value) and getattr(value, "size", 0) == 1 and value.dtype.kind in "iu" else None


def check_name(cls: type, name: Any) -> None:
    """`UntrustedFileError` for a name that would not stay a name wherever one is written into source code, or that hides
    an attribute of the class from what looks for the part by its name.
    """
    if not (is_plain(name) or (isinstance(name, str) and _HARMLESS.fullmatch(name))):
        raise UntrustedFileError(
            f"a part of a {cls.__qualname__} in it is named {shown_name(name)}. Names have letters, digits, spaces and _ - , ( ) "
            "alone. Rename it in Python, or save the model as .safetensors, which upswap.load(path, model) reads"
        )
    if len(name) > LONGEST_NAME:
        raise UntrustedFileError(f"it has a part with a name of {len(name)} characters; {LONGEST_NAME} are the most")
    hidden = of_class(cls, name)
    if hidden is not MISSING and is_code(hidden):
        raise UntrustedFileError(f"it has a part of the name of {cls.__qualname__}.{name}")


def check_record(cls: Any, record: Any) -> None:
    """`UntrustedFileError` for a description of a rewritten module that upswap did not write."""
    if type(record) is not dict or type(record.get("sites")) is not list or not isinstance(cls, type):
        raise UntrustedFileError("it describes a rewritten module in a form upswap does not write")
    if not issubclass(cls, nn.Module):
        raise UntrustedFileError(f"it describes a rewritten {cls.__qualname__}, which is not a module class")
    if not all(type(site) is dict for site in record["sites"]):
        raise UntrustedFileError("it describes a rewritten module in a form upswap does not write")
    check_names(record["sites"])
    check_values(record.get("forward"), (cls.__module__,))


def named(value: Any) -> str:
    """A value in a message: by its own name where it has one, else by its class."""
    if isinstance(value, Blank | BlankNamespace):
        return f"a {vars(value)['original'].__qualname__}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"a {type(value).__qualname__}"


def shown_name(name: Any) -> str:
    """A name in a message, with its quotes."""
    return ascii(name)[:80] if isinstance(name, str) else named(name)
