"""Functions as syntax trees: the resizes that stand in the place of another."""

from __future__ import annotations

import ast
import textwrap

import pytest

from upswap.probe.callsites.syntax import calls_in, other_ways


def others(text: str) -> list[str]:
    """What stands in the place of the first call of `resize` in a function of this text."""
    (function,) = ast.parse("def f(x, y, size):\n" + textwrap.indent(textwrap.dedent(text), "    ")).body
    assert isinstance(function, ast.FunctionDef)
    first = next(call for call in calls_in(function) if ast.unparse(call.func) == "resize")
    return [ast.unparse(call) for call in other_ways(function, first)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if size is None: x = resize(x, scale_factor=2)\nelse: x = resize(x, size=size)", ["resize(x, size=size)"]),
        ("if size: x = resize(x, size)\nelse: x = resize(x, None, 2)", ["resize(x, None, 2)"]),
        ("return resize(x, scale_factor=2) if size is None else resize(x, size)", ["resize(x, size)"]),
        ("x = y + (resize(x, scale_factor=2) if size is None else resize(x, size))", ["resize(x, size)"]),
        ("if y: return resize(x, size=1)\nelif size: return resize(x, size=2)\nelse: return resize(x, scale_factor=2)",
         ["resize(x, size=2)", "resize(x, scale_factor=2)"]),
        ("if y: pass\nelif size: return resize(x, size=2)\nelse: return resize(x, scale_factor=2)",
         ["resize(x, scale_factor=2)"]),
        ("if size:\n    with y: x = resize(x, size)\nelse:\n    with y: x = resize(x, scale_factor=2)",
         ["resize(x, scale_factor=2)"]),
    ],
)  # fmt: skip
def test_one_resize_that_is_written_twice(text: str, expected: list[str]) -> None:
    assert others(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x = resize(x, size)",
        "if size: x = resize(x, size)\nx = resize(x, scale_factor=2)",  # one after the other
        "if size:\n    x = resize(x, size)\n    x = resize(x, scale_factor=2)",  # in one arm
        "if size: x = resize(x, size)\nelse: y = resize(x, scale_factor=2)",  # another result
        "if size: x = resize(x, size)\nelse: x = resize(y, scale_factor=2)",  # another tensor
        "if size: x = resize(x, size)\nelse: x = enlarge(x, scale_factor=2)",  # another function
        "if size: x = resize(x, size)\nelse: x = resize(x, scale_factor=2, mode='bicubic')",  # another mode
        "if size: x = resize(x, scale_factor=4)\nelse: x = resize(x, scale_factor=2)",  # two fixed ratios
        "if size: x = resize(x, size)\nelse: x = resize(x)",
        "if size: x = resize(x, size)\nelse: x = resize(x, **y)",
        "if size: x = resize(x, size)\nelse: x = resize(*y)",
        "if resize(x, size): pass\nelse: resize(x, scale_factor=2)",  # in the test
        "if size:\n    for y in x: x = resize(x, size)\nelse:\n    for y in x: x = resize(x, scale_factor=2)",
        "if size:\n    def g(): return resize(x, size)\nelse:\n    def g(): return resize(x, scale_factor=2)",
    ],
)
def test_not_in_its_place(text: str) -> None:
    assert others(text) == []
