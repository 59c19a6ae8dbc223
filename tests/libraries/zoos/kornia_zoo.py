"""kornia: detectors and descriptors of local features, edges, super-resolution, detection; random weights, no download."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from kornia import feature
from kornia.feature.disk._unets.unet import Unet
from kornia.feature.loftr.backbone.resnet_fpn import ResNetFPN_8_2, ResNetFPN_16_4
from kornia.feature.sold2.backbones import HourglassBackbone
from kornia.feature.xfeat import XFeatModel
from kornia.models.dexined import DexiNed
from kornia.models.rrdbnet import RRDBNet
from kornia.models.rt_detr.architecture.hybrid_encoder import HybridEncoder
from kornia.models.small_sr import SmallSRNetWrapper
from torch import nn

from zoos.case import Arguments, seeded_case

SOURCE = "feature => source"
SIZES = ((2, 64, 64), (1, 96, 64), (3, 64, 128))
SMALL = ((2, 16, 16), (1, 24, 16), (3, 15, 22))
ODD = ((2, 64, 64), (1, 75, 61), (3, 64, 50))


def images(channels: int = 3, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> Callable[..., Arguments]:
    """Images of values between 0 and 1, so many channels."""

    def inputs(_: nn.Module, number: int) -> Arguments:
        batch, height, width = sizes[number]
        return (torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(number)),), {}

    return inputs


case = functools.partial(seeded_case, "kornia")


class Pyramid(nn.Module):
    """RT-DETR's encoder behind convolutions of its own three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.levels = nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(3)])
        self.encoder = HybridEncoder([8, 8, 8], 16, 16, expansion=0.5)

    def forward(self, x):
        x = self.stem(x)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return self.encoder(maps)


class Dense(feature.ALIKED):
    """What ALIKED computes before it picks keypoints, which one rounding more or less would pick others of."""

    def forward(self, images):
        return self.extract_dense_map(images)


LOFTR = {"initial_dim": 8, "block_dims": [8, 12, 16]}

CASES = [
    # Its stem is handed ten gradients of the one channel.
    case(
        "KeyNet",
        lambda: feature.KeyNet(pretrained=False),
        {"root:0": "image", "root:1": SOURCE, "root:2": "image", "root:3": SOURCE},
        images(1, ODD),
    ),
    case(
        "DISK Unet",
        lambda: Unet(3, size=3, down=[8, 8, 16], up=[16, 8]),
        {f"path_up.{level}.upsample": "feature => graph" for level in (0, 1)},
        images(),
    ),
    case(
        "LoFTR 8 2",
        lambda: ResNetFPN_8_2(LOFTR),
        {f"root:{level}": "feature => graph" for level in (0, 1)},
        images(1, ODD),
    ),
    case(
        "LoFTR 16 4",
        lambda: ResNetFPN_16_4({"initial_dim": 8, "block_dims": [8, 12, 16, 24]}),
        {f"root:{level}": "feature => graph" for level in (0, 1)},
        images(1),
        tested=False,
    ),
    case(
        "SOLD2 Hourglass",
        lambda: HourglassBackbone(1, 2, 1),
        {f"net.hg.0:{level}": SOURCE for level in (0, 1)},
        images(1),
    ),
    case("XFeat", XFeatModel, {"root:0": SOURCE, "root:1": SOURCE}, images(3)),
    case(
        "ALIKED",
        lambda: Dense("aliked-t16"),
        dict.fromkeys(("upsample2", "upsample8", "upsample32"), "feature => module"),
        images(),
    ),
    # Transposed convolutions bring every side output to the size it then is resized to.
    case(
        "DexiNed",
        lambda: DexiNed(pretrained=False),
        {f"up_block_{level}": "identity" for level in range(1, 7)},
        images(),
        tested=False,
    ),
    case(
        "RRDBNet",
        lambda: RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4),
        {"root:0": SOURCE, "root:1": SOURCE},
        images(3, SMALL),
    ),
    # Colours, beside a luminance that a pixel shuffle makes larger.
    case(
        "SmallSR",
        lambda: SmallSRNetWrapper(2, pretrained=False),
        {"root:0": "image", "root:1": "image"},
        images(3, SMALL),
    ),
    case("RT-DETR encoder", Pyramid, {"encoder.ccfm:0": SOURCE, "encoder.ccfm:1": SOURCE}, images()),
]
