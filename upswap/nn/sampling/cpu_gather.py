"""Bilinear reading of channels_last maps on a CPU, as the weighted sum of four rows of a table.

In channels_last a pixel's channels lie side by side: `x` is a table with a row for every pixel and group. Each point of the
output is then a "bag" of its four neighbours' rows, and `F.embedding_bag` sums bags at the speed of memory, where
`grid_sample` would first need `x`, and then the output, in the other layout. It is slow backward, where
`grid_sample` is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_format import is_channels_last
from .positions import Scheme

# Below these, a row is too short for what a bag costs, or a map too small for the number of calls (measured on torch 2.15).
_SHORTEST_ROW = 16
_SMALLEST_MAP = 2**15


def prefers(x: Tensor, scheme: Scheme) -> bool:
    """Whether `gather` computes what `scheme` asks for, and faster than `grid_sample` does."""
    return (
        is_channels_last(x)
        and x.device.type == "cpu"
        and scheme.mapping.kernel == "bilinear"
        and x.shape[1] // scheme.groups >= _SHORTEST_ROW
        and x.numel() >= _SMALLEST_MAP
    )


def gather(x: Tensor, offsets: Tensor, rows: Tensor, columns: Tensor, gain: float) -> Tensor:
    """Read `x` at base positions plus offsets times `gain`; outside `x`, its border goes on.

    Args:
        x: (B, C, H, W), channels_last, float32 or float64.
        offsets: (B, 2, G, h, w) of x's dtype, horizontal before vertical. G divides C.
        rows: (h,) vertical base positions in source pixels.
        columns: (w,) horizontal base positions in source pixels.
        gain: what offsets are multiplied by to be source pixels.

    Returns:
        (B, C, h, w), channels_last.
    """
    batch, channels, height, width = x.shape
    groups, (target_height, target_width) = offsets.shape[2], offsets.shape[-2:]
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width * groups, channels // groups)
    index = torch.int32 if table.shape[0] < 2**31 else torch.int64
    # (B, h, w, G): a point's groups side by side, as in the output.
    across, down = offsets.permute(1, 0, 3, 4, 2).unbind()
    across = torch.add(columns.view(-1, 1), across, alpha=gain).clamp_(0, width - 1)
    down = torch.add(rows.view(-1, 1, 1), down, alpha=gain).clamp_(0, height - 1)
    # Clamped once more: a NaN, of which a whole number could be anything, stays inside too. Its shares are NaN.
    left, top = across.to(index).clamp_(0, width - 1), down.to(index).clamp_(0, height - 1)
    right_share, lower_share = across.sub_(left), down.sub_(top)
    # On the last column and row the share of the neighbour is 0; the step to it is 0 too, to stay inside the table.
    to_right = (left < width - 1).to(index).mul_(groups)
    to_lower = (top < height - 1).to(index).mul_(width * groups)
    image = torch.arange(0, table.shape[0], height * width * groups, dtype=index, device=x.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, dtype=index, device=x.device)
    first = torch.add(image + group, left.add_(top, alpha=width), alpha=groups)
    neighbours = first.new_empty((*first.shape, 4))
    shares = x.new_empty((*first.shape, 4))
    upper_left, upper_right, lower_left, lower_right = neighbours.unbind(-1)
    upper_left.copy_(first)
    torch.add(first, to_right, out=upper_right)
    torch.add(first, to_lower, out=lower_left)
    torch.add(upper_right, to_lower, out=lower_right)
    upper_left_share, upper_right_share, lower_left_share, lower_right_share = shares.unbind(-1)
    torch.mul(right_share, lower_share, out=lower_right_share)
    torch.sub(right_share, lower_right_share, out=upper_right_share)
    torch.sub(lower_share, lower_right_share, out=lower_left_share)
    torch.sub(1 - right_share, lower_left_share, out=upper_left_share)
    out = F.embedding_bag(neighbours.view(-1, 4), table, per_sample_weights=shares.view(-1, 4), mode="sum")
    return out.view(batch, target_height, target_width, channels).permute(0, 3, 1, 2)
