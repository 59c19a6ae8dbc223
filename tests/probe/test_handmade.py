"""Resizes that no `F.interpolate` makes are told: by which kernel or functions, and in which module."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from upswap.probe.inputs.inputs import as_inputs
from upswap.probe.observe import observe


class Net(nn.Module):
    """One resize in a block, made by a function that the test gives."""

    def __init__(self, resize: Any) -> None:
        super().__init__()
        self.high = nn.Conv2d(3, 8, 3, padding=1)
        self.low = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 2, 1)
        self.block = Block(resize)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        high = self.high(image)
        return self.last(high + self.block(self.low(high)))


class Block(nn.Module):
    def __init__(self, resize: Any) -> None:
        super().__init__()
        self.resize = resize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.resize(x)
        return result


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2.0)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # that scripting is deprecated
    scripted = torch.jit.script(doubled)


def expanded(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


def viewed(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.unsqueeze(3).unsqueeze(5).expand(-1, -1, -1, 2, -1, 2).contiguous().view(n, c, 2 * h, 2 * w)


WAYS = {
    "aten::upsample_nearest2d": [
        lambda x: torch.ops.aten.upsample_nearest2d(x, [2 * x.shape[2], 2 * x.shape[3]]),
        lambda x: torch._C._nn.upsample_nearest2d(x, None, [2.0, 2.0]),
        scripted,
    ],
    "aten::upsample_bilinear2d": [lambda x: torch._C._nn.upsample_bilinear2d(x, None, False, [2.0, 2.0])],
    "repeat_interleave": [lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)],
    "expand and reshape": [expanded, viewed],
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("way", "resize"), [(way, resize) for way, resizes in WAYS.items() for resize in resizes])
def test_told_with_the_module(way: str, resize: Any, fake: bool) -> None:
    plan = upswap.inspect(Net(resize), torch.randn(1, 3, 256, 256) if fake else torch.randn(1, 3, 32, 32))
    assert not plan.sites
    (hint,) = plan.hints
    assert hint.startswith("it also resizes in ways that upswap does not replace")
    assert hint.endswith(f": {way} in block")


@pytest.mark.parametrize(
    "resize",
    [
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: nn.Upsample(scale_factor=2, mode="bilinear")(x),
        lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2),  # more channels, and a layout
        lambda x: F.interpolate(x.repeat_interleave(2, 3)[..., ::2], scale_factor=2),  # the pairs of an embedding
        lambda x: F.interpolate(x + x.mean((2, 3), keepdim=True).expand_as(x).reshape(x.shape), scale_factor=2),
    ],
)
def test_nothing_is_told_of_what_is_seen_or_no_resize(resize: Any) -> None:
    assert not upswap.inspect(Net(resize)).hints


def test_nothing_is_told_of_an_upsamplers_own_resizes() -> None:
    patched = upswap.patch(Net(lambda x: F.interpolate(x, scale_factor=2)))
    plan = upswap.plan_of(patched)
    assert not plan.hints
    assert observe(patched, as_inputs(torch.randn(1, 3, 32, 32))).unseen == []
