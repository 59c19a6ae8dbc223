"""What is certain by a function's text: that a name is bound where a call stands, that one expression follows another."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from .syntax import FunctionNode

_SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def is_bound(function: FunctionNode, call: ast.expr, name: str) -> bool:
    """Whether a local name of a function has a value whenever `call` in it runs, whatever branch was taken before.

    It is a parameter, the variable of a loop around the call, or assigned in a statement that runs before it in any case.
    """
    if _may_be_unbound(function, name):
        return False
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    around = _Around(function)
    if any(isinstance(part, _SCOPES) for part in around.up_to_statement(call)):
        return False
    for part in around.up_to_statement(call):
        if isinstance(part, _COMPREHENSIONS) and any(_names(generator.target, name) for generator in part.generators):
            return False
    if any(argument is not None and argument.arg == name for argument in given):
        return True
    for block, index, parent in around.blocks(call):
        if any(_binds(statement, name) for statement in block[:index]):
            return True
        if isinstance(parent, ast.For | ast.AsyncFor) and block is parent.body and _names(parent.target, name):
            return True
        if isinstance(parent, ast.With | ast.AsyncWith) and _is_entered_as(parent, name):
            return True
    return False


def follows(function: FunctionNode, call: ast.expr, later: ast.expr | ast.stmt) -> bool:
    """Whether `later` runs after every run of `call` in a function, unless an exception ends it, and not before it."""
    around = _Around(function)
    ancestors = around.ancestors(call)
    if any(isinstance(part, _SCOPES) for part in ancestors):
        return False
    if later in ancestors:
        between = ancestors[: ancestors.index(later)]
        return all(_always_runs(part, inside) for part, inside in zip(between, [call, *between], strict=False))
    chain = around.up_to_statement(later)
    inner: list[ast.AST] = [later, *chain]
    if any(
        not _always_runs(part, inside) or isinstance(part, _COMPREHENSIONS)
        for part, inside in zip(chain, inner, strict=False)
    ):
        return False
    block, place, _ = next(around.blocks(later))
    if not isinstance(block[place], _SIMPLE):
        return False
    first = next((index for found, index, _ in around.blocks(call) if found is block), None)
    if first is None or first >= place:
        return False
    if any(_leaves(statement) for statement in block[first + 1 : place]):
        return False
    here = block[first]
    returns = (ast.Return,) if isinstance(here, _LOOPS) else _LEAVING
    return not any(isinstance(part, returns) and not isinstance(part, ast.Raise) for part in _inside(here))


def returns_in(function: FunctionNode) -> list[ast.Return]:
    """The statements of a function that end it, without those of functions in it."""
    body: Sequence[ast.AST] = [function.body] if isinstance(function, ast.Lambda) else function.body
    return [part for statement in body for part in _inside(statement) if isinstance(part, ast.Return)]


class _Around:
    """What stands around the parts of a function."""

    def __init__(self, function: FunctionNode) -> None:
        self._function = function
        self._parents = {id(child): parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}

    def ancestors(self, part: ast.AST) -> list[ast.AST]:
        """The parts that a part stands in, innermost first, without the function itself."""
        found: list[ast.AST] = []
        while (part := self._parents[id(part)]) is not self._function:
            found.append(part)
        return found

    def up_to_statement(self, part: ast.AST) -> list[ast.AST]:
        """The expressions that a part stands in within its statement; a statement stands in none."""
        found: list[ast.AST] = []
        while not isinstance(part, ast.stmt) and (part := self._parents[id(part)]) is not self._function:
            if not isinstance(part, ast.stmt):
                found.append(part)
        return found

    def blocks(self, part: ast.AST) -> Iterator[tuple[list[ast.stmt], int, ast.AST]]:
        """The lists of statements that a part stands in, innermost first: each with its place there, and what has the list."""
        while part is not self._function:
            parent = self._parents[id(part)]
            for _, value in ast.iter_fields(parent):
                if isinstance(value, list) and isinstance(part, ast.stmt):
                    index = next((index for index, item in enumerate(value) if item is part), None)
                    if index is not None:
                        yield value, index, parent
            part = parent


def _may_be_unbound(function: FunctionNode, name: str) -> bool:
    """Whether a function takes a name away, or has it from elsewhere."""
    for part in ast.walk(function):
        if isinstance(part, ast.Global | ast.Nonlocal) and name in part.names:
            return True
        if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Del):
            return True
        if isinstance(part, ast.ExceptHandler) and part.name == name:
            return True
    return False


def _binds(statement: ast.stmt, name: str) -> bool:
    """Whether a name has a value after a statement has run, unless it has left its block."""
    if isinstance(statement, ast.Assign):
        return any(_names(target, name) for target in statement.targets)
    if isinstance(statement, ast.AnnAssign):
        return statement.value is not None and _names(statement.target, name)
    if isinstance(statement, ast.AugAssign):
        return _names(statement.target, name)
    if isinstance(statement, ast.With | ast.AsyncWith):
        return _is_entered_as(statement, name)
    if isinstance(statement, ast.If):
        return all(_block_binds(block, name) for block in (statement.body, statement.orelse))
    return False


def _block_binds(block: Sequence[ast.stmt], name: str) -> bool:
    return any(_binds(statement, name) or isinstance(statement, _LEAVING) for statement in block)


def _is_entered_as(statement: ast.With | ast.AsyncWith, name: str) -> bool:
    return any(item.optional_vars is not None and _names(item.optional_vars, name) for item in statement.items)


def _names(target: ast.expr, name: str) -> bool:
    """Whether an assignment to `target` binds a name."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(_names(item, name) for item in target.elts)
    if isinstance(target, ast.Starred):
        return _names(target.value, name)
    return isinstance(target, ast.Name) and target.id == name


def _always_runs(whole: ast.AST, part: ast.AST) -> bool:
    """Whether an expression that runs is certain to run its direct part `part`, once or more."""
    if isinstance(whole, _SCOPES):
        return False
    if isinstance(whole, ast.IfExp):
        return part is whole.test
    if isinstance(whole, ast.BoolOp):
        return part is whole.values[0]
    return not (isinstance(whole, ast.comprehension) and part in whole.ifs)


def _leaves(statement: ast.stmt) -> bool:
    """Whether a statement may leave the block that it stands in, by other means than an exception."""
    return any(isinstance(part, ast.Return | ast.Break | ast.Continue) for part in _inside(statement))


def _inside(statement: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement, without those of functions and classes in it."""
    yield statement
    if not isinstance(statement, _SCOPES):
        for part in ast.iter_child_nodes(statement):
            yield from _inside(part)
