"""transformers models with tiny configurations and random weights: segmentation, depth, detection, promptable masks."""

from __future__ import annotations

from typing import Any

import torch

from zoos.case import Case
from zoos.transformers_more import DENSE, DOCUMENTS
from zoos.transformers_other import NOTHING, OTHERS
from zoos.transformers_prompted import PROMPTED
from zoos.transformers_tiny import (
    CONVNEXT,
    DINOV2,
    DPT_NECK,
    GRAPH,
    HGNET,
    LARGE,
    MEDIUM,
    MODULE,
    ONE_64,
    PATCHES_14,
    RESNET,
    RTDETR,
    RTDETR_SITES,
    SMALL,
    SOURCE,
    STAGES,
    SWIN,
    VIT,
    Settings,
    Size,
    case,
    numbered,
)  # fmt: skip

#: Of what SegFormer's all-MLP head resizes, the first stage has the size already.
SEGFORMER_SITES = {"decode_head:0": "identity", **numbered("decode_head:{}", (1, 2, 3), SOURCE)}
#: Three pooled grids, three top-down resizes, then all but the largest level to the largest.
UPERNET_SITES = {
    **numbered("decode_head.psp_modules:{}", range(3), "context"), **numbered("decode_head:{}", range(6), SOURCE),
    "root:0": "logits", "root:1": "other",  # of the auxiliary head, which is used with labels only
}  # fmt: skip
MASKFORMER_SITES = numbered("model.pixel_level_module.decoder.fpn.layers.{}", range(3), GRAPH)
BEIT_UPERNET_SITES = {
    **numbered("decode_head.psp_modules.blocks.{}", range(3), "context"), **numbered("decode_head:{}", range(6), SOURCE),
}  # fmt: skip

MASKFORMER: Settings = {
    "decoder_config": {
        "model_type": "detr", "d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2, "num_queries": 5,
    },
    "fpn_feature_size": 32, "mask_feature_size": 16, "num_labels": 5,
}  # fmt: skip
UPERNET: Settings = {"hidden_size": 16, "auxiliary_channels": 8, "pool_scales": (1, 2, 3), "num_labels": 5}
BEIT_UPERNET: Settings = {
    **VIT, "pool_scales": [1, 2, 3], "auxiliary_channels": 8, "num_labels": 5, "drop_path_rate": 0.0,
}  # fmt: skip


def tasks(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """OneFormer's task, as token numbers."""
    return {"task_inputs": torch.randint(1, 20, (size[0], 8), generator=generator)}


SEGMENTATION = [
    case(
        "segformer", "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 16, "num_labels": 5,
        },
        SEGFORMER_SITES, sizes=(*SMALL, (3, 50, 70)),
    ),
    case(
        "maskformer-swin", "MaskFormerForInstanceSegmentation", {**MASKFORMER, "backbone_config": SWIN},
        MASKFORMER_SITES, sizes=(*MEDIUM, (1, 72, 104)),
    ),
    case(
        "maskformer-resnet", "MaskFormerForInstanceSegmentation", {**MASKFORMER, "backbone_config": RESNET},
        MASKFORMER_SITES, sizes=MEDIUM,
    ),
    case(
        "mask2former-swin", "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32,
            "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2,
            "dim_feedforward": 16, "num_queries": 5, "num_labels": 5,
        },
        {"model.pixel_level_module.decoder": SOURCE, "model.transformer_module.decoder.mask_predictor": "logits"},
        sizes=(*SMALL, (1, 72, 104)),
    ),
    case(
        "oneformer-swin", "OneFormerForUniversalSegmentation",
        {
            "backbone_config": SWIN, "conv_dim": 32, "mask_dim": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16,
            "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 5,
            "num_labels": 5, "task_seq_len": 8, "query_dec_layers": 1, "text_encoder_width": 16,
            "text_encoder_context_length": 8, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 20,
            "text_encoder_n_ctx": 2,
        },
        {"model.pixel_level_module.decoder": SOURCE, **numbered("model.transformer_module.decoder:{}", range(3), "logits")},
        sizes=(*SMALL, (1, 72, 104)), also=tasks,
    ),
    case(
        "upernet-swin", "UperNetForSemanticSegmentation", {**UPERNET, "backbone_config": SWIN}, UPERNET_SITES,
        sizes=(*LARGE, (1, 100, 140)),
    ),
    case(
        "upernet-convnext", "UperNetForSemanticSegmentation", {**UPERNET, "backbone_config": CONVNEXT}, UPERNET_SITES,
        sizes=(*LARGE, (1, 100, 140)),
    ),
    case(
        "beit", "BeitForSemanticSegmentation",
        {**BEIT_UPERNET, "out_indices": [1, 2, 3, 4], "add_fpn": True, "use_absolute_position_embeddings": True},
        {"beit.embeddings": "parameter", **BEIT_UPERNET_SITES},
    ),
    case(
        "data2vec-vision", "Data2VecVisionForSemanticSegmentation",
        {**BEIT_UPERNET, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True},
        {
            **numbered("data2vec_vision.encoder.layer.{}.attention.attention.relative_position_bias", range(4), "parameter"),
            **BEIT_UPERNET_SITES,
        },
        sizes=ONE_64,
    ),
    case(
        "mobilevit", "MobileViTForSemanticSegmentation",
        {
            "image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2, "mlp_ratio": 1.0, "expand_ratio": 1.0, "aspp_out_channels": 8, "num_labels": 5,
            "initializer_range": 0.2,
        },
        {  # at sizes that patches do not divide, maps are made larger before and smaller after them
            "mobilevit.encoder.layer.4:0": "other", "mobilevit.encoder.layer.4:1": "downsample",
            "segmentation_head.aspp.convs.4": "context",
        },
    ),
    case(
        "mobilevit-v2", "MobileViTV2ForSemanticSegmentation",
        {
            "image_size": 64, "base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.5,
            "ffn_multiplier": 2, "expand_ratio": 1.0, "aspp_out_channels": 8, "num_labels": 5, "initializer_range": 0.2,
        },
        {"segmentation_head.aspp.convs.4": "context"},
    ),
]  # fmt: skip

