"""CARAFE: upsampling as a weighted sum of a neighbourhood, with weights predicted for every output pixel.

Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, https://arxiv.org/abs/1905.02188.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...plan.site import Site
from ..arguments import positive_int
from ..composed import keeps_step_0, make_cascaded
from ..configs import Init, nominal_scale
from ..projection import Projection
from ..registry import register_upsampler
from ..sampling import positions as sampling
from ..sampling.positions import Mode, Pair
from ..sampling.reassembly import reassemble
from .base import KernelUpsampler, odd, resized, xavier
from .configs import CARAFEConfig

# What the authors' module draws the content encoder's weights with.
_ENCODER_STD = 0.001


class CARAFE(KernelUpsampler):
    """Upsample (B, C, H, W) by predicted kernels, from the original resize on, or as published.

    Section 3 of the paper, with k = `up_kernel`, (sv, sh) = ceil(scale) and one group:

        logits  = content_encoder(channel_compressor(x))     1x1 C -> compressed_channels, then encoder_kernel^2
                                                             convolution -> k^2 * sv * sh
        kernels = softmax over k^2 of pixel_shuffle(logits)  (B, k^2, sv * H, sh * W), taps row by row
        U[o]    = sum over the k x k taps of kernels[tap, o] * x[floor(o / s) + tap - (k - 1) / 2]

    x is zero outside, and border kernels are not renormalised. Any other target of m pixels from n: the logits
    are resized to it (bilinear) before the softmax, and output pixel o reads around source pixel floor(o * n / m).
    `KernelUpsampler` has the rest, and what the output is of U.

    The state dict is that of the authors' module, in mmcv and mmdet: `channel_compressor.*` and `content_encoder.*`; with
    `gain` where init="match". With initial weights every kernel is near 1 / k^2: U is about the k x k mean of a nearest resize.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import CARAFE
    >>> up = CARAFE(64, 2, mode="bilinear")
    >>> x = torch.randn(1, 64, 12, 16)
    >>> torch.equal(up(x), F.interpolate(x, scale_factor=2, mode="bilinear"))
    True
    >>> up(x, size=(25, 33)).shape
    torch.Size([1, 64, 25, 33])
    >>> blurred = F.interpolate(F.avg_pool2d(x, 5, stride=1, padding=2), scale_factor=2)
    >>> torch.allclose(CARAFE(64, 2, init="paper")(x), blurred, atol=0.05)
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    def __init__(
        self,
        channels: int,
        scale: float | Sequence[float] = 2,
        *,
        up_kernel: int = 5,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
        init: Init = "match",
        mode: Mode = "nearest",
        align_corners: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module; the defaults are those of the authors' module, but for `init`.

        Args:
            channels: C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, integral or not. A call that gives neither
                size nor scale_factor resizes by it.
            up_kernel: side of the predicted kernels, odd.
            encoder_kernel: side of the content encoder's kernel, odd.
            compressed_channels: channels that kernels are predicted from.
            init: "match" to compute the original resize at step 0, "paper" for the published operator.
            mode: the mode of the original resize.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__(channels, scale, init, mode, align_corners, device, dtype)
        self.up_kernel = odd("up_kernel", up_kernel)
        self.encoder_kernel = odd("encoder_kernel", encoder_kernel)
        self.compressed_channels = positive_int("compressed_channels", compressed_channels)
        self.kernel_scale: Pair = (math.ceil(self.scale[0]), math.ceil(self.scale[1]))
        taps = self.up_kernel**2 * self.kernel_scale[0] * self.kernel_scale[1]
        self.channel_compressor = Projection(self.channels, self.compressed_channels, True, device, dtype)
        self.content_encoder = Projection(
            self.compressed_channels, taps, True, device, dtype, kernel_size=self.encoder_kernel
        )
        self.reset_parameters()

    def _reset_published(self) -> None:
        xavier(self.channel_compressor)
        xavier(self.content_encoder)
        nn.init.normal_(self.content_encoder.weight, std=_ENCODER_STD)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, k^2 * sv * sh, H, W), by the convolutions, in their dtype or that of autocast."""
        return self._convolved(self._convolved(x, "channel_compressor"), "content_encoder")

    def _upsample(self, x: Tensor, size: Pair) -> Tensor:
        dtype = sampling.compute_dtype(x.dtype)
        field = sampling.shuffle(self._logits(x).to(dtype), self.kernel_scale)
        return reassemble(x.to(dtype), resized(field, size).permute(0, 2, 3, 1).softmax(dim=-1))

    def _own_options(self) -> list[str]:
        own = ("up_kernel", "encoder_kernel", "compressed_channels")
        return [f"{name}={getattr(self, name)}" for name in own]


@register_upsampler("carafe", options=CARAFEConfig, exact=keeps_step_0)
def _for_site(site: Site, config: CARAFEConfig) -> nn.Module:
    def make(factor: Any) -> CARAFE:
        return CARAFE(
            site.channels,
            factor,
            up_kernel=config.up_kernel,
            encoder_kernel=config.encoder_kernel,
            compressed_channels=config.compressed_channels,
            init=config.init,
            mode=cast(Mode, site.mode),
            align_corners=site.align_corners,
        )

    return make_cascaded(nominal_scale(site), config.cascade, make)
