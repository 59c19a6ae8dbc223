"""MONAI's networks in two dimensions, each made tiny, with the interpolating way of upsampling where there is a choice."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.apps.reconstruction.networks.nets.complex_unet import ComplexUnet
from monai.networks import nets
from monai.networks.blocks.backbone_fpn_utils import BackboneWithFPN
from monai.networks.blocks.fcn import FCN, MCFCN
from monai.networks.nets.resnet import ResNet, ResNetBlock
from monai.networks.nets.restormer import Restormer
from torch import nn

from zoos.case import Arguments, Case

FEATURE = "feature => source"
LAYER = "feature => module"

#: (height, width, batch) of the eval inputs; the last is the batch for train mode.
SIZES = ((32, 32, 1), (48, 32, 2), (32, 64, 3))
ODD = ((32, 32, 1), (37, 45, 2), (48, 64, 2))
LARGE = ((64, 64, 1), (96, 64, 2), (96, 96, 2))
#: For networks as wide as ResNet-50.
WIDE = ((64, 64, 1), (96, 64, 1), (64, 64, 2))
FIXED = ((32, 32, 1), (32, 32, 2), (32, 32, 3))


def builder(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Random weights from one seed, none of them a convolution of zeros."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make()
        # Diffusion networks end in one, behind which every output and every gradient is zero.
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
        return model.eval()

    return build


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(*channels: int, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> Callable[[nn.Module, int], Arguments]:
    """An image-like tensor for each number of channels."""

    def inputs(_: nn.Module, number: int) -> Arguments:
        height, width, batch = sizes[number]
        return tuple(_random(batch, c, height, width, seed=3 * number + i) for i, c in enumerate(channels)), {}

    return inputs


def steps(*channels: int) -> Callable[[nn.Module, int], Arguments]:
    """The image, the time step of a diffusion and, where there is a second number of channels, the label map."""

    def inputs(model: nn.Module, number: int) -> Arguments:
        (image, *labels), _ = maps(*channels)(model, number)
        return (image, torch.arange(len(image)) * 7 + 3, *labels), {}

    return inputs


def in_context(model: nn.Module, number: int) -> Arguments:
    """A diffusion step with tokens to attend to, by keyword."""
    arguments, _ = steps(1)(model, number)
    return arguments, {"context": _random(len(arguments[0]), 3, 8, seed=7)}


def complex_images(_: nn.Module, number: int) -> Arguments:
    height, width, batch = ODD[number]
    return (_random(batch, 1, height, width, 2, seed=number),), {}


def volumes(_: nn.Module, number: int) -> Arguments:
    return (_random(1, 1, 32, 32, (32, 48, 32)[number], seed=number),), {}


def with_boxes(model: nn.Module) -> Arguments:
    boxes = torch.tensor([[5.0, 8.0, 40.0, 50.0], [20.0, 30.0, 70.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}, {"boxes": boxes[:1] + 9, "labels": torch.tensor([2])}]
    return (maps(1, sizes=LARGE)(model, 2)[0][0], targets), {}


def detector() -> nn.Module:
    backbone = ResNet(
        ResNetBlock, [1, 1, 1, 1], [8, 16, 24, 32], spatial_dims=2, n_input_channels=1, conv1_t_size=3, conv1_t_stride=2
    )
    layers = {"layer1": "0", "layer2": "1", "layer3": "2"}
    pyramid = BackboneWithFPN(backbone, layers, [8, 16, 24], out_channels=16, spatial_dims=2)
    network = RetinaNet(
        spatial_dims=2,
        num_classes=3,
        num_anchors=2,
        feature_extractor=pyramid,
        size_divisible=32,
        use_list_output=False,
    )
    model = RetinaNetDetector(network, AnchorGeneratorWithAnchorShape((1, 2, 4, 8), ((8, 8), (12, 6))))
    model.set_regular_matcher(fg_iou_thresh=0.5, bg_iou_thresh=0.3)
    model.set_box_selector_parameters(score_thresh=0.0, detections_per_img=20)  # untrained, it is sure of nothing
    return model


def case(
    name: str,
    make: Callable[[], nn.Module],
    expected: Mapping[str, str],
    inputs: Callable[[nn.Module, int], Arguments],
    *,
    training: Callable[[nn.Module], Arguments] | None = None,
    count: int = 3,
    **options: Any,
) -> Case:
    return Case(
        "monai",
        name,
        builder(make),
        inputs,
        training or (lambda model: inputs(model, 2)),
        count=count,
        expected=expected,
        **options,
    )


def layers(*paths: str) -> dict[str, str]:
    """The sites of MONAI's UpSample blocks in mode "nontrainable"."""
    return {f"{path}.upsample_non_trainable": LAYER for path in paths}


