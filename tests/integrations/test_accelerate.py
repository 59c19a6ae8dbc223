"""Patched models under accelerate, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import upswap
from pages import run_page

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_accelerator_before() -> Iterator[None]:
    """accelerate has one state a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Block(nn.Module):
    """The source route, beside the module route of `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.conv(x), scale_factor=2, mode="bilinear")


def net() -> nn.Module:
    torch.manual_seed(0)
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), up, nn.Conv2d(8, 2, 1))


def prepared(model: nn.Module, **settings: Any) -> tuple[accelerate.Accelerator, nn.Module, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    optimizer = torch.optim.AdamW(upswap.param_groups(model, 0.01))
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        accelerator.backward((model(IMAGES) - 1).square().mean())
        optimizer.step()


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    old, new = expected.state_dict(), got.state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    with torch.no_grad():
        assert torch.equal(got.eval()(IMAGES), expected.eval()(IMAGES))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trained_saved_and_taken_up_again(precision: str, tmp_path: Path) -> None:
    model = upswap.patch(net(), IMAGES)
    accelerator, wrapped, optimizer = prepared(model, mixed_precision=precision)
    train(accelerator, wrapped, optimizer, 2)
    assert upswap.status(wrapped, optimizer).ok
    assert {row.state for row in upswap.status(wrapped).rows} == {"trained"}
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, wrapped, optimizer, 2)
    ended = {name: value.clone() for name, value in wrapped.state_dict().items()}

    again, other, its = prepared(upswap.patch(net(), IMAGES), mixed_precision=precision)
    again.load_state(str(tmp_path / "state"))
    train(again, other, its, 2)
    assert all(torch.equal(value, ended[name]) for name, value in other.state_dict().items())

    inside = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert inside is model
    assert upswap.is_patched(inside)
    upswap.save(inside, tmp_path / "model.safetensors")
    assert_same(upswap.load(tmp_path / "model.safetensors", net()), inside)

    accelerator.save_model(wrapped, str(tmp_path / "weights"))
    weights = tmp_path / "weights" / "model.safetensors"
    for into in (upswap.patch(net(), IMAGES), net()):  # the second is patched on the way
        assert_same(upswap.load(weights, into), inside)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/accelerate.md", {"make_model": net})
    assert_same(upswap.load(tmp_path / "model.safetensors", net()), names["model"])
