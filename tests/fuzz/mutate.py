"""How files are changed: by bytes, by records and instructions of a `.pt`, by entries of JSON and safetensors headers."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from .calls import GET, PUT, argument, bounds_of, shared_text
from .odd import COUNTS, NAMES, ODD, SPECS

Mutation = Callable[[random.Random, bytes, bytes], bytes]

# -- bytes ----------------------------------------------------------------------------------------------------------------


def truncated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 100))) + data[at:]


def deleted(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 4, 100, 4096)) :]


def doubled(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 16, 512, 8192))
    return data[: at + length] + data[at:]


def overwritten(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 8, 64))
    return data[:at] + rng.choice((b"\x00", b"\xff", b"\x7f", b"{")) * length + data[at + length :]


def ends_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bits in the first or last kilobyte: headers, tables of contents."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(min(1024, len(data)))
        changed[at if rng.random() < 0.5 else -1 - at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))] + other[rng.randrange(max(1, len(other))) :]


# -- .pt ------------------------------------------------------------------------------------------------------------------


def unpacked(data: bytes) -> dict[str, bytes]:
    """The records of a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(records: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose checksums are right whatever is in the records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)  # of no date: the same bytes whenever it is made
            info.compress_type = method
            archive.writestr(info, data)
    return buffer.getvalue()


def _in_pickle(change: Callable[[random.Random, bytes], bytes]) -> Mutation:
    def mutation(rng: random.Random, data: bytes, other: bytes) -> bytes:
        records = unpacked(data)
        name = next(name for name in records if name.endswith("data.pkl"))
        for _ in range(rng.choice((1, 1, 2, 4))):
            records[name] = change(rng, records[name])
        return packed(records)

    return mutation


def _bits(rng: random.Random, pickled: bytes) -> bytes:
    return flipped(rng, pickled, b"")


def _global(rng: random.Random, pickled: bytes) -> bytes:
    found = list(re.finditer(rb"c([\w.]+)\n([\w.]+)\n", pickled))
    if not found:
        return pickled
    own = [match.group(0) for match in found]
    new = rng.choice((rng.choice(own), b"c%s\n%s\n" % tuple(rng.choice(NAMES).encode().split(b" "))))
    at = rng.choice(found)
    return pickled[: at.start()] + new + pickled[at.end() :]


def _instruction(rng: random.Random, pickled: bytes) -> bytes:
    bounds = bounds_of(pickled)
    if not bounds:
        return pickled
    _, start, end = rng.choice(bounds)
    name = b"c%s\n%s\n" % tuple(rng.choice(NAMES).encode().split(b" "))
    new = rng.choice(
        (
            name, name + b")R", name + b")\x81", name + b"}b", b")R", b")\x81", b"}b", b"N\x85R",
            name + b"X\x04\x00\x00\x00true\x85R", b"(", b"t", b"\x85" * 500, b"}" * 500, b"(" * 500, b"0", b"2", b"Q",
            b"h\x00", b"j\xff\xff\xff\x7f", b"q\x05", b"s", b"u", b"a", b"e", b".", b"\x80\x04", b"\x95" + bytes(8),
            b"\x93", b"\x82\x01", b"\x8a\xff" + bytes(255), b"I1\n", b"cos\nsystem\n", b"J\xff\xff\xff\x7f",
            b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"Pxx\n", b"\x92", b"(cos\nsystem\no", b"(ios\nsystem\n",
            pickled[start:end], rng.randbytes(3),
        )
    )  # fmt: skip
    return rng.choice((pickled[:start] + new + pickled[start:], pickled[:start] + new + pickled[end:]))


def _removed(rng: random.Random, pickled: bytes) -> bytes:
    bounds = bounds_of(pickled)
    if not bounds:
        return pickled
    _, start, end = rng.choice(bounds)
    return pickled[:start] + pickled[end:]


