"""Saliency and polyp networks as people write them: nested U-nets, one upsampling layer for everything, side outputs fused.

The models are this repository's own. What they have of U-2-Net, BASNet and PraNet is where and how those resize.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self, inside: int, outside: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation)
        self.bn = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def as_large_as(x, other):
    """A function for the whole file; the size is the other map's."""
    return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)


def enlarged_to(x, size):
    """The same by a layer that is made for this one call."""
    return nn.Upsample(size=size, mode="bilinear", align_corners=False)(x)


class ResidualU(nn.Module):
    """A small U-net with a residual connection; its forward names every level."""

    def __init__(self, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.first = ConvBlock(inside, outside)
        self.down1, self.pool1 = ConvBlock(outside, middle), nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.down2, self.pool2 = ConvBlock(middle, middle), nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.down3, self.bottom = ConvBlock(middle, middle), ConvBlock(middle, middle, dilation=2)
        self.up3, self.up2 = ConvBlock(middle * 2, middle), ConvBlock(middle * 2, middle)
        self.up1 = ConvBlock(middle * 2, outside)

    def forward(self, x):
        x = self.first(x)
        level1 = self.down1(x)
        level2 = self.down2(self.pool1(level1))
        level3 = self.down3(self.pool2(level2))
        back3 = self.up3(torch.cat((self.bottom(level3), level3), 1))
        back2 = self.up2(torch.cat((as_large_as(back3, level2), level2), 1))
        return self.up1(torch.cat((as_large_as(back2, level1), level1), 1)) + x


class DilatedU(nn.Module):
    """The innermost block, which has dilations in the place of levels and resizes nothing."""

    def __init__(self, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.first, self.down1 = ConvBlock(inside, outside), ConvBlock(outside, middle)
        self.bottom, self.up1 = ConvBlock(middle, middle, dilation=2), ConvBlock(middle * 2, outside)

    def forward(self, x):
        x = self.first(x)
        level = self.down1(x)
        return self.up1(torch.cat((self.bottom(level), level), 1)) + x


class NestedU(nn.Module):
    """U-nets in a U-net. Every level gives a one-channel map, all are fused by a 1x1 convolution, and all are returned."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.stage1 = ResidualU(3, width // 2, width)
        self.stage2 = DilatedU(width, width // 2, width)
        self.stage3 = DilatedU(width, width // 2, width)
        self.stage2d = DilatedU(width * 2, width // 2, width)
        self.stage1d = ResidualU(width * 2, width // 2, width)
        self.side1, self.side2, self.side3 = (nn.Conv2d(width, 1, 3, padding=1) for _ in range(3))
        self.outconv = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        level1 = self.stage1(x)
        level2 = self.stage2(self.pool(level1))
        level3 = self.stage3(self.pool(level2))
        back2 = self.stage2d(torch.cat((as_large_as(level3, level2), level2), 1))
        back1 = self.stage1d(torch.cat((as_large_as(back2, level1), level1), 1))
        map1 = self.side1(back1)
        map2 = as_large_as(self.side2(back2), map1)
        map3 = as_large_as(self.side3(level3), map1)
        fused = self.outconv(torch.cat((map1, map2, map3), 1))
        return torch.sigmoid(fused), torch.sigmoid(map1), torch.sigmoid(map2), torch.sigmoid(map3)


class RecursiveBlock(nn.Module):
    """A U-net of any height: a function inside the forward that calls itself, and layers found by their names."""

    def __init__(self, height: int, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.height = height
        self.first = ConvBlock(inside, outside)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        for level in range(1, height + 1):
            self.add_module(f"stage{level}", ConvBlock(outside if level == 1 else middle, middle))
            if level < height:
                self.add_module(f"stage{level}d", ConvBlock(middle * 2, outside if level == 1 else middle))

    def forward(self, x):
        sizes = {1: x.shape[2:]}
        for level in range(2, self.height + 1):
            sizes[level] = [-(-side // 2) for side in sizes[level - 1]]
        x = self.first(x)

        def run(x, level=1):
            here = getattr(self, f"stage{level}")(x)
            if level == self.height:
                return here
            below = run(self.pool(here), level + 1)
            return getattr(self, f"stage{level}d")(torch.cat((enlarged_to(below, sizes[level]), here), 1))

        return x + run(x)


class RecursiveU(nn.Module):
    """The nested U-net of loops and recursion; the side outputs are collected in a list."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        for name, height, inside in (
            ("stage1", 3, 3),
            ("stage2", 2, width),
            ("stage2d", 2, width),
            ("stage1d", 3, 2 * width),
        ):
            self.add_module(name, RecursiveBlock(height, inside, width // 2, width))
        for level in (1, 2):
            self.add_module(f"side{level}", nn.Conv2d(width, 1, 3, padding=1))
        self.outconv = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        size = x.shape[2:]
        maps = []

        def side(x, level):
            x = getattr(self, f"side{level}")(x)
            maps.append(enlarged_to(x, size))

        level1 = self.stage1(x)
        level2 = self.stage2d(self.stage2(self.pool(level1)))
        side(level2, 2)
        level1 = self.stage1d(torch.cat((enlarged_to(level2, level1.shape[2:]), level1), 1))
        side(level1, 1)
        maps.reverse()
        maps.insert(0, self.outconv(torch.cat(maps, 1)))
        return [torch.sigmoid(one) for one in maps]


class Refiner(nn.Module):
    """A U-net on the one-channel map of another network, which it corrects."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = (
            nn.Conv2d(1, width, 3, padding=1),
            ConvBlock(width, width),
            ConvBlock(width, width),
        )
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv_d1, self.conv_d0 = ConvBlock(width * 2, width), nn.Conv2d(width, 1, 3, padding=1)
        self.upscore2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x):
        hidden = self.conv1(self.conv0(x))
        below = self.conv2(self.pool(hidden))
        residual = self.conv_d0(self.conv_d1(torch.cat((self.upscore2(below), hidden), 1)))
        return x + residual


class Boundary(nn.Module):
    """A layer for each ratio: the one for x2 enlarges features on one line and the logits of a side output on another."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = ConvBlock(3, width)
        self.pool = nn.MaxPool2d(2, 2)
        self.encoder1, self.encoder2 = ConvBlock(width, width), ConvBlock(width, width)
        self.decoder1, self.decoder0 = ConvBlock(width * 2, width), ConvBlock(width * 2, width)
        self.upscore4 = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
        self.upscore2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.outconvb, self.outconv1, self.outconv0 = (nn.Conv2d(width, 1, 3, padding=1) for _ in range(3))
        self.refunet = Refiner(width)

    def forward(self, x):
        level0 = self.stem(x)
        level1 = self.encoder1(self.pool(level0))
        bottom = self.encoder2(self.pool(level1))
        back1 = self.decoder1(torch.cat((self.upscore2(bottom), level1), 1))
        back0 = self.decoder0(torch.cat((self.upscore2(back1), level0), 1))
        deep = self.upscore4(self.outconvb(bottom))
        middle = self.upscore2(self.outconv1(back1))
        fine = self.outconv0(back0)
        return tuple(F.sigmoid(one) for one in (self.refunet(fine), fine, middle, deep))


class Aggregation(nn.Module):
    """The partial decoder: one weightless layer at five places, between convolutions and products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv_upsample1, self.conv_upsample2, self.conv_upsample3, self.conv_upsample4 = (
            ConvBlock(width, width) for _ in range(4)
        )
        self.conv_concat2 = ConvBlock(2 * width, width)
        self.conv_concat3 = ConvBlock(2 * width, width)
        self.conv_last = nn.Conv2d(width, 1, 1)

    def forward(self, x1, x2, x3):
        second = self.conv_upsample1(self.upsample(x1)) * x2
        third = self.conv_upsample2(self.upsample(self.upsample(x1))) * self.conv_upsample3(self.upsample(x2)) * x3
        second = self.conv_concat2(torch.cat((second, self.upsample(x1)), 1))
        third = self.conv_concat3(torch.cat((third, self.conv_upsample4(self.upsample(second))), 1))
        return self.conv_last(third)


class ReverseAttention(nn.Module):
    """A coarse map is made smaller, reversed, laid over the features, corrected, and made larger to be returned."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBlock(3, width), nn.MaxPool2d(2))
        self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(nn.MaxPool2d(2), ConvBlock(width, width)) for _ in range(3)
        )
        self.agg1 = Aggregation(width)
        self.ra4_conv1, self.ra4_conv2 = ConvBlock(width, width), nn.Conv2d(width, 1, 1)
        self.ra3_conv1, self.ra3_conv2 = ConvBlock(width, width), nn.Conv2d(width, 1, 1)

    def forward(self, x):
        x2 = self.layer2(self.stem(x))
        x3 = self.layer3(x2)
        x4 = self.layer4(x3)
        coarse = self.agg1(x4, x3, x2)
        lateral5 = F.interpolate(coarse, scale_factor=4, mode="bilinear")

        crop = F.interpolate(coarse, scale_factor=0.25, mode="bilinear")
        reverse = -1 * torch.sigmoid(crop) + 1
        x = reverse.expand(-1, x4.shape[1], -1, -1).mul(x4)
        x = self.ra4_conv2(F.relu(self.ra4_conv1(x))) + crop
        lateral4 = F.interpolate(x, scale_factor=16, mode="bilinear")

        crop = F.interpolate(x, scale_factor=2, mode="bilinear")
        reverse = -1 * torch.sigmoid(crop) + 1
        x = reverse.expand(-1, x3.shape[1], -1, -1).mul(x3)
        x = self.ra3_conv2(F.relu(self.ra3_conv1(x))) + crop
        return lateral5, lateral4, F.interpolate(x, scale_factor=8, mode="bilinear")
