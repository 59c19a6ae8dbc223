"""FADE: CARAFE's sums, with kernels predicted from the map and from the feature it is fused with.

Lu et al., "FADE: Fusing the Assets of Decoder and Encoder for Task-Agnostic Upsampling", ECCV 2022,
https://arxiv.org/abs/2207.10392; and "FADE: A Task-Agnostic Upsampling Operator for Encoder-Decoder Architectures", IJCV
2025, https://arxiv.org/abs/2407.13500.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...plan.site import Site
from ..arguments import positive_int
from ..composed import keeps_step_0
from ..configs import Init, nominal_scale
from ..projection import Projection
from ..registry import register_upsampler
from ..sampling import positions as sampling
from ..sampling.positions import Mode
from ..sampling.reassembly import reassemble, repeated
from .base import GuidedUpsampler, odd, xavier
from .configs import FADEConfig, FADELiteConfig

# The names that the other form of the authors' module has. It computes the same in another order.
_OTHER_NAMES = {
    "kernel_generator.conv1_en.weight": "ker_generator.compressor_en.weight",
    "kernel_generator.conv1_en.bias": "ker_generator.compressor_en.bias",
    "kernel_generator.conv1_de.weight": "ker_generator.compressor_de.weight",
    "kernel_generator.conv2_kernels": "ker_generator.content_encoder.weight",
    "kernel_generator.conv2_bias": "ker_generator.content_encoder.bias",
}


class FADE(GuidedUpsampler):
    """Upsample (B, C, H, W) by kernels from map and guide, from the original resize on, or as published.

    With k = `up_kernel_size`, en the guide, de the map, and `rep` what repeats pixels to the guide's size:

        logits  = encoder(compressor_en(en)) + rep(encoder(compressor_de(de)))     1x1 to `embedding_dim`, then 3x3 to k^2
        up      = CARAFE's sums of de with softmax(logits), zero outside
        U       = up, or with `gating`: G * en + (1 - G) * up, with G = sigmoid(rep(gate(de)))

    FADE-Lite (`lite`) compresses to k^2 channels, and its encoder is depthwise. `GuidedUpsampler` has the rest, and what the
    output is of U.

    The state dict is that of the authors' module, with `gain` where init="match". That of their other form, which has
    `kernel_generator.conv2_kernels`, loads too.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from upswap.nn import FADE
    >>> up = FADE(64, mode="bilinear")
    >>> x, skip = torch.randn(1, 64, 12, 16), torch.randn(1, 64, 24, 32)
    >>> torch.equal(up(x, guide=skip), F.interpolate(x, scale_factor=2, mode="bilinear"))
    True
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    def __init__(
        self,
        channels: int,
        guide_channels: int | None = None,
        scale: float | Sequence[float] = 2,
        *,
        gating: bool = True,
        up_kernel_size: int = 5,
        embedding_dim: int = 64,
        lite: bool = False,
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
            gating: whether the guide is mixed into the output, for which both have to have C channels.
            up_kernel_size: side of the predicted kernels, odd.
            embedding_dim: channels that kernels are predicted from; not asked for where `lite`.
            lite: whether it is FADE-Lite.
            init: "match" to compute the original resize at step 0, "paper" for the published operator.
            mode: the mode of the original resize.
            align_corners: the original resize's; only bilinear and bicubic have it.
            device: the parameters' device.
            dtype: the parameters' dtype.

        Raises:
            OptionError: an option has a value that cannot be used.
        """
        super().__init__(channels, guide_channels, scale, init, mode, align_corners, device, dtype)
        self.gating = bool(gating)
        self.up_kernel_size = odd("up_kernel_size", up_kernel_size)
        self.lite = bool(lite)
        taps = self.up_kernel_size**2
        self.embedding_dim = taps if self.lite else positive_int("embedding_dim", embedding_dim)
        if self.gating and self.guide_channels != self.channels:
            raise OptionError(
                f"gating mixes the guide into the output, so both have to have the same channels; the guide has "
                f"{self.guide_channels}, the map {self.channels}. Give gating=False"
            )
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.gating:
            self.gate_generator = nn.ModuleDict({"conv": Projection(self.channels, 1, True, **given)})
        self.ker_generator = nn.ModuleDict(
            {
                "compressor_en": Projection(self.guide_channels, self.embedding_dim, True, **given),
                "compressor_de": Projection(self.channels, self.embedding_dim, False, **given),
                "content_encoder": Projection(
                    self.embedding_dim, taps, True, **given, kernel_size=3, groups=taps if self.lite else 1
                ),
            }
        )
        self.reset_parameters()

    def _reset_published(self) -> None:
        for module in self.modules():
            if isinstance(module, Projection):
                xavier(module)

    def _operate(self, x: Tensor, guide: Tensor) -> Tensor:
        dtype, size = sampling.compute_dtype(x.dtype), (guide.shape[2], guide.shape[3])
        fine, coarse = (
            self._convolved(self._convolved(each, f"ker_generator.{compressor}"), "ker_generator.content_encoder").to(
                dtype
            )
            for each, compressor in ((guide, "compressor_en"), (x, "compressor_de"))
        )
        kernels = (fine + repeated(coarse, size)).permute(0, 2, 3, 1).softmax(dim=-1)
        up = reassemble(x.to(dtype), kernels)
        if not self.gating:
            return up
        gate = repeated(self._convolved(x, "gate_generator.conv").to(dtype).sigmoid(), size)
        return gate * guide.to(dtype) + (1 - gate) * up

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the names of the authors' other form too."""
        for other, own in _OTHER_NAMES.items():
            if f"{prefix}{other}" in state_dict:
                state_dict[f"{prefix}{own}"] = state_dict.pop(f"{prefix}{other}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_options(self) -> list[str]:
        own = ("guide_channels", "gating", "up_kernel_size", "embedding_dim", "lite")
        return [f"{name}={getattr(self, name)}" for name in own]


def _made(site: Site, config: FADEConfig | FADELiteConfig, guide_channels: int, **form: Any) -> FADE:
    return FADE(
        site.channels,
        guide_channels,
        nominal_scale(site),
        gating=config.gating,
        up_kernel_size=config.up_kernel_size,
        init=config.init,
        mode=cast(Mode, site.mode),
        align_corners=site.align_corners,
        **form,
    )


@register_upsampler("fade", options=FADEConfig, exact=keeps_step_0, guided=True)
def _for_site(site: Site, config: FADEConfig, guide_channels: int) -> nn.Module:
    return _made(site, config, guide_channels, embedding_dim=config.embedding_dim)


@register_upsampler("fade-lite", options=FADELiteConfig, exact=keeps_step_0, guided=True)
def _lite_for_site(site: Site, config: FADELiteConfig, guide_channels: int) -> nn.Module:
    return _made(site, config, guide_channels, lite=True)
