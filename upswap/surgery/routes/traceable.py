"""Which forwards a trace is faithful to: straight-line code, by an allow-list over its syntax tree.

FX records what a forward did once. That is what it always does only if nothing in it looks at anything but its arguments:
no branch or loop, no setting of its own or of the world, no helper that might. Everything else goes to the source route,
which is faithful to any code, so a refusal here costs nothing.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from types import FunctionType

import torch
from torch import nn

from ...errors import RewriteError
from ...plan.site import is_plain
from ...probe.callsites.syntax import function_node
from .refusals import NotFaithful

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Pass)
_EXPRESSIONS = (
    ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.keyword, ast.BinOp, ast.Subscript, ast.Slice, ast.Tuple, ast.List,
    ast.expr_context, ast.operator, ast.arguments, ast.arg, ast.USub, ast.UnaryOp,
)  # fmt: skip


def straight_line(owner: nn.Module) -> int:
    """The number of calls in the forward of `owner`; `NotFaithful`, with the reason, unless a trace of it is faithful.

    Admitted are assignments to local names, arithmetic, indexing, and calls of torch functions, of methods of local values
    and of children of the owner.
    """
    forward = inspect.getattr_static(type(owner), "forward", None)
    if not isinstance(forward, FunctionType):
        raise NotFaithful("its forward is no plain function")
    kinds = {p.kind for p in inspect.signature(forward).parameters.values()}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
        raise NotFaithful("its forward takes a variable or keyword-only list of arguments")
    try:
        node = function_node(forward.__code__)
    except RewriteError as error:
        raise NotFaithful(str(error)) from error
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or forward.__closure__:
        raise NotFaithful("its forward is decorated or a closure")
    check = _Check(owner, forward)
    for statement in node.body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
            check.statement(statement)
    return check.calls


def unplain_name(owner: nn.Module) -> str | None:
    """A name of a module, parameter or buffer in `owner` that is no plain one, or None.

    What traces a module may write its names into source code.
    """
    for module in owner.modules():
        # By their keys: the dicts of a scripted module are none.
        for name in (*module._modules.keys(), *module._parameters.keys(), *module._buffers.keys()):
            if not is_plain(name):
                return str(name)
    return None


class _Check:
    def __init__(self, owner: nn.Module, forward: FunctionType) -> None:
        self.owner = owner
        self.globals = forward.__globals__
        self.locals = set(forward.__code__.co_varnames)
        self.self_name = forward.__code__.co_varnames[0]
        self.calls = 0

    def statement(self, node: ast.stmt) -> None:
        if not isinstance(node, _STATEMENTS):
            raise NotFaithful(f"line {node.lineno} is a {type(node).__name__.lower()} statement")
        for target in _targets(node):
            if not isinstance(target, ast.Name | ast.Tuple):
                raise NotFaithful(f"line {node.lineno} assigns to an attribute or an element")
        value = getattr(node, "value", None)
        if value is not None:
            self.expression(value)

    def expression(self, node: ast.AST) -> None:
        if not isinstance(node, _EXPRESSIONS) or (isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.USub)):
            raise NotFaithful(
                f"line {getattr(node, 'lineno', 0)} has a {type(node).__name__.lower()}, which may decide"
            )
        if isinstance(node, ast.Call):
            self.calls += 1
            self.callee(node.func)
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                self.expression(argument)
        elif isinstance(node, ast.Attribute | ast.Name):
            self.value(node)
        else:
            for child in ast.iter_child_nodes(node):
                self.expression(child)

    def callee(self, node: ast.expr) -> None:
        """A torch function, a child of the owner, or a method of a local value."""
        root, names = _chain(node)
        if isinstance(root, ast.Name) and root.id == self.self_name:
            if not names or not isinstance(self.resolve(self.owner, names), nn.Module):
                raise NotFaithful(f"line {node.lineno} calls {ast.unparse(node)}, which is no child")
        elif isinstance(root, ast.Name) and root.id not in self.locals:
            found = self.resolve(self.globals.get(root.id, getattr(builtins, root.id, None)), names)
            home = getattr(found, "__module__", None) or (
                "torch" if type(found).__name__ == "builtin_function_or_method" else ""
            )
            if home.partition(".")[0] != "torch" or isinstance(found, type) or root.id in vars(builtins):
                raise NotFaithful(f"line {node.lineno} calls {ast.unparse(node)}, which is no torch function")
        elif isinstance(node, ast.Attribute):
            self.expression(node.value)
        else:
            raise NotFaithful(f"line {node.lineno} calls {ast.unparse(node)}, a value")

    def value(self, node: ast.Attribute | ast.Name) -> None:
        """A local value, an attribute of one, or a parameter, buffer of the owner."""
        root, names = _chain(node)
        if isinstance(root, ast.Name) and root.id == self.self_name:
            if not names or not isinstance(self.resolve(self.owner, names), torch.Tensor):
                raise NotFaithful(f"line {node.lineno} reads {ast.unparse(node)}, which may change after the trace")
        elif isinstance(root, ast.Name) and root.id not in self.locals:
            if not isinstance(self.resolve(self.globals.get(root.id), names), torch.dtype):
                raise NotFaithful(f"line {node.lineno} reads {ast.unparse(node)}, which may change after the trace")
        elif not isinstance(root, ast.Name):
            self.expression(root)

    @staticmethod
    def resolve(value: object, names: list[str]) -> object:
        for name in names:
            value = getattr(value, name, None)
        return value


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def _chain(node: ast.expr) -> tuple[ast.expr, list[str]]:
    """`a.b.c` as the expression `a` and the names `b`, `c`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return node, names