def _moved(rng: random.Random, pickled: bytes) -> bytes:
    bounds = bounds_of(pickled)
    if not bounds:
        return pickled
    (_, a, b), (_, c, d) = sorted((rng.choice(bounds), rng.choice(bounds)), key=lambda bound: bound[1])
    return pickled if b > c else pickled[:a] + pickled[c:d] + pickled[b:c] + pickled[a:b] + pickled[d:]


def _value(rng: random.Random, pickled: bytes) -> bytes:
    """A text, number or constant replaced by another, of right length."""
    kinds = ("BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "LONG1")
    bounds = [bound for bound in bounds_of(pickled) if bound[0] in kinds]
    if not bounds:
        return pickled
    kind, start, end = rng.choice(bounds)
    texts = [pickled[s + 5 : e] for name, s, e in bounds if name == "BINUNICODE"]
    odd = [value.encode() for value in ODD if isinstance(value, str)]
    if kind == "BINUNICODE" and rng.random() < 0.9:
        text = rng.choice((rng.choice(texts), rng.choice(odd)))
        new = b"X" + struct.pack("<I", len(text)) + text
    else:
        big = 10 ** rng.choice((6, 9, 12, 18))
        new = rng.choice(
            (
                b"N", b"\x88", b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b")",
                b"}", b"]", b"\x8a\x08" + struct.pack("<q", rng.choice((big, -big))),
                b"G" + struct.pack(">d", rng.choice((1e300, -1.0, float("nan")))),
            )
        )  # fmt: skip
    return pickled[:start] + new + pickled[end:]


def _shared(rng: random.Random, pickled: bytes) -> bytes:
    """A value in the place of another, or beside one: containers that have the one below twice, and so on."""
    bounds = bounds_of(pickled)
    if not bounds:
        return pickled
    value = rng.choice((b"N", b"K\x01", b"}", b"]"))
    begin, between, end = rng.choice(
        ((b"](", b"", b"e"), (b"}(K\x01", b"K\x02", b"u"), (b"", b"", b"\x86"), (b"(", b"", b"t"))
    )
    for _ in range(rng.choice((3, 12, 25, 60))):
        value = begin + value + PUT + between + GET + end
    kinds = ("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "BININT1", "BINUNICODE")
    _, start, stop = rng.choice([bound for bound in bounds if bound[0] in kinds] or bounds)
    value = rng.choice((value, value, b"cbuiltins\nset\n](" + value + b"e\x85R", b"}" + value + b"Ns"))
    return pickled[:start] + value + pickled[rng.choice((start, stop, stop)) :]


def _count(rng: random.Random, pickled: bytes) -> bytes:
    """A number replaced by one that nobody wants to count to."""
    bounds = [bound for bound in bounds_of(pickled) if bound[0] in ("BININT", "BININT1", "BININT2", "LONG1")]
    if not bounds:
        return pickled
    _, start, end = rng.choice(bounds)
    count = rng.choice(COUNTS)
    new = b"J" + struct.pack("<i", count) if count < 2**31 else b"\x8a\x08" + struct.pack("<q", count)
    return pickled[:start] + new + pickled[end:]


def records_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Records renamed, dropped, doubled, emptied, compressed, swapped."""
    records = unpacked(data)
    names = list(records)
    name, second = rng.choice(names), rng.choice(names)
    what = rng.randrange(9)
    if what == 0:
        del records[name]
    elif what == 1:
        records[rng.choice(("/", "../x", "a/" + name, name + "\x00", "x" * 300))] = records.pop(name)
    elif what == 2:
        records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
    elif what == 3:
        records[name], records[second] = records[second], records[name]
    elif what == 4:
        records[name] = bytes(rng.choice((0, 10, 10**6)))
    elif what == 5:
        folder = name.partition("/")[0]
        records[folder + rng.choice(("/constants.pkl", "/code/x.py", "/archive_format"))] = b"x"
    elif what == 6:
        records[name] = flipped(rng, records[name] or b"0", b"")
    elif what == 7:
        bomb = {n: bytes(50 * 2**20) if n == name else d for n, d in records.items()}
        return packed(bomb, zipfile.ZIP_DEFLATED)
    else:
        return packed(records, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    return packed(records)


# -- JSON and .safetensors ------------------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


#: As many entries as a value may have to be changed once more: a list that is made longer may hold one that was before.
_MOST_ENTRIES = 20_000


def edited(rng: random.Random, value: Any) -> Any:
    """A JSON value with some entries replaced, removed, doubled or taken from elsewhere in it."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = _places(value)
        if not places:
            return rng.choice(ODD)
        if len(places) > _MOST_ENTRIES:
            break
        path = rng.choice(places)
        if rng.random() < 0.5:  # the entries of sites, which are deeper and many, are not all there is
            path = path[: rng.randrange(1, len(path) + 1)]
        holder, key = _at(value, path[:-1]), path[-1]
        what = rng.random()
        if what < 0.5:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
        elif what < 0.7:
            holder[key] = json.loads(json.dumps(_at(value, rng.choice(places))))
        elif what < 0.8:
            del holder[key]
        elif what < 0.87 and isinstance(holder, list):
            holder *= rng.choice((0, 2, 200))
        elif what < 0.92 and isinstance(holder, dict):
            holder[rng.choice(("a", "forward", "__class__", "source", "plan", "schema"))] = rng.choice(ODD)
        elif isinstance(holder[key], str):
            holder[key] = spliced(rng, holder[key].encode() or b"a", rng.choice(SPECS).encode()).decode(
                errors="replace"
            )
        else:
            for _ in range(rng.choice((10, 300))):
                holder[key] = [holder[key]]
    return value


def counted(rng: random.Random, value: Any) -> Any:
    """A JSON value with numbers that nobody wants to count to, and with lists that are far longer."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = _places(value)
        if len(places) > _MOST_ENTRIES:
            break
        numbers = [path for path in places if type(_at(value, path)) in (int, float)]
        lists = [path for path in places if isinstance(_at(value, path), list) and _at(value, path)]
        if lists and (not numbers or rng.random() < 0.4):
            items = _at(value, rng.choice(lists))
            items *= rng.choice((10, 300, 4000 // len(items) + 1))
            for index, item in enumerate(items):
                if isinstance(item, dict) and "name" in item:  # sites have to have names of their own
                    items[index] = {**item, "name": f"{item['name']}{index}"}
        elif numbers:
            path = rng.choice(numbers)
            _at(value, path[:-1])[path[-1]] = rng.choice(COUNTS)
    return value


def json_counts(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return json.dumps(counted(rng, json.loads(data))).encode()


def json_entries(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return json.dumps(edited(rng, json.loads(data))).encode()


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def description_entries(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Entries of what upswap wrote, the plan and all."""
    header, rest = _parts(data)
    if "upswap" not in header.get("__metadata__", {}):
        return tensor_entries(rng, data, other)
    changed = edited(rng, json.loads(header["__metadata__"]["upswap"]))
    return _joined({**header, "__metadata__": {"upswap": json.dumps(changed)}}, rest)


def description_counts(rng: random.Random, data: bytes, other: bytes) -> bytes:
    header, rest = _parts(data)
    if "upswap" not in header.get("__metadata__", {}):
        return tensor_entries(rng, data, other)
    changed = counted(rng, json.loads(header["__metadata__"]["upswap"]))
    return _joined({**header, "__metadata__": {"upswap": json.dumps(changed)}}, rest)


def description_spec(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another architecture, or the same with other options."""
    header, rest = _parts(data)
    changed = json.loads(header.get("__metadata__", {}).get("upswap", "{}"))
    spec = str(changed.get("source"))
    numbers = list(re.finditer(r"\d+", spec))
    if numbers and rng.random() < 0.5:
        at = rng.choice(numbers)
        spec = spec[: at.start()] + str(rng.choice((0, 1, 5, 64, 4096, 10**5, 10**9, 10**30))) + spec[at.end() :]
    else:
        spec = rng.choice((*SPECS, spec + "&classes=10000000", spec + "&in_channels=4000", spec + "&activation='x/y'"))
    changed["source"] = spec
    if rng.random() < 0.3:
        changed["plan"] = None
    return _joined({**header, "__metadata__": {"upswap": json.dumps(changed)}}, rest)


def description_text(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Something that is no JSON, or none of ours, in its place."""
    header, rest = _parts(data)
    texts = (
        "",
        "[" * 100_000,
        "{}",
        "[]",
        "null",
        "1" * 5000,
        '{"schema": 1}',
        '{"schema": 2}',
        "\ud800",
        "NaN",
        '{"schema": 1, "plan": {}}',
    )
    return _joined({**header, "__metadata__": {"upswap": rng.choice(texts)}}, rest)  # fmt: skip


def tensor_entries(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Types, shapes and offsets."""
    header, rest = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(names)
        entry = header.setdefault(name, {})
        what = rng.randrange(5)
        if what == 0:
            entry["dtype"] = rng.choice(
                ("F32", "F64", "I8", "U8", "BF16", "F16", "BOOL", "I64", "F8_E4M3", "F4", "C64", "X", None)
            )
        elif what == 1:
            entry["shape"] = rng.choice(
                ([], [0], [-1], [10**12, 0], [2**63], [1, 1], None, "a", entry.get("shape", [])[::-1])
            )
        elif what == 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, len(rest)], [5, 1], [0, 2**63], [-1, 4], [], None))
        elif what == 3:
            header[rng.choice(("a", "__metadata__", name + ".x", "x" * 1000))] = header.pop(name)
        else:
            header.pop(name)
    return _joined(header, rest)


def header_length(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return (
        struct.pack("<Q", rng.choice((0, 1, 8, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(len(data)))))
        + data[8:]
    )


BYTES: dict[str, Mutation] = {
    "truncated": truncated, "bits flipped": flipped, "bytes inserted": inserted, "bytes deleted": deleted,
    "bytes doubled": doubled, "bytes overwritten": overwritten, "ends changed": ends_changed,
    "two files spliced": spliced,
}  # fmt: skip
PT: dict[str, Mutation] = {
    "pickle: bits": _in_pickle(_bits), "pickle: global": _in_pickle(_global),
    "pickle: instruction": _in_pickle(_instruction), "pickle: removed": _in_pickle(_removed),
    "pickle: moved": _in_pickle(_moved), "pickle: value": _in_pickle(_value),
    "pickle: shared": _in_pickle(_shared), "pickle: count": _in_pickle(_count),
    "pickle: argument": _in_pickle(argument), "pickle: shared text": _in_pickle(shared_text), "zip records": records_changed,
}  # fmt: skip
SAFETENSORS: dict[str, Mutation] = {
    "header: description": description_entries, "header: counts": description_counts,
    "header: spec": description_spec, "header: text": description_text,
    "header: tensors": tensor_entries, "header: length": header_length,
}  # fmt: skip
JSON: dict[str, Mutation] = {"json: entries": json_entries, "json: counts": json_counts}


def mutations_for(name: str) -> dict[str, Mutation]:
    """The mutations that a file of that name can have."""
    own = {".pt": PT, ".safetensors": SAFETENSORS, ".json": JSON}[name[name.rindex(".") :]]
    return {**BYTES, **own}


def mutated(rng: random.Random, name: str, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One change to the file `name`: what was done, and the new content.

    Those that keep the form intact get further, and have more turns.
    """
    choices = mutations_for(name)
    own = [label for label in choices if label not in BYTES]
    label = rng.choice(own) if rng.random() < 0.7 else rng.choice(list(BYTES))
    return label, choices[label](rng, data, other)
