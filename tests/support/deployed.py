"""A small patched model with offsets of pixels, for exporters: the time of an export goes with the number of its nodes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

import upswap

IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """One feature map, made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.stem(image)))


@functools.cache
def _patched() -> nn.Module:
    torch.manual_seed(0)
    model = upswap.patch(Small().eval(), IMAGES, groups=2)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Offsets of pixels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def patched() -> nn.Module:
    """Read by everybody, changed by nobody."""
    return _patched()


def sizes() -> list[torch.Tensor]:
    """Three inputs of three sizes."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in ((2, 3, 6, 5), (1, 3, 9, 12), (3, 3, 7, 7))]


def far(got: np.ndarray | torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number."""
    expected = expected.detach()
    return float((torch.as_tensor(got).detach() - expected).abs().max() / expected.abs().max())
