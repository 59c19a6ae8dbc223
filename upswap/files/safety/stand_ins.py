"""Stand-ins for what a file names: classes, functions, their instances and the members of enumerations.

The unpickler hands these to the file, which can do nothing with them but put them into each other. No code of a class runs
and nothing that others share is reached until `judgement` has seen the whole and makes them real.
"""

from __future__ import annotations

import enum
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from ...errors import SourceError, UntrustedFileError

#: What `torch.serialization.safe_globals` takes: an object, with the name a file knows it by.
SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]


_order = itertools.count()


def _keep_state(self: Any, state: Any) -> None:
    """What a pickle's BUILD reaches: the state is kept for later, and `order` tells which was given first."""
    if "state" in vars(self):
        raise UntrustedFileError("it gives one object a state twice")
    vars(self).update(state=state, order=next(_order))


# Without a base in common: an object can change to a class of the same base alone.


class Blank:
    """The stand-in for an instance of most classes. `record` describes a module that upswap rewrote."""

    __setstate__ = _keep_state


class BlankNamespace(types.SimpleNamespace):
    """The stand-in for a namespace, which becomes nothing else."""

    __setstate__ = _keep_state


def blank_for(cls: type) -> type[Blank | BlankNamespace] | None:
    """The stand-in whose instances can become instances of `cls` where they are; None for another layout in memory."""
    kinds: tuple[type[Blank | BlankNamespace], ...] = (Blank, BlankNamespace)
    for kind in kinds:
        probe: Any = kind()
        try:
            probe.__class__ = cls
        except TypeError:
            continue
        probe.__class__ = kind  # so that nothing of `cls` runs when it is thrown away
        return kind
    return None


class Apart:
    """The stand-in for an instance that no stand-in can become: of a class with slots, or of `SimpleNamespace` itself.

    Another object takes its place in the end.
    """

    __setstate__ = _keep_state

    def __init__(self, original: type) -> None:
        self.original = original


def has_slots(cls: type) -> bool:
    """Whether instances of `cls` are laid out by the `__slots__` of classes written in Python alone."""
    bases = [base for base in cls.__mro__ if base is not object]
    new: Any = cls.__new__
    return new is object.__new__ and all(base.__flags__ & _HEAP_TYPE for base in bases)


def slots_of(cls: type) -> dict[str, Any]:
    """The descriptors of the slots of a class, by their names."""
    return {
        name: value
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if isinstance(value, types.MemberDescriptorType)
    }


# What CPython marks the classes with that a `class` statement made.
_HEAP_TYPE = 1 << 9


def blank(cls: Any, record: Any = None) -> Any:
    """An instance of `cls` to be."""
    made = ((blank_for(cls) if isinstance(cls, type) else None) or Blank)()
    vars(made).update(original=cls, record=record)
    return made


def _instance(cls: type) -> Any:
    return blank(cls) if blank_for(cls) else Apart(cls)


class Mark:
    """The first entry of a list or dict that is to be a container of another kind. A file cannot make one."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __str__(self) -> str:
        return "the beginning of a container"


def _dict_of(cls: Any) -> Any:
    """What a file fills in the place of an instance of a dict of a class of one's own; torch fills its own kinds alone."""
    return OrderedDict([(Mark(lambda: cls.__new__(cls)), None)])


class Sealed(type):
    """The type of the stand-ins that a file gets for classes. `trusted` ones may be kept as values, whatever they are."""

    original: type
    trusted: bool

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """What a pickle's REDUCE reaches. Enumerations look a member up this way, and namespaces are made blank."""
        if issubclass(cls.original, enum.Enum) and len(args) == 1 and not kwargs:
            return Member(cls.original, args[0])
        if issubclass(cls.original, types.SimpleNamespace) and not args and not kwargs:
            return _instance(cls.original)
        if issubclass(cls.original, dict) and cls.trusted:
            return cls.original(*args) if args else _dict_of(cls.original)
        raise UntrustedFileError(f"it tries to call {cls.original.__module__}.{cls.original.__qualname__}")


class Member:
    """The stand-in for a member of an enumeration, which the whole process shares.

    It is looked for by its value among those the class has: asking the class could make new ones.
    """

    def __init__(self, cls: type[enum.Enum], value: Any) -> None:
        same = [member for member in cls.__members__.values() if type(member._value_) is type(value)]
        found = next((member for member in same if member._value_ == value), None)
        if found is None:
            raise SourceError(f"it holds a member of {cls.__module__}.{cls.__qualname__} that there is not")
        self.original = found


class SealedFunction:
    """The stand-in for a function that a model keeps as an attribute: a value, and never called."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, whatever the arguments."""
        raise UntrustedFileError(f"it tries to call {self.original.__module__}.{self.original.__qualname__}")


def seal(original: type, *, trusted: bool = False) -> type:
    """The stand-in for a class: a file can have blank instances of it, and nothing else."""

    def new(cls: type, *args: Any) -> Any:
        if issubclass(original, tuple):
            return tuple.__new__(original, args)
        if args:
            raise UntrustedFileError(f"it passes arguments to {original.__module__}.{original.__qualname__}")
        return _dict_of(original) if issubclass(original, dict) else _instance(original)

    body = {"__new__": new, "original": original, "trusted": trusted, "__module__": original.__module__}
    return Sealed(original.__name__, (), body)


class Opaque:
    """The stand-in for an instance of a class that is not admitted: it holds nothing and becomes nothing."""

    def __setstate__(self, state: Any) -> None:
        """What a pickle's BUILD reaches; the state is let go."""


class Foreign:
    """The names of a file that are not admitted, and what its pickle makes of them.

    A training checkpoint has more in it than a model: settings, schedules, logs. What is taken of it may hold none of these.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        #: The names whose instances the pickle puts items into: by keys, and at the end.
        self.filled_by_keys: Collection[str] = ()
        self.filled_at_end: Collection[str] = ()
        self._kept: list[Any] = []
        #: What was made, by its id, and under which name. Tensors are of a class that was.
        self.made: dict[int, str] = {}

    def stand_in(self, name: str) -> SafeGlobal:
        """What the pickle gets for a name."""

        def new(cls: type, *args: Any) -> Any:
            if name in self.filled_by_keys:
                return self._note(OrderedDict(), name)  # which may be given attributes too, as a plain dict may not
            return self._note([] if name in self.filled_at_end else Opaque(), name)

        self.names.append(name)
        # A class of tensors, so that torch can make one of it. None of torch's functions does anything else for it.
        body = {"__new__": new, "__torch_function__": torch._C._disabled_torch_function_impl}
        return (self._note(type("Foreign", (torch.Tensor,), body), name), name)

    def _note(self, value: Any, name: str) -> Any:
        self._kept.append(value)  # so that no other value gets its id
        self.made[id(value)] = name
        return value


class ForeignError(UntrustedFileError):
    """What is to be taken of a file holds classes that are not admitted."""

    def __init__(self, names: Iterable[str]) -> None:
        known = sorted(names)
        super().__init__(f"it holds {', '.join(known)}", names=dict.fromkeys(known, "not admitted"))
