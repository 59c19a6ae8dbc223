"""Look through a `.pt` before torch reads it: how large it becomes, and what its pickle would have called.

torch's restricted unpickler calls what it holds safe with any arguments. Some of that takes as much memory or time as it
is told to: `bytearray(10**12)`, a text codec of quadratic cost, a tuple so deep that hashing it overflows the C stack. The
files that `torch.save` writes of models need little of it, and what a pickle calls can be read off it without running it:
in the instructions torch knows, a callable can only come from a GLOBAL.
"""

from __future__ import annotations

import _compat_pickle
import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import SourceError, UntrustedFileError

# The list of instructions is kept in memory while it is read, and the smallest make objects of 200 bytes. Models with
# 100,000 instructions, which is a large one, have 0.2 MB.
_MOST_PICKLE = 32 * 2**20
_MOST_NESTED = 200

# How many values going through all attributes may visit: for each byte of the pickle, and in any.
_VALUES_EACH, _VALUES_FLOOR = 2, 20_000
# Keys of chosen hashes are compared each with each.
_MOST_ODD_KEYS = 2_000
# The names of modules hold those of the modules that they are in.
_CHARACTERS_EACH = 100
# Compiling takes up to 25 ms for each range of characters in a pattern.
_MOST_RANGES = 100
#: What a class may count to while an instance is restored; a longer pickle may have what is counted.
COUNTABLE = 2**18

