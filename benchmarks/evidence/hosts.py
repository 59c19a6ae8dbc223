"""The models that are fine-tuned, with random weights, and what is put into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upswap
from upswap import Site
from upswap.nn import UpsamplerConfig

ENCODER = "tu-mobilenetv3_small_050"


def _unet(classes: int) -> nn.Module:
    return smp.Unet(ENCODER, encoder_weights=None, classes=classes, decoder_channels=(64, 48, 32, 24, 16))


def _fpn(classes: int) -> nn.Module:
    return smp.FPN(
        ENCODER, encoder_weights=None, classes=classes, decoder_pyramid_channels=64, decoder_segmentation_channels=32
    )


def _segformer(classes: int) -> nn.Module:
    return smp.Segformer(ENCODER, encoder_weights=None, classes=classes, decoder_segmentation_channels=64)


def _upernet(classes: int) -> nn.Module:
    return smp.UPerNet(ENCODER, encoder_weights=None, classes=classes, decoder_channels=64)


#: By name; the first resizes by nearest, the others by bilinear.
HOSTS: dict[str, Callable[[int], nn.Module]] = {
    "unet": _unet,
    "fpn": _fpn,
    "segformer": _segformer,
    "upernet": _upernet,
}


# -- what stands for a learned upsampler ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RefinedConfig(UpsamplerConfig):
    """No options."""


class Refined(nn.Module):
    """The original resize, then a depthwise 3x3 convolution that starts as the identity: about a DySample's parameters."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ratio, self.mode = site.scale, site.mode
        self.corners = site.align_corners if site.mode in ("bilinear", "bicubic") else None
        self.refine = nn.Conv2d(site.channels, site.channels, 3, padding=1, groups=site.channels)
        nn.init.dirac_(self.refine.weight, groups=site.channels)
        nn.init.zeros_(self.refine.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
        """As `F.interpolate` is called."""
        if size is None and scale_factor is None:
            scale_factor = self.ratio
        x = F.interpolate(x, size=size, scale_factor=scale_factor, mode=self.mode, align_corners=self.corners)
        out: Tensor = self.refine(x)
        return out


@dataclasses.dataclass(frozen=True)
class BilinearConfig(UpsamplerConfig):
    """No options."""


class Bilinear(nn.Module):
    """A bilinear resize in the place of another."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ratio = site.scale

    def forward(self, x: Tensor, size: Any = None, scale_factor: Any = None) -> Tensor:
        """As `F.interpolate` is called."""
        if size is None and scale_factor is None:
            scale_factor = self.ratio
        return F.interpolate(x, size=size, scale_factor=scale_factor, mode="bilinear", align_corners=False)


@upswap.register_upsampler("refined", options=RefinedConfig)
def _refined(site: Site, _config: RefinedConfig) -> nn.Module:
    return Refined(site)


@upswap.register_upsampler("bilinear", options=BilinearConfig, exact=False)
def _bilinear(site: Site, _config: BilinearConfig) -> nn.Module:
    return Bilinear(site)


# -- arms -----------------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What becomes of a trained host before it is trained further: options of `upswap.patch`, or nothing."""

    options: dict[str, Any] | None
    from_scratch: bool = False
    """Whether it is trained from its initialisation on, for the host's steps and the arm's together."""


ARMS: dict[str, Arm] = {
    "unpatched": Arm(None),
    "bilinear": Arm({"upsampler": "bilinear", "verify": False}),
    "refined": Arm({"upsampler": "refined"}),
    "dysample-lp": Arm({"style": "lp"}),
    "dysample-pl": Arm({"style": "pl"}),
    "dysample-lp-scope": Arm({"style": "lp", "dyscope": True}),
    "dysample-lp-paper": Arm({"style": "lp", "init": "paper"}),
    "carafe": Arm({"upsampler": "carafe"}),
    "lda_aqu": Arm({"upsampler": "lda_aqu"}),
    "fade": Arm({"upsampler": "fade", "gating": False}),
    "freqfusion": Arm({"upsampler": "freqfusion"}),
    "scratch": Arm(None, from_scratch=True),
    "scratch-dysample-lp": Arm({"style": "lp"}, from_scratch=True),
}


def patched(model: nn.Module, arm: Arm, side: int) -> nn.Module:
    """The host as the arm has it."""
    if arm.options is not None:
        upswap.patch(model, torch.zeros(2, 3, side, side), **arm.options)
    return model
