"""What a training loop keeps is looked through by one rule, in a file and in memory."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from upswap.files.reading import read, tensors_in

T = torch.zeros(2)


def deep(levels: int) -> Any:
    value: Any = {"w": T}
    for _ in range(levels):
        value = {"a": value}
    return value


LOOPS: dict[str, tuple[Any, list[str]]] = {
    "weights": ({"w": T, "b": T, "step": 3}, [""]),
    "more that is none": ({"w": T, "a": 1, "b": 2}, []),
    "among other things": ({"epoch": 3, "model": {"w": T}, "ema": OrderedDict(w=T)}, ["model", "ema"]),
    "a model": ({"model": nn.Linear(2, 2), "opt": {"state": {}}}, ["model"]),
    "a model without tensors": ({"model": nn.ReLU(), "ema": {"w": T}}, ["ema"]),
    "four keys": (deep(4), ["a.a.a.a"]),
    "five keys": (deep(5), []),
    "keys that are no text": ({"w": T, "b": T, 0: T, 1: {"w": T}}, []),
    "a key of any length": ({"x" * 300: {"w": T}, "m": {"w": T}}, ["m"]),
    "a list": ({"models": [{"w": T}]}, []),
}


@pytest.mark.parametrize("name", list(LOOPS))
def test_the_same_in_a_file_and_in_memory(name: str, tmp_path: Path) -> None:
    loop, keys = LOOPS[name]
    torch.save(loop, tmp_path / "last.pt")
    here, there = read(loop), read(tmp_path / "last.pt")
    assert list(here.weights) == list(there.weights) == keys
    for key in keys:
        assert here.is_model(key) == there.is_model(key)
        assert list(here.names(key)) == list(there.names(key))
        assert list(tensors_in(here.state_dict(key))) == list(there.state_dict(key))