#: Of what torch itself holds safe, that which pickles of models call.
CALLED = frozenset(
    {
        "_codecs.encode",
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


def archive(path: Path) -> bytes:
    """The pickle in a file of torch.save, if nothing in the file takes more memory than it has bytes.

    Raises:
        SourceError: records are compressed, doubled, overlapping or claim to be longer than the file; the text is without
            the name of the file.
    """
    with zipfile.ZipFile(path) as table:
        records = table.infolist()
    names = [record.filename for record in records]
    if len(set(names)) < len(names):
        raise SourceError("it has several records of one name")
    compressed = next((record.filename for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    if compressed is not None:
        raise SourceError(
            f"its record {compressed} is compressed, which torch.save never does and which can hold any amount of data in "
            "a small file. If you made it, load and save it with torch.save"
        )
    # torch reads the table of contents with code of its own, which can be made to see another one.
    reader = torch._C.PyTorchFileReader(str(path))
    size_of: Callable[[str], int] = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))
    sizes = {name: size_of(name) for name in reader.get_all_records()}
    if sum(sizes.values()) > path.stat().st_size:
        raise SourceError("its records are longer than the file")
    if sizes.get("data.pkl", 0) > _MOST_PICKLE:
        raise SourceError(f"its data.pkl has {sizes['data.pkl']} bytes, more than the structure of any model takes")
    return bytes(reader.get_record("data.pkl"))


class _Made:
    """A container or instance that a pickle makes: what goes into it, and how deep its tuples nest.

    `kind` is `tuple`, `list`, `dict` or `set`; or it is called, and `name` is what is called. `keys` are those of a dict.
    `states` are what BUILD gives an instance.
    """

    __slots__ = ("inside", "keys", "kind", "name", "nested", "states", "unfolded")

    def __init__(self, among: list[_Made], inside: list[Any], kind: str = "", nested: int = 0, name: str = "") -> None:
        among.append(self)
        self.inside, self.kind, self.nested, self.name = inside, kind, nested, name
        self.keys: list[Any] = []
        self.states: list[Any] = []
        self.unfolded = 0  # not known


_NAMES: dict[tuple[str, str], tuple[str, str]] = _compat_pickle.NAME_MAPPING
_MODULES: dict[str, str] = _compat_pickle.IMPORT_MAPPING


class _Name(str):
    """A name that a GLOBAL asks for."""


class _Storage(NamedTuple):
    """What a tensor is of: a record of the file, of so many elements."""

    size: int


def instructions(pickled: bytes, others: Collection[str], restoring: Collection[str] = ()) -> set[str]:
    """Go through a pickle; `others` are the names it asks for beyond what torch itself holds safe.

    Those in `restoring` are of classes that run code of their own on the state they are given. Gives the names whose
    instances it puts items into, by keys. A table by instruction.

    Raises:
        UntrustedFileError: it calls something that is neither in `CALLED` nor in `others`, or uses an instruction that
            torch does not know.
        SourceError: it is no whole pickle, or nests, names or counts to more than a model does, or its values are so
            shared that going through them would take much longer than it is.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    made: list[_Made] = []

    try:
        argument: Any
        for code, argument, _ in pickletools.genops(pickled):
            name = code.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name](argument))
            elif name in _EMPTY:
                stack.append(_Made(made, [], _EMPTY[name]))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_named(*argument.partition(" ")[::2]))
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name in _TAKES:
                if _TAKES[name]:
                    items = _popped(stack, _TAKES[name])
                else:
                    items, stack = stack, marks.pop()
                if name.startswith("TUPLE"):
                    stack.append(_Made(made, items, "tuple", _nested(items)))
                else:
                    _put(stack[-1], items, name)
            elif name in ("REDUCE", "NEWOBJ"):
                given, called = stack.pop(), stack.pop()
                _check_call(called, given, others)
                stack.append(_Made(made, [given], nested=_depth(given) + 1, name=called))
            elif name == "BINPERSID":
                stack[-1] = _storage(stack[-1])
            elif name not in ("PROTO", "STOP"):
                raise UntrustedFileError(f"its pickle has the instruction {name}, which torch.save does not write")
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"its pickle is damaged: {str(error) or type(error).__name__}") from error
    _check_sharing(made, len(pickled))
    _check_text(made, len(pickled))
    _check_keys(made, len(pickled))
    _check_counts((one for one in made if one.name in restoring), len(pickled))
    return {one.name for one in made if one.keys}


def _named(module: str, attribute: str) -> _Name:
    """The name as it is today: pickles of torch.save have those of Python 2 (`__builtin__.xrange`)."""
    module, attribute = _NAMES.get((module, attribute), (_MODULES.get(module, module), attribute))
    return _Name(f"{module}.{attribute}")


def _popped(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _put(target: Any, items: list[Any], how: str) -> None:
    """What APPEND, SETITEM and BUILD do."""
    if not isinstance(target, _Made):
        raise ValueError("it puts something into a value that is no container")
    if how == "BUILD":
        if target.name in CALLED and target.name != "collections.OrderedDict":
            raise UntrustedFileError(f"it gives a state to what {target.name} made, which torch.save does not")
        target.states += items
    else:
        target.inside += items
        target.keys += items[::2] if how.startswith("SETITEM") else []


def _same(value: Any) -> Any:
    return value


#: Instructions that push a plain value, and that value from their argument.
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": _same,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "BININT": _same,
    "BININT1": _same,
    "BININT2": _same,
    "LONG1": _same,
    "BINFLOAT": _same,
    "BINUNICODE": _same,
    "SHORT_BINSTRING": _same,
}
_EMPTY = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_SET": "set", "EMPTY_TUPLE": "tuple"}
#: Instructions that take values off the stack, and how many: 0 for all since the last mark.
_TAKES = {
    "TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPENDS": 0, "SETITEMS": 0, "APPEND": 1, "SETITEM": 2, "BUILD": 1
}  # fmt: skip


def _depth(value: Any) -> int:
    return value.nested if isinstance(value, _Made) else 0


def _nested(items: list[Any]) -> int:
    nested = 1 + max(map(_depth, items), default=0)
    if nested > _MOST_NESTED:
        raise SourceError(f"its pickle nests tuples more than {_MOST_NESTED} deep, which no model does")
    return nested


def _storage(described: Any) -> _Storage:
    """What BINPERSID gives for a tuple. The key is text: torch looks for what it has read already by the key, and for the
    record by how the key prints, so that keys of other types could have one record read any number of times.
    """
    parts = described.inside if isinstance(described, _Made) and described.kind == "tuple" else []
    if len(parts) != 5 or not (isinstance(parts[1], _Name) and type(parts[2]) is str and type(parts[4]) is int):
        raise UntrustedFileError("it describes the storage of a tensor in another way than torch.save does")
    return _Storage(parts[4])


def _check_call(called: Any, given: Any, others: Collection[str]) -> None:
    if not isinstance(called, _Name):
        raise UntrustedFileError("its pickle calls a value that is not a name")
    if called not in CALLED and called not in others:
        raise UntrustedFileError(f"it tries to call {called}, which files of models do not")
    # Of another value the function would get what going through it gives, for as long as that takes.
    arguments = given.inside if _is(given, "tuple") else None
    if called == "_codecs.encode" and (arguments is None or arguments[1:] not in (["latin1"], ["latin-1"])):
        raise UntrustedFileError("it encodes text in another way than torch.save does")
    if called == "torch._tensor._rebuild_from_type_v2" and arguments:
        # This one calls its first argument.
        _check_call(arguments[0], arguments[2] if len(arguments) == 4 else None, others)
    if arguments is None or not _ARGUMENTS.get(called, lambda *_: True)(*arguments):
        raise UntrustedFileError(f"its pickle calls {called} with other arguments than torch.save does")


def _is(value: Any, *kinds: str) -> bool:
    """Whether a value is a container that instructions make, not a call."""
    return isinstance(value, _Made) and value.kind in kinds


def _is_tensor(value: Any = None, *_: Any) -> bool:
    """Whether a value is a tensor, or comes of a package that has to be trusted for it."""
    return isinstance(value, _Made) and bool(value.name) and (value.name in _TENSORS or value.name not in CALLED)


def _is_whole(value: Any) -> bool:
    """Whether a tensor has memory for each of its elements."""
    if not (isinstance(value, _Made) and value.name in _OF_STORAGE):
        return False
    storage, _, size = value.inside[0].inside[:3]
    return math.prod(size.inside) <= storage.size


def _are_sizes(value: Any) -> bool:
    return _is(value, "tuple") and all(type(size) is int for size in value.inside)


def _of_storage(storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> bool:
    return isinstance(storage, _Storage) and type(offset) is int and _are_sizes(size) and _are_sizes(stride)


def _sparse(layout: Any = None, parts: Any = None, *more: Any) -> bool:
    """torch checks each index of a sparse tensor once the file has been read."""
    tensors = [part for part in parts.inside if _is_tensor(part)] if _is(parts, "tuple") else []
    return bool(tensors) and all(map(_is_whole, tensors)) and not more


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
    "builtins.complex": lambda *parts: all(type(part) in (int, float) for part in parts),
    "builtins.set": lambda *items: all(_is(item, "list") for item in items),
    "collections.Counter": lambda *items: all(_is(item, "dict") for item in items),
    "collections.OrderedDict": lambda *items: not items,
    "torch.Size": lambda *sizes: all(map(_are_sizes, sizes)),
    "torch._tensor._rebuild_from_type_v2": lambda function=None, *_: function in _TENSORS,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype=None, size=None, stride=None, *_: all(
        _are_sizes(one) for one in (size, stride)
    ),
    "torch._utils._rebuild_sparse_tensor": _sparse,
    **dict.fromkeys(_OF_STORAGE, _of_storage),
    **dict.fromkeys(
        (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
            "torch.nn.parameter.Parameter",
        ),
        _is_tensor,
    ),
}


# -- what going through the values takes ----------------------------------------------------------------------------------


def _check_sharing(made: list[_Made], length: int) -> None:
    """`SourceError` unless going through the attributes of every instance takes no longer than the pickle explains.

    A value can be in many others. Printing, comparing and hashing visit it as often as it is reached, and so does much
    code of libraries: `a = [b, b]`, `b = [c, c]` and so on is short in a file and without end to go through. Instances
    that were given a state end such walks.
    """
    _unfold(made, lambda one: one.inside, length)
    walked = sum(sum(map(_unfolded, (one, *one.states))) for one in made if one.name or one.states)
    if walked > _most(length):
        raise _too_shared(length)


def _check_text(made: Iterable[_Made], length: int) -> None:
    """`SourceError` where bytes are made of one text again and again, or where compiling patterns takes long.

    Bytes are text that is encoded, and arrays copy theirs, each array for itself. A call takes a few bytes of the pickle.
    """
    encoded = ranges = 0
    for one in made:
        for part in (one, *(part for state in one.states for part in _insides([state]))):
            if isinstance(part, _Made) and part.name == "_codecs.encode":
                encoded += len(_insides(part.inside)[0])
        if one.name == "re._compile":
            text = next(iter(_insides(one.inside)), "")
            text = next(iter(_insides(text.inside)), "") if isinstance(text, _Made) else text  # of bytes
            ranges += str(text).count("-")
    if ranges > _MOST_RANGES:
        raise UntrustedFileError(f"it holds regular expressions with {ranges} ranges, more than any model has")
    if encoded > 2 * length:
        raise _too_shared(length)


def _check_keys(made: list[_Made], length: int) -> None:
    """`SourceError` unless hashing and comparing what the pickle has hashed takes no longer than it explains.

    These are keys, and the arguments of calls: of `set`, and of enumerations, which look theirs up. An instance may hash
    its state. Keys of chosen hashes, which have to be compared each with each, can be made of numbers and tuples.
    """
    # A bound method is kept, and hashed by what it is bound to: a module, which is hashed as the object it is.
    calls = [one for one in made if one.name and one.name != "builtins.getattr"]
    keys = [key for one in made for key in one.keys]
    for one in calls:
        if one.name in ("builtins.set", "builtins.frozenset", "collections.Counter", "collections.OrderedDict"):
            keys += [item for argument in _insides(one.inside) for item in _insides([argument])]
    odd = [key for key in keys if not isinstance(key, str | bytes) and not _hashes_to_itself(key)]
    if len(odd) > _MOST_ODD_KEYS:
        raise SourceError(
            f"its pickle has {len(odd)} keys that are neither text nor plain numbers, more than any model"
        )
    for one in made:
        one.unfolded = 0
    hashed = [value for value in (*odd, *(one.inside[0] for one in calls)) if isinstance(value, _Made)]
    _unfold(hashed, lambda one: [*one.inside, *one.states], length)
    if sum(map(_unfolded, hashed)) > _most(length):
        raise _too_shared(length)


def _insides(values: Iterable[Any]) -> list[Any]:
    return [item for value in values if isinstance(value, _Made) for item in value.inside]


def _hashes_to_itself(key: Any) -> bool:
    return isinstance(key, int) and abs(key) < sys.hash_info.modulus


def _check_counts(made: Iterable[_Made], length: int) -> None:
    """`SourceError` for a number that the code of an instance's class could count to, and that the pickle does not explain.

    `nn.LSTM` makes a list for each of its `num_layers`.
    """
    for one in made:
        queue, seen = list(one.states), set()
        while queue:
            value = queue.pop()
            if isinstance(value, int) and abs(value) > max(COUNTABLE, length):
                raise SourceError(f"it gives a {one.name} the number {str(value)[:20]}, more than any model counts to")
            if isinstance(value, _Made) and id(value) not in seen:
                seen.add(id(value))
                queue += value.inside


def _unfold(starts: Iterable[_Made], parts: Callable[[_Made], list[Any]], length: int) -> None:
    """Note in `unfolded` how many values going through each of `starts` visits; `SourceError` where they are too many."""
    most = _most(length)
    for start in starts:
        path = [(start, iter(parts(start)))] if not start.unfolded else []
        while path:
            one, rest = path[-1]
            one.unfolded = _OPEN
            inner = next((value for value in rest if isinstance(value, _Made) and value.unfolded <= 0), None)
            if inner is None:
                one.unfolded = 1 + sum(map(_unfolded, parts(one)))
                if one.unfolded > most:
                    raise _too_shared(length)
                path.pop()
            elif inner.unfolded == _OPEN:
                raise SourceError("its pickle has a container that is inside itself, which no model has")
            else:
                path.append((inner, iter(parts(inner))))


_OPEN = -1


def _most(length: int) -> int:
    return _VALUES_FLOOR + _VALUES_EACH * length


def _unfolded(value: Any) -> int:
    return value.unfolded if isinstance(value, _Made) else 1


def _too_shared(length: int) -> SourceError:
    return SourceError(
        f"its pickle has {length} bytes, and values in it are in so many others that going through all would take far longer "
        "than in any model"
    )


def check_tree(model: nn.Module, length: int) -> None:
    """`SourceError` where modules are inside so many others that going through the tree of modules takes far too long.

    `model.train()` and `model.state_dict()` visit a module as often as it is reached; `length` is that of the pickle.
    """
    made: list[_Made] = []
    nodes = {id(module): _Made(made, []) for module in model.modules()}
    for module in model.modules():
        nodes[id(module)].inside = [nodes[id(child)] for child in module._modules.values() if child is not None]
    _unfold(made, lambda one: one.inside, length)
    told = 0
    for path, _ in model.named_modules(remove_duplicate=False):
        told += len(path)
        if told > _CHARACTERS_EACH * _most(length):
            raise _too_shared(length)
