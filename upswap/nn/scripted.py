"""A DySample as TorchScript compiles it: the formulas of `sampling.positions` in the part of Python that it knows.

`torch.jit.script` reads the source of a forward, and of the functions that this calls. What it makes runs without upswap.
"""

# ruff: noqa: UP006, UP035, UP045 - TorchScript takes the names of `typing`

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import BroadcastingList2  # type: ignore[attr-defined]


def dysample_forward(
    self: Any,
    x: Tensor,
    size: Optional[BroadcastingList2[int]] = None,
    scale_factor: Optional[BroadcastingList2[float]] = None,
) -> Tensor:
    """As `DySample.forward`."""
    if x.dim() != 4 or x.size(1) != self.in_channels or not x.is_floating_point():
        raise ValueError("DySample expects an input of another shape or dtype")
    if size is not None and scale_factor is not None:
        raise ValueError("give size or scale_factor, not both")
    height, width = x.size(2), x.size(3)
    cells = (int(self.offset_scale[0]), int(self.offset_scale[1]))
    rows_by: Optional[float] = None
    columns_by: Optional[float] = None
    predicted = False  # whether offsets are predicted at the output's resolution whatever that is
    if size is None:
        vertical, horizontal = float(self.scale[0]), float(self.scale[1])
        if scale_factor is not None:
            vertical, horizontal = scale_factor[0], scale_factor[1]
        rows_by, columns_by = vertical, horizontal
        predicted = vertical == float(cells[0]) and horizontal == float(cells[1])
        h, w = int(height * vertical), int(width * horizontal)
        smaller = min(vertical, horizontal) < 1
    else:
        h, w = size[0], size[1]
        smaller = h < height or w < width
    if smaller:
        corners: Optional[bool] = None
        if self.mode in ("bilinear", "bicubic"):
            corners = self.align_corners
        if size is not None:
            return F.interpolate(x, [h, w], mode=self.mode, align_corners=corners)
        return F.interpolate(x, scale_factor=scale_factor, mode=self.mode, align_corners=corners)

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    full = x.to(dtype)
    offsets = _offsets(full, self.offset.weight, self.offset.bias, cells, self.style)
    if self.scope is not None:
        offsets = offsets * torch.sigmoid(_offsets(full, self.scope.weight, self.scope.bias, cells, self.style))
        gain = 0.5
    else:
        gain = 0.25
    if not predicted and (offsets.size(2) != h or offsets.size(3) != w):
        offsets = F.interpolate(offsets, [h, w], mode="bilinear", align_corners=False)
    offsets = offsets.reshape(x.size(0), 2, self.groups, h, w)

    mode = self.mode if self.init == "match" else "bilinear"
    corners_read = self.align_corners and self.init == "match"
    # Of torch's two kernels for nearest on a CPU; see `sampling.positions.nearest_kernel`.
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    direct = x.device.type == "cpu" and (h + w <= 128 or (x.size(1) > 3 and is_last))
    most_copied = 2 if direct else (0 if x.device.type == "cpu" else 1)
    counted = torch.float32 if direct or x.device.type != "cpu" else dtype
    rows = _positions(mode, corners_read, height, h, rows_by, dtype, counted, most_copied, x.device)
    columns = _positions(mode, corners_read, width, w, columns_by, dtype, counted, most_copied, x.device)
    if hasattr(self, "init_pos"):
        # As `DySample._upsample` has it: what was loaded, where float64 shows how it was rounded.
        own = size is not None and h == height * cells[0] and w == width * cells[1]
        if (
            (predicted or own)
            and mode == "bilinear"
            and dtype == torch.float64
            and self.init_pos.dtype == torch.float64
        ):
            per_pixel = self.init_pos.view(2, self.groups, cells[0], cells[1])
            rows = _repeated(per_pixel[1, 0, :, 0], height)
            columns = _repeated(per_pixel[0, 0, 0], width)
    rows = ((2 * rows + (1 - height)) / height).unsqueeze(1)
    columns = (2 * columns + (1 - width)) / width
    grid = torch.stack(
        [columns + offsets[:, 0] * (2 * gain / width), rows + offsets[:, 1] * (2 * gain / height)], dim=-1
    )
    by_group = full.reshape(x.size(0) * self.groups, x.size(1) // self.groups, height, width)
    kernel = "bicubic" if mode == "bicubic" else "bilinear"
    out = F.grid_sample(by_group, grid.flatten(0, 1), mode=kernel, padding_mode="border", align_corners=False)
    out = out.reshape(x.size(0), x.size(1), h, w).to(x.dtype)
    if is_last:
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _offsets(x: Tensor, weight: Tensor, bias: Optional[Tensor], cells: Tuple[int, int], style: str) -> Tensor:
    """The outputs of a 1x1 convolution with their sub-pixels spread over space: (B, N, sh * H, sw * W)."""
    # TorchScript cannot leave autocast, nor ask for it (torch 2.14 crashes): a product shows it. Of float64 it rounds nothing.
    one = x.new_zeros([1, 1])
    dtype = x.dtype if torch.mm(one, one).dtype == x.dtype else torch.float64
    weight = weight.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    if style == "pl":
        return torch.conv2d(_shuffle(x, cells).to(dtype), weight, bias).to(x.dtype)
    return _shuffle(torch.conv2d(x.to(dtype), weight, bias).to(x.dtype), cells)


def _shuffle(x: Tensor, cells: Tuple[int, int]) -> Tensor:
    """(B, N * sh * sw, H, W) -> (B, N, sh * H, sw * W)."""
    vertical, horizontal = cells[0], cells[1]
    if vertical == horizontal:
        return F.pixel_shuffle(x, vertical)
    channels = x.size(1) // (vertical * horizontal)
    by_cell = x.reshape(x.size(0), channels, vertical, horizontal, x.size(2), x.size(3))
    return by_cell.permute(0, 1, 4, 2, 5, 3).reshape(x.size(0), channels, x.size(2) * vertical, x.size(3) * horizontal)


def _repeated(sub_pixels: Tensor, source: int) -> Tensor:
    """As `sampling.positions.repeated_positions`."""
    index = torch.arange(source, dtype=sub_pixels.dtype, device=sub_pixels.device)
    return (index.unsqueeze(1) + sub_pixels).flatten()


def _positions(
    mode: str,
    align_corners: bool,
    source: int,
    target: int,
    factor: Optional[float],
    dtype: torch.dtype,
    counted: torch.dtype,
    most_copied: int,
    device: torch.device,
) -> Tensor:
    """Source positions of the output pixels along one axis; `nearest` counts in `counted`."""
    copied = factor is not None and factor != float(int(factor))
    step = source / target if factor is None else 1.0 / factor
    if mode == "area":
        index = torch.arange(target, device=device)
        first = torch.div(index * source, target, rounding_mode="floor")
        end = torch.div((index + 1) * source + (target - 1), target, rounding_mode="floor")
        return (first + (end - 1)).to(dtype) * 0.5
    if mode == "nearest" or mode == "nearest-exact":
        index = torch.arange(target, dtype=counted, device=device)
        if mode == "nearest" and copied:
            for ratio in range(1, most_copied + 1):
                if target == ratio * source:
                    return (index / ratio).floor().to(dtype)
        position = (index + 0.5) * step if mode == "nearest-exact" else index * step
        return position.float().floor().clamp(max=source - 1).to(dtype)
    index = torch.arange(target, dtype=dtype, device=device)
    if align_corners:
        return index * ((source - 1) / max(target - 1, 1))
    if mode == "bilinear" and copied and target == source:
        return index
    return (index + 0.5) * step - 0.5
