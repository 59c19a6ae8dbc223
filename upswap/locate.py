"""Find a resize call in the source of the class that makes it, from a position or from a saved `Location`."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType

from .errors import RewriteError
from .probe import Place
from .sites import Location

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def method_of(cls: type, code: CodeType) -> FunctionType | None:
    """The method that a call on an instance of `cls` reaches under the code's own name, if it is this code itself.

    None where the code belongs to a class further up whose method is overridden (reached through `super()`), or is wrapped by
    a decorator: replacing the method of that name would then replace something else.
    """
    method = inspect.getattr_static(cls, code.co_name, None)
    return method if isinstance(method, FunctionType) and method.__code__ is code else None


def function_node(code: CodeType) -> FunctionNode:
    """The syntax tree of a function, with the line numbers of its file.

    Raises `RewriteError` where the source cannot be had or has changed since it was imported.
    """
    functions = _functions(code.co_filename, tuple(linecache.getlines(code.co_filename)))
    node = functions.get((code.co_name, code.co_firstlineno))
    if node is not None:
        return node
    raise RewriteError(f"the source of {code.co_qualname} is not to be had from {code.co_filename}")


def locate(place: Place) -> Location:
    """The position of a call as a `Location`, which outlives the process.

    Raises `RewriteError`, with the reason, for a call that does not stand in the owner's own function.
    """
    code, position = place.codes[0], place.positions[-1]
    for inner in place.codes[1:]:
        if not (
            inner.co_filename == code.co_filename and inner.co_qualname.startswith(f"{code.co_qualname}.<locals>.")
        ):
            raise RewriteError(f"the call is made by a helper, {inner.co_qualname}, which upswap does not rewrite yet")
    node = function_node(code)
    for call in _calls(node):
        if (call.lineno, call.col_offset, call.end_lineno, call.end_col_offset) == position:
            expression = ast.unparse(call)
            alike = [other for other in _calls(node) if ast.unparse(other) == expression]
            return Location(
                code.co_qualname, expression, alike.index(call), place.occurrence, _short(code.co_filename), call.lineno
            )
    raise RewriteError(
        f"the call at line {position[0]} of {code.co_filename} is not in the source of {code.co_qualname}"
    )


def _short(filename: str) -> str:
    """A file as its package names it, so that plans say the same on every machine."""
    parents = [entry.rstrip("/") + "/" for entry in sys.path if entry and filename.startswith(entry.rstrip("/") + "/")]
    return filename.removeprefix(max(parents, key=len)) if parents else filename.rpartition("/")[2]


def find_call(node: FunctionNode, location: Location) -> ast.Call:
    """The call that `location` describes in a function's tree; `RewriteError` where the source no longer has it."""
    alike = [call for call in _calls(node) if ast.unparse(call) == location.expression]
    if location.index >= len(alike):
        raise RewriteError(
            f"{location.function} no longer has the call `{location.expression}`: the model's source is another version than the "
            "one the plan was made for; make the plan again"
        )
    return alike[location.index]


def _calls(node: FunctionNode) -> Iterator[ast.Call]:
    """The calls in a function in the order of the text."""
    calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
    return iter(
        sorted(
            calls, key=lambda call: (call.lineno, call.col_offset, -(call.end_lineno or 0), -(call.end_col_offset or 0))
        )
    )


@functools.lru_cache(maxsize=64)
def _functions(filename: str, lines: tuple[str, ...]) -> dict[tuple[str, int], FunctionNode]:
    """The functions of a file by name and first line, a decorator's where there is one; none where it does not parse."""
    try:
        tree = ast.parse("".join(lines), filename)
    except SyntaxError:
        return {}
    nodes = [node for node in ast.walk(tree) if isinstance(node, FunctionNode)]
    return {(node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])): node for node in nodes}
