"""Look through a `.pt` before torch reads it: how large it becomes, and what its pickle would have called.

torch's restricted unpickler calls what it holds safe with any arguments. Some of that takes as much memory or time as it
is told to: `bytearray(10**12)`, a text codec of quadratic cost, a tuple so deep that hashing it overflows the C stack. The
files that `torch.save` writes of models need little of it, and what a pickle calls can be read off it without running it:
in the instructions torch knows, a callable can only come from a GLOBAL.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from ...errors import SourceError, UntrustedFileError

# The list of instructions is kept in memory while it is read, and the smallest make objects of 200 bytes. Models with
# 100,000 instructions, which is a large one, have 0.2 MB.
_MOST_PICKLE = 32 * 2**20
_MOST_NESTED = 200

#: Of what torch itself holds safe, that which pickles of models call.
CALLED = frozenset(
    {
        "_codecs.encode",
        "builtins.complex",
        "builtins.set",
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


class _Value:
    """What is known of a value beforehand: how deep its tuples nest, and its name, text or items where it has any."""

    __slots__ = ("known", "nested")

    def __init__(self, known: Any = None, nested: int = 0) -> None:
        self.known, self.nested = known, nested


class _Name(str):
    """A name that a GLOBAL asks for."""


def instructions(pickled: bytes, others: Collection[str]) -> None:
    """Go through a pickle; `others` are the names it asks for beyond what torch itself holds safe.

    A table by instruction.

    Raises:
        UntrustedFileError: it calls something that is neither in `CALLED` nor in `others`, or uses an instruction that
            torch does not know.
        SourceError: it is no whole pickle, or nests or names more than a model does.
    """
    stack: list[_Value] = []
    marks: list[list[_Value]] = []
    memo: dict[int, _Value] = {}
    try:
        argument: Any
        for code, argument, _ in pickletools.genops(pickled):
            name = code.name
            if name in _CONSTANTS:
                stack.append(_Value(argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(_Value(_Name(f"{'builtins' if module == '__builtin__' else module}.{attribute}")))
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name == "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(_tuple(items))
            elif name in _TUPLES:
                items = [stack.pop() for _ in range(_TUPLES[name])][::-1]
                stack.append(_tuple(items))
            elif name in ("REDUCE", "NEWOBJ"):
                given, called = stack.pop(), stack.pop()
                _check_call(called.known, given.known, others)
                stack.append(_Value(None, given.nested + 1))
            elif name in ("APPENDS", "SETITEMS"):
                stack = marks.pop()
            elif name in _POPS:
                del stack[len(stack) - _POPS[name] :]
                _ = stack[-1]
            elif name == "BINPERSID":
                stack[-1] = _Value()
            elif name not in ("PROTO", "STOP"):
                raise UntrustedFileError(f"its pickle has the instruction {name}, which torch.save does not write")
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"its pickle is damaged: {str(error) or type(error).__name__}") from error


_CONSTANTS = frozenset(
    (
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_SET",
        "EMPTY_TUPLE",
    )
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}


def _tuple(items: list[_Value]) -> _Value:
    nested = 1 + max((item.nested for item in items), default=0)
    if nested > _MOST_NESTED:
        raise SourceError(f"its pickle nests tuples more than {_MOST_NESTED} deep, which no model does")
    return _Value(tuple(item.known for item in items) if len(items) <= 8 else None, nested)


def _check_call(called: Any, given: Any, others: Collection[str]) -> None:
    if not isinstance(called, _Name):
        raise UntrustedFileError("its pickle calls a value that is not a name")
    if called not in CALLED and called not in others:
        raise UntrustedFileError(f"it tries to call {called}, which files of models do not")
    if called == "_codecs.encode" and not (isinstance(given, tuple) and given[1:] in (("latin1",), ("latin-1",))):
        raise UntrustedFileError("it encodes text in another way than torch.save does")
    if called == "torch._tensor._rebuild_from_type_v2":
        # This one calls its first argument.
        arguments = given[2] if isinstance(given, tuple) and len(given) == 4 else None
        _check_call(given[0] if isinstance(given, tuple) and given else None, arguments, others)
