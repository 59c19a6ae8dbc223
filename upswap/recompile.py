"""The source route: a method compiled again with its resize calls sent through `runtime.resize`.

Only the call expressions change. Control flow stays the author's own, and so do the file and the line numbers, so that
tracebacks and breakpoints point at the code one reads.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
from collections.abc import Sequence
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from .errors import RewriteError
from .locate import FunctionNode, find_call, function_node
from .runtime import Target, resize
from .sites import Location

_RUN = "_upswap_run"
_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

Replacement = tuple[Location, Sequence[Target | None]]


def recompile(method: FunctionType, replacements: Sequence[Replacement]) -> FunctionType:
    """`method` with each located call replaced by one that goes through its targets, one for each run of the call.

    The new function shares globals, defaults and closure with the old. Raises `RewriteError` where a call cannot be found.
    """
    original = function_node(method.__code__)
    if isinstance(original, ast.AsyncFunctionDef):
        raise RewriteError(f"{method.__qualname__} is asynchronous")
    node: FunctionNode = copy.deepcopy(original)
    node.decorator_list = []
    if not node.args.posonlyargs and not node.args.args:
        raise RewriteError(f"{method.__qualname__} names no argument for the module itself")
    owner = (node.args.posonlyargs + node.args.args)[0].arg
    injected: dict[str, Any] = {}
    # Found before any is changed: `find_call` compares texts.
    calls = [find_call(node, location) for location, _ in replacements]
    for index, (call, (_, targets)) in enumerate(zip(calls, replacements, strict=True)):
        name = f"_upswap_{index}"
        injected[name] = functools.partial(resize, tuple(targets))
        arguments = [ast.Name(_RUN, ast.Load()), ast.Constant(index), ast.Name(owner, ast.Load()), call.func]
        call.args = [*arguments, *call.args]
        call.func = ast.Name(name, ast.Load())
    counts = ast.List([ast.Constant(0) for _ in calls], ast.Load())
    start = 1 if ast.get_docstring(node, clean=False) is not None else 0
    node.body.insert(start, ast.Assign([ast.Name(_RUN, ast.Store())], counts))
    return _function_like(method, node, injected)


def _function_like(method: FunctionType, node: FunctionNode, injected: dict[str, Any]) -> FunctionType:
    """Compile `node` into a function with the globals, closure, defaults and name of `method`, and `injected` in its closure."""
    code = method.__code__
    cells = dict(zip(code.co_freevars, method.__closure__ or (), strict=True))
    cells.update({name: CellType(value) for name, value in injected.items()})
    # A class of the same name around the function gives private names (`self.__x`) and `super()` their meaning; a function
    # around the class makes the closure's names free variables.
    parts = method.__qualname__.split(".")
    tree = ast.parse("def _upswap_factory(): pass")
    factory = cast(ast.FunctionDef, tree.body[0])
    free = [name for name in cells if name != "__class__"]
    factory.body = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in free]
    if len(parts) > 1 and parts[-2] != "<locals>":
        scope = cast(ast.ClassDef, ast.parse(f"class {parts[-2]}: pass").body[0])
        scope.body = [node]
        factory.body.append(scope)
    else:
        factory.body.append(node)
    compiled = compile(
        ast.fix_missing_locations(tree), code.co_filename, "exec", flags=code.co_flags & _FUTURES, dont_inherit=True
    )
    inner = _code_named(compiled, node.name)
    function = FunctionType(
        inner,
        method.__globals__,
        method.__name__,
        method.__defaults__,
        tuple(cells[name] for name in inner.co_freevars),
    )
    function.__kwdefaults__ = method.__kwdefaults__
    function.__qualname__ = method.__qualname__
    functools.update_wrapper(function, method)
    del function.__dict__["__wrapped__"]
    return function


def _code_named(code: CodeType, name: str) -> CodeType:
    """The code object of the function `name` inside compiled code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name:
                return constant
            try:
                return _code_named(constant, name)
            except RewriteError:
                continue
    raise RewriteError(f"{name} was lost in compilation")
