"""transformers models that are no dense predictors, and those that are right to have nothing to swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoos.case import Arguments, Case
from zoos.transformers_tiny import (
    GRAPH,
    LARGE,
    ONE_64,
    RESNET,
    SOURCE,
    STAGES,
    SWIN,
    VIT,
    Settings,
    Size,
    build,
    case,
    numbered,
    relative_positions,
)  # fmt: skip

SWIN2SR: Settings = {
    "image_size": 16, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "mlp_ratio": 1.0, "upscale": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
TEXT: Settings = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "vocab_size": 30,
}  # fmt: skip
#: Its image goes to SigLIP, and larger to SAM, whose 5x5 map is resized to 8x8.
DEEPSEEK: Settings = {
    "text_config": {
        "model_type": "llama", **TEXT, "vocab_size": 40, "max_position_embeddings": 64, "num_key_value_heads": 2,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", **VIT, "image_size": 24, "patch_size": 12, "num_hidden_layers": 1,
    },
    "high_res_vision_config": {
        "model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 80, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1],
        "mlp_dim": 16, "initializer_range": 0.02,
    },
    "image_token_id": 39,
}  # fmt: skip
GROUPVIT: Settings = {
    "text_config": {**TEXT, "eos_token_id": 1},
    "vision_config": {
        **VIT, "depths": [1, 1, 2], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4],
        "assign_mlp_ratio": [0.5, 2],
    },
    "projection_dim": 16, "projection_intermediate_dim": 16,
}  # fmt: skip
CLAP: Settings = {
    "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "depths": [1, 1], "num_attention_heads": [1, 2],
    "num_hidden_layers": 2, "patch_embeds_hidden_size": 8, "hidden_size": 16, "mlp_ratio": 1.0,
}  # fmt: skip


def emu3_decoder() -> nn.Module:
    """The decoder of Emu 3's video autoencoder, which has no forward of its own."""
    settings = {
        "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "hidden_size": 32, "attn_resolutions": [], "temporal_downsample_factor": 2,
    }  # fmt: skip
    return build("Emu3VQVAE", settings)().decoder


def latents(batch: int) -> Callable[[nn.Module, int], Arguments]:
    """Latents of a video of two steps and what they were quantised to: (B, T, C, H, W)."""

    def make(model: nn.Module, index: int) -> Arguments:
        generator = torch.Generator().manual_seed(index)
        side = 4 + 2 * index
        return tuple(torch.randn(batch, 2, 4, side, side, generator=generator) for _ in range(2)), {}

    return make


def spectrogram(batch: int) -> Callable[[nn.Module, int], Arguments]:
    """Of fewer time steps than the model works on, to which it is resized."""

    def make(model: nn.Module, index: int) -> Arguments:
        generator = torch.Generator().manual_seed(index)
        return (), {"input_features": torch.randn(batch, 1, 200 + 20 * index, 16, generator=generator)}

    return make


