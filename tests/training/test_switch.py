"""A disabled model computes what the original did, and afterwards what it did before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet

SIZES = [IMAGES, IMAGES[:1, :, :64, :96]]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"share_layers": True}, {"upsampler": "carafe"}], ids=str)
def test_disabled_is_the_original(options: dict[str, Any], train: bool) -> None:
    original, model = unet().train(train), unet().train(train)
    upswap.patch(model, **options)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(0.3)
    for x in SIZES:
        x = x.clone().requires_grad_()
        before = model(x)
        with upswap.disabled(model) as same:
            assert same is model
            got = model(x)
        expected = original(x)
        assert torch.equal(got, expected)
        assert not torch.allclose(before, expected, atol=1e-3)
        assert train or torch.equal(model(x), before)  # batch statistics move in training
        gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
        assert torch.equal(*gradients)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Odd(nn.Module):
    """A resize to a size, one by a factor computed anew, one layer in a container, and one to align corners."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bicubic", align_corners=True), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.conv(x))
        y = nn.functional.interpolate(y, scale_factor=1.7, mode="nearest", recompute_scale_factor=True)
        return self.head(nn.functional.interpolate(y, (2 * y.shape[2] + 1, 3 * y.shape[3]), mode="bilinear"))


def test_all_ways_to_ask_for_a_size() -> None:
    torch.manual_seed(0)
    original = Odd().eval()
    model = upswap.patch(Odd().eval(), torch.randn(1, 3, 32, 32))
    model.load_state_dict(original.state_dict(), strict=False)
    assert len(upswap.upsamplers(model)) == 3
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(0.3)
        for size in (32, 37):
            x = torch.randn(2, 3, size, size + 5)
            with upswap.disabled(model):
                assert torch.equal(model(x), original(x))
            assert not torch.allclose(model(x), original(x), atol=1e-3)


def test_a_compiled_model_is_switched_too() -> None:
    original, model = unet(), patched(unet())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(IMAGES)
        with upswap.disabled(compiled):
            assert torch.equal(compiled(IMAGES), original(IMAGES))
        assert torch.equal(compiled(IMAGES), before)


def test_an_error_inside_switches_back() -> None:
    model = patched(unet())
    with torch.no_grad():
        before = model(IMAGES)
        with pytest.raises(KeyError), upswap.disabled(model), upswap.disabled(model):
            raise KeyError
        assert torch.equal(model(IMAGES), before)
    with pytest.raises(upswap.PlanError, match="not patched"), upswap.disabled(unet()):
        pass
