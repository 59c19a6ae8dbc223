"""SAPA-B: upsampling by the similarity of a pixel of the guide to the pixels of the map around it.

Lu et al., "SAPA: Similarity-Aware Point Affiliation for Feature Upsampling", NeurIPS 2022, https://arxiv.org/abs/2209.12866.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...plan.site import Site
from ..arguments import check_choice, positive_int
from ..composed import keeps_step_0
from ..configs import Init, nominal_scale
from ..projection import Affine, weights_of
from ..registry import register_upsampler
from ..sampling import positions as sampling
from ..sampling.positions import Mode
from ..sampling.reassembly import reassemble, window_products
from .base import GuidedUpsampler, odd, ones
from .configs import SAPAConfig, SAPAForm

# What the authors' modules draw the weights of queries and keys with, of either form.
_STD = 0.02
_GROUPS = 32

#: The channels of queries and keys in the authors' modules.
_EMBEDDING: dict[SAPAForm, int] = {"conv": 32, "linear": 64}


class SAPA(GuidedUpsampler):
    """Upsample (B, C, H, W) by similarity to a guide, from the original resize on, or as published.

    With y the guide, x the map and k = `up_kernel_size`:

        scores = q(norm_y(y)) . k(norm_x(x)) at the k x k pixels around the one that an output pixel lies in
        U      = the sum over them of softmax(scores) * x

    Pixels outside of the map have score 0 and value 0, and take part in the softmax: at the border the weights add up to less
    than 1. There is no scaling of the scores. Of the two forms that were released, "conv" has 1x1 convolutions after
    GroupNorm of 32 groups (of fewer, where 32 do not divide the channels), "linear" has linear layers after LayerNorm over
    channels. `GuidedUpsampler` has the rest, and what the output is of U.

    The state dict is that of the authors' module of that form, with `gain` where init="match".

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import SAPA
    >>> up = SAPA(64, 32, mode="nearest")
    >>> x, skip = torch.randn(1, 64, 12, 16), torch.randn(1, 32, 24, 32)
    >>> torch.equal(up(x, guide=skip), F.interpolate(x, scale_factor=2))
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    def __init__(
        self,
        channels: int,
        guide_channels: int | None = None,
        scale: float | Sequence[float] = 2,
        *,
        form: SAPAForm = "conv",
        norm: bool = True,
        up_kernel_size: int = 5,
        embedding_dim: int | None = None,
        init: Init = "match",
        mode: Mode = "bilinear",
        align_corners: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module; the defaults are those of the authors' module, but for `init`.

        Args:
            channels: C, of the map.
            guide_channels: channels of the guide; None for C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, of the resize it stands in for.
            form: "conv", the one that the comparisons of papers have, or "linear", that of the NeurIPS paper's code.
            norm: whether map and guide are normalised; "linear" always does.
            up_kernel_size: side of the window, odd.
            embedding_dim: channels of queries and keys; None for 32 (conv) or 64 (linear).
            init: "match" to compute the original resize at step 0, "paper" for the published operator.
            mode: the mode of the original resize.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__(channels, guide_channels, scale, init, mode, align_corners, device, dtype)
        check_choice("form", form, get_args(SAPAForm))
        self.form = form
        self.norm = bool(norm)
        if form == "linear" and not self.norm:
            raise OptionError("norm=False is not one of the form 'linear'; use form='conv'")
        self.up_kernel_size = odd("up_kernel_size", up_kernel_size)
        depth = _EMBEDDING[form] if embedding_dim is None else embedding_dim
        self.embedding_dim = positive_int("embedding_dim", depth)
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        sides = {"y": self.guide_channels, "x": self.channels}
        if self.norm:
            self.norm_y, self.norm_x = (Affine((count,), **given) for count in sides.values())
        kernel = (1, 1) if form == "conv" else ()
        self.q, self.k = (Affine((self.embedding_dim, count, *kernel), **given) for count in sides.values())
        self.reset_parameters()

    def _reset_published(self) -> None:
        for name, module in self.named_children():
            if name.startswith("norm"):
                ones(cast(Affine, module))
            else:
                draw = nn.init.normal_ if self.form == "conv" else nn.init.trunc_normal_
                draw(cast(Affine, module).weight, std=_STD)
                nn.init.zeros_(cast(Tensor, cast(Affine, module).bias))

    def _operate(self, x: Tensor, guide: Tensor) -> Tensor:
        dtype = sampling.compute_dtype(x.dtype)
        queries = self._embedded(guide, "norm_y", "q").to(dtype)
        keys = self._embedded(x, "norm_x", "k").to(dtype)
        return reassemble(x.to(dtype), window_products(queries, keys, self.up_kernel_size).softmax(dim=-1))

    def _embedded(self, x: Tensor, norm: str, path: str) -> Tensor:
        if self.form == "linear":
            x = self._layer_norm(x, norm)
        elif self.norm:
            channels = self.guide_channels if norm == "norm_y" else self.channels
            x = self._group_norm(x, math.gcd(_GROUPS, channels), norm)
        weight, bias = weights_of(self, path)
        return F.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1), bias)

    def _own_options(self) -> list[str]:
        own = ("guide_channels", "form", "norm", "up_kernel_size", "embedding_dim")
        return [f"{name}={getattr(self, name)}" for name in own]


@register_upsampler("sapa-b", options=SAPAConfig, exact=keeps_step_0, guided=True)
def _for_site(site: Site, config: SAPAConfig, guide_channels: int) -> nn.Module:
    return SAPA(
        site.channels,
        guide_channels,
        nominal_scale(site),
        form=config.form,
        norm=config.norm,
        up_kernel_size=config.up_kernel_size,
        embedding_dim=config.embedding_dim,
        init=config.init,
        mode=cast(Mode, site.mode),
        align_corners=site.align_corners,
    )
