"""More transformers models that resize features: dense prediction, matching, detection and reading of documents."""

from __future__ import annotations

from typing import Any

import torch

from zoos.transformers_tiny import (
    DINOV2,
    DPT_NECK,
    GRAPH,
    HGNET,
    MEDIUM,
    MODULE,
    ONE_64,
    PATCHES_14,
    RESNET,
    RTDETR,
    RTDETR_SITES,
    SOURCE,
    STAGES,
    SWIN,
    VIT,
    Settings,
    Size,
    case,
    numbered,
    relative_positions,
)  # fmt: skip

#: Queries times channels: their maps are resized as one batch.
DETR: Settings = {
    "backbone_config": RESNET, "d_model": 64, "encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 8,
    "decoder_layers": 1, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 5,
}  # fmt: skip
VITDET: Settings = {
    "model_type": "vitdet", "image_size": 64, "pretrain_image_size": 64, "patch_size": 16, "num_channels": 4, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1, "out_features": ["stage2"],
}  # fmt: skip
VITPOSE_BACKBONE: Settings = {
    "model_type": "vitpose_backbone", "image_size": [64, 48], "patch_size": [16, 16], "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1, "out_indices": [2],
}  # fmt: skip
DINOV3: Settings = {
    "model_type": "dinov3_vit", "image_size": 64, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_register_tokens": 1, "out_indices": [1, 2, 3, 4],
    "apply_layernorm": True,
}  # fmt: skip
TIPSV2: Settings = {
    "backbone_config": {
        "model_type": "tipsv2_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "mlp_ratio": 1, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False,
    },
    "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "num_depth_bins": 64, "num_labels": 5,
}  # fmt: skip
TIPSV2_SITES = {"backbone.embeddings": "parameter", **DPT_NECK}
EOMT: Settings = {
    **VIT, "num_blocks": 2, "num_queries": 5, "num_upscale_blocks": 1, "mlp_ratio": 1, "num_register_tokens": 0,
    "num_labels": 5,
}  # fmt: skip
#: Three scales of the image in patches, as in the released model: at the size it was made for, every merged map has its size.
DEPTH_PRO: Settings = {
    "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [8, 8],
    "scaled_images_ratios": [0.25, 0.5, 1], "scaled_images_overlap_ratios": [0.0, 0.5, 0.25],
    "scaled_images_feature_dims": [8, 8, 8], "merge_padding_value": 1, "use_fov_model": True, "num_fov_head_layers": 1,
    **{
        f"{part}_model_config": {
            "model_type": "dinov2", "image_size": 16, "patch_size": 2, "hidden_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "mlp_ratio": 1,
        }
        for part in ("image", "patch", "fov")
    },
}  # fmt: skip
LOFTR: Settings = {
    "stage_num_blocks": [1, 1, 1, 1], "out_features": [8, 8, 16, 16], "stage_stride": [2, 1, 2, 2], "hidden_size": 16,
    "num_attention_layers": 2, "num_attention_heads": 8, "q_aggregation_kernel_size": 2, "kv_aggregation_kernel_size": 2,
    "q_aggregation_stride": 2, "kv_aggregation_stride": 2, "coarse_matching_threshold": 0.0,
    "coarse_matching_border_removal": 0, "fine_matching_slice_dim": 4,
}  # fmt: skip
OMDET: Settings = {
    "backbone_config": {**SWIN, "out_features": STAGES[1:]},
    "text_config": {
        "model_type": "clip_text_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 16, "intermediate_size": 16, "max_position_embeddings": 16, "vocab_size": 30,
    },
    "text_projection_in_dim": 24, "text_projection_out_dim": 24, "class_embed_dim": 24, "task_encoder_hidden_dim": 16,
    "num_queries": 5, "encoder_hidden_dim": 16, "decoder_hidden_dim": 16, "vision_features_channels": [16, 16, 16],
    "encoder_in_channels": [16, 32, 64], "encoder_dim_feedforward": 16, "encoder_attention_heads": 2,
    "decoder_num_heads": 2, "decoder_num_layers": 1, "decoder_dim_feedforward": 16, "decoder_num_points": 2,
    "image_size": 96, "apply_layernorm_after_vision_backbone": False,
}  # fmt: skip
RF_DETR: Settings = {
    "backbone_config": {
        "model_type": "rf_detr_dinov2", "image_size": 56, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "mlp_ratio": 1, "num_windows": 2, "out_indices": [1, 2, 3],
    },
    "d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 2, "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2, "decoder_n_points": 2, "num_queries": 5, "group_detr": 2, "intermediate_size": 16,
    "num_labels": 5,
}  # fmt: skip


