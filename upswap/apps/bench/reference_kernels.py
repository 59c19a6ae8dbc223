"""The operators with predicted kernels as their definitions read, step by step: of twice the size, and with windows made whole.

So their authors write them in plain PyTorch: every window of the map is unfolded, repeated to the output's size, multiplied by
its kernel and summed. Benchmarks compare with it. `docs/upsamplers.md` names the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Formula = Callable[[Any, Tensor, Tensor | None], Tensor]


class ReferenceOperator(nn.Module):
    """Twice the size of (B, C, H, W), as `formula` reads, with the weights of one of upswap's modules."""

    def __init__(self, ours: nn.Module, formula: _Formula) -> None:
        super().__init__()
        self.ours = ours
        self.formula = formula

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W); the guide, where one is taken, is (B, C, 2 H, 2 W)."""
        return self.formula(self.ours, x, guide)


def carafe(ours: Any, x: Tensor, _guide: Tensor | None) -> Tensor:
    """Kernels from the map alone."""
    logits = F.pixel_shuffle(_conv(ours.content_encoder, _conv(ours.channel_compressor, x)), 2)
    return _sums(x, logits.softmax(dim=1))


def fade(ours: Any, x: Tensor, guide: Tensor | None) -> Tensor:
    """Kernels from map and guide, without the gate."""
    parts = ours.ker_generator
    fine = _conv(parts["content_encoder"], _conv(parts["compressor_en"], guide))
    coarse = _conv(parts["content_encoder"], _conv(parts["compressor_de"], x))
    return _sums(x, (fine + _twice(coarse)).softmax(dim=1))


def sapa(ours: Any, x: Tensor, guide: Tensor | None) -> Tensor:
    """Kernels are products of the guide with a window of the map; the form with convolutions."""
    groups = math.gcd(32, x.shape[1])
    queries = _conv(ours.q, _group_norm(ours.norm_y, guide, groups))
    keys = _conv(ours.k, _group_norm(ours.norm_x, x, groups))
    products = (_twice_windows(keys, 5) * queries.unsqueeze(2)).sum(dim=1)
    return _sums(x, products.softmax(dim=1))


def freqfusion(ours: Any, x: Tensor, guide: Tensor | None) -> Tensor:
    """Low-pass kernels of the sharpened guide, and offsets by similarity."""

    def kernels(logits: Tensor, window: Tensor) -> Tensor:
        weights = logits.softmax(dim=1) * window.flatten().view(-1, 1, 1)
        return weights / weights.sum(dim=1, keepdim=True)

    fine, coarse = _conv(ours.hr_channel_compressor, guide), _conv(ours.lr_channel_compressor, x)
    sharp = kernels(_conv(ours.content_encoder2, fine), ours.hamming_highpass)
    fine = 2 * fine - _sums(fine, sharp)
    low = _conv(ours.content_encoder, fine)
    low = low + _sums(_conv(ours.content_encoder, coarse), kernels(low, ours.hamming_lowpass))
    up = _sums(x, kernels(low, ours.hamming_lowpass))

    parts, groups = ours.dysampler, ours.compressed // 8
    fine = _with_similarities(_group_norm(parts["norm_hr"], fine, groups))
    coarse = _with_similarities(_group_norm(parts["norm_lr"], coarse, groups))
    offset, scale = (
        _conv(parts[name], coarse) + F.pixel_unshuffle(_conv(parts[f"hr_{name}"], fine), 2)
        for name in ("offset", "direct_scale")
    )
    batch, _, height, width = x.shape
    points = (offset * scale.sigmoid() + parts.init_pos).view(batch, 2, -1, height, width)
    centres = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")).to(x) + 0.5
    grid = 2 * (points + centres.unsqueeze(1)) / x.new_tensor([width, height]).view(2, 1, 1, 1) - 1
    grid = (
        F.pixel_shuffle(grid.flatten(1, 2), 2).view(batch, 2, ours.groups, 2 * height, 2 * width).permute(0, 2, 3, 4, 1)
    )
    by_group = up.reshape(batch * ours.groups, -1, 2 * height, 2 * width)
    return F.grid_sample(by_group, grid.flatten(0, 1), padding_mode="border", align_corners=False).view(up.shape)


def lda_aqu(ours: Any, x: Tensor, _guide: Tensor | None) -> Tensor:
    """Attention to nine points that each query moves; copies of the map are made for all of them."""
    batch, channels, height, width = x.shape
    size, groups = (2 * height, 2 * width), ours.n_groups
    normed = F.layer_norm(x.permute(0, 2, 3, 1), (channels,), *ours.layer_norm["norm"].parameters()).permute(0, 3, 1, 2)
    queries = F.interpolate(_conv(ours.proj_q, normed), size, mode="bilinear", align_corners=True)
    by_group = queries.reshape(batch * groups, -1, *size)
    first = ours.conv_offset["0"]
    hidden = F.conv2d(by_group, first.weight, padding=1, groups=first.weight.shape[0]).permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(hidden, hidden.shape[-1:], *ours.conv_offset["1"]["norm"].parameters()))
    moves = _conv(ours.conv_offset["3"], hidden.permute(0, 3, 1, 2)).tanh() * ours.range_factor
    taps = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]).to(x)
    points = moves.view(-1, 9, 2, *size) + taps.view(9, 2, 1, 1)
    points = points + torch.stack(torch.meshgrid(*(torch.arange(n).to(x) for n in size), indexing="ij"))
    grid = (2 * points / x.new_tensor([size[0] - 1, size[1] - 1]).view(2, 1, 1) - 1).permute(0, 1, 3, 4, 2).flip(-1)

    def read(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape(batch * groups, -1, height, width)
        return F.grid_sample(tensor, grid.flatten(1, 2), align_corners=True).view(batch, -1, 9, *size)

    bias = ours.relative_position_bias_table.permute(0, 1, 4, 3, 2)
    keys = read(_conv(ours.proj_k, normed)) + bias.reshape(1, -1, 9, 1, 1)
    weights = (queries.unsqueeze(2) * keys.shape[1] ** -0.5 * keys).sum(dim=1, keepdim=True).softmax(dim=2)
    return (weights * read(x)).sum(dim=2)


def _conv(at: Any, x: Any) -> Tensor:
    """The convolution of a module, or of a linear layer's weights, zero outside."""
    return F.conv2d(x, at.weight, at.bias, padding=at.weight.shape[-1] // 2)


def _group_norm(at: Any, x: Any, groups: int) -> Tensor:
    return F.group_norm(x, groups, at.weight, at.bias)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _twice_windows(x: Tensor, side: int) -> Tensor:
    """(B, C, k^2, 2 H, 2 W): the window around each pixel, for each of the four pixels that come of it."""
    batch, channels, height, width = x.shape
    windows = F.unfold(x, side, padding=side // 2).view(batch, -1, height, width)
    return _twice(windows).view(batch, channels, side * side, 2 * height, 2 * width)


def _sums(x: Tensor, kernels: Tensor) -> Tensor:
    """Sums of windows with (B, k^2, h, w) kernels, of x's size or twice that."""
    side = round(kernels.shape[1] ** 0.5)
    if kernels.shape[2:] == x.shape[2:]:
        windows = F.unfold(x, side, padding=side // 2).view(*x.shape[:2], side * side, *x.shape[2:])
    else:
        windows = _twice_windows(x, side)
    return (windows * kernels.unsqueeze(1)).sum(dim=2)


def _with_similarities(x: Tensor) -> Tensor:
    """With the cosine similarities of each pixel to the 8 that lie 2 away from it."""
    around = F.unfold(x, 3, dilation=2, padding=2).view(*x.shape[:2], 9, *x.shape[2:])
    alike = F.cosine_similarity(around, x.unsqueeze(2), dim=1)
    return torch.cat((x, alike[:, :4], alike[:, 5:]), dim=1)
