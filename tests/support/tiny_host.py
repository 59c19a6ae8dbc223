"""A host of a few hundred weights, with a resize on each route: the files under `data/schema1` hold it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Straight(nn.Module):
    """For the graph route."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)


class Branch(nn.Module):
    """For the source route, with a helper and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def up(self, x):
        return F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] * 2), mode="nearest")

    def forward(self, x, skip=None):
        for _ in range(2):
            x = self.up(self.conv(x))
        return x if skip is None else x + skip


class Tiny(nn.Module):
    """The third resize is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.straight = Straight()
        self.branch = Branch()
        self.layer = nn.Upsample(scale_factor=2, mode="bicubic")
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, image):
        return self.last(self.layer(self.branch(self.straight(self.stem(image)))))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 6 * 5).reshape(1, 3, 6, 5)
