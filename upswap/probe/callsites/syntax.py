"""The source of functions: their syntax trees, and the calls in them."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import NamedTuple, cast

from ...errors import RewriteError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Fusion = ast.Call | ast.BinOp | ast.AugAssign
# The names that functions made of these have in tracebacks and qualified names.
_COMPREHENSIONS: dict[type, str] = {
    ast.ListComp: "<listcomp>",
    ast.SetComp: "<setcomp>",
    ast.DictComp: "<dictcomp>",
    ast.GeneratorExp: "<genexpr>",
}
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SHAPES = ("shape", "size", "numel")
#: Of the functions of torch that resize, in their order.
_ARGUMENTS = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


class Function(NamedTuple):
    """A function as it stands in a file: `ordinal` counts those of the same qualified name (lambdas, redefinitions)."""

    qualname: str
    ordinal: int
    first_line: int
    node: FunctionNode


def function_of(code: CodeType) -> Function:
    """The function of a code object, with the line numbers of its file.

    Raises `RewriteError` where the source cannot be had or has changed since it was imported.
    """
    functions = _functions(code.co_filename, tuple(linecache.getlines(code.co_filename)))
    found = [f for f in functions if f.first_line == code.co_firstlineno and f.qualname == code.co_qualname]
    if len(found) > 1:  # lambdas on one line
        found = [f for f in found if _covers(f.node, code)]
    if len(found) == 1:
        return found[0]
    raise RewriteError(f"the source of {code.co_qualname} is not to be had from {code.co_filename}")


def function_node(code: CodeType) -> FunctionNode:
    """The syntax tree of a function; raises as `function_of` does."""
    return function_of(code).node


def has_source(code: CodeType) -> bool:
    """Whether `function_of` finds the function."""
    try:
        function_of(code)
    except RewriteError:
        return False
    return True


def calls_in(node: ast.AST) -> list[ast.Call]:
    """The calls in a function in the order of the text."""
    calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
    return sorted(
        calls, key=lambda call: (call.lineno, call.col_offset, -(call.end_lineno or 0), -(call.end_col_offset or 0))
    )


def fusions_in(node: ast.AST) -> list[Fusion]:
    """The calls and additions in a function in the order of the text: what may fuse two maps."""
    found = [child for child in ast.walk(node) if isinstance(child, ast.Call) or _is_addition(child)]
    fusions = cast("list[Fusion]", found)
    return sorted(
        fusions, key=lambda part: (part.lineno, part.col_offset, -(part.end_lineno or 0), -(part.end_col_offset or 0))
    )


def _is_addition(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add)


def fusion_at(code: CodeType, position: tuple[int | None, ...]) -> Fusion:
    """The call or addition at a position of a function's text; `RewriteError` where there is none."""
    for part in fusions_in(function_node(code)):
        if (part.lineno, part.col_offset, part.end_lineno, part.end_col_offset) == position:
            return part
    raise RewriteError(f"{code.co_qualname} fuses at line {position[0]} by something else than a call or an addition")


def call_at(code: CodeType, position: tuple[int | None, ...]) -> ast.Call:
    """The call at a (line, column, end line, end column) in a function's text; `RewriteError` where there is none."""
    for call in calls_in(function_node(code)):
        if (call.lineno, call.col_offset, call.end_lineno, call.end_col_offset) == position:
            return call
    raise RewriteError(
        f"{code.co_qualname} leads there at line {position[0]} by something else than a call (a property, an operator)"
    )


def stands_in_loop(function: FunctionNode, call: ast.Call) -> bool:
    """Whether a loop or comprehension of a function may run a call in it again."""
    loops = (node for node in ast.walk(function) if isinstance(node, _LOOPS))
    return any(child is call for loop in loops for child in ast.walk(loop))


def asks_for_shapes(code: CodeType, position: tuple[int | None, ...], *, anywhere: bool) -> bool:
    """Whether a branch whose test mentions a shape or size may decide if the call at a position runs, in the loops around it.

    With `anywhere`, in all of the function, which is then itself called in a loop. True where the source cannot be had.
    """
    try:
        function, call = function_node(code), call_at(code, position)
    except RewriteError:
        return True
    loops = [part for part in ast.walk(function) if isinstance(part, _LOOPS) and any(c is call for c in ast.walk(part))]
    tests = [test for around in ([function] if anywhere else loops) for test in _tests_in(around)]
    return any(isinstance(part, ast.Attribute) and part.attr in _SHAPES for test in tests for part in ast.walk(test))


