"""The source that `torch.jit.script` compiles in the place of a rewritten function's code.

TorchScript takes a function's text, and knows neither closures nor counters. The text it gets is the author's own, with
each resize call that goes through an upsampler written as a call of it. A function on the way to one becomes a method. Where that
is not possible, the text is an error, so that the original resize is never scripted in silence.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

from ...errors import RewriteError
from ...plan.site import Site, Step, child_of
from ...probe.callsites.class_code import is_resize_layer
from ...probe.callsites.location import find_call, is_function
from ...probe.callsites.syntax import FunctionNode, function_of, stands_in_loop
from .rewrite_calls import put, value_of

#: What stands in a text that must not be compiled: TorchScript knows no such name, and shows the line with the reason.
_REFUSAL = "upswap_cannot_script"

_ARGUMENTS = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


def with_script(
    new: Any, original: Any, owner: nn.Module, sites: Sequence[Site], first: int = 0, *, guided: bool = False
) -> dict[str, FunctionType]:
    """Give `new`, which replaces the method `original` of `owner`, the text to be scripted; `sites` are all of the owner's.

    What comes back are more methods for the owner's class, which that text calls: functions on the way to a resize, numbered
    from `first`. Python never runs them. With `guided` there is no such text: the method brings a guide to an upsampler.
    """
    if not (isinstance(new, FunctionType) and isinstance(original, FunctionType)):
        return {}
    # TorchScript looks through decorators too.
    original = inspect.unwrap(original)
    script = _Script(owner, first)
    try:
        if guided:
            raise _NotScriptable("an upsampler that takes a guide cannot be scripted")
        text = script.of(original, sites, 0)
    except (_NotScriptable, RewriteError) as reason:
        text = _refusal(original, str(reason))
        script.helpers.clear()
    # `inspect`, which TorchScript asks for the source, goes by `__wrapped__` and finds the text by the code's file. TorchScript
    # looks the names in it up from `new`.
    new.__dict__["__wrapped__"] = _with_text(original, text)
    new.__dict__["__signature__"] = inspect.signature(original)
    return script.helpers


def _with_text(function: FunctionType, text: str) -> FunctionType:
    """A function that `inspect` has another text of. Python never compiles the text."""
    code = function.__code__.replace(co_filename=_listed(text, function.__name__), co_firstlineno=1)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


class _NotScriptable(Exception):
    """The text is the reason."""


class _Script:
    """Writes the functions of one owner anew; those on the way to its resizes become methods, which `helpers` collects."""

    def __init__(self, owner: nn.Module, first: int) -> None:
        self.owner = owner
        self.first = first
        self.helpers: dict[str, FunctionType] = {}

    def of(self, function: FunctionType, sites: Sequence[Site], depth: int, module: str | None = None) -> str:
        """The function's text with the calls of its swapped sites replaced; it is the one at `depth` of their ways.

        `module` is the name of its first argument where that is the owner, which is then given to it; it has one of its own where
        that is None.
        """
        found = function_of(function.__code__)
        node, first = copy.deepcopy(found.node), found.first_line
        # Not by `inspect`, which looks through all modules for each function.
        lines = linecache.getlines(function.__code__.co_filename)[first - 1 : node.end_lineno]
        at: dict[Step, list[Site]] = {}
        for site in sites:
            if site.location is not None and self._is_at(site.location.steps, depth, function):
                at.setdefault(site.location.steps[depth], []).append(site)
        text = _Text(node, lines, first)
        owner, name = (self.owner, _first(node)) if module is None else (None, module)
        if module is not None:
            text.begin_arguments(module)
        for step, here in at.items():
            swapped = [site for site in here if site.swap]
            if not swapped:
                continue
            call = find_call(node, step)
            if any(len(_steps(site)) > depth + 1 for site in here):
                if text.loops(call) and not all(map(_every_run, here)):
                    raise _NotScriptable(
                        f"{step.expression} leads to a resize in another function, and stands in a loop"
                    )
                text.replace(call, functools.partial(self._helped, call, function, owner, name, here, depth))
                continue
            through = [
                (site, functools.partial(_through, call, function, owner, f"{name}.{child_of(site)}"))
                for site in swapped
            ]
            if len(here) == 1 and (_every_run(here[0]) or not text.loops(call)):
                text.replace(call, through[0][1])
            else:
                text.count(call, [(_run(site), shown) for site, shown in through])
        return text.edited()

    @staticmethod
    def _is_at(steps: Sequence[Step], depth: int, function: FunctionType) -> bool:
        return len(steps) > depth and is_function(
            steps[depth], function.__code__, function.__globals__.get("__name__", "")
        )

    def _helped(
        self,
        call: ast.Call,
        function: FunctionType,
        owner: nn.Module | None,
        name: str,
        sites: Sequence[Site],
        depth: int,
    ) -> str:
        """The call of a function on the way, as one of a method that is that function written anew."""
        callee = value_of(call.func, function, owner)
        helper: Any = callee.__func__ if isinstance(callee, staticmethod) else callee
        own = (
            isinstance(callee, FunctionType)
            and ast.unparse(call.func) == f"{name}.{callee.__name__}"
            and owner is not None
        )
        helper = inspect.unwrap(helper) if isinstance(helper, FunctionType) else helper
        steps = _steps(sites[0])
        deeper = [
            number
            for number in range(depth + 1, len(steps))
            if isinstance(helper, FunctionType) and self._is_at(steps, number, helper)
        ]
        if not deeper or any(step.fresh for step in steps[depth : deeper[0] + 1]):
            raise _NotScriptable(f"{ast.unparse(call)} leads to a resize in another function by more than a plain call")
        text = self.of(helper, sites, deeper[0], None if own else _GIVEN)
        method = f"_upswap_script_{self.first + len(self.helpers)}"
        self.helpers[method] = _with_text(helper, text)
        self.helpers[method].__name__ = method  # by which TorchScript knows it
        arguments = [ast.unparse(value) for value in (*call.args, *call.keywords)]
        return f"{name}.{method}({', '.join(arguments)})"


#: The name by which a function on the way is given the owner.
_GIVEN = "_upswap_owner"


def _steps(site: Site) -> tuple[Step, ...]:
    return site.location.steps if site.location is not None else ()


def _through(call: ast.Call, function: FunctionType, owner: nn.Module | None, upsampler: str) -> str:
    return f"{upsampler}({_arguments(call, function, owner)})"


def _run(site: Site) -> int:
    """Which run of its call a site is, from 0."""
    occurrence = site.location.occurrence if site.location else None
    if occurrence is None:
        raise _NotScriptable("it is not known which run of a call is which")
    return occurrence


def _every_run(site: Site) -> bool:
    return site.location is not None and site.location.occurrence is None


class _Text:
    """A function's lines, to be changed at places that its tree names: by line, and by column in bytes.

    The tree is changed with them, so that a call which stands in another's arguments is changed there too.
    """

    def __init__(self, node: FunctionNode, lines: Sequence[str], first: int) -> None:
        self._node = node
        self._lines = [line.encode() for line in lines]
        self._first = first
        self._changes: list[tuple[ast.Call, Callable[[], str]]] = []
        self._inserted: list[tuple[ast.stmt, str]] = []
        self._argument = ""
        self._counters = 0

    def loops(self, call: ast.Call) -> bool:
        """Whether a loop may run a call again."""
        return stands_in_loop(self._node, call)

    def begin_arguments(self, name: str) -> None:
        """Give the function one more argument before its others."""
        arguments = self._node.args
        if not (arguments.posonlyargs + arguments.args):
            raise _NotScriptable("a function without arguments leads to a resize")
        self._argument = f"{name}, "

    def replace(self, call: ast.Call, new: Callable[[], str]) -> None:
        """Put what `new` gives in the place of a call."""
        self._changes.append((call, new))

    def count(self, call: ast.Call, runs: Sequence[tuple[int, Callable[[], str]]]) -> None:
        """Put the expressions of `runs` in the place of a call at its runs of those numbers; other runs are the call's own."""
        statement = _statement_of(self._node, call)
        counter = f"_upswap_run_{self._counters}"
        self._counters += 1

        def by_number() -> str:
            new = ast.unparse(call)
            for number, shown in reversed(runs):
                new = f"({shown()} if {counter} == {number + 1} else {new})"
            return new

        self._changes.append((call, by_number))
        self._inserted.append((statement, f"{counter} += 1"))
        self._inserted.insert(0, (_first_statement(self._node), f"{counter} = 0"))

    def edited(self) -> str:
        """The text, from the first column on."""
        first_argument = next(iter(self._node.args.posonlyargs + self._node.args.args), None)
        edits = self._edits()
        if self._argument and first_argument is not None:
            edits.append((first_argument, self._argument, True))
        for part, new, before in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
            begin = part.lineno - self._first
            end, column = (
                (begin, part.col_offset) if before else ((part.end_lineno or 0) - self._first, part.end_col_offset or 0)
            )
            after = self._lines[end][column:]
            self._lines[begin] = self._lines[begin][: part.col_offset] + new.encode() + after
            # Kept as lines, so that the numbers of those that follow stay.
            self._lines[begin + 1 : end + 1] = [b""] * (end - begin)
        for statement, new in reversed(self._inserted):
            at = statement.lineno - self._first
            indent = self._lines[at][: statement.col_offset]
            if indent.strip():
                raise _NotScriptable(f"{ast.unparse(statement)} does not begin its line")
            self._lines[at] = indent + new.encode() + b"\n" + self._lines[at]
        return textwrap.dedent(b"".join(self._lines).decode())

    def _edits(self) -> list[tuple[ast.Call | ast.arg, str, bool]]:
        """The outermost calls that change, with what takes their places: what is inside of others is in their texts."""
        parents = {id(child): parent for parent in ast.walk(self._node) for child in ast.iter_child_nodes(parent)}
        inside = {id(call): {id(part) for part in ast.walk(call)} for call, _ in self._changes}
        edits: list[tuple[ast.Call | ast.arg, str, bool]] = []
        for call, new in sorted(self._changes, key=lambda change: len(inside[id(change[0])])):
            edits = [edit for edit in edits if id(edit[0]) not in inside[id(call)]]
            text = new()
            edits.append((call, text, False))
            put(parents[id(call)], call, ast.Name(text))
        return edits


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


def _arguments(call: ast.Call, function: FunctionType, owner: nn.Module | None) -> str:
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
