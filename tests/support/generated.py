"""Models made from a recipe of plain data, so that a spec can say it too: `python:generated:build?blocks=(...)`."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Block(nn.Module):
    """A convolution, and a resize in one of the ways that models have it."""

    def __init__(self, mode: str, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.scale = scale
        self.how = {"mode": mode.removesuffix("-ac"), **({"align_corners": True} if mode.endswith("-ac") else {})}

    def body(self, x):
        return F.dropout(self.norm(self.conv(x)), 0.1, self.training)


class Layer(Block):
    def __init__(self, mode: str, scale: float) -> None:
        super().__init__(mode, scale)
        self.up = nn.Upsample(scale_factor=scale, **self.how)

    def forward(self, x):
        return self.up(self.body(x))


class Straight(nn.Module):
    """Nothing but a convolution and a call: for the graph route."""

    def __init__(self, mode: str, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")


class Call(Block):
    def forward(self, x, skip=None):
        x = F.interpolate(self.body(x), scale_factor=self.scale, **self.how)
        return x if skip is None else x + skip


class ToSize(Block):
    def forward(self, x):
        size = (int(x.shape[-2] * self.scale), int(x.shape[-1] * self.scale))
        return F.interpolate(self.body(x), size=size, **self.how)


def helped(x, scale, how):
    return F.interpolate(x, scale_factor=scale, **how)


class Helper(Block):
    def forward(self, x):
        return helped(self.body(x), self.scale, self.how)


class Loop(Block):
    def forward(self, x):
        for _ in range(2):
            x = F.interpolate(self.body(x), scale_factor=self.scale, **self.how)
        return F.max_pool2d(x, 2)


class Listed(Block):
    """A layer that a plain list holds too."""

    def __init__(self, mode: str, scale: float) -> None:
        super().__init__(mode, scale)
        self.up = nn.Upsample(scale_factor=scale, **self.how)
        self.layers = [self.up]

    def forward(self, x):
        return self.layers[0](self.body(x))


class TwoWidths(Block):
    """One layer for two numbers of channels."""

    def __init__(self, mode: str, scale: float) -> None:
        super().__init__(mode, scale)
        self.up = nn.Upsample(scale_factor=scale, **self.how)
        self.narrow = nn.Conv2d(WIDTH, WIDTH // 2, 1)

    def forward(self, x):
        x = self.body(x)
        half = self.up(self.narrow(x))
        return self.up(x) + torch.cat([half, half], 1)


class TrainOnly(Block):
    """In train mode a second map is made larger, in a function and in place."""

    def forward(self, x):
        x = self.body(x)
        if self.training:
            x = x + F.max_pool2d(helped(x, 2, self.how), 2) + F.max_pool2d(F.interpolate(x, scale_factor=2), 2)
        return F.interpolate(x, scale_factor=self.scale, **self.how)


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(lambda y: helped(self.body(y), self.scale, self.how), x, use_reentrant=False)


BLOCKS: dict[str, type[nn.Module]] = {
    "layer": Layer,
    "straight": Straight,
    "call": Call,
    "size": ToSize,
    "helper": Helper,
    "loop": Loop,
    "listed": Listed,
    "widths": TwoWidths,
    "train": TrainOnly,
    "checkpoint": Checkpointed,
}


class Pair(NamedTuple):
    out: torch.Tensor
    maps: list[torch.Tensor]


@dataclasses.dataclass
class Answer:
    out: torch.Tensor
    maps: dict[str, torch.Tensor]


class Generated(nn.Module):
    """A stem, the blocks one after the other, and a head."""

    def __init__(self, blocks: Sequence[tuple[str, str, str, float]], output: str, buffers: Sequence[str]) -> None:
        super().__init__()
        self.output = output
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.order: list[str] = []
        made: dict[tuple[str, str, float], nn.Module] = {}
        for name, kind, mode, scale in blocks:
            self.order.append(name)
            # What is the same is one module under two names.
            self.add_module(name, made.setdefault((kind, mode, scale), BLOCKS[kind](mode, scale)))
        self.last = nn.Conv2d(WIDTH, 2, 1)
        if "float" in buffers:
            self.register_buffer("mean", torch.linspace(0.1, 0.3, WIDTH).reshape(WIDTH, 1, 1))
        if "unsaved" in buffers:
            self.register_buffer("offset", torch.linspace(-0.3, 0.2, WIDTH).reshape(WIDTH, 1, 1), persistent=False)
        if "int" in buffers:
            self.register_buffer("index", torch.arange(WIDTH))
            self.register_buffer("mask", torch.arange(WIDTH) % 2 == 0, persistent=False)
        if "complex" in buffers:
            self.register_buffer("phase", torch.complex(torch.arange(4.0), torch.ones(4)).conj())
        if "none" in buffers:
            self.register_buffer("nothing", None)
            self.register_buffer("empty", torch.empty(0, 3))
        if "views" in buffers:
            whole = torch.linspace(0, 1, 6)
            self.register_buffer("first", whole[:4])
            self.register_buffer("second", whole[2:])
            self.register_buffer("turned", whole.reshape(2, 3).t())

    def forward(self, image):
        x = self.stem(image)
        for buffer in (getattr(self, "mean", None), getattr(self, "offset", None)):
            x = x if buffer is None else x + buffer
        maps = []
        for name in self.order:
            x = getattr(self, name)(x)
            maps.append(x)
        out = self.last(x)
        if self.output == "tensor":
            return out
        if self.output == "tuple":
            return out, maps[-1]
        if self.output == "dict":
            return OrderedDict(out=out, maps={"first": maps[0]})
        if self.output == "named":
            return Pair(out, maps)
        return Answer(out, {"last": maps[-1]})


def build(
    blocks: Sequence[tuple[str, str, str, float]],
    output: str = "tensor",
    buffers: Sequence[str] = (),
    tied: bool = False,
    seed: int = 0,
) -> nn.Module:
    """The model of a recipe. `blocks` are (name, kind, mode, scale)."""
    torch.manual_seed(seed)
    model = Generated(blocks, output, buffers)
    if tied:
        convolutions = [
            m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape == (WIDTH, WIDTH, 3, 3)
        ]
        for conv in convolutions[1:]:
            conv.weight = convolutions[0].weight
    return model


def image(dtype: Any = torch.float32, size: int = 12) -> torch.Tensor:
    return torch.rand(2, 3, size, size + 4, generator=torch.Generator().manual_seed(3)).to(dtype)
