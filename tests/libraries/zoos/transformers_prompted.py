"""The SAM family of transformers: masks of what points, boxes, text or earlier frames ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoos.case import Arguments, Case
from zoos.transformers_tiny import ONE_64, ONE_128, SOURCE, Settings, Size, build, case, numbered, relative_positions

SAM_MASKS: Settings = {
    "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_depth": 1,
    "iou_head_hidden_dim": 16,
}  # fmt: skip
SAM: Settings = {
    "vision_config": {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_dim": 16,
        "initializer_range": 0.02,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": SAM_MASKS,
}  # fmt: skip
SAM2: Settings = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 12, 16, 24], "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [3], "mlp_ratio": 1.0,
            "window_positional_embedding_background_size": [2, 2],
        },
        "backbone_channel_list": [24, 16, 12, 8], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "mask_input_channels": 4},
    "mask_decoder_config": {**SAM_MASKS, "hidden_size": 32},
}  # fmt: skip
EDGETAM: Settings = {
    **SAM2,
    "vision_config": {
        **SAM2["vision_config"], "backbone_channel_list": [256, 128, 64, 32],
        "backbone_config": {
            "model_type": "timm_wrapper", "architecture": "test_byobnet", "num_classes": 2, "initializer_range": 0.02,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
        },
    },
}  # fmt: skip
SAM_SITES = relative_positions("vision_encoder.layers", "attn")
SAM3_SITES = numbered("mask_decoder.pixel_decoder:{}", range(2), SOURCE)
SAM2_SITES = {"vision_encoder.backbone": "parameter", "vision_encoder.neck": SOURCE}


def points(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """One object with two points an image."""
    batch, height, width = size
    return {"input_points": torch.rand(batch, 1, 2, 2, generator=generator) * min(height, width)}


def points_and_masks(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """Points, and a mask of the image's size, which SAM 2 makes smaller."""
    batch, height, width = size
    masks = (torch.rand(batch, 1, height, width, generator=generator) > 0.5).float()
    return {**points(size, generator), "input_masks": masks}


PROMPTED: list[Case] = [
    case("sam", "SamModel", SAM, SAM_SITES, sizes=ONE_64, also=points),
    case(
        "sam-hq", "SamHQModel", {**SAM, "mask_decoder_config": {**SAM_MASKS, "vit_dim": 16}}, SAM_SITES, sizes=ONE_64,
        also=points,
    ),
    case("sam2", "Sam2Model", SAM2, SAM2_SITES, sizes=ONE_128, also=points),
    case(
        "sam2-with-a-mask", "Sam2Model", SAM2, {"root": "image", **SAM2_SITES}, sizes=ONE_128, also=points_and_masks,
        inferred=False, tested=False,
    ),
    case("edgetam", "EdgeTamModel", EDGETAM, {"vision_encoder.neck": SOURCE}, sizes=ONE_128, also=points),
]  # fmt: skip