def text(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """A sentence, as token numbers."""
    return {
        "input_ids": torch.randint(1, 30, (size[0], 6), generator=generator),
        "attention_mask": torch.ones(size[0], 6, dtype=torch.long),
    }


def resized_positions(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True}


def text_and_resized_positions(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {**text(size, generator), "interpolate_pos_encoding": True}


def segmented_text(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {**text(size, generator), "output_segmentation": True}


def high_resolution(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """A prompt with the tokens that an image takes, and the image at a larger size."""
    batch = size[0]
    tokens = torch.cat([torch.full((batch, 4), 39), torch.randint(1, 30, (batch, 3), generator=generator)], 1)
    return {"input_ids": tokens, "high_res_pixel_values": torch.randn(batch, 3, 80, 80, generator=generator)}


def prompts(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """An image and its segmentation, as an example of the task."""
    names = ("prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(size[0], 3, *size[1:], generator=generator) for name in names}


def noise(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """What decides the patches to mask, and would be drawn anew at each forward."""
    return {"noise": torch.rand(size[0], 4, generator=generator)}


OTHERS = [
    case(
        "janus-vqvae", "JanusVQVAE",
        {
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "num_patches": 8,
        },
        numbered("decoder.up.{}.upsample", range(2), GRAPH), sizes=((1, 32, 32), (2, 32, 32)),
    ),
    Case(  # norms that resize the quantised latents to their own size, three times to what they have already
        "transformers", "emu3-vqvae-decoder", emu3_decoder, latents(1), lambda model: latents(2)(model, 0),
        expected={
            "time_conv.0": "sequence", "middle_block.attn_norm": "identity",
            **numbered("middle_block.block_1.norm{}", (1, 2), "identity"),
            **numbered("middle_block.block_2.norm{}", (1, 2), "identity"),
            **numbered("up_block.up.1.block.0.norm{}", (1, 2), "identity"),
            **numbered("up_block.up.1.block.1.norm{}", (1, 2), "identity"), "up_block.up.1.upsample": GRAPH,
            **numbered("up_block.up.0.block.0.norm{}", (1, 2), GRAPH),
            **numbered("up_block.up.0.block.1.norm{}", (1, 2), GRAPH), "norm_out": GRAPH,
        },
        inferred=False,
    ),
    case(
        "swin2sr-nearest", "Swin2SRForImageSuperResolution", {**SWIN2SR, "upsampler": "nearest+conv"},
        numbered("upsample:{}", range(2), GRAPH), sizes=((1, 16, 16), (2, 24, 16)),
    ),
    case(
        "swin2sr-aux", "Swin2SRForImageSuperResolution", {**SWIN2SR, "upsampler": "pixelshuffle_aux"}, {"root": "image"},
        sizes=((1, 16, 16), (2, 24, 16)), tested=False,
    ),
    case(
        "deepseek-vl-hybrid", "DeepseekVLHybridModel", DEEPSEEK,
        {
            **relative_positions("high_res_vision_model.vision_encoder.layers", "attn"),
            "high_res_vision_proj": SOURCE,
        },
        sizes=((1, 24, 24), (2, 24, 24)), also=high_resolution, inferred=False,
    ),
    # Attention maps, made under no_grad for the output alone.
    case(
        "groupvit", "GroupViTModel", GROUPVIT, numbered("root:{}", range(2), "other"), sizes=ONE_64, also=segmented_text,
        inferred=False,
    ),
    Case(  # the spectrogram, of which only a norm was taken
        "transformers", "clap-audio", build("ClapAudioModel", CLAP), spectrogram(1), lambda model: spectrogram(2)(model, 0),
        expected={"audio_encoder": "image"}, inferred=False,
    ),
]  # fmt: skip

DETR: Settings = {
    "backbone_config": RESNET, "d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "decoder_layers": 1, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 5,
}  # fmt: skip
DEFORMABLE: Settings = {
    **DETR, "d_model": 32, "decoder_layers": 2, "backbone_config": {**RESNET, "out_features": STAGES[1:]},
    "num_feature_levels": 4, "encoder_n_points": 2, "decoder_n_points": 2, "disable_custom_kernels": True,
}  # fmt: skip
GROUNDING: Settings = {
    **DEFORMABLE, "backbone_config": {**SWIN, "out_features": STAGES[1:]}, "text_config": {"model_type": "bert", **TEXT},
    "max_text_len": 6,
}  # fmt: skip
LW_DETR: Settings = {
    "backbone_config": {
        "model_type": "lw_detr_vit", "image_size": 64, "pretrain_image_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "mlp_ratio": 1, "num_windows": 4, "out_indices": [0, 1], "window_block_indices": [0],
    },
    "projector_scale_factors": [1.0], "d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 1,
    "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "num_queries": 5, "group_detr": 2,
    "decoder_n_points": 2, "num_labels": 5,
}  # fmt: skip
VIT_1: Settings = {**VIT, "num_hidden_layers": 1}
#: Larger than the 64x64 that the tiny ViT's positions are for.
OTHER_THAN_64: tuple[Size, ...] = ((1, 96, 96), (2, 64, 96))


def masks(owner: str, count: int) -> dict[str, str]:
    """The masks of ones that a model makes where it is given none."""
    return numbered(owner + ":{}", range(count), "parameter")


#: Masks of ones, position embeddings, relative positions, and masks of patches.
NOTHING = [
    case("detr", "DetrForObjectDetection", DETR, masks("model.backbone", 4)),
    case("conditional-detr", "ConditionalDetrForObjectDetection", DETR, masks("model.backbone", 4), tested=False),
    case(
        "dab-detr", "DabDetrForObjectDetection", {**DETR, "hidden_size": 16}, masks("model.backbone.conv_encoder", 4),
        tested=False,
    ),
    case(
        "deformable-detr", "DeformableDetrForObjectDetection", DEFORMABLE,
        {"model": "parameter", **masks("model.backbone", 3)}, sizes=LARGE, tested=False,
    ),
    case(
        "table-transformer", "TableTransformerForObjectDetection", DETR, masks("model.backbone.conv_encoder", 4),
        tested=False,
    ),
    case(
        "grounding-dino", "GroundingDinoForObjectDetection", GROUNDING,
        {"model": "parameter", **masks("model.backbone.conv_encoder", 3)}, sizes=LARGE, also=text, tested=False,
    ),
    case(
        "mm-grounding-dino", "MMGroundingDinoForObjectDetection", GROUNDING,
        {"model": "parameter", **masks("model.backbone.conv_encoder", 3)}, sizes=LARGE, also=text, tested=False,
    ),
    case(
        "lw-detr", "LwDetrForObjectDetection", LW_DETR,
        {"model.backbone": "parameter", "model.backbone.backbone.embeddings": "parameter"}, sizes=ONE_64, tested=False,
    ),
    case(
        "yolos", "YolosForObjectDetection",
        {
            **VIT_1, "image_size": [64, 64], "num_detection_tokens": 5, "use_mid_position_embeddings": False,
            "num_labels": 5,
        },
        {"vit.embeddings.interpolation": "parameter"}, tested=False,
    ),
    case(
        "vit", "ViTForImageClassification", {**VIT_1, "num_labels": 5}, {"vit.embeddings": "parameter"},
        sizes=OTHER_THAN_64, also=resized_positions, inferred=False, tested=False,
    ),
    case(
        "dinov2", "Dinov2Model", {**VIT_1, "mlp_ratio": 1}, {"embeddings": "parameter"}, sizes=OTHER_THAN_64,
    ),
    case(
        "pvt", "PvtForImageClassification",
        {
            "image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [1, 1, 1, 1], "num_labels": 5,
        },
        numbered("pvt.encoder.patch_embeddings.{}", range(4), "parameter"), sizes=ONE_64, tested=False,
    ),
    case(
        "hiera", "HieraForPreTraining",
        {
            "image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "mlp_ratio": 1.0,
            "decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 1,
        },
        {"hiera.embeddings.patch_embeddings": "mask"}, sizes=ONE_64, also=noise, inferred=False,
    ),
    case(
        "radio", "RadioModel", {**VIT_1, "mlp_ratio": 1.0, "max_img_size": 128, "num_registers": 1},
        {"embeddings": "parameter"}, tested=False,  # its patches are projected by a linear layer
    ),
    case(
        "seggpt", "SegGptForImageSegmentation",
        {
            "image_size": [64, 32], "pretrain_image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "mlp_dim": 16, "decoder_hidden_size": 8, "merge_index": 0,
            "intermediate_hidden_state_indices": [0, 1], "drop_path_rate": 0.0,
        },
        {"model.embeddings": "parameter", **relative_positions("model.encoder.layers", "attention")},
        sizes=((1, 32, 32), (2, 32, 32)), also=prompts, tested=False,
    ),
    case(
        "clip", "CLIPModel", {"text_config": {**TEXT, "eos_token_id": 1}, "vision_config": VIT_1, "projection_dim": 8},
        {"vision_model.embeddings": "parameter"}, sizes=OTHER_THAN_64, also=text_and_resized_positions,
        inferred=False, tested=False,
    ),
    case(
        "clipseg", "CLIPSegForImageSegmentation",
        {
            "text_config": {**TEXT, "eos_token_id": 1}, "vision_config": {**VIT, "num_hidden_layers": 2},
            "projection_dim": 16, "extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 8,
        },
        {"clip.vision_model.embeddings": "parameter"}, sizes=((1, 96, 96), (2, 96, 96)), also=text, tested=False,
    ),
    case(  # the positions of each image are resized to its valid part: one call an image
        "vilt", "ViltModel", {**VIT_1, "vocab_size": 30, "max_position_embeddings": 16}, masks("embeddings", 3), also=text,
    ),
]  # fmt: skip
