"""What a model could call beside what it called, by other data or arguments: modules that did not run, lines not reached."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..errors import RewriteError
from .callsites.class_code import CONTAINERS, calls_a_resize, is_resize_layer
from .callsites.functions import attributes, functions_in, names_by_function
from .callsites.syntax import calls_in, function_node, other_positions
from .observe import Observation

#: The functions of torch that resize, by the last part of their names.
_RESIZES = ("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")


def with_modules_alike(model: nn.Module, run: Observation) -> Observation:
    """The run with the calls that modules which did not run would have made, after ones like them that did.

    A model that reads the values of its tensors may choose a head by them, of several that are alike: of the same classes,
    with parameters of the same shapes. Of a model that reads none, a module that did not run is not in use.
    """
    if not run.reads_values:
        return run
    calls, forwards = list(run.calls), dict(run.forwards)
    for path, twin in _twins(model, run.called).items():
        for call in run.calls:
            if _is_inside(call.owner, twin):
                owner = path + call.owner.removeprefix(twin)
                caller = call.caller
                if caller is not None and _is_inside(caller.owner, twin):
                    caller = caller._replace(owner=path + caller.owner.removeprefix(twin))
                else:
                    caller = None
                calls.append(dataclasses.replace(call, owner=owner, caller=caller, twin=call.owner, guide=""))
                forwards[owner] = run.forwards.get(call.owner)
    return dataclasses.replace(run, calls=calls, forwards=forwards)


def unreached(model: nn.Module, first: Observation, trained: Observation | None) -> str | None:
    """What is to be said of resizes that other values or arguments may lead to, and that are not listed as sites; None where
    there are none."""
    if first.reads_values:
        twins = _twins(model, first.called)
        found = [
            path
            for path, owner, module in _outermost_idle(model, first.called)
            if path not in twins and _could_run(owner, path.rpartition(".")[2]) and _may_resize(module)
        ]
        found += _lines_not_reached(model, first)
        why = "values or arguments choose what runs, and these did not; pass example_inputs that lead there"
    else:
        called = first.called | (trained.called if trained is not None else set())
        # What the code of its owner never names is not in use.
        found = [
            path
            for path, owner, module in _outermost_idle(model, called)
            if any(path.rpartition(".")[2] in names for names in names_by_function(type(owner))) and _may_resize(module)
        ]
        why = "arguments choose what runs, and these did not; pass example_inputs that lead there"
    if not found:
        return None
    shown = "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"{why} to have their resizes listed: {shown}"


def _could_run(owner: nn.Module, name: str) -> bool:
    """Whether a container has a module, or the code of its owner names it or looks one up by a name put together."""
    return isinstance(owner, CONTAINERS) or any({name, "getattr"} & names for names in names_by_function(type(owner)))


def _may_resize(module: nn.Module) -> bool:
    """Whether a module, or one in it, may."""
    return any(
        is_resize_layer(inner) or (not type(inner).__module__.startswith("torch.") and calls_a_resize(type(inner)))
        for inner in module.modules()
    )


def _lines_not_reached(model: nn.Module, run: Observation) -> list[str]:
    """The resize calls in the methods of classes whose modules ran that no run made."""
    hops = {hop for call in run.calls for hop in call.place.hops}
    made = {
        (hop.code.co_filename, position)
        for hop in hops
        for position in (hop.position, *other_positions(hop.code, hop.position))
    }
    lines: dict[str, None] = {}
    for cls in dict.fromkeys(type(model.get_submodule(path)) for path in ("", *run.called)):
        if cls.__module__.startswith("torch."):
            continue
        for function in (function for _, value in attributes(cls) for function in functions_in(value)):
            code = function.__code__
            for call in _resize_calls(code):
                position = (call.lineno, call.col_offset, call.end_lineno, call.end_col_offset)
                if (code.co_filename, position) not in made:
                    lines[f"line {call.lineno} of {code.co_qualname}, {ast.unparse(call)}"] = None
    return list(lines)


def _resize_calls(code: CodeType) -> list[ast.Call]:
    try:
        calls = calls_in(function_node(code))
    except RewriteError:
        return []
    return [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in _RESIZES]


def _that_ran(called: set[str]) -> set[str]:
    """The paths of the modules that ran, and of those that something in them did: a container never runs itself."""
    return {".".join(parts[:end]) for parts in (path.split(".") for path in called) for end in range(1, len(parts) + 1)}


def _twins(model: nn.Module, called: set[str]) -> dict[str, str]:
    """For each module that did not run, nor any in it, one that did and is like it; the outermost of them only."""
    ran = _that_ran(called)
    shape_of = functools.cache(lambda path: _shape_of(model.get_submodule(path)))
    twins: dict[str, str] = {}
    for path, _, module in _outermost_idle(model, called):
        of_its_class = (other for other, twin in model.named_modules() if other in ran and type(twin) is type(module))
        twin = next((other for other in of_its_class if shape_of(other) == _shape_of(module)), None)
        if twin is not None:
            twins[path] = twin
    return twins


def _outermost_idle(model: nn.Module, called: set[str]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The modules that did not run, nor any in them, of those that are in one that did: each with that one."""
    ran = _that_ran(called)

    def within(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if inner not in ran:
                yield inner, module, child
            else:
                yield from within(child, inner)

    return within(model, "")


def _shape_of(module: nn.Module) -> Any:
    """The classes of a module and those in it, by name, and the shapes of its tensors."""
    return (
        [(name, type(inner)) for name, inner in module.named_modules()],
        [(name, tensor.shape) for name, tensor in module.state_dict().items()],
    )


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
