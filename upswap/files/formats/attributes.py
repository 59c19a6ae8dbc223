"""Where a model holds its values, so that a message can name the attribute."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def held_by(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each value in the attributes of a model's modules, and in containers there, with its place as Python writes it.

    Tensors are left out. A module comes after what it holds.
    """
    for path, module in model.named_modules():
        queue = [
            (f"{path}.{name}".removeprefix("."), value) for name, value in module.__dict__.items() if name not in _PARTS
        ]
        seen: set[int] = set()
        while queue:
            place, value = queue.pop(0)
            if id(value) in seen or isinstance(value, torch.Tensor):
                continue
            seen.add(id(value))
            queue += _inside(place, value)
            yield place, value
        yield path or type(module).__qualname__, module


_PARTS = ("_modules", "_parameters", "_buffers")


def _inside(place: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{place}[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, functools.partial):
        return [(f"{place}.func", value.func), *_inside(f"{place}.keywords", value.keywords)]
    own = getattr(value, "__dict__", None)
    plain = not callable(value) and type(own) is dict
    return [(f"{place}.{name}", item) for name, item in own.items()] if plain and own else []
