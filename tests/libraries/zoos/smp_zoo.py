"""segmentation-models-pytorch, for the coverage command: every architecture over encoders of different families.

`tests/libraries/test_smp.py` holds what is expected of each site. The `PAPER_CASES` are hosts of the DySample paper that no
other library here has: Panoptic FPN's two halves, the pyramid with three top-down steps and the semantic head on it, are SMP's
FPN.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import segmentation_models_pytorch as smp
from torch import nn

from zoos.case import Case, batches, seeded_case

ARCHITECTURES = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "PAN",
    "UPerNet",
    "Segformer",
    "DPT",
)
ENCODERS = ("resnet18", "mit_b0", "efficientnet-b0", "tu-convnext_atto", "tu-pvt_v2_b0")
#: What SMP refuses to build, or what the encoder does not have (dilation).
REFUSED = {
    *((architecture, "mit_b0") for architecture in ("UnetPlusPlus", "Linknet")),
    *((architecture, "tu-pvt_v2_b0") for architecture in ("DeepLabV3", "DeepLabV3Plus", "PAN")),
}
#: Encoders that take images of one size, in pixels.
FIXED = {"tu-swin_tiny_patch4_window7_224": 224, "tu-vit_tiny_patch16_224": 224}


def build(architecture: str, encoder: str, **options: Any) -> nn.Module:
    """An architecture for three classes."""
    if architecture == "DPT":  # narrower than the published model, for time
        options = {"decoder_intermediate_channels": (32, 48, 64, 64), "decoder_fusion_channels": 32, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what SMP and timm say of their own settings
        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=3, **options)


def case(architecture: str, encoder: str) -> Case:
    if encoder in FIXED:
        side = FIXED[encoder]
        inputs = batches((1, side, side), (2, side, side))
    elif architecture == "PAN":  # pools its map three times at a 32nd of the image
        inputs = batches((1, 256, 256), (2, 256, 288))
    else:
        inputs = batches((1, 64, 64), (2, 64, 96))
    make = functools.partial(build, architecture, encoder)
    return seeded_case("smp", f"{architecture}-{encoder}", make, None, inputs, count=2, tested=False)


CASES = [
    *(
        case(architecture, encoder)
        for architecture in ARCHITECTURES
        for encoder in ENCODERS
        if architecture != "DPT" and (architecture, encoder) not in REFUSED
    ),
    *(case(architecture, "tu-swin_tiny_patch4_window7_224") for architecture in ("Unet", "PSPNet", "UPerNet")),
    case("DPT", "tu-vit_tiny_patch16_224"),
]

FEATURE = "feature => source"
#: The pyramid swapped and the semantic head left alone, as the authors did.
PANOPTIC = {
    **{f"decoder.p{level}": FEATURE for level in (4, 3, 2)},
    **{f"decoder.seg_blocks.0.block.{step}": "feature" for step in range(3)},
    **{f"decoder.seg_blocks.1.block.{step}": "feature" for step in range(2)},
    "decoder.seg_blocks.2.block.0": "feature",
    "segmentation_head.1": "logits",
}
SEGFORMER = {
    **{f"decoder:{step}": FEATURE for step in range(3)},
    "decoder:3": "identity",
    "segmentation_head.1": "logits",
}
PAPER_INPUTS = batches((1, 64, 64), (2, 64, 96))


PAPER_CASES = [
    *(
        seeded_case(
            "smp",
            f"panoptic_fpn-{encoder}",
            functools.partial(build, "FPN", encoder),
            PANOPTIC,
            PAPER_INPUTS,
            count=2,
            options={"exclude": ("decoder.seg_blocks*",)},
        )
        for encoder in ("resnet50", "resnet101")
    ),
    seeded_case(
        "smp", "segformer_b1", functools.partial(build, "Segformer", "mit_b1"), SEGFORMER, PAPER_INPUTS, count=2
    ),
]
