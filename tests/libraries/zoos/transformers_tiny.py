"""What the transformers cases share: making a model and its inputs from settings, tiny backbones, repeated site names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zoos.case import Arguments, Case

#: (batch, height, width)
Size = tuple[int, int, int]
Settings = Mapping[str, Any]
#: More arguments beside the images, for images of that size.
More = Callable[[Size, torch.Generator], dict[str, Any]]

SMALL: tuple[Size, ...] = ((1, 64, 64), (2, 96, 64))
#: The least at which a nearest x2 of a map of stride 32 has a gradient: a point on the border has none, and of 3 pixels one
#: is inside.
MEDIUM: tuple[Size, ...] = ((1, 96, 96), (2, 128, 96))
LARGE: tuple[Size, ...] = ((1, 128, 128), (2, 160, 128))
#: Models of one size.
ONE_64: tuple[Size, ...] = ((1, 64, 64), (2, 64, 64))
ONE_128: tuple[Size, ...] = ((1, 128, 128), (2, 128, 128))
PATCHES_14: tuple[Size, ...] = ((1, 56, 56), (2, 70, 56))

SOURCE = "feature => source"
GRAPH = "feature => graph"
MODULE = "feature => module"


def numbered(pattern: str, numbers: Sequence[int], decision: str) -> dict[str, str]:
    """The same decision for several sites: `numbered("decode_head:{}", range(2), SOURCE)`."""
    return {pattern.format(number): decision for number in numbers}


def relative_positions(layers: str, attention: str) -> dict[str, str]:
    """The tables of relative positions of two layers, one of each axis."""
    return numbered(f"{layers}.0.{attention}:{{}}", range(2), "parameter") | numbered(
        f"{layers}.1.{attention}:{{}}", range(2), "parameter"
    )


STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN: Settings = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "window_size": 2, "drop_path_rate": 0.0, "out_features": STAGES,
}  # fmt: skip
CONVNEXT: Settings = {
    "model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_features": STAGES,
}  # fmt: skip
RESNET: Settings = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": STAGES,
}  # fmt: skip
VIT: Settings = {
    "image_size": 64, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip
DINOV2: Settings = {
    "model_type": "dinov2", "image_size": 56, "patch_size": 14, "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "apply_layernorm": True,
    "reshape_hidden_states": False,
}  # fmt: skip
RTDETR_RESNET: Settings = {
    "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": STAGES[1:],
}  # fmt: skip
RTDETR: Settings = {
    "backbone_config": RTDETR_RESNET, "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "d_model": 16, "num_queries": 5, "decoder_in_channels": [16, 16, 16],
    "decoder_ffn_dim": 16, "decoder_n_points": 2, "decoder_layers": 2, "decoder_attention_heads": 2, "num_denoising": 0,
    "hidden_expansion": 0.5, "num_labels": 5, "initializer_range": 0.05,
}  # fmt: skip
HGNET: Settings = {
    "model_type": "hgnet_v2", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8,
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 8, 16], "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 16, 16], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True], "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5], "out_features": STAGES[1:],
}  # fmt: skip

#: The masks of ones that the model makes where it is given none, and the two top-down steps.
RTDETR_SITES = {
    **numbered("model.backbone:{}", range(3), "parameter"),
    **numbered("model.encoder:{}", range(2), SOURCE),
}
#: The four fusion layers of DPT and its kind.
DPT_NECK = numbered("neck.fusion_stage.layers.{}", range(4), SOURCE)


def build(model: str, settings: Settings) -> Callable[[], nn.Module]:
    """The model class of that name with random weights of seed 0, in eval mode.

    Drawn with the library's deviation of 0.02, maps of few channels fade to nothing, and norms of them make noise of their
    gradients: the convolutions are drawn anew, as torch draws them but for the biases, which could leave a last ReLU dead.
    """

    def make() -> nn.Module:
        import transformers  # here, so that the zoo can be listed without it

        cls = getattr(transformers, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = cls(cls.config_class(**settings)).eval()
            for module in made.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.reset_parameters()
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            return made

    return make


def images(sizes: Sequence[Size], also: More | None = None, channels: int = 3) -> Callable[[nn.Module, int], Arguments]:
    """`pixel_values` of each size, and what else the model has to be given for them."""

    def make(model: nn.Module, index: int) -> Arguments:
        batch, height, width = sizes[index]
        generator = torch.Generator().manual_seed(index)
        kwargs = {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}
        return (), kwargs | (also(sizes[index], generator) if also else {})

    return make


def case(
    name: str,
    model: str,
    settings: Settings,
    expected: Mapping[str, str],
    *,
    sizes: Sequence[Size] = SMALL,
    also: More | None = None,
    channels: int = 3,
    **more: Any,
) -> Case:
    """A case of images; it trains on a batch of two at the first size."""
    _, height, width = sizes[0]
    train = images([(2, height, width)], also, channels)
    return Case(
        zoo="transformers",
        name=name,
        build=build(model, settings),
        inputs=images(sizes, also, channels),
        training=lambda model: train(model, 0),
        count=len(sizes),
        expected=expected,
        **more,
    )
