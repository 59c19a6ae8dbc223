"""A change of a model that breaks off half way leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upswap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), scale_factor=2)


class Closed(Block):
    """Takes no more children, and no other class, once it is closed."""

    closed = False

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if self.closed:
            raise RuntimeError("takes no children")
        super().add_module(name, module)


class NoOtherClass(Block):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise RuntimeError("stays what it is")
        super().__setattr__(name, value)


class Model(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.up, self.last = Block(), nn.Upsample(scale_factor=2), last
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.up(self.first(x))))


def look(model: nn.Module) -> list[Any]:
    return [(type(module), list(module.__dict__), list(module._modules.values())) for module in model.modules()]


@pytest.mark.parametrize("cls", [Closed, NoOtherClass])
def test_a_patch_that_breaks_off(cls: type[nn.Module]) -> None:
    model = Model(cls())
    cls.closed = True
    before = look(model)
    with pytest.raises(RuntimeError):
        upswap.patch(model, torch.randn(1, 4, 8, 8))
    assert look(model) == before


def test_an_undo_that_breaks_off() -> None:
    model = Model(Block())
    upswap.patch(model, torch.randn(1, 4, 8, 8))
    del model.last._modules["upsample"]
    before = look(model)
    with pytest.raises(KeyError):
        upswap.unpatch(model)
    assert look(model) == before


def helper(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2)


class Detour(NoOtherClass):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(self, self.conv(x))


def test_a_trial_that_breaks_off() -> None:
    model = Model(Detour())
    before = look(model)
    with pytest.raises(RuntimeError):
        upswap.inspect(model, torch.randn(1, 4, 8, 8))
    assert look(model) == before
