"""CARAFE: upsampling as a weighted sum of a neighbourhood, with weights predicted for every output pixel.

Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, https://arxiv.org/abs/1905.02188. Here to be
compared with: unlike DySample it does not compute the original resize at step 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..plan.site import Site
from .arguments import check_choice, plain, positive_int, scale_pair, target
from .composed import make_cascaded
from .configs import CARAFEConfig, nominal_scale
from .host_init import InitialisesItself
from .projection import Projection, weights_of
from .registry import register_upsampler
from .sampling import memory_format as layout
from .sampling import positions as sampling
from .sampling.positions import Mode, Pair
from .tracing import leaf

# What the authors' module draws the content encoder's weights with.
_ENCODER_STD = 0.001


class CARAFE(InitialisesItself, nn.Module):
    """Upsample (B, C, H, W) by predicted kernels, as published; at step 0, a blur and **not** the original resize.

    Section 3 of the paper, with k = `up_kernel`, (sv, sh) = ceil(scale) and one group:

        logits  = content_encoder(channel_compressor(x))     1x1 C -> compressed_channels, then encoder_kernel^2
                                                             convolution -> k^2 * sv * sh
        kernels = softmax over k^2 of pixel_shuffle(logits)  (B, k^2, sv * H, sh * W), taps row by row
        out[o]  = sum over the k x k taps of kernels[tap, o] * x[floor(o / s) + tap - (k - 1) / 2]

    x is zero outside, and border kernels are not renormalised. Any other target of m pixels from n: the logits
    are resized to it (bilinear) before the softmax, and output pixel o reads around source pixel floor(o * n / m). A target
    smaller than the input along an axis is computed by the original resize.

    The convolutions run in the dtype of their weights, or of autocast; kernels and sums are float32 (float64 for float64
    input). The output has the input's dtype and memory format.

    The state dict is that of the authors' module, in mmcv and mmdet: `channel_compressor.*` and `content_encoder.*`. With
    initial weights every kernel is near 1 / k^2: the output is about the k x k mean of a nearest resize.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import CARAFE
    >>> up = CARAFE(64, 2)
    >>> x = torch.randn(1, 64, 12, 16)
    >>> up(x).shape
    torch.Size([1, 64, 24, 32])
    >>> up(x, size=(25, 33)).shape
    torch.Size([1, 64, 25, 33])
    >>> blurred = F.interpolate(F.avg_pool2d(x, 5, stride=1, padding=2), scale_factor=2)
    >>> torch.allclose(up(x), blurred, atol=0.05)
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    is_upsampler = True

    def __init__(
        self,
        channels: int,
        scale: float | Sequence[float] = 2,
        *,
        up_kernel: int = 5,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
        mode: Mode = "nearest",
        align_corners: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the module; the defaults are those of the authors' module.

        Args:
            channels: C.
            scale: the factor, or (vertical, horizontal) factors, at least 1, integral or not. A call that gives neither
                size nor scale_factor resizes by it.
            up_kernel: side of the predicted kernels, odd.
            encoder_kernel: side of the content encoder's kernel, odd.
            compressed_channels: channels that kernels are predicted from.
            mode: the mode of the original resize, for targets smaller than the input.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__()
        check_choice("mode", mode, get_args(Mode))
        self.channels = positive_int("channels", channels)
        self.scale = scale_pair(scale)
        self.up_kernel = _odd("up_kernel", up_kernel)
        self.encoder_kernel = _odd("encoder_kernel", encoder_kernel)
        self.compressed_channels = positive_int("compressed_channels", compressed_channels)
        self.mode = mode
        self.align_corners = bool(align_corners)
        self.kernel_scale: Pair = (math.ceil(self.scale[0]), math.ceil(self.scale[1]))
        taps = self.up_kernel**2 * self.kernel_scale[0] * self.kernel_scale[1]
        self.channel_compressor = Projection(self.channels, self.compressed_channels, True, device, dtype)
        self.content_encoder = Projection(
            self.compressed_channels, taps, True, device, dtype, kernel_size=self.encoder_kernel
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors' module does. Call it where a host's own initialisation has been over the module."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=_ENCODER_STD)
        for projection in (self.channel_compressor, self.content_encoder):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
            projection.note_values()

    @leaf
    def forward(
        self,
        x: Tensor,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Upsample `x`, to `size`, by `scale_factor`, or by the module's own `scale` where neither is given.

        Args:
            x: (B, C, H, W), floating point, of any memory format.
            size: the output's (h, w), or one int for both.
            scale_factor: one factor, or (vertical, horizontal).

        Returns:
            (B, C, h, w), of x's dtype and memory format.

        Raises:
            ShapeError: `x` is not what the module was built for.
            OptionError: both size and scale_factor are given, or one of them is not one value or a pair.
        """
        if x.dim() != 4 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ShapeError(
                f"CARAFE expects a floating-point input of shape (B, {self.channels}, H, W), got {tuple(x.shape)} "
                f"of {x.dtype}"
            )
        shape, _, smaller = target(x, size, scale_factor, self.scale)
        if smaller:
            return sampling.Mapping(self.mode, self.align_corners).resize(x, size, scale_factor)
        return self._upsample(x, self._logits(x), shape)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, k^2 * sv * sh, H, W), by the convolutions, in their dtype or that of autocast."""
        compressed = F.conv2d(x, *weights_of(self, "channel_compressor"))
        return F.conv2d(compressed, *weights_of(self, "content_encoder"), padding=self.encoder_kernel // 2)

    def _upsample(self, x: Tensor, logits: Tensor, size: Pair) -> Tensor:
        """`x` (B, C, H, W) at `size`, by kernels from `logits` (B, k^2 * sv * sh, H, W)."""
        dtype = sampling.compute_dtype(x.dtype)
        vertical, horizontal = self.kernel_scale
        field = sampling.shuffle(logits.to(dtype), self.kernel_scale)
        if not sampling.known_equal(size, (vertical * x.shape[2], horizontal * x.shape[3])):
            field = F.interpolate(field, size=size, mode="bilinear", align_corners=False)
        out = reassemble(x.to(dtype), field.permute(0, 2, 3, 1).softmax(dim=-1))
        return out.to(x.dtype).contiguous(memory_format=layout.format_of(x))

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        parts = [f"{self.channels}", f"scale={plain(self.scale)}", f"up_kernel={self.up_kernel}"]
        parts += [f"encoder_kernel={self.encoder_kernel}", f"compressed_channels={self.compressed_channels}"]
        parts.append(f"mode={self.mode}")
        if self.align_corners:
            parts.append("align_corners=True")
        return ", ".join(parts)


def reassemble(x: Tensor, kernels: Tensor) -> Tensor:
    """Weighted sums of neighbourhoods: output pixel o of m reads the window around pixel floor(o * n / m) of `x`.

    A sum over rows of a table that are given by number, which is what `F.embedding_bag` computes without making the windows
    first: `docs/upsamplers.md` has what that and other formulations take.

    Args:
        x: (B, C, H, W), float32 or float64; zero outside.
        kernels: (B, h, w, k^2) of x's dtype, taps row by row.

    Returns:
        (B, C, h, w), laid out as channels_last.
    """
    batch, channels, height, width = x.shape
    _, *target, taps = kernels.shape
    side = math.isqrt(taps)
    margin = side // 2
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, margin, margin, margin, margin))
    stride = pixels.shape[2]

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=x.device)

    rows, columns = (numbers(m) * n // m for n, m in zip((height, width), target, strict=True))
    # Pixels are numbered through all images. A window has the number of its first tap, from which the others are `steps`.
    windows = (numbers(batch).view(-1, 1, 1) * pixels.shape[1] + rows.view(-1, 1)) * stride + columns
    steps = (numbers(side).view(-1, 1) * stride + numbers(side)).flatten()
    out = F.embedding_bag(
        (windows.unsqueeze(-1) + steps).reshape(-1, taps),
        pixels.reshape(-1, channels),
        mode="sum",
        per_sample_weights=kernels.reshape(-1, taps),
    )
    return out.reshape(batch, *target, channels).permute(0, 3, 1, 2)


def _odd(name: str, value: int) -> int:
    """A kernel's side; OptionError unless it is odd, so that it has a centre."""
    if positive_int(name, value) % 2 == 0:
        raise OptionError(f"{name} must be odd, so that a kernel has a centre; got {value}")
    return int(value)


@register_upsampler("carafe", options=CARAFEConfig, exact=False)
def _for_site(site: Site, config: CARAFEConfig) -> nn.Module:
    def make(factor: Any) -> CARAFE:
        return CARAFE(
            site.channels,
            factor,
            up_kernel=config.up_kernel,
            encoder_kernel=config.encoder_kernel,
            compressed_channels=config.compressed_channels,
            mode=cast(Mode, site.mode),
            align_corners=site.align_corners,
        )

    return make_cascaded(nominal_scale(site), config.cascade, make)
