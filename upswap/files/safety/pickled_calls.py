"""What a pickle calls, and with what: only what `torch.save` calls, with arguments as it gives them.

The values here stand for those that the unpickler would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch

from ...errors import UntrustedFileError

#: Of what torch itself holds safe, that which pickles of models call.
CALLED = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
    }
)


class Made:
    """A container or instance that a pickle makes: what goes into it, and how deep its tuples nest.

    `kind` is `tuple`, `list`, `dict` or `set`; or it is called, and `name` is what is called. `keys` are those of a dict.
    `states` are what BUILD gives an instance. `listed` says that it is appended to.
    """

    __slots__ = ("inside", "keys", "kind", "listed", "name", "nested", "states", "unfolded")

    def __init__(self, among: list[Made], inside: list[Any], kind: str = "", nested: int = 0, name: str = "") -> None:
        among.append(self)
        self.inside, self.kind, self.nested, self.name = inside, kind, nested, name
        self.keys: list[Any] = []
        self.states: list[Any] = []
        self.listed = False
        self.unfolded = 0  # not known


class Name(str):
    """A name that a GLOBAL asks for."""


class Storage(NamedTuple):
    """What a tensor is of: a record of the file, of so many elements."""

    size: int


def storage(described: Any) -> Storage:
    """What BINPERSID gives for a tuple. The key is text: torch looks for what it has read already by the key, and for the
    record by how the key prints, so that keys of other types could have one record read any number of times.
    """
    parts = described.inside if isinstance(described, Made) and described.kind == "tuple" else []
    if len(parts) != 5 or not (isinstance(parts[1], Name) and type(parts[2]) is str and type(parts[4]) is int):
        raise UntrustedFileError("it describes the storage of a tensor in another way than torch.save does")
    return Storage(parts[4])


def check_call(called: Any, given: Any, others: Collection[str]) -> None:
    """`UntrustedFileError` for a call of what is in neither `CALLED` nor `others`, or with arguments of no file of torch.save."""
    if not isinstance(called, Name):
        raise UntrustedFileError("its pickle calls a value that is not a name")
    if called not in CALLED and called not in others:
        raise UntrustedFileError(f"it tries to call {called}, which files of models do not")
    # Of another value the function would get what going through it gives, for as long as that takes.
    arguments = given.inside if _is(given, "tuple") else None
    if called == "_codecs.encode" and (arguments is None or arguments[1:] not in (["latin1"], ["latin-1"])):
        raise UntrustedFileError("it encodes text in another way than torch.save does")
    if called == "torch._tensor._rebuild_from_type_v2" and arguments:
        # This one calls its first argument.
        check_call(arguments[0], arguments[2] if len(arguments) == 4 else None, others)
    if arguments is None or not _ARGUMENTS.get(called, lambda *_: True)(*arguments):
        raise UntrustedFileError(f"its pickle calls {called} with other arguments than torch.save does")


def _is(value: Any, *kinds: str) -> bool:
    """Whether a value is a container that instructions make, not a call."""
    return isinstance(value, Made) and value.kind in kinds


def _is_tensor(value: Any = None, *_: Any) -> bool:
    """Whether a value is a tensor, or comes of a package that has to be trusted for it."""
    return isinstance(value, Made) and bool(value.name) and (value.name in _TENSORS or value.name not in CALLED)


def _is_whole(value: Any) -> bool:
    """Whether a tensor has memory for its elements, which `expand` lets several have together; a few need none."""
    if not (isinstance(value, Made) and value.name in _OF_STORAGE):
        return False
    storage, _, size = value.inside[0].inside[:3]
    return math.prod(size.inside) <= max(storage.size, _FEW)


def _are_bytes(value: Any) -> bool:
    return isinstance(value, Made) and value.name == "_codecs.encode"


def _are_sizes(value: Any) -> bool:
    return _is(value, "tuple") and all(type(size) is int for size in value.inside)


def _of_storage(
    storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, trained: Any = None, *rest: Any
) -> bool:
    if not (isinstance(storage, Storage) and type(offset) is int and _are_sizes(size) and _are_sizes(stride)):
        return False
    if not (rest and _are_hooks(rest[0]) and all(_is(one, "dict") or isinstance(one, Name) for one in rest[1:])):
        return False
    # `expand` has strides of 0. Other views of more elements than there are come of `unfold`, and have few.
    apart = [one for one, step in zip(size.inside, stride.inside, strict=False) if step]
    return math.prod(apart) <= max(storage.size, _FEW)


def _are_hooks(value: Any) -> bool:
    """Whether a value is what `torch.save` has in the place of a tensor's hooks; `judgement` sees that it is empty."""
    return value is None or (isinstance(value, Made) and value.name == "collections.OrderedDict")


def _parameter(value: Any = None, trained: Any = None, hooks: Any = None, *rest: Any) -> bool:
    return _is_tensor(value) and _are_hooks(hooks) and not rest


def _with_state(value: Any = None, trained: Any = None, hooks: Any = None, *rest: Any) -> bool:
    return _parameter(value, trained, hooks) and len(rest) == 1 and _are_attributes(rest[0])


def _are_attributes(state: Any) -> bool:
    """Whether a state gives a tensor attributes of its own alone: torch sets them, and some of its own have code that runs."""
    parts = state.inside if _is(state, "tuple") else [state]
    names = [key for part in parts if isinstance(part, Made) for key in part.keys]
    return all(part is None or _is(part, "dict") for part in parts) and all(
        type(name) is str and not hasattr(torch.nn.Parameter, name) for name in names
    )


def _sparse(layout: Any = None, parts: Any = None, *more: Any) -> bool:
    """torch checks each index of a sparse tensor once the file has been read."""
    tensors = [part for part in parts.inside if _is_tensor(part)] if _is(parts, "tuple") else []
    return bool(tensors) and all(map(_is_whole, tensors)) and not more


#: As many elements as a view, or the parts of a sparse tensor, may have without memory for each: they take no time.
_FEW = 2**16

_OF_STORAGE = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_TENSORS = frozenset(
    {
        *_OF_STORAGE,
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_sparse_tensor",
        "torch.nn.parameter.Parameter",
    }
)
# What the functions are called with that go through their arguments, or give attributes to what they made. A tensor of one
# number can have any number of elements, and a stand-in may have no attributes of the file's.
_ARGUMENTS: dict[str, Callable[..., bool]] = {
    "_codecs.encode": lambda text=None, *_: type(text) is str,
    "builtins.bytearray": lambda *parts: len(parts) < 2 and all(map(_are_bytes, parts)),
    "builtins.complex": lambda *parts: all(type(part) in (int, float) for part in parts),
    "builtins.set": lambda *items: all(_is(item, "list") for item in items),
    "collections.Counter": lambda *items: all(_is(item, "dict") for item in items),
    "collections.OrderedDict": lambda *items: not items,
    "torch.Size": lambda *sizes: all(map(_are_sizes, sizes)),
    "torch._tensor._rebuild_from_type_v2": lambda function=None, *rest: (
        function in _TENSORS and len(rest) == 3 and _are_attributes(rest[2])
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype=None, size=None, stride=None, *_: all(
        _are_sizes(one) for one in (size, stride)
    ),
    "torch._utils._rebuild_sparse_tensor": _sparse,
    **dict.fromkeys(_OF_STORAGE, _of_storage),
    "torch._utils._rebuild_parameter_with_state": _with_state,
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"), _parameter),
}
