"""LDA-AQU: upsampling as attention of each output pixel to points around it, whose places are predicted too.

Du et al., "LDA-AQU: Adaptive Query-guided Upsampling via Local Deformable Attention", ACM MM 2024,
https://arxiv.org/abs/2411.19585.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...plan.site import Site
from ..arguments import positive_int
from ..composed import keeps_step_0, make_cascaded
from ..configs import Init, nominal_scale
from ..projection import Affine, Projection
from ..registry import register_upsampler
from ..sampling import positions as sampling
from ..sampling.positions import Mode, Pair
from ..sampling.reassembly import reassemble_points
from .base import KernelUpsampler, odd, ones, xavier
from .configs import LDAAQUConfig

# What the authors' module draws the bias of each point with.
_BIAS_STD = 0.02


class LDAAQU(KernelUpsampler):
    """Upsample (B, C, H, W) by attention to k x k points around each output pixel, from the original resize on, or as published.

    With n = layer_norm(x) over channels, D = C / reduction_factor, k = `k_u`, and positions in pixels of the output:

        q       = proj_q(n), resized to the output (bilinear, align_corners=True);  k = proj_k(n)
        d       = range_factor * tanh(conv_offset(q)) + the k x k grid around 0      for each of n_groups parts of q's channels
        score   = D^-0.5 * q . (k at the point + rpb of the tap), for each of nh heads
        U       = the sum over the k x k points of softmax(score) * x at the point

    Points are read bilinearly, zero outside; the corner pixels of output and input lie on each other. `KernelUpsampler` has
    the rest, and what the output is of U.

    The state dict is that of the authors' module, with `gain` where init="match".

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import LDAAQU
    >>> up = LDAAQU(64, 2, mode="bilinear")
    >>> x = torch.randn(1, 64, 12, 16)
    >>> torch.equal(up(x), F.interpolate(x, scale_factor=2, mode="bilinear"))
    True
    >>> up(x, size=(25, 33)).shape
    torch.Size([1, 64, 25, 33])
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        scale: float | Sequence[float] = 2,
        *,
        reduction_factor: int = 4,
        nh: int = 1,
        k_u: int = 3,
        k_e: int = 3,
        n_groups: int = 2,
        range_factor: float = 11,
        rpb: bool = True,
        init: Init = "match",
        mode: Mode = "bilinear",
        align_corners: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module; the defaults are those of the authors' module, but for `init`.

        Args:
            channels: C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, integral or not. A call that gives neither
                size nor scale_factor resizes by it.
            reduction_factor: by how much queries and keys have fewer channels.
            nh: heads.
            k_u: side of the grid of points, odd.
            k_e: side of the depthwise convolution that predicts where they are, odd.
            n_groups: groups of channels with points of their own.
            range_factor: how far points can move, in pixels of the output.
            rpb: whether each tap has a bias.
            init: "match" to compute the original resize at step 0, "paper" for the published operator.
            mode: the mode of the original resize.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__(channels, scale, init, mode, align_corners, device, dtype)
        self.reduction_factor = positive_int("reduction_factor", reduction_factor)
        self.nh = positive_int("nh", nh)
        self.k_u = odd("k_u", k_u)
        self.k_e = odd("k_e", k_e)
        self.n_groups = positive_int("n_groups", n_groups)
        self.range_factor = float(range_factor)
        self.rpb = bool(rpb)
        depth = self.channels // self.reduction_factor
        for name, parts in (("n_groups", self.n_groups), ("nh", self.nh)):
            if depth == 0 or depth % parts or self.channels % parts:
                raise OptionError(
                    f"{name}={parts} does not divide {self.channels} channels and the {depth} that reduction_factor="
                    f"{self.reduction_factor} leaves of them; choose a divisor of both"
                )
        taps = self.k_u**2
        per_group = depth // self.n_groups
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer_norm = nn.ModuleDict({"norm": Affine((self.channels,), **given)})
        self.proj_q = Projection(self.channels, depth, False, **given)
        self.proj_k = Projection(self.channels, depth, False, **given)
        self.conv_offset = nn.ModuleDict(
            {
                "0": Projection(per_group, per_group, False, **given, kernel_size=self.k_e, groups=per_group),
                "1": nn.ModuleDict({"norm": Affine((per_group,), **given)}),
                "3": Projection(per_group, 2 * taps, True, **given, kernel_size=self.k_e),
            }
        )
        table = torch.empty(1, self.nh, 1, taps, depth // self.nh, **given) if self.rpb else None
        self.register_parameter("relative_position_bias_table", None if table is None else nn.Parameter(table))
        self.reset_parameters()

    def _reset_published(self) -> None:
        for module in self.modules():
            if isinstance(module, Projection):
                xavier(module)
            elif isinstance(module, Affine):
                ones(module)
        nn.init.zeros_(cast(Projection, self.conv_offset["3"]).weight)
        if self.relative_position_bias_table is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=_BIAS_STD)

    def _upsample(self, x: Tensor, size: Pair) -> Tensor:
        dtype = sampling.compute_dtype(x.dtype)
        batch, groups = x.shape[0], self.n_groups
        normed = self._layer_norm(x, "layer_norm.norm")
        queries = F.interpolate(self._convolved(normed, "proj_q"), size, mode="bilinear", align_corners=True)
        keys = self._convolved(normed, "proj_k").to(dtype).reshape(batch * groups, -1, *x.shape[2:])
        rows, columns = self._points(queries.reshape(batch * groups, -1, *size), x, dtype)
        weights = self._scores(queries.to(dtype), self._read(keys, rows, columns)).softmax(dim=2)
        return self._summed(x.to(dtype), rows, columns, weights)

    def _points(self, queries: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows and columns in pixels of `x` where the queries (B * G, D / G, h, w) read, (B * G, k^2, h, w) each."""
        hidden = self._layer_norm(self._convolved(queries, "conv_offset.0"), "conv_offset.1.norm")
        moves = self._convolved(F.gelu(hidden), "conv_offset.3").to(dtype).tanh() * self.range_factor
        taps = torch.arange(self.k_u, dtype=dtype, device=x.device) - self.k_u // 2
        by_axis = moves.reshape(moves.shape[0], -1, 2, *moves.shape[2:])
        down = by_axis[:, :, 0] + taps.repeat_interleave(self.k_u).view(-1, 1, 1)
        right = by_axis[:, :, 1] + taps.repeat(self.k_u).view(-1, 1, 1)
        rows, columns = (torch.arange(n, dtype=dtype, device=x.device) for n in moves.shape[2:])
        steps = []
        for source, target in ((x.shape[2], rows), (x.shape[3], columns)):
            # Pixels of x between two of the output; of an output of one there is one place. Tensors: a graph takes any size.
            last = torch.arange(source, dtype=dtype, device=x.device)[-1:]
            steps.append(last / target[-1:].clamp(min=1))
        return (down + rows.unsqueeze(1)) * steps[0], (right + columns) * steps[1]

    def _read(self, keys: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The keys (B * G, D / G, H, W) at the points: (B, D, k^2, h, w)."""
        height, width = keys.shape[2:]
        taps, *size = rows.shape[1:]
        grid = torch.stack((sampling.normalised(columns, width), sampling.normalised(rows, height)), dim=-1)
        read = F.grid_sample(keys, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
        return read.reshape(keys.shape[0] // self.n_groups, -1, taps, *size)

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Products of queries (B, D, h, w) and keys (B, D, k^2, h, w) of each head: (B, nh, k^2, h, w)."""
        batch, depth, taps, *size = keys.shape
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias_table.to(keys.dtype)  # (1, nh, 1, k^2, D / nh)
            keys = keys + bias.permute(0, 1, 4, 3, 2).reshape(1, depth, taps, 1, 1)
        products = (queries * depth**-0.5).unsqueeze(2) * keys
        return products.reshape(batch, self.nh, -1, taps, *size).sum(dim=2)

    def _summed(self, x: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        """The sums of `x` (B, C, H, W) at the points of each group, with the weights (B, nh, k^2, h, w) of each head."""
        batch, channels, height, width = x.shape
        # Parts of channels that have one group and one head.
        parts = math.lcm(self.n_groups, self.nh)
        places = [
            each.reshape(batch, self.n_groups, *each.shape[1:]).repeat_interleave(parts // self.n_groups, dim=1)
            for each in (rows, columns)
        ]
        given = (*places, weights.repeat_interleave(parts // self.nh, dim=1))
        out = reassemble_points(
            x.reshape(batch * parts, -1, height, width), *(each.flatten(0, 1).permute(0, 2, 3, 1) for each in given)
        )
        return out.reshape(batch, channels, *rows.shape[2:])

    def _own_options(self) -> list[str]:
        own = ("reduction_factor", "nh", "k_u", "k_e", "n_groups", "range_factor", "rpb")
        return [f"{name}={getattr(self, name)}" for name in own]


@register_upsampler("lda_aqu", options=LDAAQUConfig, exact=keeps_step_0)
def _for_site(site: Site, config: LDAAQUConfig) -> nn.Module:
    def make(factor: Any) -> LDAAQU:
        return LDAAQU(
            site.channels,
            factor,
            reduction_factor=config.reduction_factor,
            nh=config.nh,
            k_u=config.k_u,
            k_e=config.k_e,
            n_groups=config.n_groups,
            range_factor=config.range_factor,
            rpb=config.rpb,
            init=config.init,
            mode=cast(Mode, site.mode),
            align_corners=site.align_corners,
        )

    return make_cascaded(nominal_scale(site), config.cascade, make)
