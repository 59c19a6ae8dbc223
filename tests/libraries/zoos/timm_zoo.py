"""timm: a small member of every family that resizes something in its forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv5 import MobileNetV5, MobileNetV5Encoder
from torch import nn

from zoos.case import Case, batches, seeded_case

Shape = tuple[int, int, int]


def case(name: str, build: Callable[[], nn.Module], expected: dict[str, str], *shapes: Shape, **fields: Any) -> Case:
    """A case of batches of these shapes."""
    return seeded_case("timm", name, build, expected, batches(*shapes), count=len(shapes), **fields)


def made(model: str, **options: Any) -> Callable[[], nn.Module]:
    options = {"num_classes": 3, **options}
    if options.get("features_only"):
        del options["num_classes"]
    return functools.partial(timm.create_model, model, pretrained=False, **options)


# HRNet: every branch of a module gets every lower one, each by its own layer.


def stage(branches: int) -> dict[str, Any]:
    """A stage with one module of narrow branches, one block each."""
    return {
        "num_modules": 1,
        "num_branches": branches,
        "block_type": "BASIC",
        "num_blocks": (1,) * branches,
        "num_channels": (8, 16, 24, 32)[:branches],
        "fuse_method": "SUM",
    }


HRNET_SIZE = {f"stage{branches}": stage(branches) for branches in (2, 3, 4)}
HRNET = {
    f"stage{branches}.0.fuse_layers.{high}.{low}.2": "feature => module"
    for branches in (2, 3, 4)
    for high in range(branches)
    for low in range(high + 1, branches)
}

# CoaT: in a parallel block, each of three scales goes to each other one, up and down, on one line of code.

UP = "feature => source"


def coat(blocks: int) -> dict[str, str]:
    return {
        f"parallel_blocks.{block}:{step}": UP if step < 3 else "downsample"
        for block in range(blocks)
        for step in range(6)
    }


def coat_tiny(**options: Any) -> Callable[[], nn.Module]:
    """With weights large enough for the scales to hear of each other: initial ones of 0.02 leave a hundred-thousandth."""

    def build() -> nn.Module:
        model = made("coat_tiny", **COAT_SIZE, **options)()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2.0)
        return model

    return build


COAT_SIZE = {"img_size": 64, "embed_dims": (16, 32, 32, 32), "serial_depths": (1,) * 4, "parallel_depth": 2}

# MobileNetV5: the last two scales are fused, and brought to a fixed grid where that does not divide theirs.

MOBILE_BLOCKS = [
    ["er_r1_k3_s2_e2_c8"],
    ["uir_r1_a3_k5_s2_e2_c16"],
    ["uir_r1_a5_k5_s2_e2_c16", "mqa_r1_k3_h2_s2_d8_c16", "uir_r1_a0_k0_s1_e2_c16"],
    ["uir_r1_a5_k5_s2_e2_c32", "mqa_r1_k3_h2_v2_s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
]


def mobilenet(form: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    options = {"stem_size": 8, "msfa_output_resolution": 4, **options}
    return lambda: form(decode_arch_def(MOBILE_BLOCKS), **options)


# GhostNet: from the third stage on, the first layer of each block multiplies its map with a smaller one, resized.

GHOST = {
    f"blocks.{stage}.{block}.ghost1": "gate"
    for stage, count in enumerate((1, 1, 1, 1, 1, 1, 5, 1, 4))
    for block in range(count)
    if stage > 1
}

SIZES = ((2, 96, 96), (2, 96, 128))
SQUARES = ((2, 64, 64), (3, 64, 64))
#: No map of these is cut by a patch, so that MobileViT has nothing to round up to.
EVEN = ((2, 64, 64), (2, 64, 128))
#: MobileNetV5's fixed grid is 4x4, which these maps have or are whole multiples of; others it makes smaller.
GRID = ((2, 64, 64), (2, 64, 128))
MSFA = {"msfa:0": UP, "msfa:1": "downsample"}

# Vision transformers that resize their position embeddings to the image.

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
DYNAMIC = {"dynamic_img_size": True, **VIT}
POSITIONS: dict[str, tuple[dict[str, Any], tuple[Shape, ...]]] = {
    "vit_tiny_patch16_224": (DYNAMIC, SIZES),
    "vit_tiny_r_s16_p8_224": (DYNAMIC, SIZES),
    "vitamin_small_224": ({"dynamic_img_size": True, "depth": 1}, SIZES),
    "flexivit_small": (DYNAMIC, SIZES),
    "deit_tiny_distilled_patch16_224": (DYNAMIC, SIZES),
    "eva02_tiny_patch14_224": ({"patch_size": 16, **DYNAMIC}, SIZES),
    "hiera_small_abswin_256": ({"img_size": 64, "embed_dim": 8}, SQUARES),
    "hieradet_small": ({"embed_dim": 8}, EVEN),
}

CASES = [
    case("hrnet_w18_small", made("hrnet_w18_small", **HRNET_SIZE), HRNET, *SIZES),
    case("hrnet_w18_small-features", made("hrnet_w18_small", features_only=True, **HRNET_SIZE), HRNET, *SIZES),
    case(
        "hrnet_w18_small-plain_features",
        made("hrnet_w18_small", features_only=True, feature_location="", **HRNET_SIZE),
        # The last sums are what it gives out, with no convolution after them.
        {name: "logits" if name.startswith("stage4") else kind for name, kind in HRNET.items()},
        *SIZES,
    ),
    case(
        "coat_tiny",
        coat_tiny(),
        # The classifier reads class tokens, which the last block does not resize: its upsamplers would never learn.
        {name: "feature" if kind == UP and ".1:" in name else kind for name, kind in coat(2).items()},
        *SQUARES,
        options={"exclude": ("parallel_blocks.1:*",)},
    ),
    case(
        "coat_tiny-features",
        coat_tiny(features_only=True),
        {f"model.{name}": kind for name, kind in coat(2).items()},
        *SQUARES,
    ),
    case("mobilenetv5", mobilenet(MobileNetV5, num_classes=3, num_features=32), MSFA, *GRID),
    case("mobilenetv5_enc", mobilenet(MobileNetV5Encoder), MSFA, *GRID),
    case(
        "mobilenetv5-fixed_grid",
        mobilenet(MobileNetV5, num_classes=3, num_features=32, msfa_output_resolution=16),
        # Up to 16x16 here, down to it from a large image.
        {"msfa:0": UP, "msfa:1": "context"},
        *SIZES,
    ),
    case(
        "cpubone_nano",
        made("cpubone_nano", head_widths=(16, 16)),
        {"stages.2.1.total.0.0.main.1.upsampling.1": "feature => module"},
        *SIZES,
    ),
    case(
        "efficientformerv2_s0",
        made(
            "efficientformerv2_s0",
            img_size=64,
            depths=(1, 1, 2, 1),
            mlp_ratios=(4, 4, (4, 4), (4,)),
            layer_scale_init_value=1.0,
        ),
        {f"stages.2.blocks.{block}.token_mixer.upsample": "feature => module" for block in range(2)},
        *SQUARES,
    ),
    # Rounds its maps up to whole patches and back, where they are not whole: from 64 pixels on, only at another size.
    case(
        "mobilevit_xxs",
        made("mobilevit_xxs"),
        {"stages.4.1:0": "other", "stages.4.1:1": "downsample"},
        *EVEN,
        (1, 96, 96),
    ),
    case(
        "mobilevit_xxs-rounding",
        made("mobilevit_xxs"),
        {"stages.4.1:0": "context", "stages.4.1:1": "downsample"},
        *SIZES,
        inferred=False,
    ),
    case("mobilevitv2_050-rounding", made("mobilevitv2_050"), {"stages.4.1": "context"}, *SIZES, inferred=False),
    # Gates: an attention map made small, resized and multiplied with the features.
    case(
        "csatv2",
        made("csatv2", dims=(8, 16, 24, 32), depths=(1, 1, 3, 3)),
        {"stages.0.0": "gate", "stages.1.1": "gate", "stages.2.1": "gate", "stages.3.1": "gate"},
        *SIZES,
    ),
    case("ghostnetv2_100", made("ghostnetv2_100"), GHOST, *SIZES),
    case("ghostnetv3_050", made("ghostnetv3_050"), GHOST, *SIZES),
    # Images: two scales of the input.
    case(
        "crossvit_tiny_240",
        made(
            "crossvit_tiny_240",
            img_size=64,
            img_scale=(1.0, 0.75),
            patch_size=(8, 12),
            embed_dim=(16, 32),
            depth=((1, 1, 0),),
            num_heads=(2, 2),
            mlp_ratio=(2, 2, 1),
        ),
        {"root": "image"},
        *SQUARES,
    ),
    *(
        case(name, made(name, **options), {"root": "parameter"}, *shapes)
        for name, (options, shapes) in POSITIONS.items()
    ),
    case("qwen3_vit_88m", made("qwen3_vit_88m", depth=2, embed_dim=64, num_heads=2), {"encoder": "parameter"}, *EVEN),
    case("naflexvit_base_patch16_gap", made("naflexvit_base_patch16_gap", **VIT), {"embeds": "parameter"}, *SIZES),
    case(
        "naflexvit_base_patch16_parfac_gap",
        made("naflexvit_base_patch16_parfac_gap", **VIT),
        {"embeds:0": "parameter", "embeds:1": "parameter"},
        *SIZES,
    ),
    case(
        "samvit_base_patch16",
        made("samvit_base_patch16", img_size=128, global_attn_indexes=(1,), window_size=4, neck_chans=16, **VIT),
        {"root": "parameter", "blocks.1.attn:0": "parameter", "blocks.1.attn:1": "parameter"},
        *EVEN,
    ),
    case("resnet50_clip", made("resnet50_clip"), {"head": "parameter"}, *SIZES, tested=False),
]
