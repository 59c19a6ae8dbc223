"""What is certain where a function's text is read: names that are bound, expressions that follow."""

from __future__ import annotations

import ast
import textwrap
from typing import Any

import pytest

from upswap.probe.callsites.certain import follows, is_bound, returns_in


def function(body: str, arguments: str = "x, flag") -> ast.FunctionDef:
    """The tree of a function with this body."""
    (found,) = ast.parse(f"def forward(self, {arguments}):\n{textwrap.indent(body, '    ')}").body
    assert isinstance(found, ast.FunctionDef)
    return found


def part(node: ast.FunctionDef, text: str) -> Any:
    """The only expression or statement of a function that is written so."""
    (found,) = [p for p in ast.walk(node) if isinstance(p, ast.expr | ast.stmt) and ast.unparse(p) == text]
    return found


@pytest.mark.parametrize(
    "body",
    [
        "skip = x\nreturn up(x)",
        "a, (skip, *b) = x\nreturn up(x)",
        "skip: object = x\nif flag:\n    return up(x)",
        "for skip in x:\n    y = up(x)",
        "with x as skip:\n    y = up(x)",
        "if flag:\n    skip = x\nelse:\n    skip = flag\nreturn up(x)",
        "if flag:\n    skip = x\nelse:\n    raise ValueError\nreturn up(x)",
        "skip = x\nreturn [up(x) for each in x]",
    ],
)
def test_a_name_that_is_bound_before_the_call_in_any_case(body: str) -> None:
    node = function(body)
    assert is_bound(node, part(node, "up(x)"), "skip")


@pytest.mark.parametrize("name", ["x", "flag", "rest", "more", "last"])
def test_a_parameter_is_bound(name: str) -> None:
    node = function("return up(x)", "x, flag, *rest, last=None, **more")
    assert is_bound(node, part(node, "up(x)"), name)


@pytest.mark.parametrize(
    "body",
    [
        "if flag:\n    skip = x\nreturn up(x)",
        "for skip in x:\n    pass\nreturn up(x)",
        "y = up(x)\nskip = x",
        "skip = x\ndel skip\nreturn up(x)",
        "global skip\nskip = x\nreturn up(x)",
        "try:\n    skip = x\nexcept ValueError:\n    pass\nreturn up(x)",
        "try:\n    pass\nexcept ValueError as skip:\n    pass\nskip = x\nreturn up(x)",
        "skip: object\nreturn up(x)",
        "skip = x\nreturn [up(x) for skip in x]",
        "skip = x\nreturn (lambda: up(x))",
        "return up(x)",
    ],
)
def test_a_name_that_may_be_unbound_or_another_one(body: str) -> None:
    node = function(body)
    assert not is_bound(node, part(node, "up(x)"), "skip")


@pytest.mark.parametrize(
    "body",
    [
        "y = up(x)\nz = y\nreturn y + z",
        "return x + up(x) if False else 1",
        "y = up(x)\nif flag:\n    y = x\nz = y + z",
        "if flag:\n    y = up(x)\nelse:\n    y = x\nreturn y + z",
        "for i in x:\n    y = up(x)\n    if i:\n        continue\nreturn y + z",
        "for i in x:\n    y = up(x)\n    y = y + z\n    if i:\n        break",
        "y = up(x)\ny = f(a=(y + z))",
        "return [up(x) for a in b] + z",
        "return z + [up(x) for x in y if x]",
    ],
)
def test_an_expression_that_follows(body: str) -> None:
    node = function(body)
    (addition,) = [p for p in ast.walk(node) if isinstance(p, ast.BinOp)]
    assert follows(node, part(node, "up(x)"), addition)


@pytest.mark.parametrize(
    "body",
    [
        "y = up(x)\nif flag:\n    y = y + z",
        "y = up(x)\nif flag:\n    return y\nreturn y + z",
        "for i in x:\n    y = up(x)\n    if i:\n        continue\n    y = y + z",
        "for i in x:\n    if i:\n        y = up(x)\n        break\n    y = y + z",
        "for i in x:\n    y = up(x)\n    if i:\n        return y\nreturn y + z",
        "z = y + z\ny = up(x)",
        "y = up(x)\nreturn y + z if flag else y",
        "y = up(x)\nreturn flag and y + z",
        "y = up(x)\nreturn [y + z for z in x]",
        "y = up(x)\nwhile y + z:\n    pass",
        "f = lambda: up(x)\nreturn f() + z",
        "def f():\n    return up(x)\nreturn f() + z",
        "return z + (up(x) if flag else x)",
    ],
)
def test_an_expression_that_need_not_follow(body: str) -> None:
    node = function(body)
    (addition,) = [p for p in ast.walk(node) if isinstance(p, ast.BinOp)]
    assert not follows(node, part(node, "up(x)"), addition)


def test_what_ends_a_function_and_not_one_in_it() -> None:
    node = function(
        "if flag:\n    return x\ndef inner():\n    return flag\nfor i in x:\n    return i\nreturn lambda: x"
    )
    assert [ast.unparse(each) for each in returns_in(node)] == ["return x", "return i", "return lambda: x"]