def pair(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """The two images to match, as one tensor of five dimensions."""
    batch, height, width = size
    return {"pixel_values": torch.randn(batch, 2, 3, height, width, generator=generator)}


def prompt(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """A coarse depth map."""
    return {"prompt_depth": torch.rand(size[0], 1, 20, 24, generator=generator)}


def classes(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """Two classes an image, and a task, as token numbers."""
    batch = size[0]
    return {
        "classes_input_ids": torch.randint(1, 30, (2 * batch, 6), generator=generator),
        "classes_attention_mask": torch.ones(2 * batch, 6, dtype=torch.long),
        "classes_structure": torch.full((batch,), 2),
        "tasks_input_ids": torch.randint(1, 30, (batch, 8), generator=generator),
        "tasks_attention_mask": torch.ones(batch, 8, dtype=torch.long),
    }


def detr_sites(prefix: str) -> dict[str, str]:
    """The masks that the model makes, and the three steps of its mask head."""
    return {
        **numbered(f"{prefix}.model.backbone:{{}}", range(4), "parameter"),
        **numbered("mask_head.fpn_stages.{}", range(3), GRAPH),
    }


def loftr_sites(prefix: str) -> dict[str, str]:
    """Attention at half the size; crossing from either image to the other is one module, called twice."""
    layers = prefix + "local_feature_transformer.layers.{}."
    return {
        **numbered(layers + "self_attention", range(2), SOURCE),
        **numbered(layers + "cross_attention", range(2), SOURCE),
    }


DENSE = [
    case("detr-segmentation", "DetrForSegmentation", DETR, detr_sites("detr"), sizes=MEDIUM),
    case(
        "conditional-detr-segmentation", "ConditionalDetrForSegmentation", DETR, detr_sites("conditional_detr"),
        sizes=MEDIUM, tested=False,
    ),
    case(
        "prompt-depth-anything", "PromptDepthAnythingForDepthEstimation",
        {
            "backbone_config": DINOV2, "reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8, "head_hidden_size": 4,
        },
        {
            "backbone.embeddings": "parameter", **numbered("neck.fusion_stage.layers.{}:0", range(4), "image"),
            **numbered("neck.fusion_stage.layers.{}:1", range(4), SOURCE), "head": SOURCE,
        },
        sizes=PATCHES_14, also=prompt, inferred=False,
    ),
    case(  # maps of one size whatever the image's, resized to what the image's size asks for
        "depth-pro", "DepthProForDepthEstimation", DEPTH_PRO,
        {
            "depth_pro.encoder.image_encoder:0": "image", "depth_pro.encoder.image_encoder:1": "context",
            **numbered("depth_pro.encoder.patch_encoder:{}", range(3), "image"),
            **numbered("depth_pro.encoder.patch_encoder:{}", range(3, 6), "context"),
            **numbered("depth_pro.encoder.patch_encoder:{}", range(6, 8), "identity"),
            "fov_model.fov_encoder:0": "image", "fov_model.fov_encoder:1": "context", "fov_model.head": "context",
        },
        sizes=((1, 64, 64), (2, 64, 96)),
    ),
    case(
        "vitmatte", "VitMatteForImageMatting",
        {
            "backbone_config": VITDET, "hidden_size": 16, "convstream_hidden_sizes": [8, 8, 8],
            "fusion_hidden_sizes": [8, 8, 8, 8], "initializer_range": 1.0,
        },
        {"backbone.embeddings": "parameter", **numbered("decoder.fusion_blocks.{}", range(4), GRAPH)}, channels=4,
    ),
    case(
        "vitpose", "VitPoseForPoseEstimation", {"backbone_config": VITPOSE_BACKBONE, "num_labels": 5},
        {"head.upsampling": MODULE}, sizes=((1, 64, 48), (2, 64, 48)),
    ),
    case("efficientloftr", "EfficientLoFTRModel", LOFTR, loftr_sites(""), also=pair, sizes=MEDIUM),
    case(
        "efficientloftr-matching", "EfficientLoFTRForKeypointMatching", LOFTR,
        {
            **loftr_sites("efficientloftr."), "refinement_layer": SOURCE,
            **numbered("refinement_layer.out_conv_layers.{}", range(2), GRAPH),
        },
        also=pair, sizes=MEDIUM, tested=False,
    ),
    case(
        "chmv2", "CHMv2ForDepthEstimation",
        {
            "backbone_config": {**DINOV3, "return_class_token": True}, "patch_size": 16,
            "post_process_channels": [8, 8, 16, 16], "fusion_hidden_size": 8, "head_hidden_size": 8,
            "number_output_channels": 64,
        },
        {**numbered("head.fusion_layers.{}", range(4), SOURCE), "head.conv_depth.head.1": MODULE},
        # Five resizes with aligned corners, whose rounding a mean over bins, weighted by ReLUs over their sum, magnifies.
        tolerance=3e-5,
    ),
    case(
        "tipsv2-dpt-dense", "Tipsv2DptForDensePrediction", TIPSV2,
        {
            "backbone.embeddings": "parameter", **numbered("depth_neck.fusion_stage.layers.{}", range(4), SOURCE),
            **numbered("normals_neck.fusion_stage.layers.{}", range(4), SOURCE),
            **numbered("segmentation_neck.fusion_stage.layers.{}", range(4), SOURCE),
        },
        sizes=PATCHES_14, tested=False,
    ),
    case("tipsv2-dpt-depth", "Tipsv2DptForDepthEstimation", TIPSV2, TIPSV2_SITES, sizes=PATCHES_14),
    case("tipsv2-dpt-normals", "Tipsv2DptForNormalEstimation", TIPSV2, TIPSV2_SITES, sizes=PATCHES_14, tested=False),
    case("tipsv2-dpt-segmentation", "Tipsv2DptForSemanticSegmentation", TIPSV2, TIPSV2_SITES, sizes=PATCHES_14, tested=False),
    case(
        "mobilenet-v2", "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.1, "min_depth": 8, "depth_divisible_by": 8, "expand_ratio": 1.0, "num_labels": 5},
        {"segmentation_head": "context"},
    ),
    case("eomt", "EomtForUniversalSegmentation", EOMT, numbered("root:{}", range(2), "logits"), sizes=ONE_64),
    case(
        "eomt-dinov3", "EomtDinov3ForUniversalSegmentation", EOMT, numbered("root:{}", range(2), "logits"),
        sizes=ONE_64, tested=False,
    ),
    case(
        "deimv2", "Deimv2ForObjectDetection", {**RTDETR, "backbone_config": HGNET},
        numbered("model.encoder:{}", range(2), SOURCE), sizes=MEDIUM, tested=False,
    ),
    case(
        "deimv2-lite", "Deimv2ForObjectDetection",
        {
            **RTDETR, "backbone_config": {**HGNET, "out_features": STAGES[2:]}, "encoder_type": "lite",
            "encoder_in_channels": [16, 16], "num_feature_levels": 2, "feat_strides": [16, 32],
            "decoder_in_channels": [16, 16],
        },
        {"model.encoder": SOURCE}, sizes=MEDIUM, tested=False,
    ),
    case(  # one line resizes by 2, 1 and 0.5
        "deimv2-dinov3", "Deimv2ForObjectDetection",
        {**RTDETR, "backbone_config": {**DINOV3, "out_indices": [2, 3, 4]}, "encoder_in_channels": [16, 16, 16]},
        {
            "model.conv_encoder:0": SOURCE, "model.conv_encoder:1": "identity", "model.conv_encoder:2": "downsample",
            **numbered("model.encoder:{}", range(2), SOURCE),
        },
        sizes=MEDIUM,
    ),
    case(  # the method with the call is called twice, for queries of the encoder and of the decoder
        "rf-detr-segmentation", "RfDetrForInstanceSegmentation", RF_DETR,
        {
            "model.model.backbone": "parameter", "model.model.backbone.backbone.embeddings": "parameter",
            **numbered("root:{}", range(2), SOURCE),
        },
        sizes=((1, 56, 56), (2, 56, 56)),
    ),
    case(
        "omdet-turbo", "OmDetTurboForObjectDetection", OMDET, numbered("encoder:{}", range(2), SOURCE), sizes=MEDIUM,
        also=classes,
    ),
]  # fmt: skip


def lcnet(model_type: str) -> Settings:
    """A PP-LCNet of five stages: (kernel, channels in, channels out, stride, squeeze and excitation) a block."""
    return {
        "model_type": model_type, "stem_channels": 8, "divisor": 8, "out_features": ["stage2", "stage3", "stage4", "stage5"],
        "block_configs": [[[3, 8, 8, 1 if stage == 0 else 2, stage == 4]] for stage in range(5)],
    }  # fmt: skip


LCNET_V4: Settings = {
    "model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 8], "out_features": STAGES,
    "block_configs": [[[3, 8, 8, 1 if stage == 0 else 2, stage == 1]] for stage in range(4)],
}  # fmt: skip
#: Kernel, stride and padding of each convolution of a block.
INTRACLASS: Settings = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    **{f"vertical_long_to_small_conv_{ratio}ratio": [[3, 1], 1, [1, 0]] for ratio in ("long", "mid", "short")},
    **{f"horizontal_small_to_long_conv_{ratio}ratio": [[1, 3], 1, [0, 1]] for ratio in ("long", "mid", "short")},
    **{f"symmetric_conv_long_{ratio}ratio": [[3, 3], 1, [1, 1]] for ratio in ("long", "mid", "short")},
}  # fmt: skip
SERVER_DET: Settings = {
    "neck_out_channels": 32, "intraclass_block_config": INTRACLASS, "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}  # fmt: skip
MOBILE_DET: Settings = {"neck_out_channels": 32, "layer_list_out_channels": [8, 8, 8, 8], "reduction": 2}
#: Three top-down steps; then a loop whose results are thrown away, and a list comprehension that does the same again.
SERVER_NECK = {
    **numbered("model.neck:{}", (0, 1, 2, 6, 7, 8), SOURCE), **numbered("model.neck:{}", (3, 4, 5), "other"),
}  # fmt: skip
MOBILE_NECK = numbered("model.neck:{}", range(6), SOURCE)
READING_ORDER: Settings = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "rel_pos_bins": 8,
    "rel_2d_pos_bins": 8, "max_position_embeddings": 20, "coordinate_size": 2, "shape_size": 4, "num_classes": 5,
    "relation_bias_embed_dim": 4, "global_pointer_head_size": 4,
}  # fmt: skip

DOCUMENTS = [
    case(
        "pp-ocr-v5-server-det", "PPOCRV5ServerDetForObjectDetection",
        {**SERVER_DET, "backbone_config": {**HGNET, "out_features": STAGES}},
        {**SERVER_NECK, "head.upsample_convolution": MODULE}, sizes=MEDIUM,
    ),
    case(
        "pp-ocr-v5-mobile-det", "PPOCRV5MobileDetForObjectDetection",
        {**MOBILE_DET, "backbone_config": lcnet("pp_lcnet_v3")}, MOBILE_NECK, sizes=MEDIUM,
    ),
    case(
        "pp-ocr-v6-medium-det", "PPOCRV6MediumDetForObjectDetection", {**SERVER_DET, "backbone_config": LCNET_V4},
        SERVER_NECK, sizes=MEDIUM, tested=False,
    ),
    case(
        "pp-ocr-v6-small-det", "PPOCRV6SmallDetForObjectDetection",
        {**MOBILE_DET, "backbone_config": LCNET_V4, "dilated_kernel_size": 3}, MOBILE_NECK, sizes=MEDIUM,
        tested=False,
    ),
    case(
        "pp-doclayout-v2", "PPDocLayoutV2ForObjectDetection",
        {
            **RTDETR, "backbone_config": HGNET, "reading_order_config": READING_ORDER, "class_thresholds": [0.5] * 5,
            "class_order": [0, 1, 2, 3, 4],
        },
        RTDETR_SITES, sizes=MEDIUM, tested=False,
    ),
    case(
        "pp-doclayout-v3", "PPDocLayoutV3ForObjectDetection",
        {
            **RTDETR, "backbone_config": {**HGNET, "out_features": STAGES}, "mask_feature_channels": [8, 8],
            "x4_feat_dim": 8, "num_prototypes": 4, "global_pointer_head_size": 4,
        },
        {
            **numbered("model.backbone:{}", range(4), "parameter"), **numbered("model.encoder:{}", range(3), SOURCE),
            "model.encoder.mask_feature_head.scale_heads.1.layers.1": MODULE,
            "model.encoder.mask_feature_head.scale_heads.2.layers.1": MODULE,
            "model.encoder.mask_feature_head.scale_heads.2.layers.3": MODULE,
            **numbered("model.encoder.mask_feature_head:{}", range(2), "identity"),
        },
        sizes=MEDIUM,
    ),
    case(
        "pp-doclayout-v4", "PPDocLayoutV4ForObjectDetection",
        {**RTDETR, "backbone_config": HGNET, "global_pointer_head_size": 4, "hidden_size": 16},
        RTDETR_SITES, sizes=MEDIUM, tested=False,
    ),
    case(
        "slanet", "SLANetForTableRecognition",
        {
            "backbone_config": lcnet("pp_lcnet"), "post_conv_out_channels": 8, "out_channels": 6, "hidden_size": 8,
            "max_text_length": 3,
        },
        numbered("backbone.post_csp_pan:{}", range(3), SOURCE), sizes=MEDIUM,
    ),
    case(
        "slanext", "SLANeXtForTableRecognition",
        {
            "vision_config": {
                "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
                "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 16, "initializer_range": 0.02,
            },
            "post_conv_in_channels": 8, "post_conv_out_channels": 8, "out_channels": 6, "hidden_size": 8,
            "max_text_length": 3,
        },
        relative_positions("backbone.vision_tower.layers", "attn"), sizes=ONE_64, tested=False,
    ),
]  # fmt: skip
