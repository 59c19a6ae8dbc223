"""A place on the Python stack as a `Location`, which outlives the process, and back."""

from __future__ import annotations

import ast
import sys
from types import CodeType

from .errors import RewriteError
from .sites import Location, Step
from .source import FunctionNode, call_at, calls_in, function_of
from .trail import Hop, Place


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
    function = function_of(hop.code)
    call = call_at(hop.code, hop.position)
    expression = ast.unparse(call)
    alike = [other for other in calls_in(function.node) if ast.unparse(other) == expression]
    return Step(
        function=hop.code.co_qualname,
        expression=expression,
        index=alike.index(call),
        module=hop.module,
        ordinal=function.ordinal,
        fresh=hop.fresh,
        inner=hop.inner,
    )


def find_call(node: FunctionNode, step: Step) -> ast.Call:
    """The call that `step` describes in a function's tree; `RewriteError` where the source no longer has it."""
    alike = [call for call in calls_in(node) if ast.unparse(call) == step.expression]
    if step.index >= len(alike):
        raise RewriteError(
            f"{step.function} no longer has the call `{step.expression}`: the model's source is another version than the one the "
            "plan was made for; make the plan again"
        )
    return alike[step.index]


def is_function(step: Step, code: CodeType, module: str) -> bool:
    """Whether a code object, whose globals are those of `module`, is the function a step describes."""
    return code.co_qualname == step.function and module == step.module and function_of(code).ordinal == step.ordinal


def _short(filename: str) -> str:
    """A file as its package names it, so that plans say the same on every machine."""
    parents = [entry.rstrip("/") + "/" for entry in sys.path if entry and filename.startswith(entry.rstrip("/") + "/")]
    return filename.removeprefix(max(parents, key=len)) if parents else filename.rpartition("/")[2]
