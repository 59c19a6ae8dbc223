"""Inputs described as plain data, and built from their description."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from ...errors import InputError
from ...shown import brief
from ..callsites.functions import loaded
from .inputs import Inputs, _fields, _has_fields, _instance, _parts


def describe(value: Any) -> Any:
    """`value` as plain data that JSON can hold: shapes and dtypes for tensors, the values of numbers and strings.

    Containers are tuples, lists, dicts, named tuples and instances of dataclasses (which transformers' outputs are). Raises
    `InputError` for anything else, which cannot be made again from a description. A table by type, as `build` is by form.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": _name(value.dtype)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe(item) for item in value]}
    if isinstance(value, Inputs):
        return {"args": describe(value.args), "kwargs": describe(value.kwargs)}
    parts = _parts(value)
    if parts is not None and _find(type(value).__module__, type(value).__qualname__) is type(value):
        fields = {name: describe(item) for name, item in parts.items()}
        return {"instance": [type(value).__module__, type(value).__qualname__, fields]}
    if type(value) in (dict, OrderedDict) and all(isinstance(key, str) for key in value):
        return {_DICTS[type(value)]: {key: describe(item) for key, item in value.items()}}
    if type(value) is dict and all(isinstance(key, str | int) for key in value):
        return {"items": [[key, describe(item)] for key, item in value.items()]}
    raise InputError(f"a {type(value).__name__} cannot be described as plain data")


_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered"}


def build(description: Any, make: Callable[[list[int], torch.dtype], torch.Tensor]) -> Any:
    """The value that `describe` described, its tensors made by `make(shape, dtype)`.

    A description may come from a stranger's file: the classes it names must be loaded already and be dataclasses or named
    tuples, and none of their code is run.
    """
    if "tensor" in description:
        return make(list(description["tensor"]), _dtype(description["dtype"]))
    if "args" in description:
        return Inputs(build(description["args"], make), build(description["kwargs"], make))
    ((form, content),) = description.items()
    if form == "size":
        return torch.Size(content)
    if form == "dtype":
        return _dtype(content)
    if form == "value":
        return content
    if form in ("tuple", "list"):
        items = [build(item, make) for item in content]
        return tuple(items) if form == "tuple" else items
    if form in ("dict", "ordered"):
        made = {key: build(item, make) for key, item in content.items()}
        return made if form == "dict" else OrderedDict(made)
    if form == "items":
        return {key: build(item, make) for key, item in content}
    if form == "instance":
        module, name, fields = content
        cls = _find(module, name)
        if cls is None:
            raise InputError(f"{module}.{name} is no loaded dataclass or named tuple")
        unknown = set(fields) - set(_fields(cls))
        if unknown:
            raise InputError(f"{module}.{name} has no field {brief(next(iter(unknown)))}")
        return _instance(cls, {field: build(item, make) for field, item in fields.items()})
    raise InputError(f"{brief(form)} is not a description of a value")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _find(module: str, name: str) -> type | None:
    """The named tuple or dataclass of that name in a module that is loaded."""
    found = loaded(module, name)
    return found if isinstance(found, type) and _has_fields(found) else None


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{brief(name)} is not the name of a torch.dtype")
    return found
