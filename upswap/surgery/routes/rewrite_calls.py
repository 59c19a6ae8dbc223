"""A method compiled again from its syntax tree, with its resize calls sent through `runtime.resize`.

Only the call expressions change. Control flow stays the author's own, and so do the file and the line numbers, so that
tracebacks and breakpoints point at the code one reads. Where the way to a resize leads through other functions, those are
compiled again too, for this owner alone, and the expressions that call them go through a `Helper`.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any, cast

from torch import nn

from ...errors import RewriteError
from ...plan.site import Step
from ...probe.callsites.certain import follows, is_bound, returns_in
from ...probe.callsites.functions import functions_in, loaded
from ...probe.callsites.location import find_call, find_fusion, is_function
from ...probe.callsites.syntax import FunctionNode, Fusion, function_node, other_ways
from .guiding import GUIDE, Handed, check_fused, fuse, hand
from .runtime import Target, enter, resize

_RUN, _OWNER, _FUSE, _FUSED = "_upswap_run", "_upswap_owner", "_upswap_fuse", "_upswap_fused"
_ADD, _ADD_IN_PLACE = "_upswap_add", "_upswap_iadd"
_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclasses.dataclass
class Resize:
    """A resize call to be replaced: what each of its runs goes through, and which counter counts them, if they are
    counted. `apart` are the expressions that have sites of their own. `names` are the locals that guides are found by, `fusings`
    the expressions where results are corrected with theirs."""

    step: Step
    counter: int | None
    targets: list[Target | None]
    apart: frozenset[str]
    names: tuple[str, ...] = ()
    fusings: tuple[Step, ...] = ()


@dataclasses.dataclass
class Fuse:
    """A sum or concatenation in which results of the resizes at some sites are corrected."""

    step: Step
    sites: tuple[str, ...]


@dataclasses.dataclass
class Hand:
    """A call that leads to modules which guides are handed to, found by the locals `names`; `sites` are theirs."""

    step: Step
    targets: list[Handed]
    names: tuple[str, ...]
    sites: str


@dataclasses.dataclass
class Detour:
    """A call that leads to functions with resize calls in them: for each function, as its own steps name it, what is
    replaced there. `fusings` are as those of a `Resize`."""

    step: Step
    functions: list[tuple[Step, list[Resize | Detour | Fuse | Hand]]]
    fusings: tuple[Step, ...] = ()


Replacement = Resize | Detour | Fuse | Hand


def recompile(
    method: FunctionType,
    owner: nn.Module,
    replacements: Sequence[Replacement],
    counters: int,
    takes_guide: bool = False,
) -> FunctionType:
    """`method` of the module `owner`, with the calls that `replacements` name replaced; its resizes use that many
    counters in all. With `takes_guide` it has one more keyword, by which it is handed a guide.

    The new function shares globals, defaults and closure with the old. Raises `RewriteError` where a call cannot be found.
    """
    node = _copied(method)
    arguments = node.args.posonlyargs + node.args.args
    if not arguments:
        raise RewriteError(f"{method.__qualname__} names no argument for the module itself")
    if takes_guide:
        node.args.kwonlyargs.append(ast.arg(GUIDE))
        node.args.kw_defaults.append(ast.Constant(None))
    injected = _replace(method, owner, node, replacements, counters, arguments[0].arg)
    _begin(node, [ast.Assign([ast.Name(_RUN, ast.Store())], _zeros(counters))])
    return _Template(method, node, injected, {GUIDE: None} if takes_guide else None).bind(method)


class Helper:
    """A function on the way to a resize, or several that one expression may call, compiled again when it is met.

    `owner` and the counters of the run are handed to it as two more keyword arguments.
    """

    def __init__(
        self, owner: nn.Module, functions: Sequence[tuple[Step, Sequence[Replacement]]], counters: int, callee: Any
    ) -> None:
        self._functions = functions
        self._counters = counters
        self._templates: dict[CodeType, _Template | None] = {}
        # Functions that live as long as their module, found beforehand: torch.compile can look one up, but not make one.
        self._made: dict[FunctionType, FunctionType] = {}
        #: Whether torch calls the function for the model, handed to it as an argument.
        self.indirect = any(step.fresh for step, _ in functions)
        for value in (callee, *(loaded(step.module, step.function) for step, _ in functions)):
            for function in functions_in(value):
                new = self._compiled(function, owner)
                if new is not None:
                    self._made[function] = new

    def __deepcopy__(self, memo: Any) -> Helper:
        return self

    def of(self, function: FunctionType, owner: nn.Module) -> FunctionType | None:
        """The function compiled again, or None for one the plan does not know."""
        known = self._made.get(function)
        return known if known is not None else self._compiled(function, owner)

    def _compiled(self, function: FunctionType, owner: nn.Module) -> FunctionType | None:
        code = function.__code__
        if code not in self._templates:
            self._templates[code] = self._template(function, owner)
        template = self._templates[code]
        return None if template is None else template.bind(function)

    def _template(self, function: FunctionType, owner: nn.Module) -> _Template | None:
        module = function.__globals__.get("__name__", "")
        for step, replacements in self._functions:
            if step.function == function.__code__.co_qualname and is_function(step, function.__code__, module):
                node = _copied(function)
                injected = _replace(function, owner, node, replacements, self._counters, _OWNER)
                node.args.kwonlyargs += [ast.arg(_OWNER), ast.arg(_RUN)]
                node.args.kw_defaults += [None, None]
                none = ast.Compare(ast.Name(_RUN, ast.Load()), [ast.Is()], [ast.Constant(None)])
                fresh = ast.Assign([ast.Name(_RUN, ast.Store())], _zeros(self._counters))
                _begin(node, [ast.If(none, [fresh], [])])
                return _Template(function, node, injected)
        return None


def _copied(function: FunctionType) -> ast.FunctionDef:
    """The function's tree, a copy; a lambda's as a function that returns its value."""
    node = copy.deepcopy(function_node(function.__code__))
    if isinstance(node, ast.AsyncFunctionDef):
        raise RewriteError(f"{function.__qualname__} is asynchronous")
    if isinstance(node, ast.Lambda):
        definition = cast(ast.FunctionDef, ast.parse("def _upswap_lambda(): pass").body[0])
        definition.args, definition.body = node.args, [ast.Return(node.body)]
        return ast.copy_location(definition, node)
    node.decorator_list = []
    return node


def _replace(
    function: FunctionType,
    owner: nn.Module,
    node: ast.FunctionDef,
    replacements: Sequence[Replacement],
    counters: int,
    owner_name: str,
) -> dict[str, Any]:
    """Change the calls in `node`, and give what they need from the function's closure, by name."""
    injected: dict[str, Any] = {}
    # Found before any is changed: `find_call` compares texts.
    fuses = [each for each in replacements if isinstance(each, Fuse)]
    fusions = [find_fusion(node, each.step) for each in fuses]
    others = [each for each in replacements if not isinstance(each, Fuse)]
    calls = [find_call(node, replacement.step) for replacement in others]
    if len(set(map(id, (*calls, *fusions)))) < len(calls) + len(fusions):
        raise RewriteError(f"one call of {function.__qualname__} is a resize at one time and leads to one at another")
    parents = {id(child): parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
    numbered = [*zip(calls, itertools.count(), others, strict=False)]
    numbered += [
        (other, index, replacement)
        for call, index, replacement in numbered
        if isinstance(replacement, Resize)
        for other in other_ways(node, call)
        if ast.unparse(other) not in replacement.apart
    ]
    for call, _, replacement in numbered:
        _check_guides(function, node, call, replacement)
    for call, index, replacement in numbered:
        name = f"_upswap_{index}"
        run: ast.expr = ast.Name(_RUN, ast.Load())
        if replacement.step.inner:
            run = _counted_anew(call, parents, node, counters)
        leading: list[ast.expr] = []
        if isinstance(replacement, Resize):
            injected[name] = functools.partial(resize, tuple(replacement.targets))
            # In the code itself: torch 2.9 compiles a number that is held elsewhere as one that may change.
            leading = [ast.Constant(replacement.counter), run]
            call.keywords += _locals(replacement.names)
        elif isinstance(replacement, Hand):
            injected[name] = functools.partial(hand, tuple(replacement.targets))
            call.keywords += _locals(replacement.names)
        else:
            callee = value_of(call.func, function, owner if owner_name != _OWNER else None)
            helper = Helper(owner, replacement.functions, counters, callee)
            injected[name] = functools.partial(enter, helper, _names(replacement))
            leading = [run]
        inherited = _super_call(call)
        if inherited is not None:
            # torch.compile cannot hold `super().forward` as a value, so what it stands for is found beforehand.
            injected[f"{name}_super"] = _inherited(function, type(owner), *inherited)
            call.args = [ast.Name(_first_name(node), ast.Load()), *call.args]
            call.func = ast.Name(f"{name}_super", ast.Load())
        call.args = [*leading, ast.Name(owner_name, ast.Load()), call.func, *call.args]
        call.func = ast.Name(name, ast.Load())
    if fusions:
        injected |= {_FUSE: fuse, _ADD: operator.add, _ADD_IN_PLACE: operator.iadd}
        # Those inside others first: the others then have the changed ones.
        for fusion in sorted(fusions, key=lambda part: sum(1 for _ in ast.walk(part))):
            _fuse(fusion, parents[id(fusion)], counters)
        sites = tuple(dict.fromkeys(site for each in fuses for site in each.sites))
        injected[_FUSED] = functools.partial(check_fused, sites)
        for statement in returns_in(node):
            given: list[ast.expr] = [ast.Constant(counters), ast.Name(_RUN, ast.Load())]
            value = statement.value if statement.value is not None else ast.Constant(None)
            statement.value = ast.Call(ast.Name(_FUSED, ast.Load()), [*given, value], [])
    return injected


def _check_guides(
    function: FunctionType, node: ast.FunctionDef, call: ast.Call, replacement: Resize | Hand | Detour
) -> None:
    """`RewriteError` where the names of guides are not certainly bound at a call, or its result is not certainly fused later."""
    for name in () if isinstance(replacement, Detour) else replacement.names:
        if not is_bound(node, call, name):
            raise RewriteError(f"in {function.__qualname__} the name of a guide, {name}, is not bound in every case")
    for step in () if isinstance(replacement, Hand) else replacement.fusings:
        if not follows(node, call, find_fusion(node, step)):
            raise RewriteError(
                f"in {function.__qualname__} `{step.expression}` does not follow the resize in every case"
            )


def _locals(names: Sequence[str]) -> list[ast.keyword]:
    """The keyword by which a call passes the values of locals on. It comes last, so that they are what they are at the call."""
    values: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
    return [ast.keyword("_upswap_locals", ast.Tuple(values, ast.Load()))] if names else []


def _fuse(fusion: Fusion, parent: ast.AST, counters: int) -> None:
    """Let a sum or concatenation go through `guiding.fuse`."""
    leading: list[ast.expr] = [ast.Constant(counters), ast.Name(_RUN, ast.Load())]
    through = ast.Name(_FUSE, ast.Load())
    if isinstance(fusion, ast.Call):
        fusion.args = [*leading, fusion.func, *fusion.args]
        fusion.func = through
    elif isinstance(fusion, ast.BinOp):
        adding = ast.copy_location(ast.Name(_ADD, ast.Load()), fusion)
        put(
            parent,
            fusion,
            ast.copy_location(ast.Call(through, [*leading, adding, fusion.left, fusion.right], []), fusion),
        )
    else:
        now = copy.deepcopy(fusion.target)
        now.ctx = ast.Load()
        adding = ast.copy_location(ast.Name(_ADD_IN_PLACE, ast.Load()), fusion)
        call = ast.copy_location(ast.Call(through, [*leading, adding, now, fusion.value], []), fusion)
        put(parent, fusion, ast.copy_location(ast.Assign([fusion.target], call), fusion))


def put(parent: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Let a part of a tree be another."""
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list):
            value[:] = [new if item is old else item for item in value]


def value_of(node: ast.expr, function: FunctionType, owner: nn.Module | None) -> Any:
    """What `a` or `a.b.c` stands for in a function, whose first argument is `owner` if one is given; None where that
    cannot be told."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    code = function.__code__
    if node.id in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(node.id)]
        value = cell.cell_contents if cell != CellType() else None
    elif node.id == code.co_varnames[0] and owner is not None:
        value = owner
    else:
        value = None if node.id in code.co_varnames else function.__globals__.get(node.id)
    for name in names:
        own = {**vars(value), **value._modules} if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
        value = own[name] if name in own else inspect.getattr_static(value, name, None)
    return value


def _names(detour: Detour) -> str:
    """The sites a detour leads to, for a message."""
    names: list[str] = []
    for _, replacements in detour.functions:
        for replacement in replacements:
            if isinstance(replacement, Resize):
                names += [target.site for target in replacement.targets if target is not None]
            elif isinstance(replacement, Hand):
                names.append(replacement.sites)
            elif isinstance(replacement, Detour):
                names.append(_names(replacement))
    return ", ".join(names)


def _counted_anew(call: ast.Call, parents: dict[int, ast.AST], top: ast.AST, counters: int) -> ast.expr:
    """Counters for a call in a function that is run by something else, perhaps again: made in that function."""
    around = parents[id(call)]
    while not isinstance(around, FunctionNode):
        around = parents[id(around)]
    if around is top:
        return ast.Name(_RUN, ast.Load())
    if isinstance(around, ast.Lambda):
        return _zeros(counters)
    begins = around.body[0]
    if not (isinstance(begins, ast.Assign) and ast.unparse(begins.targets[0]) == _RUN):
        _begin(around, [ast.Assign([ast.Name(_RUN, ast.Store())], _zeros(counters))])
    return ast.Name(_RUN, ast.Load())


def _begin(node: ast.FunctionDef | ast.AsyncFunctionDef, statements: list[ast.stmt]) -> None:
    """Put statements first in a function, after its docstring."""
    start = 1 if ast.get_docstring(node, clean=False) is not None else 0
    node.body[start:start] = statements


def _zeros(count: int) -> ast.List:
    return ast.List([ast.Constant(0) for _ in range(count)], ast.Load())


def _super_call(call: ast.Call) -> tuple[list[ast.expr], str] | None:
    """The arguments of `super` and the method's name in `super(...).method(...)`."""
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
        inner = function.value
        if isinstance(inner.func, ast.Name) and inner.func.id == "super":
            return inner.args, function.attr
    return None


def _first_name(node: ast.FunctionDef) -> str:
    return (node.args.posonlyargs + node.args.args)[0].arg


def _inherited(function: FunctionType, cls: type, arguments: list[ast.expr], name: str) -> Callable[..., Any]:
    """The function that `super(...).name` stands for in an instance of `cls`."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if arguments:
        here = function.__globals__.get(ast.unparse(arguments[0]))
    else:
        here = cells["__class__"].cell_contents if "__class__" in cells else None
    after = cls.__mro__[cls.__mro__.index(here) + 1 :] if here in cls.__mro__ else ()
    for base in after:
        if isinstance(vars(base).get(name), FunctionType):
            return cast(Callable[..., Any], vars(base)[name])
    raise RewriteError(f"{function.__qualname__} calls super().{name}, which cannot be told for a {cls.__qualname__}")


class _Template:
    """A function's changed tree, compiled; it gives new functions with the globals, defaults and closure of old ones."""

    def __init__(
        self,
        function: FunctionType,
        node: ast.FunctionDef,
        injected: dict[str, Any],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self._defaults = defaults or {}
        self._injected = {name: CellType(value) for name, value in injected.items()}
        code = function.__code__
        free = [name for name in (*code.co_freevars, *self._injected) if name != "__class__"]
        tree = ast.parse("def _upswap_factory(): pass")
        factory = cast(ast.FunctionDef, tree.body[0])
        # A function around it makes the closure's names free variables; a class of the same name around that gives private
        # names (`self.__x`) and `super()` their meaning.
        factory.body = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in free]
        scope = _enclosing_class(code.co_qualname)
        # What is defined in the factory would otherwise be a free variable of code that mentions it: a helper that calls itself.
        own = sorted({node.name, scope or node.name} - set(free))
        if own:
            factory.body.append(ast.Global(own))
        if scope is not None:
            definition = cast(ast.ClassDef, ast.parse("class _: pass").body[0])
            definition.name, definition.body = scope, [node]
            factory.body.append(definition)
        else:
            factory.body.append(node)
        compiled = compile(
            ast.fix_missing_locations(tree), code.co_filename, "exec", flags=code.co_flags & _FUTURES, dont_inherit=True
        )
        self._code = _code_named(compiled, node.name)

    def bind(self, function: FunctionType) -> FunctionType:
        """The new function in the place of `function`."""
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells.update(self._injected)
        new = FunctionType(
            self._code,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells[name] for name in self._code.co_freevars),
        )
        new.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **self._defaults} or None
        new.__qualname__ = function.__qualname__
        functools.update_wrapper(new, function)
        del new.__dict__["__wrapped__"]
        return new


def _enclosing_class(qualname: str) -> str | None:
    """The name of the class a function stands in, by its qualified name."""
    for part in reversed(qualname.split(".<locals>.")):
        names = part.split(".")
        if len(names) > 1:
            return names[-2]
    return None


def _code_named(code: CodeType, name: str) -> CodeType:
    """The code object of the function `name` inside compiled code."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name:
                return constant
            try:
                return _code_named(constant, name)
            except RewriteError:
                continue
    raise RewriteError(f"{name} was lost in compilation")
