"""Changes to what a pickle calls functions with and what it gives as state, and to text that is in many places."""

from __future__ import annotations

import pickletools
import random
import struct
from collections.abc import Callable
from typing import NamedTuple

from .odd import COUNTS, NAMES

_FAR = b"\x40\x42\x0f\x00"  # a place of the memo that no file has
PUT, GET = b"r" + _FAR, b"j" + _FAR


class Span(NamedTuple):
    """Where a value stands in a pickle, and where the items of a tuple do."""

    start: int
    end: int
    items: tuple[Span, ...] = ()


def bounds_of(pickled: bytes) -> list[tuple[str, int, int]]:
    """(instruction, start, end) for a whole pickle; none for one that is broken already."""
    try:
        found = [(code.name, position) for code, _, position in pickletools.genops(pickled)]
    except ValueError:
        return []
    ends = [position for _, position in found[1:]] + [len(pickled)]
    return [(name, start, end) for (name, start), end in zip(found, ends, strict=True)]


def given(bounds: list[tuple[str, int, int]]) -> tuple[list[Span], list[Span]]:
    """Each value that a call or a BUILD of a whole pickle gets, and each storage."""
    stack: list[Span] = []
    marks: list[tuple[int, list[Span]]] = []
    found: list[Span] = []
    storages: list[Span] = []
    for name, start, end in bounds:
        if name == "MARK":
            marks.append((start, stack))
            stack = []
        elif name == "TUPLE":
            items, (begin, stack) = stack, marks.pop()
            stack.append(Span(begin, end, tuple(items)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = stack[-int(name[-1]) :]
            stack[-len(items) :] = [Span(items[0].start, end, tuple(items))]
        elif name in ("APPENDS", "SETITEMS"):
            _, stack = marks.pop()
            stack[-1] = Span(stack[-1].start, end)
        elif name in ("APPEND", "SETITEM", "BUILD", "REDUCE", "NEWOBJ"):
            last = stack.pop()
            found += [last] if name == "BUILD" else last.items if name in ("REDUCE", "NEWOBJ") else []
            if name == "SETITEM":
                stack.pop()
            stack[-1] = Span(stack[-1].start, end)
        elif name in ("BINPUT", "LONG_BINPUT", "BINPERSID"):
            stack[-1] = stack[-1]._replace(end=end)
            storages += [stack[-1]] if name == "BINPERSID" else []
        elif name not in ("PROTO", "STOP"):
            stack.append(Span(start, end))
    return found, storages


def argument(rng: random.Random, pickled: bytes) -> bytes:
    """An argument or a state replaced by an odd one, by another of the file, by none or by two."""
    bounds = bounds_of(pickled)
    try:
        found, storages = given(bounds)
    except IndexError:  # a pickle that is broken already
        return pickled
    # What later instructions get from the memo has to stay there.
    gets = {pickled[start + 1 : end] for name, start, end in bounds if name.endswith("BINGET")}
    puts = [start for name, start, end in bounds if name.endswith("BINPUT") and pickled[start + 1 : end] in gets]
    free = [one for one in found if not any(one.start <= put < one.end for put in puts)]
    if not free:
        return pickled
    chosen = rng.choice(free)
    other = rng.choice(found)
    new = rng.choice((_odd(rng, pickled, storages), _odd(rng, pickled, storages), pickled[other.start : other.end]))
    new = rng.choice((new, new, new, new, b"", new + new, pickled[chosen.start : chosen.end] + new))
    return pickled[: chosen.start] + new + pickled[chosen.end :]


def _number(rng: random.Random) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", rng.choice((*COUNTS, -1, 0, 1, 2, 3)))


def _name(rng: random.Random) -> bytes:
    return b"c%s\n%s\n" % tuple(rng.choice(NAMES).encode().split(b" "))


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _sizes(rng: random.Random) -> bytes:
    return b"(" + b"".join(_number(rng) for _ in range(rng.choice((0, 1, 2, 4, 70)))) + b"t"


def _tensor(rng: random.Random, pickled: bytes, storages: list[Span]) -> bytes:
    """One of a storage of the file's, of any size, mostly without steps; or what is no tensor."""
    if not storages:
        return b"N"
    of = rng.choice(storages)
    sizes = [rng.choice((1, 2, 10**3, 10**9)) for _ in range(rng.choice((0, 1, 1, 2)))]
    strides = [rng.choice((0, 0, 0, 1)) for _ in sizes]
    shape, steps = (
        b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", one) for one in each) + b"t" for each in (sizes, strides)
    )
    rest = b"K\x00" + shape + steps + b"\x89" + rng.choice((_HOOKS, b"N", _hooks(rng)))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pickled[of.start : of.end] + rest + b"tR"
    wrapped = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x89" + rng.choice((_HOOKS, _hooks(rng))) + b"tR"
    return rng.choice((tensor, tensor, wrapped))


_HOOKS = b"ccollections\nOrderedDict\n)R"


def _hooks(rng: random.Random) -> bytes:
    """What is called in a backward pass, were it let in; and what is no dict."""
    inside = b"K\x01" + rng.choice((_name(rng), b"N", b"K\x01")) + b"s"
    return rng.choice((_HOOKS + inside, b"}" + inside, _HOOKS + b"}" + _text("items") + _name(rng) + b"sb", _name(rng)))


def _state(rng: random.Random, pickled: bytes, storages: list[Span]) -> bytes:
    names = ("_backward_hooks", "data", "grad", "requires_grad", "__class__", "kept", "_grad_fn", "names", "_modules")
    value = rng.choice((_tensor(rng, pickled, storages), _name(rng), _number(rng), b"}", _HOOKS))
    own = b"}" + _text(rng.choice(names)) + value + b"s"
    return rng.choice((own, own, b"N" + own + b"\x86", own + own + b"\x86", own + b"\x85"))


def _odd(rng: random.Random, pickled: bytes, storages: list[Span]) -> bytes:
    """A value that `torch.save` writes nowhere, or not here."""
    make: Callable[[], bytes] = rng.choice(
        (
            lambda: _tensor(rng, pickled, storages),
            lambda: b"cbuiltins\nset\n" + _tensor(rng, pickled, storages) + b"\x85R",
            lambda: b"cbuiltins\nset\n](" + _tensor(rng, pickled, storages) * rng.choice((1, 3, 300)) + b"e\x85R",
            lambda: b"](" + _tensor(rng, pickled, storages) * rng.choice((1, 300)) + b"e",
            lambda: _sizes(rng),
            lambda: b"ctorch\nSize\n" + rng.choice((_sizes(rng), _tensor(rng, pickled, storages))) + b"\x85R",
            lambda: _hooks(rng),
            lambda: _state(rng, pickled, storages),
            lambda: _number(rng),
            lambda: _name(rng),
            lambda: _text(rng.choice(("", "a", "a" * 70_000, "latin1", "sum", "0"))),
            lambda: rng.choice((b"N", b"\x88", b"]", b"}", b")", b"G" + struct.pack(">d", 1e300))),
        )
    )
    return make()


def shared_text(rng: random.Random, pickled: bytes) -> bytes:
    """One long text that stands in many places: as a value, a name, in containers, or as what bytes and patterns are of."""
    texts = [bound for bound in bounds_of(pickled) if bound[0] == "BINUNICODE"]
    if not texts:
        return pickled
    letter, length = (
        rng.choice(("a", "a", "é", "(", "[a-z]", "\n", "\x1b", "[/red]")),
        rng.choice((300, 20_000, 200_000)),
    )
    text = letter * (length // len(letter))
    encoded = text.encode()
    long = b"X" + struct.pack("<I", len(encoded)) + encoded + PUT
    if rng.random() < 0.4:  # in the place of several texts of the file's
        chosen = sorted(rng.sample(texts, min(len(texts), rng.choice((2, 10, 500)))), key=lambda bound: -bound[1])
        for _, start, end in chosen:
            pickled = pickled[:start] + (long if start == chosen[-1][1] else GET) + pickled[end:]
        return pickled
    each = rng.choice(
        (
            GET, GET, b"c_codecs\nencode\n" + GET + _text("latin1") + b"\x86R", b"}" + GET + b"Ns", b"(" + GET * 50 + b"t",
            b"cre\n_compile\n" + GET + b"K\x20\x86R", b"cpathlib\nPosixPath\n(" + GET * 50 + b"tR",
            b"ctorch\ndevice\n" + GET + b"\x85R", b"cbuiltins\nset\n](" + GET * 50 + b"e\x85R",
        )
    )  # fmt: skip
    begin, close = rng.choice(((b"](", b"e"), (b"(", b"t")))
    _, start, end = rng.choice(texts)
    return pickled[:start] + begin + long + each * rng.choice((1, 50, 5_000)) + close + pickled[end:]
