"""How long going through the values of a pickle takes: walking, hashing, comparing, counting and encoding them.

A value can be in many others, so that a short pickle has more to go through than any time is enough for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ...errors import SourceError, UntrustedFileError
from .pickled_calls import Made

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


def check_sharing(made: list[Made], length: int) -> None:
    """`SourceError` unless going through the attributes of every instance takes no longer than the pickle explains.

    A value can be in many others. Printing, comparing and hashing visit it as often as it is reached, and so does much
    code of libraries: `a = [b, b]`, `b = [c, c]` and so on is short in a file and without end to go through. Instances
    that were given a state end such walks.
    """
    _unfold(made, lambda one: one.inside, length)
    walked = sum(sum(map(_unfolded, (one, *one.states))) for one in made if one.name or one.states)
    if walked > _most(length):
        raise _too_shared(length)


def check_text(made: Iterable[Made], length: int) -> None:
    """`SourceError` where bytes are made of one text again and again, or where compiling patterns takes long.

    Bytes are text that is encoded, and arrays copy theirs, each array for itself. A call takes a few bytes of the pickle.
    """
    encoded = ranges = 0
    for one in made:
        for part in (one, *(part for state in one.states for part in _insides([state]))):
            if isinstance(part, Made) and part.name == "builtins.bytearray":  # a copy
                part = next(iter(_insides(part.inside)), None)
            if isinstance(part, Made) and part.name == "_codecs.encode":
                encoded += len(_insides(part.inside)[0])
        if one.name == "re._compile":
            text = next(iter(_insides(one.inside)), "")
            text = next(iter(_insides(text.inside)), "") if isinstance(text, Made) else text  # of bytes
            ranges += text.count("-") if isinstance(text, str) else 0
    if ranges > _MOST_RANGES:
        raise UntrustedFileError(f"it holds regular expressions with {ranges} ranges, more than any model has")
    if encoded > 2 * length:
        raise _too_shared(length)


def check_keys(made: list[Made], length: int) -> None:
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
    hashed = [value for value in (*odd, *(one.inside[0] for one in calls)) if isinstance(value, Made)]
    _unfold(hashed, lambda one: [*one.inside, *one.states], length)
    if sum(map(_unfolded, hashed)) > _most(length):
        raise _too_shared(length)


def _insides(values: Iterable[Any]) -> list[Any]:
    return [item for value in values if isinstance(value, Made) for item in value.inside]


def _hashes_to_itself(key: Any) -> bool:
    return isinstance(key, int) and abs(key) < sys.hash_info.modulus


def check_counts(made: Iterable[Made], length: int) -> None:
    """`SourceError` for a number that the code of an instance's class could count to, and that the pickle does not explain.

    `nn.LSTM` makes a list for each of its `num_layers`.
    """
    for one in made:
        queue, seen = list(one.states), set()
        while queue:
            value = queue.pop()
            if isinstance(value, int) and abs(value) > max(COUNTABLE, length):
                raise SourceError(f"it gives a {one.name} the number {str(value)[:20]}, more than any model counts to")
            if isinstance(value, Made) and id(value) not in seen:
                seen.add(id(value))
                queue += value.inside


def _unfold(starts: Iterable[Made], parts: Callable[[Made], list[Any]], length: int) -> None:
    """Note in `unfolded` how many values going through each of `starts` visits; `SourceError` where they are too many."""
    most = _most(length)
    for start in starts:
        path = [(start, iter(parts(start)))] if not start.unfolded else []
        while path:
            one, rest = path[-1]
            one.unfolded = _OPEN
            inner = next((value for value in rest if isinstance(value, Made) and value.unfolded <= 0), None)
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
    return value.unfolded if isinstance(value, Made) else 1


def _too_shared(length: int) -> SourceError:
    return SourceError(
        f"its pickle has {length} bytes, and values in it are in so many others that going through all would take far longer "
        "than in any model"
    )


def check_tree(model: nn.Module, length: int) -> None:
    """`SourceError` where modules are inside so many others that going through the tree of modules takes far too long.

    `model.train()` and `model.state_dict()` visit a module as often as it is reached; `length` is that of the pickle.
    """
    made: list[Made] = []
    nodes = {id(module): Made(made, []) for module in model.modules()}
    for module in model.modules():
        nodes[id(module)].inside = [nodes[id(child)] for child in module._modules.values() if child is not None]
    _unfold(made, lambda one: one.inside, length)
    told = 0
    for path, _ in model.named_modules(remove_duplicate=False):
        told += len(path)
        if told > _CHARACTERS_EACH * _most(length):
            raise _too_shared(length)