DPT: Settings = {
    **VIT,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 8,
}
BEIT: Settings = {
    "model_type": "beit", **VIT, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False,
    "use_relative_position_bias": True, "drop_path_rate": 0.0,
}  # fmt: skip
#: Weights large enough for the bins to differ from pixel to pixel.
ZOEDEPTH: Settings = {
    "backbone_config": BEIT, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "num_relative_features": 8,
    "bottleneck_features": 16, "num_attractors": [4, 2, 2, 1], "bin_embedding_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
NYU: Settings = {"name": "nyu", "n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}
#: Two heads, of which a classifier picks one: for these weights and inputs the first.
ZOEDEPTH_NK: Settings = {
    **ZOEDEPTH, "bin_configurations": [NYU, {**NYU, "name": "kitti", "max_depth": 80.0}], "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128, "patch_transformer_intermediate_size": 8,
    "patch_transformer_num_attention_heads": 2,
}  # fmt: skip
DPT_SITES = {"dpt.embeddings": "parameter", **DPT_NECK, "head.head.1": MODULE}
SQUARE: tuple[Size, ...] = ((1, 64, 64), (2, 96, 96))
GLPN_SITES = {**numbered("decoder.stages.{}.upsample", range(4), MODULE), "decoder.final_upsample": MODULE}
ZOEDEPTH_SITES = {
    **numbered("backbone.beit.layers.{}.relative_position_bias", range(4), "parameter"),
    **DPT_NECK, "relative_head.upsample": MODULE,
}  # fmt: skip

DEPTH = [
    case("dpt", "DPTForDepthEstimation", DPT, DPT_SITES, sizes=SQUARE),
    case(  # an odd number of patches: the next level's map, no longer twice as large, is resized too
        "dpt-odd", "DPTForDepthEstimation", DPT,
        {
            "dpt.embeddings": "parameter", "neck.fusion_stage.layers.0": SOURCE, "neck.fusion_stage.layers.1:0": SOURCE,
            "neck.fusion_stage.layers.1:1": SOURCE, "neck.fusion_stage.layers.2:0": SOURCE,
            "neck.fusion_stage.layers.2:1": SOURCE, "neck.fusion_stage.layers.3:0": SOURCE,
            "neck.fusion_stage.layers.3:1": SOURCE, "head.head.1": MODULE,
        },
        sizes=((1, 80, 80), (2, 64, 64)), inferred=False,
    ),
    case(
        "dpt-segmentation", "DPTForSemanticSegmentation", {**DPT, "num_labels": 5},
        {"dpt.embeddings": "parameter", **DPT_NECK, "head.head.5": "logits"}, sizes=SQUARE,
    ),
    case(
        "dpt-hybrid", "DPTForDepthEstimation",
        {
            **DPT, "is_hybrid": True, "neck_hidden_sizes": [8, 16, 16, 16], "backbone_featmap_shape": [1, 32, 4, 4],
            "backbone_config": {
                "model_type": "bit", "global_padding": "same", "layer_type": "bottleneck", "embedding_size": 8,
                "num_groups": 2, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "embedding_dynamic_padding": True,
                "out_features": ["stage1", "stage2", "stage3"],
            },
        },
        DPT_SITES, sizes=ONE_64,
    ),
    case(
        "dpt-dinov2", "DPTForDepthEstimation",
        {"backbone_config": DINOV2, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8},
        {"backbone.embeddings": "parameter", **DPT_NECK, "head.head.1": MODULE}, sizes=PATCHES_14,
    ),
    case(
        "glpn", "GLPNForDepthEstimation",
        {
            "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 8,
        },
        GLPN_SITES,
    ),
    case(
        "depth-anything", "DepthAnythingForDepthEstimation",
        {
            "backbone_config": DINOV2, "reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8, "head_hidden_size": 4,
        },
        {"backbone.embeddings": "parameter", **DPT_NECK, "head": SOURCE}, sizes=PATCHES_14,
    ),
    case(
        "zoedepth", "ZoeDepthForDepthEstimation", {**ZOEDEPTH, "bin_configurations": [NYU]},
        {
            **ZOEDEPTH_SITES, **numbered("metric_head.attractors.{}:0", range(4), SOURCE),
            **numbered("metric_head.attractors.{}:1", range(4), "logits"),  # depths, only rescaled by value
            "metric_head:0": "identity", "metric_head:1": SOURCE, "metric_head:2": "logits",
        },
    ),
    case(
        "zoedepth-nk", "ZoeDepthForDepthEstimation", ZOEDEPTH_NK,
        {
            **ZOEDEPTH_SITES, "metric_head:0": "logits", "metric_head:1": SOURCE,
            # The example's values choose one head; the plan lists both.
            **numbered("metric_head.attractors.nyu.{}:0", range(4), SOURCE),
            **numbered("metric_head.attractors.nyu.{}:1", range(4), "logits"),
            **numbered("metric_head.attractors.kitti.{}:0", range(4), SOURCE),
            **numbered("metric_head.attractors.kitti.{}:1", range(4), "logits"),
        },
    ),
]  # fmt: skip

DETECTION = [
    case("rt-detr", "RTDetrForObjectDetection", RTDETR, RTDETR_SITES, sizes=MEDIUM),
    case("rt-detr-v2", "RTDetrV2ForObjectDetection", RTDETR, RTDETR_SITES, sizes=MEDIUM),
    case("d-fine", "DFineForObjectDetection", {**RTDETR, "backbone_config": HGNET}, RTDETR_SITES, sizes=MEDIUM),
]  # fmt: skip

CASES: list[Case] = [*SEGMENTATION, *DEPTH, *DETECTION, *PROMPTED, *DENSE, *DOCUMENTS, *OTHERS, *NOTHING]

#: nvidia/mit-b1 with SegFormer's head for ADE20K.
SEGFORMER_B1: Settings = {
    "hidden_sizes": [64, 128, 320, 512], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 5, 8],
    "sr_ratios": [8, 4, 2, 1], "mlp_ratios": [4, 4, 4, 4], "decoder_hidden_size": 256, "num_labels": 150,
}  # fmt: skip
#: facebook/maskformer-swin-base-ade and -large-ade.
SWIN_B: Settings = {
    "model_type": "swin", "image_size": 384, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32],
    "window_size": 12, "drop_path_rate": 0.3, "out_features": STAGES,
}  # fmt: skip
SWIN_L: Settings = {**SWIN_B, "embed_dim": 192, "num_heads": [6, 12, 24, 48]}
#: depth-anything/Depth-Anything-V2-Small.
DEPTH_ANYTHING_SMALL: Settings = {
    "backbone_config": {
        "model_type": "dinov2", "image_size": 518, "patch_size": 14, "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "out_indices": [3, 6, 9, 12], "apply_layernorm": True, "reshape_hidden_states": False,
    },
    "reassemble_hidden_size": 384, "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64,
}  # fmt: skip
#: The hosts of the paper at their real widths and depths, on small images.
PAPER_CASES: list[Case] = [
    case("segformer-b1", "SegformerForSemanticSegmentation", SEGFORMER_B1, SEGFORMER_SITES),
    case(
        "depth-anything-small", "DepthAnythingForDepthEstimation", DEPTH_ANYTHING_SMALL,
        {"backbone.embeddings": "parameter", **DPT_NECK, "head": SOURCE}, sizes=PATCHES_14,
    ),
    case(
        "glpn-kitti", "GLPNForDepthEstimation",  # vinvino02/glpn-kitti: MiT-B4
        {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 8, 27, 3], "num_attention_heads": [1, 2, 5, 8]},
        GLPN_SITES, tested=False,
    ),
]  # fmt: skip

#: As the tiny one in the tests, wider and deeper; for the coverage command alone.
CASES += [
    case(
        name, "MaskFormerForInstanceSegmentation",
        {"backbone_config": backbone, "decoder_config": {"model_type": "detr"}, "num_labels": 150},
        MASKFORMER_SITES, sizes=MEDIUM, tested=False,
    )
    for name, backbone in (("maskformer-swin-b", SWIN_B), ("maskformer-swin-l", SWIN_L))
]  # fmt: skip
