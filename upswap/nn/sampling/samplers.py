"""Other ways to read a map at positions, for runtimes that lack GridSample or are slow at it; each computes what it does.

    gather   reads the neighbours of a point by index
    window   weights all neighbours within a reach of the pixel that nearest sampling reads: no index, no data-dependent address

Both are plain torch functions of tensors with at most four dimensions, and clamp to the border as `padding_mode="border"` does.
The kernels are those of `grid_sample`: linear, or the cubic one with a = -0.75 (aten/src/ATen/native/UpSample.h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError

SamplerName = Literal["gridsample", "gather", "window"]

_CUBIC = -0.75

# Of "window": (2 n + 1)**2 copies of the map.
_WIDEST_REACH = 16


class Sampler(NamedTuple):
    """How a map is read: "gridsample" by torch's own function."""

    name: SamplerName = "gridsample"
    rows: bool = False
    """Of "gather": whether all channels of a point are read at once."""
    reach: int = 1
    """Of "window": how many pixels to each side take part."""


GRIDSAMPLE = Sampler()


class Points(NamedTuple):
    """Where a map (B, C, H, W) is read."""

    rows: Tensor
    """(B, G, h, w), in source pixels."""
    columns: Tensor
    """(B, G, h, w), in source pixels."""


def read(x: Tensor, points: Points, kernel: str, sampler: Sampler) -> Tensor:
    """`x` at `points`, by "gather" or "window".

    Args:
        x: (B, C, H, W), contiguous; C is a multiple of G.
        points: a position for each group of channels and each pixel of the output.
        kernel: "bilinear" or "bicubic".
        sampler: how it is read. "window" moves a point that is out of its reach to the end of it.

    Returns:
        (B, C, h, w), of x's dtype.

    Raises:
        OptionError: a window that would be far too wide.
    """
    if sampler.name == "window" and not 0 <= sampler.reach <= _WIDEST_REACH:
        raise OptionError(f"a window of reach {sampler.reach}: it is {_WIDEST_REACH} at most")
    batch, channels, height, width = x.shape
    groups, size = points.rows.shape[1], points.rows.shape[2:]
    by_group = x.reshape(batch * groups, channels // groups, height, width)
    rows, columns = (positions.flatten(0, 1).unsqueeze(1) for positions in points)
    if sampler.name == "window":
        out = _by_window(by_group, rows, columns, kernel, sampler.reach)
    elif sampler.rows:
        out = _by_row(by_group, rows, columns, kernel)
    else:
        out = _by_element(by_group, rows, columns, kernel)
    return out.reshape(batch, channels, *size)


def far_from_nearest(positions: Tensor, source: int, axis: int) -> Tensor:
    """How far positions lie from the source pixel that nearest sampling reads: what a window has to reach.

    Args:
        positions: (B, G, h, w), in source pixels along `axis`.
        source: pixels of the source along it.
        axis: 2 for rows, 3 for columns.

    Returns:
        (B, G, h, w), signed.
    """
    ramp = torch.arange(source, dtype=positions.dtype, device=positions.device)
    ramp = ramp.view(1, 1, -1, 1) if axis == 2 else ramp.view(1, 1, 1, -1)
    size = (positions.shape[2], 1) if axis == 2 else (1, positions.shape[3])
    # The same function as for the map itself, so that a runtime that rounds in its own way does it for both.
    return positions - F.interpolate(ramp, size=size, mode="nearest")


def _by_element(x: Tensor, rows: Tensor, columns: Tensor, kernel: str) -> Tensor:
    batch, channels, height, width = x.shape
    size = rows.shape[2:]
    flat = x.reshape(batch, channels, height * width)

    def value(index: Tensor) -> Tensor:
        index = index.reshape(batch, 1, -1).expand(-1, channels, -1)
        return flat.gather(2, index).reshape(batch, channels, *size)

    return _weighted(value, rows, columns, height, width, kernel)


def _by_row(x: Tensor, rows: Tensor, columns: Tensor, kernel: str) -> Tensor:
    batch, channels, height, width = x.shape
    size = rows.shape[2:]
    table = x.reshape(batch, channels, height * width).transpose(1, 2).reshape(batch * height * width, channels)
    first = torch.arange(batch, device=x.device).reshape(-1, 1, 1, 1) * (height * width)

    def value(index: Tensor) -> Tensor:
        return table.index_select(0, (index + first).reshape(-1))

    out = _weighted(value, rows, columns, height, width, kernel, (-1, 1))
    return out.reshape(batch, size[0] * size[1], channels).transpose(1, 2).reshape(batch, channels, *size)


def _weighted(
    value: Callable[[Tensor], Tensor],
    rows: Tensor,
    columns: Tensor,
    height: int,
    width: int,
    kernel: str,
    shape: Sequence[int] = (),
) -> Tensor:
    """The neighbours of each point, times their weights; `value` reads at indices, `shape` makes weights fit what it gives."""

    def fit(weight: Tensor) -> Tensor:
        return weight.reshape(shape) if shape else weight

    across = _neighbours(columns, width, kernel)
    return _total(
        _total(value(row * width + column) * fit(horizontal) for column, horizontal in across) * fit(vertical)
        for row, vertical in _neighbours(rows, height, kernel)
    )


def _total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _neighbours(positions: Tensor, source: int, kernel: str) -> list[tuple[Tensor, Tensor]]:
    """(index, weight) of the pixels that a point reads along an axis of `source` pixels."""
    below = positions.floor()
    distance = positions - below
    first, offsets = below.long(), (0, 1) if kernel == "bilinear" else (-1, 0, 1, 2)
    return [((first + k).clamp(0, source - 1), _kernel(distance - k, kernel)) for k in offsets]


def _by_window(x: Tensor, rows: Tensor, columns: Tensor, kernel: str, reach: int) -> Tensor:
    height, width = x.shape[2:]
    size = (rows.shape[2], rows.shape[3])
    # The cubic kernel reads a pixel further out than the linear one.
    steps = reach if kernel == "bilinear" else reach + 1
    vertical = far_from_nearest(rows, height, 2).clamp(-reach, reach)
    horizontal = far_from_nearest(columns, width, 3).clamp(-reach, reach)
    padded = F.pad(x, (steps, steps, steps, steps), mode="replicate")
    across = [_kernel(horizontal - k, kernel) for k in range(-steps, steps + 1)]

    def moved(i: int, j: int) -> Tensor:
        return F.interpolate(padded[:, :, i : i + height, j : j + width], size=size, mode="nearest")

    return _total(
        _total(moved(i, j) * weight for j, weight in enumerate(across)) * _kernel(vertical - (i - steps), kernel)
        for i in range(2 * steps + 1)
    )


def _kernel(distance: Tensor, kernel: str) -> Tensor:
    """The weight of a pixel at a signed distance from the point."""
    t = distance.abs()
    if kernel == "bilinear":
        return (1 - t).clamp(min=0)
    near = ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1
    far = ((_CUBIC * t - 5 * _CUBIC) * t + 8 * _CUBIC) * t - 4 * _CUBIC
    # Each polynomial where it holds, without a branch: `far` is 0 at t = 1 and t = 2, `near` at t = 1.
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