def other_ways(function: FunctionNode, call: ast.Call) -> list[ast.Call]:
    """The resizes that a function makes in the place of `call` where a branch around it goes another way.

    `if size is None: x = F.interpolate(x, scale_factor=2)`, `else: x = F.interpolate(x, size=size)`: one resize of one tensor,
    written twice, by a factor and by a size. What is done with the result, and all other arguments, have to be the same.
    """
    parents = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    part: ast.AST = call
    while not isinstance(branch := parents[id(part)], ast.If | ast.IfExp):
        if isinstance(branch, (FunctionNode, *_LOOPS)):
            return []
        part = branch
    asked = _asked(call)
    if part is branch.test or asked is None:
        return []
    while isinstance(above := parents[id(branch)], ast.If) and above.orelse == [branch]:  # an elif
        branch = above
    frame = _frame(part, call)
    return [
        other
        for way in _ways(branch)
        if part not in way
        for there in way
        for other in calls_in(there)
        if _frame(there, other) == frame and _differ_in_size(asked, _asked(other))
    ]


@functools.lru_cache(maxsize=256)
def other_positions(code: CodeType, position: tuple[int | None, ...]) -> tuple[tuple[int | None, ...], ...]:
    """The positions of a call's `other_ways`; none where the source cannot be had."""
    try:
        others = other_ways(function_node(code), call_at(code, position))
    except RewriteError:
        return ()
    return tuple((call.lineno, call.col_offset, call.end_lineno, call.end_col_offset) for call in others)


def _ways(branch: ast.If | ast.IfExp) -> list[list[ast.AST]]:
    """The statements of each way that a branch can go, those behind an `elif` too; or the values of a conditional expression."""
    if isinstance(branch, ast.IfExp):
        return [[branch.body], [branch.orelse]]
    if len(branch.orelse) == 1 and isinstance(branch.orelse[0], ast.If):
        return [[*branch.body], *_ways(branch.orelse[0])]
    return [[*branch.body], [*branch.orelse]]


def _frame(statement: ast.AST, call: ast.Call) -> str:
    """The text around a call."""
    return ast.unparse(statement).replace(ast.unparse(call), "_")


def _asked(call: ast.Call) -> dict[str, str] | None:
    """What a resize is asked for, by the names of the arguments; None where they are unpacked."""
    if any(isinstance(value, ast.Starred) for value in call.args) or not all(word.arg for word in call.keywords):
        return None
    given = zip(_ARGUMENTS, call.args, strict=False)
    named = [*given, *((word.arg or "", word.value) for word in call.keywords)]
    return {"": ast.unparse(call.func), **{name: ast.unparse(value) for name, value in named}}


def _differ_in_size(one: dict[str, str], other: dict[str, str] | None) -> bool:
    """Whether two resizes are the same but that one has a size where the other has a factor, or another size."""
    if other is None or one.keys() & other.keys() & {"scale_factor"}:
        return False
    sizes = ("size", "scale_factor", "recompute_scale_factor")
    rest = [{name: text for name, text in asked.items() if name not in sizes} for asked in (one, other)]
    return rest[0] == rest[1] and all(asked.keys() & {"size", "scale_factor"} for asked in (one, other))


def _tests_in(tree: ast.AST) -> Iterator[ast.expr]:
    """What the branches in a syntax tree ask, comprehensions among them."""
    for part in ast.walk(tree):
        if isinstance(part, ast.If | ast.IfExp | ast.While):
            yield part.test
        elif isinstance(part, ast.comprehension):
            yield from part.ifs


def _covers(node: FunctionNode, code: CodeType) -> bool:
    """Whether every expression of the code stands inside the node."""
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
    return all(
        start <= (line, column) and (end_line, end_column) <= end
        for line, end_line, column, end_column in code.co_positions()
        if None not in (line, end_line, column, end_column) and (column, end_column) != (0, 0)
    )


@functools.lru_cache(maxsize=64)
def _functions(filename: str, lines: tuple[str, ...]) -> tuple[Function, ...]:
    """The functions of a file; none where it does not parse."""
    try:
        tree = ast.parse("".join(lines), filename)
    except SyntaxError:
        return ()
    counts: dict[str, int] = {}
    functions: list[Function] = []
    for qualname, node in _named([tree], ""):
        decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
        first = min([node.lineno, *(d.lineno for d in decorators)])
        functions.append(Function(qualname, counts.get(qualname, 0), first, node))
        counts[qualname] = counts.get(qualname, 0) + 1
    return tuple(functions)


def _named(nodes: Iterable[ast.AST], prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """The functions in and under some nodes with their qualified names, in the order of the text."""
    for node in nodes:
        if isinstance(node, FunctionNode):
            name = prefix + ("<lambda>" if isinstance(node, ast.Lambda) else node.name)
            yield name, node
            body: Sequence[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else node.body
            # Decorators and defaults run outside it.
            yield from _named((part for part in ast.iter_child_nodes(node) if part not in body), prefix)
            yield from _named(body, f"{name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            yield from _named(ast.iter_child_nodes(node), f"{prefix}{node.name}.")
        elif type(node) in _COMPREHENSIONS:
            scope = f"{prefix}{_COMPREHENSIONS[type(node)]}.<locals>."
            yield from _named(ast.iter_child_nodes(node), scope)
        else:
            yield from _named(ast.iter_child_nodes(node), prefix)
