"""What a model holds at a moment, to be put back: attributes, containers at any depth, and the values of tensors.

Only what was changed is written to. Contents are compared by identity, because `==` of an element may raise, or give a
tensor. They are read and written by the methods of `dict`, `list` and their like, because a frozen container refuses its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import operator
import os
import sys
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..errors import UpswapWarning

#: Types with contents that can change, the more special first: an OrderedDict has to be read and written as one.
_MUTABLE: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, bytearray)

#: Types of which nothing has to be kept, for a quick look.
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})

#: Types whose instances hold nothing but their content.
_PLAIN = frozenset({OrderedDict, dict, list, set, deque, defaultdict})

#: What people do not name when they name what is in it.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})

_MISSING = object()


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is changed; an error leaves it as it was before. Values of tensors are not looked after."""
    snapshot = Snapshot(model, values=False)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


class Snapshot:
    """What a model holds now: in its modules, and in the containers, plain data and further modules that those hold.

    Other objects stay out, because a logger or a trainer that a model refers to is not its own. No copy is made of the
    values of parameters, and without `values` of those of any tensor.
    """

    def __init__(self, model: nn.Module, *, values: bool = True) -> None:
        self._kept: list[_Kept] = []
        # Most registries of most modules are empty; an object for each would make up most of the time that this takes.
        self._empty: list[Any] = []
        self._empty_in: list[str] = []
        self._uncopied = {id(parameter) for parameter in model.parameters()} if values else None
        self._kinds: dict[type, _Kind | None] = {}
        self._seen = {id(sys.modules), id(os.environ)}  # the process's own, whoever refers to them
        queue: list[tuple[str, Any]] = list(model.named_modules())[::-1]
        while queue:  # not recursive: a container may hold itself, or nest deeper than Python's stack
            self._keep(*queue.pop(), queue)

    def restore(self) -> None:
        """Put back what was changed; an `UpswapWarning` names what cannot be."""
        changed = [kept for kept in self._kept if kept.changed()]
        filled = (pair for pair in zip(self._empty_in, self._empty, strict=True) if pair[1])
        changed += [_Content(name, container, _base_of(type(container)), []) for name, container in filled]
        lost: dict[str, str] = {}
        for kept in changed:
            try:
                kept.put_back()
            except Exception as error:  # noqa: BLE001 - a key's own __eq__, a tensor that refuses; the rest goes back
                lost[kept.name] = f"{type(error).__name__}: {error}"
        left = {kept.name: lost.get(kept.name, "it changes again") for kept in changed if kept.changed()}
        if left:
            listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in list(left.items())[:5])
            warnings.warn(
                f"what was changed could not be put back: {listed}. Make the model anew before you save or train it",
                UpswapWarning,
                stacklevel=2,
            )

    def _keep(self, name: str, value: Any, queue: list[tuple[str, Any]]) -> None:
        """Remember what `value` holds, and put those of its parts into the queue that hold something themselves."""
        kind = self._kind(type(value))
        if kind is None or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if kind.is_tensor:
            with contextlib.suppress(Exception):  # of a form that can be neither copied nor looked at
                copied = self._uncopied is not None and id(value) not in self._uncopied
                self._kept.append(_tensor(name, value, copied))
            return
        if kind.base is not None:
            content = _read(kind.base, value)
            half = len(content) // 2
            keys = (
                [*itertools.repeat("", half), *content[:half]] if issubclass(kind.base, dict) else itertools.repeat("")
            )
            self._queue(name, zip(keys, content, strict=False), queue)
            if kind.base in _MUTABLE:
                self._kept.append(_Content(name, value, kind.base, content))
        for slot in kind.slots:
            found = _in_slot(slot, value)
            queue.append((name, found))
            self._kept.append(_Slot(name, value, slot, found))
        if kind.has_attributes:
            attributes = object.__getattribute__(value, "__dict__")
            self._kept.append(_Instance(name, value, type(value), attributes))
            if id(attributes) not in self._seen:  # several objects may share theirs
                self._seen.add(id(attributes))
                self._kept.append(_Content(name, attributes, dict, _read(dict, attributes)))
                self._queue(name, dict.items(attributes), queue)

    def _queue(self, name: str, parts: Iterable[tuple[Any, Any]], queue: list[tuple[str, Any]]) -> None:
        for key, part in parts:
            cls = type(part)
            if cls in _ATOMS:
                continue
            if cls in _PLAIN and not part:
                self._empty.append(part)
                self._empty_in.append(name)
            elif type(key) is not str or key in _REGISTRIES:
                queue.append((name, part))
            else:
                queue.append((f"{name}.{key}" if name and key else name or key, part))

    def _kind(self, cls: type) -> _Kind | None:
        if cls not in self._kinds:
            kind = _kind_of(cls)
            self._kinds[cls] = None if kind == _Kind() else kind
        return self._kinds[cls]


class _Kind(NamedTuple):
    """What there is to keep of the instances of a class."""

    base: Any = None
    has_attributes: bool = False
    slots: tuple[Any, ...] = ()
    is_tensor: bool = False


def _kind_of(cls: type) -> _Kind:
    if issubclass(cls, torch.Tensor):
        return _Kind(is_tensor=True)
    if issubclass(cls, type | enum.Enum):
        return _Kind()
    base = _base_of(cls)
    plain = issubclass(cls, nn.Module | Collection | types.SimpleNamespace) or dataclasses.is_dataclass(cls)
    if cls is base or not plain:
        return _Kind(base)
    slots = (
        slot
        for parent in cls.__mro__
        if "__slots__" in vars(parent)
        for slot in vars(parent).values()
        if isinstance(slot, types.MemberDescriptorType)
    )
    return _Kind(base, getattr(cls, "__dictoffset__", 0) != 0, tuple(slots))


