"""Weighted sums of pixels: of the window around a pixel, of points between pixels, and the products of windows with queries.

Each sum is one over rows of a table that are given by number. `F.embedding_bag` computes that without making the windows
first: `docs/upsamplers.md` has what that and other formulations take. It has no second derivatives.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import is_exporting, plain_functions_wanted
from .positions import Pair, known_equal

#: What a window reads outside of the map.
Padding = Literal["zero", "reflect"]


def reassemble(x: Tensor, kernels: Tensor, padding: Padding = "zero") -> Tensor:
    """Weighted sums of windows: output pixel o of m reads the window around pixel floor(o * n / m) of `x`.

    Args:
        x: (B, C, H, W), float32 or float64.
        kernels: (B, h, w, k^2) of x's dtype, taps row by row.
        padding: what is read outside. A map too small to be reflected repeats its border.

    Returns:
        (B, C, h, w), laid out as channels_last.
    """
    height, width = x.shape[2:]
    _, *target, taps = kernels.shape
    side = math.isqrt(taps)
    pixels = x.permute(0, 2, 3, 1)
    if padding == "zero":
        pixels = F.pad(pixels, (0, 0, *[side // 2] * 4))
    rows = _windows(height, target[0], side, padding, x.device).repeat_interleave(side, dim=1)
    columns = _windows(width, target[1], side, padding, x.device).repeat(1, side)
    numbers = rows.unsqueeze(1) * pixels.shape[2] + columns
    return _sums(pixels, numbers.unsqueeze(0), kernels)


def reassemble_points(x: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of points between pixels, each read bilinearly.

    Args:
        x: (B, C, H, W), float32 or float64; zero outside.
        rows: (B, h, w, T), where T points are read for each output pixel, in pixels of x.
        columns: (B, h, w, T).
        weights: (B, h, w, T).

    Returns:
        (B, C, h, w), laid out as channels_last.
    """
    height, width = x.shape[2:]
    numbers, shares = [], []
    across = _neighbours(columns, width)
    for row, vertical in _neighbours(rows, height):
        of_row = vertical * weights
        for column, horizontal in across:
            numbers.append(row * width + column)
            shares.append(of_row * horizontal)
    return _sums(x.permute(0, 2, 3, 1), torch.cat(numbers, dim=-1), torch.cat(shares, dim=-1))


