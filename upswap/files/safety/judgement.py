"""What a `.pt` holds, judged as a whole and then made real.

torch's unpickler has put stand-ins and plain values together by then, and no code of a model's class has run. An instance
is refused that hides a method of its class, or whose names could become code elsewhere. What is admitted becomes real in
place: first every object gets its class and its state, then modules that upswap rewrote are rewritten again.
"""

from __future__ import annotations

import functools
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn

from ...architectures.packages import inside
from ...errors import UntrustedFileError
from ...plan.site import is_plain
from ...shown import brief, one_line
from ...surgery.rewritten_class import rewrite_all
from ...surgery.routes.kept_methods import rebind
from .allowed_names import PACKAGES
from .instance_rules import (
    MISSING,
    check_counts,
    check_name,
    check_record,
    is_code,
    is_number,
    items_of,
    named,
    of_class,
    shown_name,
)
from .stand_ins import Apart, Blank, BlankNamespace, ForeignError, Mark, Member, Sealed, SealedFunction, slots_of
from .value_forms import Factory, Form, MethodForm, PartialForm, refilled

#: Packages of layers. Their classes may be attributes of a model (`self.norm = nn.ReLU`), which its forward can call.
#: Classes of whole models may not: the constructors of some download, or evaluate text of their configuration.
LAYERS: tuple[str, ...] = (
    "torch.nn.modules",
    "torchvision.ops",
    "timm.layers",
    "monai.networks.blocks",
    "monai.networks.layers",
)
# What holds nothing else and has no behaviour that a file could choose.
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.Size, torch.device, torch.dtype, torch.layout,
    torch.memory_format, torch.qscheme,
)  # fmt: skip
_VALUES = (
    *_PLAIN, range, slice, re.Pattern, functools.partial,
)  # fmt: skip
_DICTS = (dict, OrderedDict, Counter, defaultdict)
_LISTS = (list, set, deque)
#: The attributes of a module that hold what torch calls before and after its own functions.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
#: Whose instances may be hooks: weight norm, spectral norm.
_HOOK_CLASSES = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def judged(
    found: Any, trust: tuple[str, ...] = (), foreign: Mapping[int, str] = MappingProxyType({})
) -> tuple[Any, list[Any]]:
    """What a file holds, with real classes, functions and members, and the instances in it that are still blank.

    Raises `UntrustedFileError` for what no file of a model holds. `trust` has the packages whose code may be in it. Of the
    values in `foreign`, by their ids, none may be in it: their names are not admitted.
    """
    judge = _Judge(trust, foreign)
    found = judge.opened(found)
    queue: list[tuple[Any, Any]] = [(found, None)]
    holders: dict[int, tuple[Any, Any]] = {}  # each value seen, and what it was first seen in
    names: set[str] = set()
    while queue:
        value, holder = queue.pop()
        if id(value) in holders:
            continue
        holders[id(value)] = (value, holder)
        name = foreign.get(id(value)) or foreign.get(id(type(value)))
        if name is not None:
            names.add(name)
            continue
        try:
            queue += [(part, value) for part in judge.inside(value)]
        except UntrustedFileError as error:
            place = _place(value, holders)
            raise UntrustedFileError(f"at {place}: {error}" if place else str(error)) from error
    if names:
        raise ForeignError(names)
    return found, judge.blanks


