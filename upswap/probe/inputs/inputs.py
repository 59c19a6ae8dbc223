"""Example inputs: what the user gave, in one form, and as plain data.

A model is run on example inputs to find its resize calls. The user may pass them as a tensor, a tuple of positional
arguments, a dict of keyword arguments or `(args, kwargs)`; left out, they are inferred (`examples.py`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...errors import InputError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one forward: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, in order."""
        found: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found

    def copied(self) -> Inputs:
        """The same arguments for one run, which may change them."""
        args, kwargs = copied((self.args, self.kwargs))
        return Inputs(args, kwargs)

    def map(self, function: Callable[[torch.Tensor], Any]) -> Inputs:
        """The same structure with every tensor replaced by `function(tensor)`."""
        args, kwargs = map_tensors((self.args, self.kwargs), function)
        return Inputs(args, kwargs)


def as_inputs(example_inputs: Any) -> Inputs:
    """What the user passed as `example_inputs`, in one form.

    Accepts a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or `(args, kwargs)` with a
    tuple or list and a dict. A model whose one argument is a list or a dict takes it in a tuple: `([image],)`.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], tuple | list)
            and isinstance(example_inputs[1], dict)
        ):
            return Inputs(tuple(example_inputs[0]), dict(example_inputs[1]))
        return Inputs(tuple(example_inputs), {})
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of positional arguments, a dict of keyword "
        "arguments, or (args, kwargs)"
    )


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any], other: Callable[[Any], Any] | None = None) -> Any:
    """`value` with every tensor in its tuples, lists, dicts and dataclasses replaced by `function(tensor)`.

    What is neither is replaced by `other(value)`, if that is given.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    parts = _parts(value)
    if parts is not None:
        others = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in parts}
        return _instance(
            type(value), {name: map_tensors(item, function, other) for name, item in parts.items()}, others
        )
    if isinstance(value, tuple):
        return type(value)([map_tensors(item, function, other) for item in value])
    if isinstance(value, list):
        return [map_tensors(item, function, other) for item in value]
    if isinstance(value, dict):
        made = {key: map_tensors(item, function, other) for key, item in value.items()}
        return OrderedDict(made) if isinstance(value, OrderedDict) else made
    return value if other is None else other(value)


def copied(value: Any) -> Any:
    """`value` for one run of a model, which may write to its tensors and change the objects it is given (a session, a cache)."""
    return map_tensors(value, torch.clone, _copy_of)


def _copy_of(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError, NotImplementedError):  # a lock, a generator, a tensor of a graph inside
        return value


def _parts(value: Any) -> dict[str, Any] | None:
    """The fields of a named tuple or of an instance of a dataclass; None for anything else."""
    if isinstance(value, type | Inputs) or not _has_fields(type(value)):
        return None
    return {name: getattr(value, name) for name in _fields(type(value)) if hasattr(value, name)}


def _fields(cls: type) -> tuple[str, ...]:
    names: Any = getattr(cls, "__dataclass_fields__", None) or getattr(cls, "_fields", ())
    return tuple(names)


def _has_fields(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))


def _instance(cls: type, fields: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> Any:
    """An instance with these fields, and other attributes, made without running any code of the class."""
    if issubclass(cls, tuple):
        return tuple.__new__(cls, fields.values())
    made: Any = OrderedDict.__new__(cls) if issubclass(cls, OrderedDict) else object.__new__(cls)
    for name, value in {**(others or {}), **fields}.items():
        object.__setattr__(made, name, value)
        if issubclass(cls, OrderedDict) and name in fields and value is not None:  # transformers' ModelOutput
            OrderedDict.__setitem__(made, name, value)
    return made