SAM3_VISION: Settings = {
    "backbone_config": {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 128, "patch_size": 16, "window_size": 4, "global_attn_indexes": [1],
        "pretrain_image_size": 64,
    },
    "fpn_hidden_size": 32, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
}  # fmt: skip
SAM3_PART: Settings = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16}
SAM3: Settings = {
    "vision_config": SAM3_VISION,
    "text_config": {
        "model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 16, "max_position_embeddings": 8, "vocab_size": 30,
    },
    "geometry_encoder_config": {**SAM3_PART, "num_layers": 1}, "detr_encoder_config": {**SAM3_PART, "num_layers": 1},
    "detr_decoder_config": {**SAM3_PART, "num_layers": 2, "num_queries": 5},
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
}  # fmt: skip
SAM3_LITE: Settings = {
    **SAM3,
    "text_config": {
        "model_type": "sam3_lite_text_text_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 16, "max_position_embeddings": 10, "vocab_size": 30,
        "repmixer_kernel_size": 3,
    },
}  # fmt: skip
SAM3_TRACKER: Settings = {
    "vision_config": SAM3_VISION, "mask_decoder_config": {**SAM_MASKS, "hidden_size": 32},
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 4},
}  # fmt: skip
MEMORY: Settings = {
    "num_maskmem": 2, "memory_attention_hidden_size": 32, "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 16, "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 8, "mask_downsampler_embed_dim": 32,
    "memory_fuser_num_layers": 1, "memory_fuser_embed_dim": 32, "memory_fuser_intermediate_dim": 16,
}  # fmt: skip
SAM3_TRACKER_VIDEO: Settings = {**MEMORY, **SAM3_TRACKER, "image_size": 128}
SAM2_VIDEO: Settings = {**SAM2, **MEMORY, "image_size": 128}
EDGETAM_VIDEO: Settings = {
    **EDGETAM, **MEMORY, "vision_config": {"model_type": "edgetam_vision_model", **EDGETAM["vision_config"]},
    "image_size": 128, "memory_attention_mlp_hidden_size": 16, "memory_attention_rope_k_sizes": [4, 4],
    "perceiver_resampler_num_latents": 16, "perceiver_resampler_num_latents_2d": 16, "perceiver_resampler_hidden_size": 8,
    "perceiver_resampler_attention_head_dim": 8, "perceiver_resampler_mlp_intermediate_size": 8,
    "perceiver_resampler_num_layers": 1,
}  # fmt: skip
#: The masks it gives at the image's size, and its pyramid.
VIDEO_SITES = {"root": "logits", "vision_encoder.neck": SOURCE}
#: Class prefix -> package
ARCHITECTURES = {"Sam2Video": "sam2_video", "Sam3TrackerVideo": "sam3_tracker_video", "EdgeTamVideo": "edgetam_video"}


def words(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """What to look for, as token numbers."""
    return {
        "input_ids": torch.randint(1, 30, (size[0], 6), generator=generator),
        "attention_mask": torch.ones(size[0], 6, dtype=torch.long),
    }


def video(architecture: str) -> Callable[[nn.Module, int], Arguments]:
    """The first frame of a new session, which the model fills, with a point on one object."""

    def make(model: nn.Module, index: int) -> Arguments:
        import transformers

        session_of = getattr(
            getattr(transformers.models, ARCHITECTURES[architecture]), f"{architecture}InferenceSession"
        )
        generator = torch.Generator().manual_seed(index)
        frames = torch.randn(2, 3, 128, 128, generator=generator)
        session = session_of(video=frames, video_height=128, video_width=128, dtype=torch.float32)
        point = torch.rand(1, 1, 1, 2, generator=generator) * 128
        labels = torch.ones(1, 1, 1, dtype=torch.int)
        session.obj_id_to_idx(1)
        session.add_point_inputs(0, 0, {"point_coords": point, "point_labels": labels})
        session.obj_with_new_inputs = [1]
        return (), {"inference_session": session, "frame_idx": 0}

    return make


PROMPTED += [
    case("sam3", "Sam3Model", SAM3, SAM3_SITES, sizes=ONE_128, also=words),
    case(
        "sam3-lite-text", "Sam3LiteTextModel", SAM3_LITE,
        {"text_encoder.embeddings.position_embedding": "parameter", **SAM3_SITES}, sizes=ONE_128, also=words,
    ),
    case("sam3-tracker", "Sam3TrackerModel", SAM3_TRACKER, {}, sizes=ONE_128, also=points),
    # Their forwards are run in inference mode: nothing of them can be trained.
    *(
        Case("transformers", name, build(f"{model}Model", settings), video(model), None, expected=expected, inferred=False)
        for name, model, settings, expected in (
            ("sam2-video", "Sam2Video", SAM2_VIDEO, {"vision_encoder.backbone": "parameter", **VIDEO_SITES}),
            ("sam3-tracker-video", "Sam3TrackerVideo", SAM3_TRACKER_VIDEO, {"root": "logits"}),
            ("edgetam-video", "EdgeTamVideo", EDGETAM_VIDEO, VIDEO_SITES),
        )
    ),
]  # fmt: skip