def _base_of(cls: type) -> Any:
    return next((base for base in (*_MUTABLE, tuple, frozenset) if issubclass(cls, base)), None)


# -- what is kept, and how it goes back -----------------------------------------------------------------------------------


class _Kept(Protocol):
    """A thing as it was."""

    @property
    def name(self) -> str:
        """Where in the model it is."""

    def changed(self) -> bool:
        """Whether it is not as it was."""

    def put_back(self) -> None:
        """Make it what it was."""


class _Content(NamedTuple):
    """The elements of a container; of a dict its keys, then its values."""

    name: str
    container: Any
    base: Any
    content: list[Any]

    def changed(self) -> bool:
        now = _read(self.base, self.container)
        if _same(self.content, now):
            return False
        before, now = _alive(self.base, self.content), _alive(self.base, now)
        if self.base is set:
            return {id(item) for item in before} != {id(item) for item in now}
        return not _same(before, now)

    def put_back(self) -> None:
        base, container, content = self.base, self.container, _alive(self.base, self.content)
        if not issubclass(base, dict):
            fresh = base(content)  # what fails, fails before anything is taken out
            base.clear(container)
            (base.update if base is set else base.extend)(container, fresh)
            return
        keys, values = content[: len(content) // 2], content[len(content) // 2 :]
        now = _read(base, container)
        pairs = list(zip(keys, values, strict=True))
        if _same(keys, now[: len(now) // 2]):
            pairs = [pair for pair, found in zip(pairs, now[len(keys) :], strict=True) if pair[1] is not found]
        else:
            dict(pairs)  # as above
            base.clear(container)
        for key, value in pairs:
            base.__setitem__(container, key, value)


class _Slot(NamedTuple):
    """An attribute that a class keeps outside the `__dict__`."""

    name: str
    instance: Any
    slot: Any
    value: Any

    def changed(self) -> bool:
        return _in_slot(self.slot, self.instance) is not self.value

    def put_back(self) -> None:
        if self.value is _MISSING:
            self.slot.__delete__(self.instance)
        else:
            self.slot.__set__(self.instance, self.value)


class _Instance(NamedTuple):
    """The class of an object, and the dict of its attributes."""

    name: str
    instance: Any
    cls: type
    attributes: dict[str, Any]

    def changed(self) -> bool:
        own = object.__getattribute__(self.instance, "__dict__")
        return type(self.instance) is not self.cls or own is not self.attributes

    def put_back(self) -> None:
        object.__setattr__(self.instance, "__class__", self.cls)
        object.__setattr__(self.instance, "__dict__", self.attributes)


class _Tensor(NamedTuple):
    """A tensor: its memory in `data`, a copy of its values where one was made, else how often they had been written."""

    name: str
    tensor: torch.Tensor
    data: torch.Tensor
    values: torch.Tensor | None
    written: int | None

    def changed(self) -> bool:
        if not _is_view(self.tensor, self.data):
            return True
        if self.values is None:
            return self.written != _written(self.tensor)
        if torch.equal(self.data, self.values):
            return False
        both_nan = (self.data != self.data) & (self.values != self.values)  # and so not equal
        return not bool(((self.data == self.values) | both_nan).all())

    @torch.no_grad()
    def put_back(self) -> None:
        if not _is_view(self.tensor, self.data):
            self.tensor.data = self.data
        if self.values is not None:
            self.tensor.copy_(self.values)
        elif self.written != _written(self.tensor):
            raise RuntimeError("its values were written to, and there is no copy of them")


def _tensor(name: str, tensor: torch.Tensor, copied: bool) -> _Tensor:
    copied = copied and not tensor.is_meta
    data = tensor.detach()
    kept = _Tensor(name, tensor, data, data.clone() if copied else None, None if copied else _written(tensor))
    kept.changed()  # fails now, where it would later
    return kept


def _is_view(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether `tensor` has the very memory of `data`, in the same form."""
    return (
        tensor.dtype == data.dtype
        and tensor.shape == data.shape
        and tensor.stride() == data.stride()
        and (tensor.is_meta or tensor.data_ptr() == data.data_ptr())
    )


def _written(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to in place; not counted for tensors made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _read(base: Any, container: Any) -> list[Any]:
    return (
        [*base.keys(container), *base.values(container)] if issubclass(base, dict) else list(base.__iter__(container))
    )


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _alive(base: Any, content: list[Any]) -> list[Any]:
    """The content without weak references to what is gone: a container of such loses those by itself."""
    if not any(issubclass(cls, weakref.ref) for cls in {*map(type, content)}):
        return content
    if not issubclass(base, dict):
        return [item for item in content if not _is_gone(item)]
    half = len(content) // 2
    pairs = [pair for pair in zip(content[:half], content[half:], strict=True) if not any(map(_is_gone, pair))]
    return [*(key for key, _ in pairs), *(value for _, value in pairs)]


def _is_gone(item: Any) -> bool:
    return isinstance(item, weakref.ref) and item() is None


def _in_slot(slot: Any, instance: Any) -> Any:
    try:
        return slot.__get__(instance)
    except AttributeError:
        return _MISSING
