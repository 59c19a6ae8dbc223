"""The sums of upsamplers with predicted kernels, one output pixel and one tap at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`x` (B, C, H, W) at a larger size."""
    out = torch.empty(*x.shape[:2], *size, dtype=x.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            out[:, :, i, j] = x[:, :, i * x.shape[2] // size[0], j * x.shape[3] // size[1]]
    return out


def window(x: Tensor, row: int, column: int, side: int, padding: str = "zero") -> list[Tensor]:
    """What lies in a window of `x` (C, H, W), row by row."""
    found = []
    for i in range(-(side // 2), side // 2 + 1):
        for j in range(-(side // 2), side // 2 + 1):
            y, z = row + i, column + j
            if padding == "reflect":
                y, z = (abs(n) if n < last else 2 * last - n for n, last in ((y, x.shape[1] - 1), (z, x.shape[2] - 1)))
            inside = 0 <= y < x.shape[1] and 0 <= z < x.shape[2]
            found.append(x[:, y, z] if inside else torch.zeros(x.shape[0], dtype=x.dtype))
    return found


def sums(x: Tensor, kernels: Tensor, padding: str = "zero") -> Tensor:
    """Sums of the windows of `x` (B, C, H, W) with kernels (B, k^2, h, w)."""
    side, size = round(kernels.shape[1] ** 0.5), tuple(kernels.shape[2:])
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for b in range(x.shape[0]):
        for i in range(size[0]):
            for j in range(size[1]):
                place = i * x.shape[2] // size[0], j * x.shape[3] // size[1]
                for tap, value in enumerate(window(x[b], *place, side, padding)):
                    out[b, :, i, j] += kernels[b, tap, i, j] * value
    return out
