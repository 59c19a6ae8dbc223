"""A disabled model computes what the original did, and afterwards what it did before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet

SIZES = [IMAGES, IMAGES[:1, :, :64, :96]]


def moved(model: nn.Module) -> nn.Module:
    """With offsets that show."""
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(0.3)
    return model


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"share_layers": True}, {"upsampler": "carafe"}], ids=str)
def test_disabled_is_the_original(options: dict[str, Any], train: bool) -> None:
    original, model = unet().train(train), unet().train(train)
    moved(upswap.patch(model, **options))
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


class Constant(nn.Module):
    """A call with a constant factor, which the graph route leaves to the upsampler."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.interpolate(torch.relu(self.conv(x)), scale_factor=1.5, mode="bilinear")
        return self.head(nn.functional.interpolate(y, scale_factor=2))


@pytest.mark.parametrize(("make", "routes"), [(Odd, {"module", "source"}), (Constant, {"graph"})])
def test_all_ways_to_ask_for_a_size(make: type[nn.Module], routes: set[str]) -> None:
    torch.manual_seed(0)
    original = make().eval()
    model = moved(upswap.patch(copy.deepcopy(original), torch.randn(1, 3, 32, 32)))
    assert {site.route for site in upswap.plan_of(model).swapped} == routes
    with torch.no_grad():
        for size in (32, 37):
            x = torch.randn(2, 3, size, size + 5)
            with upswap.disabled(model):
                assert torch.equal(model(x), original(x))
            assert not torch.allclose(model(x), original(x), atol=1e-3)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """What the original computes."""
    with torch.no_grad():
        return unet()(IMAGES)


@pytest.fixture
def model() -> nn.Module:
    return patched(unet())


@pytest.fixture
def before(model: nn.Module) -> torch.Tensor:
    """What the patched model computes."""
    with torch.no_grad():
        return model(IMAGES)


def test_overlapping_uses_end_with_the_last(model: nn.Module, before: torch.Tensor, expected: torch.Tensor) -> None:
    first, second = upswap.disabled(model), upswap.disabled(model)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model(IMAGES), expected)
        second.__exit__(None, None, None)
        assert torch.equal(model(IMAGES), before)


def test_copies_are_disabled_as_long(
    model: nn.Module, before: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        with upswap.disabled(model):
            copied = copy.deepcopy(copy.deepcopy(model))
            with upswap.disabled(copied):
                assert torch.equal(copied(IMAGES), expected)
            assert torch.equal(copied(IMAGES), expected)
            for parameter in upswap.parameters(model):
                parameter.zero_()  # a copy has weights of its own
        assert not any("forward" in module.__dict__ for module in copied.modules())
        assert torch.equal(copied(IMAGES), before)
        assert torch.equal(upswap.load(upswap.save(copied, tmp_path / "copied.pt"))(IMAGES), before)


def test_files_are_not_disabled(model: nn.Module, before: torch.Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        with upswap.disabled(model):
            for path in ("model.pt", "whole.pt"):
                with pytest.raises(upswap.SaveError, match=r"outside of upswap\.disabled"):
                    (upswap.save if path == "model.pt" else torch.save)(model, tmp_path / path)
            upswap.save(model, tmp_path / "model.safetensors")
        assert torch.equal(upswap.load(tmp_path / "model.safetensors")(IMAGES), before)


def test_a_compiled_model_is_switched_too(model: nn.Module, expected: torch.Tensor) -> None:
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(IMAGES)
        with upswap.disabled(compiled):
            assert torch.equal(compiled(IMAGES), expected)
        assert torch.equal(compiled(IMAGES), before)


def test_an_error_inside_switches_back(model: nn.Module, before: torch.Tensor) -> None:
    with torch.no_grad():
        with pytest.raises(KeyError), upswap.disabled(model), upswap.disabled(model):
            raise KeyError
        assert torch.equal(model(IMAGES), before)
    with pytest.raises(upswap.PlanError, match="not patched"), upswap.disabled(unet()):
        pass