def window_products(queries: Tensor, keys: Tensor, side: int) -> Tensor:
    """Products of the query at each output pixel with the keys in its window, which is that of `reassemble`.

    Args:
        queries: (B, D, h, w); along each axis at least as large as the keys.
        keys: (B, D, H, W), zero outside.
        side: k.

    Returns:
        (B, h, w, k^2), taps row by row.
    """
    batch, depth, height, width = keys.shape
    size = (queries.shape[2], queries.shape[3])
    # Pixels of one window are brought together, as many for each: a window is then read once for all of them.
    cells, gathered, places = _by_window(size, (height, width), queries.device)
    if gathered is not None:
        queries = queries.index_select(2, gathered[0]).index_select(3, gathered[1])
    vertical, horizontal = cells
    queries = queries.reshape(batch, depth, height, vertical, width, horizontal).permute(0, 2, 4, 3, 5, 1)
    windows = F.unfold(keys, side, padding=side // 2).reshape(batch, depth, side * side, height, width)
    products = _matmul(
        queries.reshape(-1, vertical * horizontal, depth),
        windows.permute(0, 3, 4, 1, 2).reshape(-1, depth, side * side),
    )
    products = products.reshape(batch, height, width, vertical, horizontal, -1).permute(0, 1, 3, 2, 4, 5)
    products = products.reshape(batch, height * vertical, width * horizontal, -1)
    return products if places is None else products.index_select(1, places[0]).index_select(2, places[1])


def repeated(x: Tensor, size: Pair) -> Tensor:
    """`x` (B, C, H, W) at `size`: each output pixel has the value of the pixel around which `reassemble` reads for it."""
    rows, columns = (sources(n, m, x.device) for n, m in zip(x.shape[2:], size, strict=True))
    return x.index_select(2, rows).index_select(3, columns)


def sources(source: int, target: int, device: torch.device) -> Tensor:
    """(target,): the source pixel around which each output pixel reads, floor(o * n / m)."""
    return torch.arange(target, device=device) * source // target


def _windows(source: int, target: int, side: int, padding: Padding, device: torch.device) -> Tensor:
    """(target, side): along an axis, the pixels in the window of each output pixel, counted from the start of what is padded."""
    taps = sources(source, target, device).unsqueeze(1) + torch.arange(side, device=device)
    if padding == "zero":
        return taps
    last = source - 1
    return (last - (last - (taps - side // 2).abs()).abs()).clamp(min=0)


def _neighbours(positions: Tensor, source: int) -> list[tuple[Tensor, Tensor]]:
    """(number, weight) of the two pixels that a point lies between along an axis; those outside weigh nothing."""
    below = positions.floor()
    share = positions - below
    pairs = []
    for pixel, weight in ((below, 1 - share), (below + 1, share)):
        inside = (pixel >= 0) & (pixel < source)  # of what is no number too
        pairs.append((torch.where(inside, pixel, 0).long(), torch.where(inside, weight, 0)))
    return pairs


_Axes = tuple[Tensor, Tensor]


def _by_window(size: Pair, source: Pair, device: torch.device) -> tuple[Pair, _Axes | None, _Axes | None]:
    """How pixels of one window are brought together: how many it has at most, which they are, and where each went.

    The last two are None where the pixels are in that order already.
    """
    cells = (-(-size[0] // source[0]), -(-size[1] // source[1]))
    if known_equal(size, (cells[0] * source[0], cells[1] * source[1])):
        return cells, None, None
    gathered, places = [], []
    for target, pixels, most in zip(size, source, cells, strict=True):
        first = (torch.arange(pixels, device=device) * target + pixels - 1) // pixels
        each = first.unsqueeze(1) + torch.arange(most, device=device)
        gathered.append(each.clamp(max=target - 1).flatten())
        window = sources(pixels, target, device)
        places.append(window * most + torch.arange(target, device=device) - first[window])
    return cells, (gathered[0], gathered[1]), (places[0], places[1])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices in their own dtype, whatever autocast would have."""
    # Entered only where needed, so that an exported graph has no autocast region in it.
    if a.device.type != "meta" and torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    return a @ b


def _sums(pixels: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
    """Sums of the pixels of `pixels` (B, H, W, C) that have the `numbers` (B or 1, h, w, T) in an image, times `weights`."""
    batch, height, width, channels = pixels.shape
    first = torch.arange(batch, device=pixels.device).view(-1, 1, 1, 1) * (height * width)
    taps = weights.shape[-1]
    table = pixels.reshape(-1, channels)
    if is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        # Few runtimes have bags of embeddings, and exporters to ONNX make a loop over them of it.
        windows = table.index_select(0, (numbers + first).reshape(-1)).reshape(-1, taps, channels)
        out = (windows * weights.reshape(-1, taps, 1)).sum(dim=1)
    else:
        out = F.embedding_bag(
            (numbers + first).to(torch.int32).reshape(-1, taps),  # short numbers keep less for backward
            table,
            mode="sum",
            per_sample_weights=weights.reshape(-1, taps),
        )
    if out.requires_grad and not plain_functions_wanted():
        out = _WithGradientInRows.apply(out)
    return out.reshape(batch, weights.shape[1], weights.shape[2], channels).permute(0, 3, 1, 2)


class _WithGradientInRows(torch.autograd.Function):
    """The same, whose gradient arrives with each pixel's channels together.

    Of a map that goes on as contiguous they lie far apart, and torch's gradient of the weights then takes up to twenty times
    as long (torch 2.14, 256 channels).
    """

    @staticmethod
    def forward(_ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
