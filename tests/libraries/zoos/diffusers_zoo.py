"""diffusers: denoising U-nets, ControlNets and autoencoders, each made tiny; what its pipelines run, one model at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from torch import nn

from zoos.case import Arguments, Case, seeded_case

SOURCE = "feature => source"

#: (batch, height, width); of the last, the U-nets are told the size of each level, since two halvings do not divide it.
SIZES = ((1, 16, 16), (2, 32, 16), (2, 22, 30))
#: As large as autoencoders with a factor of 8 want them.
LARGE = ((1, 32, 32), (2, 64, 32), (2, 32, 48))
CONTEXT = 8


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(channels: int, sizes: tuple[tuple[int, int, int], ...] = SIZES, **options: Any) -> Callable[..., Arguments]:
    """An image, and options of the forward."""

    def inputs(_: nn.Module, number: int) -> Arguments:
        batch, height, width = sizes[number]
        return (_random(batch, channels, height, width, seed=number),), options

    return inputs


def steps(channels: int = 3, tokens: bool = False, hint: bool = False, **extra: Any) -> Callable[..., Arguments]:
    """An image and a time step; with `tokens`, what cross-attention attends to; with `hint`, a ControlNet's picture."""

    def inputs(_: nn.Module, number: int) -> Arguments:
        batch, height, width = SIZES[number]
        arguments: list[Any] = [_random(batch, channels, height, width, seed=number), torch.arange(batch) * 7 + 3]
        if tokens:
            arguments.append(_random(batch, 3, CONTEXT, seed=7 + number))
        if hint:
            arguments.append(_random(batch, 3, height * 2, width * 2, seed=9 + number))
        return tuple(arguments), extra

    return inputs


def ratios(_: nn.Module, number: int) -> Arguments:
    """An image, a time step between 0 and 1 and the pooled tokens."""
    batch, height, width = SIZES[number]
    pooled = _random(batch, 1, 8, seed=7 + number)
    return (_random(batch, 4, height, width, seed=number), torch.full((batch,), 0.3), pooled), {}


def awake(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """No convolution of zeros, behind which every output and every gradient is zero."""

    def build() -> nn.Module:
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
        return model

    return build


def case(name: str, make: Callable[[], nn.Module], expected: Mapping[str, str], inputs: Any, **fields: Any) -> Case:
    return seeded_case("diffusers", name, awake(make), expected, inputs, **fields)


def upsamplers(*paths: str) -> dict[str, str]:
    """The upsamplers of these blocks; an image that the levels do not divide leads to another call, with a size."""
    return {f"{path}.upsamplers.0": SOURCE for path in paths}


UNET: dict[str, Any] = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {**UNET, "cross_attention_dim": CONTEXT, "attention_head_dim": 4}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def unet2d(up: str, down: str = "DownBlock2D", **options: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        down_block_types=(down,) * 3, up_block_types=(up,) * 3, attention_head_dim=4, **{**UNET, **options}
    )


def conditioned(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **{**CROSS, **options},
    )


def controlnet() -> nn.Module:
    return diffusers.ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
        **CROSS,
    )


class Controlled(nn.Module):
    """A U-net and the ControlNet that adds to its skips, as a pipeline runs the two."""

    def __init__(self) -> None:
        super().__init__()
        self.controlnet, self.unet = controlnet(), conditioned()

    def forward(self, sample, timestep, tokens, hint):
        down, middle = self.controlnet(sample, timestep, tokens, hint, return_dict=False)
        return self.unet(
            sample, timestep, tokens, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


#: Each norm of the decoder is modulated by the quantised latents, resized to its map.
SPATIAL_NORMS = {
    f"decoder.{block}.resnets.{resnet}.norm{norm}": decided
    for block, decided in (("mid_block", "identity"), ("up_blocks.0", "identity"), ("up_blocks.1", "feature => graph"))
    for resnet in (0, 1)
    for norm in (1, 2)
}
SPATIAL = {
    **SPATIAL_NORMS,
    "decoder.mid_block.attentions.0.spatial_norm": "identity",
    "decoder.conv_norm_out": "feature => graph",
    **upsamplers("decoder.up_blocks.0"),
}

CASES = [
    case("UNet2DModel", lambda: unet2d("UpBlock2D"), upsamplers("up_blocks.0", "up_blocks.1"), steps()),
    case(
        "UNet2DModel attention",
        lambda: unet2d("AttnUpBlock2D", "AttnDownBlock2D"),
        upsamplers("up_blocks.0", "up_blocks.1"),
        steps(),
        tested=False,
    ),
    case(
        "UNet2DModel resnet",
        lambda: unet2d("ResnetUpsampleBlock2D", "ResnetDownsampleBlock2D"),
        {f"up_blocks.{block}.upsamplers.0.upsample": SOURCE for block in (0, 1)},
        steps(),
    ),
    case(
        "UNet2DConditionModel",
        conditioned,
        upsamplers("up_blocks.0", "up_blocks.1"),
        steps(4, tokens=True),
        inferred=False,
    ),
    case(
        "ControlNetModel",
        Controlled,
        upsamplers("unet.up_blocks.0", "unet.up_blocks.1"),
        steps(4, tokens=True, hint=True),
        inferred=False,
    ),
    case(
        "AutoencoderKL",
        lambda: diffusers.AutoencoderKL(**VAE),
        upsamplers("decoder.up_blocks.0", "decoder.up_blocks.1"),
        images(3, LARGE),
    ),
    case(
        "AsymmetricAutoencoderKL",
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=VAE["down_block_types"],
            down_block_out_channels=(8, 16, 16),
            layers_per_down_block=1,
            up_block_types=VAE["up_block_types"],
            up_block_out_channels=(8, 16, 16),
            layers_per_up_block=1,
            norm_num_groups=4,
        ),
        upsamplers("decoder.up_blocks.0", "decoder.up_blocks.1"),
        images(3, LARGE),
        tested=False,
    ),
    case(
        "AutoencoderTiny",
        lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
        {f"decoder.layers.{layer}": "feature => module" for layer in (5, 10, 15)},
        images(3, LARGE),
    ),
    case(
        "AutoencoderDC",
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
            encoder_qkv_multiscales=((),) * 3,
            decoder_qkv_multiscales=((),) * 3,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            upsample_block_type="interpolate",
        ),
        {f"decoder.up_blocks.{block}.0": SOURCE for block in (0, 1)},
        images(3, LARGE),
    ),
    case(
        "VQModel",
        lambda: diffusers.VQModel(**{**VAE, "num_vq_embeddings": 16}),
        upsamplers("decoder.up_blocks.0", "decoder.up_blocks.1"),
        images(3, LARGE),
    ),
    case(
        "VQModel spatial",
        lambda: diffusers.VQModel(
            **{
                **VAE,
                "block_out_channels": (32, 32),
                "down_block_types": VAE["down_block_types"][:2],
                "up_block_types": VAE["up_block_types"][:2],
                "num_vq_embeddings": 16,
                "norm_type": "spatial",
            }
        ),
        SPATIAL,
        images(3, LARGE),
    ),
    case(
        "StableCascadeUNet",
        lambda: diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=8,
            block_out_channels=(8, 16),
            num_attention_heads=(0, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
            clip_text_pooled_in_channels=8,
            clip_seq=2,
            switch_level=(True,),
        ),
        {"down_downscalers.1.1.blocks.1": "downsample", "up_upscalers.0.1.blocks.0": "feature => module"},
        ratios,
        inferred=False,
    ),
]
