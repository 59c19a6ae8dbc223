"""Where the models and state dicts are in what a training loop keeps: one rule for files, and for what is in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from .safety.instance_rules import LONGEST_NAME

# `callbacks`, the name of one, `ema`, `state_dict`.
_MOST_KEYS = 4


class Kinds(NamedTuple):
    """What values are: stand-ins that are not judged are read in another way than real ones.

    `entries` gives the pairs in a dict, and None for any other value.
    """

    is_model: Callable[[Any], bool]
    is_tensor: Callable[[Any], bool]
    entries: Callable[[Any], Collection[tuple[Any, Any]] | None]


def parts(value: Any, kinds: Kinds, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The models and state dicts in a value, each with the keys that lead to it.

    Some state dicts have a few other things among their tensors: the step, the extra state of a layer.
    """
    entries = None if kinds.is_model(value) else kinds.entries(value)
    if entries is None:
        if kinds.is_model(value):
            yield ".".join(keys), value
        return
    names = [key for key, _ in entries]
    if all(type(name) is str for name in names) and 2 * sum(kinds.is_tensor(item) for _, item in entries) > len(names):
        yield ".".join(keys), value
    elif len(keys) < _MOST_KEYS:
        for key, item in entries:
            if type(key) is str and len(key) <= LONGEST_NAME:
                yield from parts(item, kinds, (*keys, key))
