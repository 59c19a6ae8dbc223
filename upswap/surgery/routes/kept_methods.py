"""Methods that a model keeps as values (`self.resize = self._resize`), which are of the class that it had when they were kept.

A rewritten module has another class. Its kept methods have to be that class's, or their resizes would go by the upsamplers.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ...architectures.packages import inside

_ORIGINAL = "_upswap_original"


def mark(new: Any, original: Any) -> None:
    """Note on a function that it replaces the method `original`."""
    if isinstance(new, FunctionType):
        new.__dict__[_ORIGINAL] = original


def rebind(modules: Iterable[nn.Module]) -> None:
    """Let the methods that modules keep be those of their owners' classes of now."""
    for put, method in _methods(modules):
        function: Any = method.__func__
        now = attribute(type(method.__self__), function.__name__)
        if isinstance(now, FunctionType) and now is not function and _original(now) is _original(function):
            put(MethodType(now, method.__self__))


def late_method(owner: nn.Module, cls: type, name: str) -> MethodType:
    """The method `name` of a module that will be of `cls`, or of a class made from it: looked up when it is called."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    method.__name__ = name
    method.__dict__[_ORIGINAL] = attribute(cls, name)
    return MethodType(method, owner)


def _original(function: FunctionType) -> Any:
    return vars(function).get(_ORIGINAL, function)


def kept_functions(model: nn.Module) -> set[str]:
    """The qualified names of the functions that modules, and their classes, keep in attributes and containers."""
    classes: dict[type, None] = {}
    kept: list[Any] = []
    for module in model.modules():
        classes.update(dict.fromkeys(type(module).__mro__))
        kept += (value for name, value in module.__dict__.items() if name not in _TORCH)
    for cls in classes:
        if not inside(cls.__module__, ("torch", "builtins")):
            kept += (value for value in vars(cls).values() if isinstance(value, dict | list | tuple))
    return {name for name in map(_function_name, _values(kept)) if name}


def attribute(cls: type, name: str) -> Any:
    """What a class has under a name, as it is there."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


# What torch keeps in a module: parts, which are looked at by themselves, and hooks.
_TORCH = frozenset(vars(nn.Module()))


def _methods(modules: Iterable[nn.Module]) -> Iterator[tuple[Callable[[Any], None], MethodType]]:
    """Each method of a module that attributes, dicts and lists hold, with what puts another in its place."""
    seen: set[int] = set()
    queue: list[Any] = [module.__dict__ for module in modules]
    while queue:
        container = queue.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        entries = list(container.items() if isinstance(container, dict) else enumerate(container))
        for key, value in entries:
            if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
                yield functools.partial(type(container).__setitem__, container, key), value
            elif type(value) in (dict, list, OrderedDict) and key not in _TORCH:
                queue.append(value)


_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset)


def _values(containers: Sequence[Any]) -> Iterator[Any]:
    """All values in containers, at any depth. They are read without what their own classes make of reading."""
    seen: set[int] = set()
    queue = list(containers)
    while queue:
        value = queue.pop()
        kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        if kind is not None:
            if id(value) not in seen:
                seen.add(id(value))
                queue += dict.values(value) if kind is dict else kind.__iter__(value)
        elif isinstance(value, functools.partial):
            queue += [value.func, *value.args, *value.keywords.values()]
        else:
            yield value


def _function_name(value: Any) -> str:
    function = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
    return function.__code__.co_qualname if isinstance(function, FunctionType) else ""
