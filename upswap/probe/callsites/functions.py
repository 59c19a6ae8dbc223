"""Functions inside decorators, partials and bound methods: find one, and put another in its place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

# A decorator of a decorator of a decorator; closures deeper than this are no wrapping of a function any more.
_DEPTH = 6
#: Where `torch.jit.script_if_tracing` keeps the function that it scripts.
_SCRIPTED = "__original_fn"


def replaced(value: Any, change: Callable[[FunctionType], Any | None], depth: int = _DEPTH) -> Any | None:
    """`value` with the first function in it that `change` has another for, in the same wrapping; None where there is none.

    Looks into bound methods, `functools.partial` and `partialmethod`, static and class methods, and the closures of wrappers.
    The wrapper of `torch.jit.script_if_tracing` is left out: a trace would script the function that it names, and so go around
    the other.
    """
    if isinstance(value, FunctionType):
        if hasattr(value, _SCRIPTED):  # a compiled graph comes by here, and torch 2.10 cannot look into a `__dict__`
            return replaced(getattr(value, _SCRIPTED), change, depth)
        new = change(value)
        return new if new is not None or value.__closure__ is None or not depth else _rewrapped(value, change, depth)
    if isinstance(value, MethodType):
        new = replaced(value.__func__, change, depth)
        return None if new is None else functools.partial(new, value.__self__)
    if isinstance(value, functools.partial):
        new = replaced(value.func, change, depth)
        return None if new is None else functools.partial(new, *value.args, **value.keywords)
    if isinstance(value, functools.partialmethod):
        new = replaced(value.func, change, depth)
        return None if new is None else functools.partialmethod(new, *value.args, **value.keywords)
    if isinstance(value, (staticmethod, classmethod)):
        new = replaced(value.__func__, change, depth)
        return None if new is None else type(value)(new)
    return None


def functions_in(value: Any) -> list[FunctionType]:
    """Every function that `replaced` would look at."""
    found: list[FunctionType] = []

    def keep(function: FunctionType) -> None:
        found.append(function)

    replaced(value, keep)
    return found


def _rewrapped(wrapper: FunctionType, change: Callable[[FunctionType], Any | None], depth: int) -> FunctionType | None:
    """A wrapper whose closure holds the changed function."""
    for index, cell in enumerate(wrapper.__closure__ or ()):
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        inner = replaced(content, change, depth - 1)
        if inner is not None:
            cells = list(wrapper.__closure__ or ())
            cells[index] = CellType(inner)
            new = FunctionType(
                wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells)
            )
            new.__kwdefaults__ = wrapper.__kwdefaults__
            new.__qualname__ = wrapper.__qualname__
            functools.update_wrapper(new, wrapper)
            del new.__dict__["__wrapped__"]  # as update_wrapper set it; the wrapper's own is put right below
            if "__wrapped__" in wrapper.__dict__:
                new.__dict__["__wrapped__"] = inner
            return new
    return None


def attributes(cls: type) -> Iterator[tuple[str, Any]]:
    """The names and values a class gives its instances, as the class itself holds them (not those of `torch.nn.Module`)."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__ == "torch.nn.modules.module":
            return
        for name, value in vars(base).items():
            if name not in seen:
                seen.add(name)
                yield name, value


def reaching(cls: type, code: CodeType) -> list[str]:
    """The attributes of `cls` that run this code: those a subclass can replace to run other code instead.

    None for code that is reached in another way: through `super()`, or by a function set on the instance.
    """
    return [
        name for name, value in attributes(cls) if any(function.__code__ is code for function in functions_in(value))
    ]


def names_in(function: FunctionType) -> set[str]:
    """The names that a function's code uses, with those of the functions in its text."""
    names: set[str] = set()
    queue = [function.__code__]
    while queue:
        code = queue.pop()
        names.update(code.co_names)
        queue += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def methods(cls: type) -> list[FunctionType]:
    """The functions of a class, apart from those that make an instance."""
    return [
        function
        for _, value in attributes(cls)
        for function in functions_in(value)
        if not function.__name__.startswith(("__init__", "_init", "init_", "reset_"))
    ]


def names_by_function(cls: type) -> list[set[str]]:
    """The names that each of a class's methods uses."""
    return [names_in(function) for function in methods(cls)]


def loaded(module: str, name: str) -> Any:
    """What a module that is loaded, or a class in it, defines under a dotted name; None where it does not.

    A name may come from a stranger's file, and asking a module for an attribute can make it import more.
    """
    value: Any = sys.modules.get(module)
    for part in name.split("."):
        value = vars(value).get(part) if isinstance(value, type | ModuleType) else None
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
