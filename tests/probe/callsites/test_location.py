"""Where a call stands, as a plan keeps it: every statement around it, finding it again, and refusing."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import sys
import textwrap

import pytest

from upswap.errors import RewriteError
from upswap.plan.site import Location, Step
from upswap.probe.callsites import location
from upswap.probe.callsites.location import find_call, is_function, locate
from upswap.probe.callsites.stack import Hop, Place
from upswap.probe.callsites.syntax import calls_in, function_of


def function(text):
    return ast.parse(textwrap.dedent(text)).body[0]


def around(body, head="def f():"):
    """What stands around the call of `mark` in a function."""
    node = function(f"{head}\n{textwrap.indent(textwrap.dedent(body), '    ')}")
    call = next(call for call in calls_in(node) if isinstance(call.func, ast.Name) and call.func.id == "mark")
    return location._around(node, call)


AROUND = {
    # plain statements
    "mark()": (),
    "return other(mark())": (),
    "with a: mark()": (),
    "try: mark()\nfinally: pass": (),
    # branches
    "if a > 1: mark()": ("if a > 1",),
    "if a: pass\nelse: mark()": ("if a, else",),
    "if a: pass\nelif b: mark()": ("if a, else", "if b"),
    "if mark(): pass": (),
    "x = mark() if a else 0": ("if a",),
    "x = 0 if a else mark()": ("if a, else",),
    "x = 0 if mark() else 1": (),
    # loops
    "while a: mark()": ("while a",),
    "while a: pass\nelse: mark()": ("while a, else",),
    "while mark(): pass": (),
    "for i in xs.items(): mark()": ("for i in xs.items()",),
    "for i in xs: pass\nelse: mark()": ("for i in xs, else",),
    "for i in mark(): pass": (),
    "for i in xs:\n    mark()\nelse: pass": ("for i in xs",),
    # comprehensions
    "[mark() for i in xs]": ("for i in xs",),
    "[mark() for i in xs if i]": ("for i in xs if i",),
    "{mark() for i in xs}": ("for i in xs",),
    "{i: mark() for i in xs}": ("for i in xs",),
    "{mark(): i for i in xs}": ("for i in xs",),
    "sum(mark() for i in xs)": ("for i in xs",),
    "[mark() for i in xs for j in ys]": ("for i in xs", "for j in ys"),
    "[j for i in xs for j in mark()]": ("for i in xs",),
    "[i for i in mark()]": (),
    # operators that may stop before
    "a and mark()": ("a and",),
    "a and b and mark() and c": ("a and b and",),
    "mark() and a": (),
    "a or b or mark()": ("a or b or",),
    "mark() or a": (),
    # other blocks
    "try: pass\nexcept ValueError: mark()": ("except ValueError",),
    "try: pass\nexcept: mark()": ("except",),
    "match x:\n    case [1, y]: mark()": ("case [1, y]",),
    "match mark():\n    case 1: pass": (),
    # within each other, outermost first
    "for i in xs:\n    if i:\n        [mark() for j in i]": ("for i in xs", "if i", "for j in i"),
    "if a:\n    while b:\n        c or mark()": ("if a", "while b", "c or"),
}


@pytest.mark.parametrize("body", AROUND)
def test_what_stands_around_a_call(body) -> None:
    assert around(body) == AROUND[body]


def test_asynchronous_loops() -> None:
    assert around("async for i in xs: mark()", "async def f():") == ("for i in xs",)
    assert around("async for i in mark(): pass", "async def f():") == ()


def test_a_lambda_has_headers_too() -> None:
    node = ast.parse("lambda x: mark() if x else 0", mode="eval").body
    assert location._around(node, node.body.body) == ("if x",)


TWICE = """
def f(x):
    for i in x:
        up(x)
    if x:
        up( x )
    return down(x)
