"""A place on the Python stack as a `Location`, which outlives the process, and back."""

from __future__ import annotations

import ast
import itertools
import os
import sys
from collections.abc import Sequence
from types import CodeType
from typing import cast

from ...errors import RewriteError
from ...plan.site import Location, Step
from .stack import Hop, Place
from .syntax import FunctionNode, Fusion, call_at, calls_in, function_of, fusion_at, fusions_in


def locate(place: Place) -> Location:
    """The position of a call as a `Location`.

    Raises `RewriteError`, with the reason, where a function on the way has no source, or the call is not in it.
    """
    if place.problem:
        raise RewriteError(place.problem)
    steps = tuple(_step(hop) for hop in place.hops)
    last = place.hops[-1]
    return Location(steps, place.occurrence, _short(last.code.co_filename), last.position[0] or 0)


def _step(hop: Hop) -> Step:
    return _described(hop, call_at(hop.code, hop.position), calls_in(function_of(hop.code).node))


def locate_fusion(hop: Hop) -> Step:
    """The sum or concatenation at the position of a hop, which is none of its own; raises as `locate`."""
    return _described(hop, fusion_at(hop.code, hop.position), fusions_in(function_of(hop.code).node))


def _described(hop: Hop, call: Fusion, others: Sequence[Fusion]) -> Step:
    function = function_of(hop.code)
    expression = ast.unparse(call)
    alike = [other for other in others if ast.unparse(other) == expression]
    return Step(
        function=hop.code.co_qualname,
        expression=expression,
        index=alike.index(call),
        module=hop.module,
        ordinal=function.ordinal,
        fresh=hop.fresh,
        inner=hop.inner,
        alike=len(alike),
        around=_around(function.node, call),
    )


def find_call(node: FunctionNode, step: Step) -> ast.Call:
    """The call that `step` describes in a function's tree.

    Raises `RewriteError` where the source no longer has it, or has it in other company: another call written alike may
    have come before it, another loop may run it another number of times.
    """
    return cast("ast.Call", _found(node, step, calls_in(node)))


def find_fusion(node: FunctionNode, step: Step) -> Fusion:
    """The sum or concatenation that `step` describes in a function's tree; raises as `find_call`."""
    return _found(node, step, fusions_in(node))


def _found(node: FunctionNode, step: Step, among: Sequence[Fusion]) -> Fusion:
    alike = [call for call in among if ast.unparse(call) == step.expression]
    if not alike:
        raise RewriteError(f"{step.function} no longer has the call `{step.expression}`")
    if len(alike) != step.alike or step.index >= step.alike:
        raise RewriteError(
            f"{step.function} has the call `{step.expression}` {_times(len(alike))}, where it had it {_times(step.alike)}"
        )
    call = alike[step.index]
    around = _around(node, call)
    if around != step.around:
        raise RewriteError(
            f"in {step.function} the call `{step.expression}` now stands {_inside(around)}, where it stood "
            f"{_inside(step.around)}"
        )
    return call


def _around(function: FunctionNode, call: Fusion) -> tuple[str, ...]:
    """The loops and branches of a function that decide whether and how often a call in it runs, outermost first."""
    parents = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    headers: list[str] = []
    child: ast.AST = call
    while child is not function:
        parent = parents[id(child)]
        headers += _headers(parent, child)
        child = parent
    return tuple(reversed(headers))


def _headers(parent: ast.AST, child: ast.AST) -> list[str]:
    """What a statement or expression says of when its part `child` runs, innermost first. A table by its form."""
    if isinstance(parent, ast.If | ast.IfExp | ast.While) and child is not parent.test:
        word = "while" if isinstance(parent, ast.While) else "if"
        inside = parent.body if isinstance(parent.body, list) else [parent.body]
        test = ast.unparse(parent.test)
        return [f"{word} {test}" if child in inside else f"{word} {test}, else"]
    if isinstance(parent, ast.For | ast.AsyncFor) and child is not parent.iter:
        after = ", else" if child in parent.orelse else ""
        return [f"for {ast.unparse(parent.target)} in {ast.unparse(parent.iter)}{after}"]
    if isinstance(parent, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return [ast.unparse(generator).strip() for generator in reversed(parent.generators) if generator is not child]
    if isinstance(parent, ast.BoolOp) and child is not parent.values[0]:
        before = itertools.takewhile(lambda value: value is not child, parent.values)
        word = "and" if isinstance(parent.op, ast.And) else "or"
        return [f" {word} ".join(map(ast.unparse, before)) + f" {word}"]
    if isinstance(parent, ast.ExceptHandler):
        return [f"except {ast.unparse(parent.type)}" if parent.type is not None else "except"]
    if isinstance(parent, ast.match_case):
        return [f"case {ast.unparse(parent.pattern)}"]
    return []


def _inside(around: tuple[str, ...]) -> str:
    return f"in `{'`, `'.join(around)}`" if around else "in no loop or branch"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def is_function(step: Step, code: CodeType, module: str) -> bool:
    """Whether a code object, whose globals are those of `module`, is the function a step describes."""
    return code.co_qualname == step.function and module == step.module and function_of(code).ordinal == step.ordinal


def _short(filename: str) -> str:
    """A file as its package names it, so that plans say the same on every machine."""
    # A package of the user's own may be in the current folder without that being on the path.
    places = {entry.rstrip("/") + "/" for entry in (*sys.path, os.getcwd()) if entry}
    parents = [place for place in places if filename.startswith(place)]
    return filename.removeprefix(max(parents, key=len)) if parents else filename.rpartition("/")[2]
