"""DySample's definition, written for reading: slow, square integer scales only, and unsafe in half precision.

Everything is computed in the input's dtype through coordinates normalised to -1 .. 1, as in the authors' module, and
the state dict is theirs. Benchmarks compare with it, and the tests hold the package's module against it where the golden
file has no case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceDySample(nn.Module):
    """Upsample (B, C, H, W) by an integer `scale` as the paper defines it: see `upswap.DySample` for the formulas.

    The parameters have torch's own initialisation: whoever compares loads the same weights into both.
    """

    init_pos: Tensor

    def __init__(
        self, in_channels: int, scale: int, style: str, groups: int, dyscope: bool, scope_bias: bool = False
    ) -> None:
        super().__init__()
        self.scale, self.style, self.groups = scale, style, groups
        conv_in, conv_out = in_channels, 2 * groups * scale**2
        if style == "pl":
            conv_in, conv_out = in_channels // scale**2, 2 * groups
        self.offset = nn.Conv2d(conv_in, conv_out, 1)
        self.scope = nn.Conv2d(conv_in, conv_out, 1, bias=scope_bias) if dyscope else None
        self.register_buffer("init_pos", self._initial_positions())

    def _initial_positions(self) -> Tensor:
        along_axis = [(i - (self.scale - 1) / 2) / self.scale for i in range(self.scale)]
        horizontal = [x for _ in range(self.groups) for _y in along_axis for x in along_axis]
        vertical = [y for _ in range(self.groups) for y in along_axis for _x in along_axis]
        return torch.tensor(horizontal + vertical).view(1, -1, 1, 1)

    def _offsets(self, x: Tensor) -> Tensor:
        seen = F.pixel_shuffle(x, self.scale) if self.style == "pl" else x
        offset = self.offset(seen)
        offset = offset * 0.25 if self.scope is None else offset * self.scope(seen).sigmoid() * 0.5
        return F.pixel_unshuffle(offset, self.scale) if self.style == "pl" else offset

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, scale * H, scale * W); H and W at least 1, x contiguous."""
        batch, channels, height, width = x.shape
        offset = self._offsets(x) + self.init_pos
        pixel_x = (torch.arange(width) + 0.5).to(x)
        pixel_y = (torch.arange(height) + 0.5).to(x)
        centres = torch.stack((pixel_x.expand(height, width), pixel_y.unsqueeze(1).expand(height, width)))
        points = centres.view(1, 2, 1, height, width) + offset.view(batch, 2, -1, height, width)
        grid = 2 * points / torch.tensor([width, height]).to(x).view(1, 2, 1, 1, 1) - 1
        grid = F.pixel_shuffle(grid.view(batch, -1, height, width), self.scale)
        grid = grid.view(batch, 2, self.groups, height * self.scale, width * self.scale).permute(0, 2, 3, 4, 1)
        out = F.grid_sample(
            x.reshape(batch * self.groups, -1, height, width),
            grid.flatten(0, 1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return out.view(batch, channels, height * self.scale, width * self.scale)