"""


def step(**changes):
    known = Step("f", "up(x)", 0, alike=2, around=("for i in x",))
    return dataclasses.replace(known, **changes)


def test_calls_written_alike_are_found_by_their_number() -> None:
    node = function(TWICE)
    assert find_call(node, step()).lineno == 4
    assert find_call(node, step(index=1, around=("if x",))).lineno == 6
    assert find_call(node, step(expression="down(x)", alike=1, around=())).lineno == 7


def refusal(**changes):
    with pytest.raises(RewriteError) as caught:
        find_call(function(TWICE), step(**changes))
    return str(caught.value)


def test_a_call_that_is_gone_is_refused() -> None:
    assert refusal(expression="up(y)") == "f no longer has the call `up(y)`"


def test_another_number_of_calls_is_refused() -> None:
    assert refusal(alike=1) == "f has the call `up(x)` 2 times, where it had it once"
    assert refusal(alike=3) == "f has the call `up(x)` 2 times, where it had it 3 times"
    assert refusal(expression="down(x)") == "f has the call `down(x)` once, where it had it 2 times"


def test_a_number_beyond_the_calls_is_refused() -> None:
    assert refusal(index=2) == "f has the call `up(x)` 2 times, where it had it 2 times"


def test_a_call_in_other_company_is_refused() -> None:
    assert refusal(index=1) == "in f the call `up(x)` now stands in `if x`, where it stood in `for i in x`"
    assert refusal(around=()) == "in f the call `up(x)` now stands in `for i in x`, where it stood in no loop or branch"
    both = ("if x", "for i in x")
    assert refusal(around=both) == (
        "in f the call `up(x)` now stands in `for i in x`, where it stood in `if x`, `for i in x`"
    )


def up(x):
    return x


def outer(xs):
    return [inner(x) for x in xs]


def inner(x):
    x = up(x)
    if x:
        x = up(x)
    return x


def hop(code, number, **changes):
    call = calls_in(function_of(code).node)[number]
    return Hop(code, (call.lineno, call.col_offset, call.end_lineno, call.end_col_offset), __name__, **changes)


def test_locate_keeps_every_step_of_the_way() -> None:
    line = inner.__code__.co_firstlineno + 3
    way = (hop(outer.__code__, 0, inner=True), hop(inner.__code__, 1, fresh=True))
    found = locate(Place(way, 3))
    assert found.steps == (
        Step("outer", "inner(x)", 0, __name__, inner=True, alike=1, around=("for x in xs",)),
        Step("inner", "up(x)", 1, __name__, fresh=True, alike=2, around=("if x",)),
    )
    assert (found.occurrence, found.line) == (3, line)
    assert found.file.endswith("test_location.py")
    assert locate(Place(way, None)).occurrence is None


def test_located_calls_are_found_again() -> None:
    node = function_of(inner.__code__).node
    for number, call in enumerate(calls_in(node)):
        (known,) = locate(Place((hop(inner.__code__, number),))).steps
        assert find_call(node, known) is call


def test_locate_takes_the_file_of_the_last_step_and_line_0_for_none(monkeypatch) -> None:
    monkeypatch.setattr(location, "_step", lambda hop: Step(hop.code.co_qualname, "up(x)", 0))
    codes = [compile("1", name, "eval") for name in ("/elsewhere/first.py", "/elsewhere/last.py")]
    found = locate(Place(tuple(Hop(code, (None,) * 4, "m") for code in codes)))
    assert found == Location((Step("<module>", "up(x)", 0),) * 2, 0, "last.py", 0)


def test_locate_refuses_a_place_with_a_problem_in_its_words() -> None:
    with pytest.raises(RewriteError, match=r"^no method makes it$"):
        locate(Place((hop(inner.__code__, 0),), problem="no method makes it"))


def test_locate_refuses_functions_without_source() -> None:
    namespace: dict = {}
    exec("def made(x):\n    return up(x)\n", namespace)
    with pytest.raises(RewriteError, match="the source of made is not to be had from <string>"):
        locate(Place((Hop(namespace["made"].__code__, (2, 11, 2, 16), "m"),)))


def test_locate_refuses_what_is_no_call() -> None:
    with pytest.raises(RewriteError, match="inner leads there at line 1 by something else than a call"):
        locate(Place((Hop(inner.__code__, (1, 0, 1, 5), __name__),)))


first, second = lambda x: up(x), lambda x: up(up(x))


def test_lambdas_of_one_name_are_told_apart() -> None:
    ordinals = [function_of(made.__code__).ordinal for made in (first, second)]
    assert ordinals[1] == ordinals[0] + 1
    for made, ordinal in zip((first, second), ordinals, strict=True):
        (known,) = locate(Place((hop(made.__code__, 0),))).steps
        assert (known.function, known.ordinal) == ("<lambda>", ordinal)
        for other in (first, second):
            assert is_function(known, other.__code__, __name__) == (other is made)


def test_is_function_asks_for_name_and_module() -> None:
    known = Step("inner", "up(x)", 0, "m")
    assert is_function(known, inner.__code__, "m")
    assert not is_function(known, inner.__code__, "n")
    assert not is_function(known, outer.__code__, "m")
    assert not is_function(dataclasses.replace(known, ordinal=1), inner.__code__, "m")


def test_files_are_named_from_the_longest_directory_on_the_path(monkeypatch) -> None:
    for entries in itertools.permutations(["", "/a", "/a/b/", "/a/b/cc"]):
        monkeypatch.setattr(sys, "path", list(entries))
        assert location._short("/a/b/c/file.py") == "c/file.py"
    monkeypatch.setattr(sys, "path", ["/z", ""])
    assert location._short("/a/b/file.py") == "file.py"
    assert location._short("<string>") == "<string>"
    monkeypatch.setattr(sys, "path", ["/aX/"])
    assert location._short("/aX/b/file.py") == "b/file.py"