def _place(value: Any, holders: Mapping[int, tuple[Any, Any]]) -> str:
    """Where a value is, as it would be written in Python; of the model itself nothing."""
    places: list[str] = []
    while (holder := holders[id(value)][1]) is not None:
        key = _key(holder, value)
        if isinstance(holder, Blank | BlankNamespace) or _key(holders[id(holder)][1], holder) in _REGISTRIES:
            places.append("" if key in _REGISTRIES else f".{one_line(key, 80) if isinstance(key, str) else brief(key)}")
        else:
            places.append(f"[{key if type(key) is int else shown_name(key)}]")
        value = holder
    if len(places) > _MOST_STEPS:
        places[_MOST_STEPS // 2 : -_MOST_STEPS // 2] = ["..."]
    return "".join(reversed(places)).removeprefix(".")


_REGISTRIES = ("_modules", "_parameters", "_buffers")
# As many steps to a value as a message has.
_MOST_STEPS = 20


def _key(holder: Any, value: Any) -> Any:
    """The name or index of a value in what holds it."""
    entries = vars(holder).get("state", {}) if isinstance(holder, Blank | BlankNamespace) else holder
    pairs = type(entries).items(entries) if isinstance(entries, dict) else enumerate(entries or ())
    return next((key for key, item in pairs if item is value), "")


def made_real(blanks: Iterable[Any]) -> None:
    """Give blank instances that were judged their classes and states, in the order in which the file did."""
    given = [(blank, dict(vars(blank))) for blank in blanks]
    given.sort(key=lambda pair: pair[1].get("order", 0))
    for blank, of in given:
        vars(blank).clear()
        if not issubclass(of["original"], nn.Module):
            vars(blank).update(of.get("state") or {})
    for blank, of in given:
        blank.__class__ = of["original"]
    for blank, of in given:
        if isinstance(blank, nn.Module):
            blank.__setstate__(of["state"])
    rewrite_all([(blank, of["record"]) for blank, of in given if of["record"] is not None])
    rebind(blank for blank, _ in given if isinstance(blank, nn.Module))


class _Judge:
    """Looks at one value after another, and opens the stand-ins in it."""

    def __init__(self, trust: tuple[str, ...], foreign: Collection[int]) -> None:
        self.blanks: list[Any] = []
        self._trust = trust
        self._foreign = foreign  # the ids of what is refused by its name, which says more than where it is
        # Instances that took the place of a stand-in, and the values in their slots, by the instance's id.
        self._slots: dict[int, tuple[Any, list[Any]]] = {}
        # What takes the place of a value, by the value's id; the value is kept, so that no other gets its id.
        self._replaced: dict[int, tuple[Any, Any]] = {}
        self._admitted: dict[int, Any] = {}

    def opened(self, value: Any) -> Any:
        """The value that a stand-in stands for; a tuple with such values for the stand-ins in it; any other as it is."""
        if isinstance(value, Sealed | SealedFunction | Member):
            real: Any = value.original
            if isinstance(value, Sealed) and not (value.trusted or inside(real.__module__, LAYERS)):
                raise UntrustedFileError(f"it keeps the class {real.__qualname__} of models as a value, to be called")
            self._admitted[id(real)] = real
            return real
        if isinstance(value, Factory | Mark):
            raise UntrustedFileError(f"it keeps {value} as a value, which files of models do not")
        if id(value) not in self._replaced:
            real = self._in_place_of(value)
            if real is value:
                return value
            self._replaced[id(value)] = (value, real)
        return self._replaced[id(value)][1]

    def _in_place_of(self, value: Any) -> Any:
        """Another object where one has to take the place of `value`, or `value` itself."""
        if isinstance(value, MethodForm):
            return self._method(*value.args)
        if isinstance(value, PartialForm):
            return self._partial(*value.parts())
        if isinstance(value, Form):
            return value.made(self.opened)
        if isinstance(value, Apart):
            return self._apart(value)
        if isinstance(value, tuple) and type(value) not in _VALUES:
            items = [self.opened(item) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            return value if same else tuple.__new__(type(value), items)
        filled = refilled(value)
        return value if filled is None else filled

    def _method(self, owner: Any = None, name: Any = None, *more: Any) -> MethodType:
        """A method that a module's own class has from an admitted package, bound to the module."""
        cls: Any = vars(owner)["original"] if isinstance(owner, Blank) else object
        function: Any = of_class(cls, name) if is_plain(name) else None
        home = function.__module__ if isinstance(function, FunctionType) else ""
        own = issubclass(cls, nn.Module) and inside(home, (*PACKAGES, *self._trust)) and home != nn.Module.__module__
        if more or not own:
            raise UntrustedFileError("it holds a method that is not one of a module's own class")
        return MethodType(function, owner)

    def _partial(self, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> functools.partial[Any]:
        """A partial of a layer's class or of an admitted function, with plain values, layers and functions as arguments."""
        if not self._is_admitted_code(function) or not all(map(self._is_argument, (*args, *keywords.values()))):
            raise UntrustedFileError("it holds a partial of more than a layer and plain arguments")
        named = {name: self.opened(value) for name, value in keywords.items()}
        return functools.partial(self.opened(function), *map(self.opened, args), **named)

    def _is_argument(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(self._is_argument, value))
        return isinstance(value, (*_PLAIN, Member)) or self._is_admitted_code(value)

    def _is_admitted_code(self, value: Any) -> bool:
        """Whether a value is a class or function of an admitted package, and not one that torch itself holds safe."""
        if isinstance(value, Sealed | SealedFunction):
            return True
        return isinstance(value, type | FunctionType) and bool(self._trust) and inside(value.__module__, self._trust)

    def _apart(self, value: Apart) -> Any:
        """An instance that takes the place of its stand-in, with its values in it, without the class's code."""
        cls: Any = value.original
        state = vars(value).get("state")
        own, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
        descriptors = slots_of(cls)
        plain = all(part is None or type(part) is dict for part in (own, slots))
        fits = plain and (slots or {}).keys() <= descriptors.keys() and (not own or cls.__dictoffset__)
        if not fits:
            raise UntrustedFileError(f"it holds a {cls.__qualname__} whose state is not what one has")
        made = types.SimpleNamespace() if cls is types.SimpleNamespace else object.__new__(cls)
        self._replaced[id(value)] = (value, made)
        for name, item in (slots or {}).items():
            descriptors[name].__set__(made, self.opened(item))
        if own:
            vars(made).update(own)
        self._slots[id(made)] = (made, [descriptors[name].__get__(made) for name in slots or ()])
        return made

    def inside(self, value: Any) -> Iterable[Any]:
        """The values in a value, which is judged."""
        kind = type(value)
        if kind in _VALUES or id(value) in self._admitted or isinstance(value, PurePath) or is_number(value):
            return ()
        if isinstance(value, Blank | BlankNamespace):
            return self._instance(value)
        if id(value) in self._slots:
            return [*self._slots[id(value)][1], *self._attributes(kind, getattr(value, "__dict__", {}))]
        if kind is MethodType:
            return (value.__self__,)
        if kind in _DICTS:
            own = getattr(value, "__dict__", {})
            hiding = next((name for name in own if of_class(kind, name) is not MISSING), None)
            if hiding is not None:
                raise UntrustedFileError(f"it puts {named(own[hiding])} in the place of {kind.__qualname__}.{hiding}")
            return [*self._dict(value), *self._attributes(kind, own)]
        if kind in _LISTS:
            items = [self.opened(item) for item in value]
            value.clear()
            (value.update if kind is set else value.extend)(items)
            return items
        if isinstance(value, tuple | frozenset):
            return value
        if kind in (torch.Tensor, nn.Parameter):
            return self._tensor(value)
        return self._of_trusted_code(value)

    def _dict(self, value: dict[Any, Any]) -> list[Any]:
        """The keys and values of a dict. Its methods are those of its type: an OrderedDict has attributes of its own."""
        kind: Any = OrderedDict if type(value) is OrderedDict else dict  # a Counter's update would count
        items = [(self.opened(key), self.opened(item)) for key, item in kind.items(value)]
        kind.clear(value)
        kind.update(value, items)
        return [part for item in items for part in item]

    def _tensor(self, value: torch.Tensor) -> list[Any]:
        hooks = (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None), value.grad)
        if any(found is not None and (isinstance(found, torch.Tensor) or found) for found in hooks):
            raise UntrustedFileError("it holds a tensor with hooks or a gradient")
        value._backward_hooks = None  # the file's dict may be in the model too, whose code fills it later
        return self._attributes(type(value), vars(value))

    def _instance(self, blank: Any) -> list[Any]:
        """The state and the record of an instance to be."""
        of = vars(blank)
        cls, record, state = of["original"], of["record"], of.setdefault("state", {})
        if id(cls) in self._foreign:
            return [cls]
        if record is not None:
            check_record(cls, record)
        if type(state) is not dict or (issubclass(cls, nn.Module) and not state):
            raise UntrustedFileError(f"it holds a {cls.__qualname__} whose state is not what one has")
        self.blanks.append(blank)
        values = self._attributes(cls, state)
        if issubclass(cls, nn.Module):
            self._module(cls, state)
            if cls.__setstate__ is not nn.Module.__setstate__:
                check_counts(cls, state)
        return [*values, record]

    def _attributes(self, cls: type, own: dict[Any, Any]) -> list[Any]:
        """The values of an instance's attributes, none of which may take the place of code."""
        values = self._dict(own)
        for name, value in own.items():
            if not (is_plain(name) and name.isidentifier()):
                raise UntrustedFileError(
                    f"it gives a {cls.__qualname__} the attribute {shown_name(name)}, which is no name"
                )
            hidden = of_class(cls, name)
            if hidden is MISSING or self._is_foreign(value):
                continue
            # Data hides data, and also a method: it cannot be called (`layer.type = "Conv"`).
            if self._can_be_called(value) or (is_code(hidden) and isinstance(value, Blank | BlankNamespace)):
                raise UntrustedFileError(f"it puts {named(value)} in the place of {cls.__qualname__}.{name}")
        return values

    def _module(self, cls: type, state: Mapping[str, Any]) -> None:
        """What a module keeps in dicts of its own: parts under names, and hooks."""
        for place, kind in (("_modules", Blank), ("_parameters", torch.Tensor), ("_buffers", torch.Tensor)):
            for name, value in items_of(cls, place, state):
                check_name(cls, name)
                if self._is_foreign(value):
                    continue
                real = value is None or isinstance(value, kind)
                if not real or (kind is Blank and value is not None and not _is_module(value)):
                    raise UntrustedFileError(f"it has {named(value)} among the {place[1:]} of a {cls.__qualname__}")
        for place in _HOOKS & state.keys():
            for _, value in items_of(cls, place, state):
                if not (type(value) is bool or self._is_foreign(value) or self._is_hook(value)):
                    raise UntrustedFileError(f"it puts {named(value)} in {cls.__qualname__}.{place}")

    def _is_foreign(self, value: Any) -> bool:
        """Whether a value is of a class that is not admitted, or a rewritten module of one."""
        return id(value) in self._foreign or (isinstance(value, Blank) and id(vars(value)["original"]) in self._foreign)

    def _is_hook(self, value: Any) -> bool:
        """Whether a value may be called before or after a module: that of a norm of weights, or code that is trusted."""
        cls = vars(value)["original"] if isinstance(value, Blank) else type(value)
        home = value.__module__ if isinstance(value, FunctionType) else cls.__module__
        return inside(home, (*_HOOK_CLASSES, *self._trust)) and not issubclass(cls, nn.Module)

    def _can_be_called(self, value: Any) -> bool:
        if isinstance(value, Blank | BlankNamespace):
            return of_class(vars(value)["original"], "__call__") is not MISSING
        trusted = self._trust and inside(str(getattr(value, "__module__", "")), self._trust)
        return callable(value) and not trusted

    def _of_trusted_code(self, value: Any) -> Iterable[Any]:
        """What an instance of a trusted class holds, or what trusted code made; anything else is refused."""
        is_code = isinstance(value, type | FunctionType | BuiltinFunctionType)
        home = value.__module__ if is_code else type(value).__module__
        if not self._trust or (is_code and not inside(home or "", self._trust)):
            raise UntrustedFileError(f"it keeps {named(value)} as a value, which files of models do not")
        own = getattr(value, "__dict__", None)
        items = self._dict(value) if isinstance(value, dict) else []
        return [*items, *(self._dict(own) if type(own) is dict else ())]


def _is_module(value: Any) -> bool:
    return issubclass(vars(value)["original"], nn.Module)