def spade(*paths: str, norms: tuple[str, ...] = ("norm1", "norm2")) -> dict[str, str]:
    """The label map, made as large as the features it modulates: up, down or not at all."""
    return {f"{path}.{norm}": "image" for path in paths for norm in norms}


UNETPP = [(0, 1), (1, 1), (0, 2), (2, 1), (1, 2), (0, 3), (3, 1), (2, 2), (1, 3), (0, 4)]
BOTTOM = "net.0.1.submodule"
VOXELMORPH = (f"{BOTTOM}.1.submodule.1.submodule.1", f"{BOTTOM}.1.submodule.2.1", f"{BOTTOM}.2.1")
DINTS = {
    **{f"stem_down.{depth}.mod.0": "image" for depth in range(3)},
    **{f"dints_space.cell_tree.({block}, {path}).preprocess.up": LAYER for block in (0, 1) for path in (1, 4)},
    "stem_up.2.mod.3": LAYER,
    "stem_up.1.mod.3": LAYER,
}
DAF3D = {f"backbone_with_fpn.fpn:{i}": "volume" for i in range(6)}
#: The displacement is the mean of its estimates at each level, the first of which is at full size already.
FIELD = {f"output_block:{i}": "logits" for i in range(3)}
UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
FEATURES = (4, 4, 8, 8, 16, 8)
LEVELS: dict[str, Any] = {"num_res_blocks": 1, "channels": (8, 16, 16), "norm_num_groups": 4}
NO_ATTENTION: dict[str, Any] = {
    "attention_levels": (False,) * 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
ATTENTION: dict[str, Any] = {"attention_levels": (False, False, True), "num_head_channels": 8}


def voxelmorph_unet() -> nn.Module:
    return nets.VoxelMorphUNet(2, 2, 8, (4, 8, 8, 8, 8, 8), (4, 4))


def dints(use_downsample: bool) -> nn.Module:
    space = nets.TopologyInstance(
        channel_mul=0.25, num_blocks=2, num_depths=3, spatial_dims=2, use_downsample=use_downsample
    )
    return nets.DiNTS(space, 1, 2, spatial_dims=2, use_downsample=use_downsample)


def spadenet(is_vae: bool) -> nn.Module:
    z_dim = 8 if is_vae else None
    return nets.SPADENet(2, 1, 1, 3, (32, 32), [8, 16, 24], z_dim, is_vae, spade_intermediate_channels=8)


def spade_sites(first: int) -> dict[str, str]:
    """Each call of the decoder's one `Upsample`, from number `first` on; the last resizes the image that is refined."""
    return {
        **{f"decoder:{first + i}": FEATURE for i in range(2)},
        f"decoder:{first + 2}": "logits",
        **spade(*(f"decoder.blocks.{i}" for i in range(3)), norms=("norm_s", "norm_0", "norm_1")),
    }


CASES = [
    case(
        "BasicUNet",
        lambda: nets.BasicUNet(**UNET, features=FEATURES, upsample="nontrainable"),
        layers(*(f"upcat_{i}.upsample" for i in (4, 3, 2, 1))),
        maps(1, sizes=ODD),
    ),
    case(
        "BasicUNetPlusPlus",
        lambda: nets.BasicUNetPlusPlus(**UNET, features=FEATURES, upsample="nontrainable"),
        layers(*(f"upcat_{depth}_{layer}.upsample" for depth, layer in UNETPP)),
        maps(1, sizes=ODD),
    ),
    case(
        "FlexibleUNet resnet10",
        lambda: nets.FlexibleUNet(1, 2, "resnet10", decoder_channels=(32, 24, 16, 16, 8)),
        layers(*(f"decoder.blocks.{i}.upsample" for i in range(5))),
        maps(1, sizes=LARGE),
    ),
    case(
        "FlexibleUNet efficientnet-b0",
        lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", decoder_channels=(32, 24, 16, 16, 8)),
        layers(*(f"decoder.blocks.{i}.upsample" for i in range(5))),
        maps(3, sizes=LARGE),
        tested=False,
    ),
    case(
        "SegResNet",
        lambda: nets.SegResNet(**UNET, init_filters=8),
        layers(*(f"up_samples.{i}.1" for i in range(3))),
        maps(1),
    ),
    # The last is its autoencoder's, which runs in train mode only.
    case(
        "SegResNetVAE",
        lambda: nets.SegResNetVAE((64, 64), vae_nz=16, **UNET, init_filters=8),
        layers(*(f"up_samples.{i}.1" for i in range(3)), "vae_fc_up_sample.1"),
        maps(1, sizes=((64, 64, 1), (96, 64, 2), (64, 64, 2))),
    ),
    case(
        "SegResNetDS",
        lambda: nets.SegResNetDS(
            **UNET, init_filters=8, blocks_down=(1, 1, 1, 1), dsdepth=2, upsample_mode="nontrainable"
        ),
        layers(*(f"up_layers.{i}.upsample" for i in range(3))),
        maps(1),
    ),
    # Its way up is transposed convolutions; in train mode it resizes the logits of deep supervision.
    case(
        "DynUNet",
        lambda: nets.DynUNet(
            **UNET,
            kernel_size=[3] * 4,
            strides=[1, 2, 2, 2],
            upsample_kernel_size=[2, 2, 2],
            filters=(4, 8, 8, 8),
            deep_supervision=True,
            deep_supr_num=2,
        ),
        {"root:0": "logits", "root:1": "logits"},
        maps(1),
    ),
    # It takes 256x256 only and its widths are fixed: minutes for all checks.
    case(
        "HoVerNet",
        nets.HoVerNet,
        layers("upsample", "nucleus_prediction.upsample", "horizontal_vertical.upsample"),
        maps(3, sizes=((256, 256, 1),) * 3),
        count=2,
        tested=False,
    ),
    case(
        "FCN",
        lambda: FCN(1, pretrained=False),
        {f"root:{i}": FEATURE for i in range(5)},
        maps(3, sizes=WIDE),
        tested=False,
    ),
    # FCN's forward, reached through super().
    case("MCFCN", lambda: MCFCN(4, 1, pretrained=False), {f"root:{i}": FEATURE for i in range(5)}, maps(4, sizes=WIDE)),
    # In two dimensions its pyramid pools the height alone.
    case(
        "AHNet",
        lambda: nets.AHNet((1, 1, 1, 1), **UNET, psp_block_num=2, upsample_mode="bilinear"),
        {**{f"up{i}.up": LAYER for i in range(4)}, "psp:0": FEATURE, "psp:1": FEATURE, "final.up": "logits"},
        maps(1, sizes=WIDE),
    ),
    case("DiNTS", lambda: dints(True), {**DINTS, "stem_up.0.mod.3": LAYER}, maps(1, sizes=LARGE)),
    case(
        "DiNTS at full size",
        lambda: dints(False),
        {**DINTS, "stem_up.0.mod.3": "identity"},
        maps(1, sizes=LARGE),
        tested=False,
    ),
    case("SPADENet", lambda: spadenet(False), {"decoder:0": "image", **spade_sites(1)}, maps(3)),
    case("SPADENet with encoder", lambda: spadenet(True), spade_sites(0), maps(3, 1, sizes=FIXED), inferred=False),
    case(
        "AutoencoderKL",
        lambda: nets.AutoencoderKL(**UNET, latent_channels=3, **LEVELS, **NO_ATTENTION),
        layers("decoder.blocks.2", "decoder.blocks.4"),
        maps(1),
    ),
    case(
        "SPADEAutoencoderKL",
        lambda: nets.SPADEAutoencoderKL(
            **UNET, label_nc=3, latent_channels=3, spade_intermediate_channels=8, **LEVELS, **NO_ATTENTION
        ),
        {
            **spade("decoder.blocks.1", "decoder.blocks.3", "decoder.blocks.5"),
            **layers("decoder.blocks.2", "decoder.blocks.4"),
        },
        maps(1, 3),
        inferred=False,
    ),
    case("VoxelMorphUNet", voxelmorph_unet, layers(*VOXELMORPH), maps(2)),
    case(
        "VoxelMorph",
        lambda: nets.VoxelMorph(voxelmorph_unet(), integration_steps=2, spatial_dims=2),
        layers(*(f"backbone.{path}" for path in VOXELMORPH)),
        maps(1, 1),
        inferred=False,
    ),
    case(
        "LocalNet",
        lambda: nets.LocalNet(2, 2, 4, (0, 1, 2), out_channels=2),
        {"decode_deconvs.0": FEATURE, "decode_deconvs.1": FEATURE, **FIELD},
        maps(2),
    ),
    case("RegUNet", lambda: nets.RegUNet(2, 2, 4, 2, out_channels=2), {"output_block": "logits"}, maps(2)),
    case(
        "ComplexUnet",
        lambda: ComplexUnet(2, FEATURES, upsample="nontrainable"),
        layers(*(f"unet.upcat_{i}.upsample" for i in (4, 3, 2, 1))),
        complex_images,
        inferred=False,
    ),
    case(
        "RetinaNetDetector",
        detector,
        {f"network.feature_extractor.fpn:{i}": FEATURE for i in range(2)},
        maps(1, sizes=LARGE),
        training=with_boxes,
    ),
    # Three-dimensional: found and kept. In train mode it resizes nine maps to the labels' size at a line of their own.
    case(
        "DAF3D",
        lambda: nets.DAF3D(1, 2),
        {**DAF3D, **{f"root:{i}": "volume" for i in range(10)}},
        volumes,
        inferred=False,
        tested=False,
    ),
    case(
        "BasicUNet in three dimensions",
        lambda: nets.BasicUNet(3, 1, 2, FEATURES, upsample="nontrainable"),
        {f"upcat_{i}.upsample.upsample_non_trainable": "volume" for i in (4, 3, 2, 1)},
        volumes,
        inferred=False,
    ),
    case(
        "DiffusionModelUNet",
        lambda: nets.DiffusionModelUNet(**UNET, **LEVELS, **ATTENTION),
        layers("up_blocks.0.upsampler", "up_blocks.1.upsampler"),
        steps(1),
    ),
    # One layer is called twice in its block's forward: for the block's input and for its hidden state.
    case(
        "DiffusionModelUNet, residual resizing",
        lambda: nets.DiffusionModelUNet(**UNET, **LEVELS, **ATTENTION, resblock_updown=True),
        layers("up_blocks.0.upsampler.upsample", "up_blocks.1.upsampler.upsample"),
        steps(1),
    ),
    case(
        "DiffusionModelUNet in context",
        lambda: nets.DiffusionModelUNet(**UNET, **LEVELS, **ATTENTION, with_conditioning=True, cross_attention_dim=8),
        layers("up_blocks.0.upsampler", "up_blocks.1.upsampler"),
        in_context,
        inferred=False,
        tested=False,
    ),
    case(
        "SPADEDiffusionModelUNet",
        lambda: nets.SPADEDiffusionModelUNet(**UNET, label_nc=3, spade_intermediate_channels=8, **LEVELS, **ATTENTION),
        {
            **spade(*(f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(2))),
            **layers("up_blocks.0.upsampler", "up_blocks.1.upsampler"),
        },
        steps(1, 3),
        inferred=False,
    ),
    # Transposed convolutions, pixel shuffle, or nothing at all.
    case("UNet", lambda: nets.UNet(**UNET, channels=(4, 8, 16), strides=(2, 2)), {}, maps(1)),
    case("AttentionUnet", lambda: nets.AttentionUnet(**UNET, channels=(4, 8, 16), strides=(2, 2)), {}, maps(1)),
    case("VNet", lambda: nets.VNet(**UNET, dropout_dim=2), {}, maps(1), tested=False),
    case("VQVAE", lambda: nets.VQVAE(2, 1, 1, (8, 8, 16), 1, (8, 8, 16), embedding_dim=8, ddp_sync=False), {}, maps(1)),
    case("GlobalNet", lambda: nets.GlobalNet([32, 32], 2, 2, 4, 2), {}, maps(2, sizes=FIXED)),
    case("Restormer", lambda: Restormer(2, 1, 1, 8, (1, 1), (1, 1), 1), {}, maps(1), tested=False),
    case("PatchDiscriminator", lambda: nets.PatchDiscriminator(2, 4, 1), {}, maps(1)),
    case(
        "UNETR",
        lambda: nets.UNETR(1, 2, (32, 32), 4, 24, 32, 2, spatial_dims=2),
        {},
        maps(1, sizes=FIXED),
        inferred=False,
        tested=False,
    ),
    case(
        "SwinUNETR",
        lambda: nets.SwinUNETR(1, 2, feature_size=12, spatial_dims=2),
        {},
        maps(1, sizes=LARGE),
        tested=False,
    ),
]
