"""Plain data, as JSON has it, made into dataclasses by the types of their fields; what does not fit is named."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from ..errors import PlanError
from ..shown import brief, one_line

T = TypeVar("T")

#: Far above any size in a model; what is larger only serves to overflow.
_LARGEST = 2**31
#: Descriptions of inputs nest a few levels; Python's own stack would end at hundreds.
_DEEPEST = 60


class Rule(NamedTuple):
    """What a value has to be beside its type: `Annotated[int, Rule("a positive number", lambda value: value > 0)]`."""

    says: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
    """The rule that a value is one of these."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def made(cls: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass `cls` from a mapping with its fields, lists for tuples.

    Fields with a default may be missing. Raises `PlanError` naming the entry, as in `sites[3].channels`, `where` being the
    name of `data` itself, that is of another type, missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise _wrong(where, data, f"an object with the entries of a {cls.__name__}")
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(key if isinstance(key, str) else brief(key) for key in data if key not in fields)
    if unknown:
        raise PlanError(f"unknown entries in a {cls.__name__}: {one_line(', '.join(unknown[:5]), 300)} (in {where})")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlanError(f"this is not a plan upswap wrote: {where} has no entry {name}")
    try:
        return cls(**values)
    except ValueError as error:  # of a dataclass that looks at its values itself
        raise PlanError(f"this is not a plan upswap wrote: {where}: {error}") from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as a value of the type `kind`. A table by the form of the type."""
    if kind in _SCALARS:  # first, because most are
        return _scalar(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value = _value(arguments[0], data, where)
        for rule in arguments[1:]:
            if not rule.holds(value):
                raise _wrong(where, data, rule.says)
        return value
    if origin in (typing.Union, types.UnionType):
        (other,) = (option for option in arguments if option is not type(None))
        return None if data is None else _value(other, data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _wrong(where, data, "a list")
        each = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else list(arguments)
        if len(each) != len(data):
            raise _wrong(where, data, f"a list of {len(each)}")
        return tuple(
            _value(item, value, f"{where}[{index}]") for index, (item, value) in enumerate(zip(each, data, strict=True))
        )
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return made(kind, data, where)
    if kind is Any or origin is not None:
        if origin is not None and not isinstance(data, Mapping):
            raise _wrong(where, data, "an object")
        _check_plain(data, where, _DEEPEST)
        return data
    raise TypeError(f"{kind} is not a type of plain data")


_SCALARS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and type(data) is int and abs(data) < _LARGEST:
        return float(data)
    if type(data) is not kind:
        raise _wrong(where, data, _SCALARS[kind])
    if (kind is int and abs(data) >= _LARGEST) or (kind is float and not math.isfinite(data)):
        raise _wrong(where, data, f"{_SCALARS[kind]} that a model can have")
    return data


def _check_plain(data: Any, where: str, depth: int) -> None:
    """`PlanError` unless `data` is made of what JSON has, and not too deep."""
    if depth == 0:
        raise PlanError(f"this is not a plan upswap wrote: {where} goes too deep")
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not isinstance(key, str):
                raise _wrong(where, key, "named by strings")
            _check_plain(value, f"{where}.{one_line(key, 60)}", depth - 1)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            _check_plain(value, f"{where}[{index}]", depth - 1)
    elif data is not None and not isinstance(data, str | bool | int | float):
        raise _wrong(where, data, "plain data")


def _wrong(where: str, data: Any, expected: str) -> PlanError:
    return PlanError(f"this is not a plan upswap wrote: {where} is {brief(data)}, where it has to be {expected}")
