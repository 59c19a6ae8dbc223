"""The source that `torch.jit.script` compiles in the place of a rewritten function's code.

TorchScript takes a function's text, and knows neither closures nor counters. The text it gets is the author's own, with
each resize call that goes through an upsampler written as a call of it. Where that is not possible, the text is an error,
so that the original resize is never scripted in silence.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

from ...errors import RewriteError
from ...plan.site import Site, Step, child_of
from ...probe.callsites.class_code import is_resize_layer
from ...probe.callsites.location import find_call, is_function
from ...probe.callsites.syntax import FunctionNode, function_of, stands_in_loop
from .rewrite_calls import value_of

#: What stands in a text that must not be compiled: TorchScript knows no such name, and shows the line with the reason.
_REFUSAL = "upswap_cannot_script"

_ARGUMENTS = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


def with_script(new: Any, original: Any, owner: nn.Module, sites: Sequence[Site]) -> None:
    """Give `new`, which replaces the method `original` of `owner`, the text to be scripted; `sites` are all of the owner's."""
    if not (isinstance(new, FunctionType) and isinstance(original, FunctionType)):
        return
    try:
        text = _text(original, owner, sites)
    except (_NotScriptable, RewriteError) as reason:
        text = _refusal(original, str(reason))
    # `inspect`, which TorchScript asks for the source, goes by `__wrapped__` and finds the text by the code's file. Python never
    # compiles the text. TorchScript looks the names in it up from `new`.
    code = original.__code__.replace(co_filename=_listed(text, original.__name__), co_firstlineno=1)
    new.__dict__["__wrapped__"] = FunctionType(
        code, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    new.__dict__["__signature__"] = inspect.signature(original)


class _NotScriptable(Exception):
    """The text is the reason."""


def _text(function: FunctionType, owner: nn.Module, sites: Sequence[Site]) -> str:
    """The function's text with the calls of its swapped sites replaced."""
    found = function_of(function.__code__)
    node, first = found.node, found.first_line
    # Not by `inspect`, which looks through all modules for each function.
    lines = linecache.getlines(function.__code__.co_filename)[first - 1 : node.end_lineno]
    module = function.__globals__.get("__name__", "")
    calls: dict[Step, list[Site]] = {}
    for site in sites:
        if site.location is not None and is_function(site.location.steps[0], function.__code__, module):
            if len(site.location.steps) > 1 and site.swap:
                raise _NotScriptable(f"{site.location.steps[0].expression} leads to a resize in another function")
            calls.setdefault(site.location.steps[0], []).append(site)
    text = _Text(lines, first)
    for step, here in calls.items():
        swapped = [site for site in here if site.swap]
        if swapped:
            call = find_call(node, step)
            given = _arguments(call, function, owner)
            through = [(site, f"{_first(node)}.{child_of(site)}({given})") for site in swapped]
            if len(here) == 1 and (_every_run(here[0]) or not stands_in_loop(node, call)):
                text.replace(call, through[0][1])
            else:
                text.count(node, call, [(_run(site), shown) for site, shown in through])
    return text.edited()


def _run(site: Site) -> int:
    """Which run of its call a site is, from 0."""
    occurrence = site.location.occurrence if site.location else None
    if occurrence is None:
        raise _NotScriptable("it is not known which run of a call is which")
    return occurrence


def _every_run(site: Site) -> bool:
    return site.location is not None and site.location.occurrence is None


class _Text:
    """A function's lines, to be changed at places that its tree names: by line, and by column in bytes."""

    def __init__(self, lines: Sequence[str], first: int) -> None:
        self._lines = [line.encode() for line in lines]
        self._first = first
        self._edits: list[tuple[ast.expr, str]] = []
        self._inserted: list[tuple[ast.stmt, str]] = []
        self._counters = 0

    def replace(self, call: ast.Call, new: str) -> None:
        """Put `new` in the place of a call."""
        self._edits.append((call, new))

    def count(self, function: FunctionNode, call: ast.Call, runs: Sequence[tuple[int, str]]) -> None:
        """Put the expressions of `runs` in the place of a call at its runs of those numbers; other runs are the call's own."""
        statement = _statement_of(function, call)
        counter = f"_upswap_run_{self._counters}"
        self._counters += 1
        new = ast.unparse(call)
        for number, shown in reversed(runs):
            new = f"({shown} if {counter} == {number + 1} else {new})"
        self._edits.append((call, new))
        self._inserted.append((statement, f"{counter} += 1"))
        self._inserted.insert(0, (_first_statement(function), f"{counter} = 0"))

    def edited(self) -> str:
        """The text, from the first column on."""
        for call, new in sorted(self._edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
            begin, end = call.lineno - self._first, (call.end_lineno or 0) - self._first
            after = self._lines[end][call.end_col_offset or 0 :]
            self._lines[begin] = self._lines[begin][: call.col_offset] + new.encode() + after
            # Kept as lines, so that the numbers of those that follow stay.
            self._lines[begin + 1 : end + 1] = [b""] * (end - begin)
        for statement, new in reversed(self._inserted):
            at = statement.lineno - self._first
            indent = self._lines[at][: statement.col_offset]
            if indent.strip():
                raise _NotScriptable(f"{ast.unparse(statement)} does not begin its line")
            self._lines[at] = indent + new.encode() + b"\n" + self._lines[at]
        return textwrap.dedent(b"".join(self._lines).decode())


def _statement_of(function: FunctionNode, call: ast.Call) -> ast.stmt:
    """The statement that runs a call once each time it runs itself."""
    parents = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    found: ast.AST = call
    while not isinstance(found, ast.stmt):
        if not isinstance(found, ast.expr | ast.keyword) or isinstance(found, _NOT_ONCE):
            raise _NotScriptable(f"{ast.unparse(call)} does not run once with its statement")
        found = parents[id(found)]
    if isinstance(found, ast.While):
        raise _NotScriptable(f"{ast.unparse(call)} does not run once with its statement")
    return found


_NOT_ONCE = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _first_statement(function: FunctionNode) -> ast.stmt:
    if isinstance(function, ast.Lambda):
        raise _NotScriptable("a lambda holds the call")
    has_docstring = ast.get_docstring(function, clean=False) is not None and len(function.body) > 1
    return function.body[1 if has_docstring else 0]


def _arguments(call: ast.Call, function: FunctionType, owner: nn.Module) -> str:
    """The arguments of an upsampler's call, from those of the resize call."""
    callee = value_of(call.func, function, owner)
    if callee in (F.interpolate, F.upsample, F.upsample_nearest, F.upsample_bilinear):
        if any(isinstance(value, ast.Starred) for value in call.args) or any(
            word.arg is None for word in call.keywords
        ):
            raise _NotScriptable(f"{ast.unparse(call)} has arguments that are not written out")
        given = dict(zip(_ARGUMENTS, call.args, strict=False)) | {str(word.arg): word.value for word in call.keywords}
        sizes = [given.get(name) for name in ("size", "scale_factor")]
        recomputed = given.get("recompute_scale_factor")
        if recomputed is not None and not (isinstance(recomputed, ast.Constant) and not recomputed.value):
            raise _NotScriptable(f"{ast.unparse(call)} computes its scale factor again")
        texts = [ast.unparse(value) if value is not None else "None" for value in (given["input"], *sizes)]
    elif is_resize_layer(callee) and len(call.args) == 1 and not call.keywords and not callee.recompute_scale_factor:
        texts = [ast.unparse(call.args[0]), repr(callee.size), repr(callee.scale_factor)]
    else:
        raise _NotScriptable(f"{ast.unparse(call)} is no plain call of a resize")
    return ", ".join(texts)


def _first(node: FunctionNode) -> str:
    arguments = node.args.posonlyargs + node.args.args
    if not arguments:
        raise _NotScriptable("it names no argument for the module itself")
    return arguments[0].arg


def _refusal(function: FunctionType, reason: str) -> str:
    """A function that cannot be scripted, with the arguments of `function`."""
    code = function.__code__
    names = [ast.arg(name) for name in code.co_varnames[: code.co_argcount]]
    arguments = ast.arguments([], names, None, [], [], None, [])
    told = ast.Constant(f"{reason}. torch.jit.trace takes the patched model")
    body = ast.Expr(ast.Call(ast.Name(_REFUSAL, ast.Load()), [told], []))
    made = ast.FunctionDef(name=function.__name__, args=arguments, body=[body], decorator_list=[], lineno=1)
    return ast.unparse(ast.fix_missing_locations(ast.Module([made], []))) + "\n"


def _listed(text: str, name: str) -> str:
    """The name of a file that `inspect` reads the text from."""
    file = f"<upswap script of {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    return file
