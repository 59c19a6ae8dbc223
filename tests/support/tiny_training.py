"""What the tests of trainers train: a host of two resizes, one a layer and one a call, on eight small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import upswap

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 2, (8, 32, 32), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.up = nn.Upsample(scale_factor=2)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.up(self.act(self.norm(self.first(x))))
        return self.last(F.interpolate(self.second(x), scale_factor=2, mode="bilinear"))


UPSAMPLERS = ["up", "upsample"]


def patched_net() -> Net:
    return upswap.patch(Net(), IMAGES[:1])


def loss_of(model: nn.Module, images: torch.Tensor = IMAGES, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)


def states(model: nn.Module, optimizer: Any = None, ema: Any = None) -> list[str]:
    """The state of each upsampler, and with it whatever `status` has against it."""
    return [" ".join((row.state, *row.problems)) for row in upswap.status(model, optimizer, ema).rows]


TRAINED = ["trained"] * len(UPSAMPLERS)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def assert_kept(got: nn.Module, expected: nn.Module) -> None:
    """The same upsamplers, trained, with the same values, and the same output."""
    assert states(got) == TRAINED
    assert list(upswap.upsamplers(got)) == list(upswap.upsamplers(expected))
    own, theirs = got.state_dict(), expected.state_dict()
    assert list(own) == list(theirs)
    for key, tensor in theirs.items():
        torch.testing.assert_close(own[key], tensor, rtol=0, atol=0)
    torch.testing.assert_close(output(got), output(expected), rtol=0, atol=0)
