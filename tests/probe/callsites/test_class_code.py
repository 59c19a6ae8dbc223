"""What the code of classes says: which forward cannot be another, what is called as a resize."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from upswap.probe.callsites.class_code import (
    calls_a_resize,
    is_resize_layer,
    names_a_resize,
    runs_its_children,
    why_fixed,
)


class Resizes(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Named(nn.Module):
    """A setting of it has the name of a resize."""

    rescale_coords = 2.0

    def forward(self, x):
        return x * self.rescale_coords


class OnlyMade(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = self.upsampler()

    def forward(self, x):
        return x


class Own(nn.Upsample):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "names", "calls"),
    [(Resizes, True, True), (Named, True, False), (OnlyMade, False, False), (nn.ReLU, False, False)],
)
def test_what_is_called_as_a_resize(cls: type, names: bool, calls: bool) -> None:
    assert (names_a_resize(cls), calls_a_resize(cls)) == (names, calls)


def test_a_forward_that_cannot_be_another() -> None:
    module = Resizes()
    assert why_fixed(module) is None
    assert why_fixed(torch.fx.symbolic_trace(module)).startswith("torch.fx makes its forward of a graph")
    module.forward = lambda x: x
    assert why_fixed(module) == "its forward was set on the instance, and would hide a rewritten one"


def test_a_layer_with_a_forward_of_its_own_is_no_layer_that_only_resizes() -> None:
    assert is_resize_layer(nn.UpsamplingNearest2d(scale_factor=2))
    assert not is_resize_layer(Own(scale_factor=2))
    assert runs_its_children(nn.Sequential())
    assert not runs_its_children(Own(scale_factor=2))
