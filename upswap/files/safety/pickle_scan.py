"""Look through a `.pt` before torch reads it: how large it becomes, and what its pickle would have called.

torch's restricted unpickler calls what it holds safe with any arguments. Some of that takes as much memory or time as it
is told to: `bytearray(10**12)`, a text codec of quadratic cost, a tuple so deep that hashing it overflows the C stack. The
files that `torch.save` writes of models need little of it, and what a pickle calls can be read off it without running it:
in the instructions torch knows, a callable can only come from a GLOBAL.
"""

from __future__ import annotations

import _compat_pickle
import os
import pickletools
import zipfile
from collections.abc import Callable, Collection
from typing import Any, BinaryIO, NamedTuple

import torch

from ...errors import SourceError, UntrustedFileError
from .pickle_walks import check_counts, check_keys, check_sharing, check_text
from .pickled_calls import CALLED, Made, Name, check_call, storage

# The list of instructions is kept in memory while it is read, and the smallest make objects of 200 bytes. Models with
# 100,000 instructions, which is a large one, have 0.2 MB.
_MOST_PICKLE = 32 * 2**20
_MOST_NESTED = 200


def archive(file: BinaryIO) -> bytes:
    """The pickle in a file of torch.save, if nothing in the file takes more memory than it has bytes.

    Raises:
        SourceError: records are compressed, doubled, overlapping or claim to be longer than the file; the text is without
            the name of the file.
    """
    with zipfile.ZipFile(file) as table:
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
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    size_of: Callable[[str], int] = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))
    sizes = {name: size_of(name) for name in reader.get_all_records()}
    if sum(sizes.values()) > os.fstat(file.fileno()).st_size:
        raise SourceError("its records are longer than the file")
    if sizes.get("data.pkl", 0) > _MOST_PICKLE:
        raise SourceError(f"its data.pkl has {sizes['data.pkl']} bytes, more than the structure of any model takes")
    return bytes(reader.get_record("data.pkl"))


_NAMES: dict[tuple[str, str], tuple[str, str]] = _compat_pickle.NAME_MAPPING
_MODULES: dict[str, str] = _compat_pickle.IMPORT_MAPPING


class Filled(NamedTuple):
    """The names whose instances a pickle puts items into: by keys, and at the end."""

    by_keys: frozenset[str] = frozenset()
    at_end: frozenset[str] = frozenset()


def instructions(pickled: bytes, others: Collection[str], restoring: Collection[str] = ()) -> Filled:
    """Go through a pickle; `others` are the names it asks for beyond what torch itself holds safe.

    Those in `restoring` are of classes that run code of their own on the state they are given. A table by instruction.

    Raises:
        UntrustedFileError: it calls something that is neither in `CALLED` nor in `others`, or uses an instruction that
            torch does not know.
        SourceError: it is no whole pickle, or nests, names or counts to more than a model does, or its values are so
            shared that going through them would take much longer than it is.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    made: list[Made] = []

    try:
        argument: Any
        for code, argument, _ in pickletools.genops(pickled):
            name = code.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name](argument))
            elif name in _EMPTY:
                stack.append(Made(made, [], _EMPTY[name]))
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
                    stack.append(Made(made, items, "tuple", _nested(items)))
                else:
                    _put(stack[-1], items, name)
            elif name in ("REDUCE", "NEWOBJ"):
                given, called = stack.pop(), stack.pop()
                check_call(called, given, others)
                stack.append(Made(made, [given], nested=_depth(given) + 1, name=called))
            elif name == "BINPERSID":
                stack[-1] = storage(stack[-1])
            elif name not in ("PROTO", "STOP"):
                raise UntrustedFileError(f"its pickle has the instruction {name}, which torch.save does not write")
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"its pickle is damaged: {str(error) or type(error).__name__}") from error
    check_sharing(made, len(pickled))
    check_text(made, len(pickled))
    check_keys(made, len(pickled))
    check_counts((one for one in made if one.name in restoring), len(pickled))
    by_keys, at_end = (one.name for one in made if one.keys), (one.name for one in made if one.listed)
    return Filled(frozenset(by_keys), frozenset(at_end))


def _named(module: str, attribute: str) -> Name:
    """The name as it is today: pickles of torch.save have those of Python 2 (`__builtin__.xrange`)."""
    module, attribute = _NAMES.get((module, attribute), (_MODULES.get(module, module), attribute))
    return Name(f"{module}.{attribute}")


def _popped(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _put(target: Any, items: list[Any], how: str) -> None:
    """What APPEND, SETITEM and BUILD do."""
    if not isinstance(target, Made):
        raise ValueError("it puts something into a value that is no container")
    if how == "BUILD":
        if target.name in CALLED and target.name != "collections.OrderedDict":
            raise UntrustedFileError(f"it gives a state to what {target.name} made, which torch.save does not")
        target.states += items
    else:
        target.inside += items
        target.listed |= how.startswith("APPEND")
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
    return value.nested if isinstance(value, Made) else 0


def _nested(items: list[Any]) -> int:
    nested = 1 + max(map(_depth, items), default=0)
    if nested > _MOST_NESTED:
        raise SourceError(f"its pickle nests tuples more than {_MOST_NESTED} deep, which no model does")
    return nested
