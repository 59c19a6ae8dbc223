"""torchvision: segmentation, detection and optical flow, narrow and on small images.

Detection models take lists of images of different sizes, resize them to a size of their own, and give lists of boxes; so that
these have something in them with random weights, every score passes (`score_thresh=0`) and few are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.models import detection, optical_flow, resnet, segmentation, vgg
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import backbone_utils, faster_rcnn, keypoint_rcnn, mask_rcnn
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from zoos.case import Arguments, Case, batches, seeded, seeded_case

IMAGE = {"transform": "image"}


def fpn(levels: int) -> dict[str, str]:
    """The top-down x2 of a pyramid of so many levels."""
    return {f"backbone.fpn:{level}": "feature => source" for level in range(levels - 1)}


def images(*shapes: tuple[int, ...], seed: int = 1) -> list[torch.Tensor]:
    """Images with values between 0 and 1, as torchvision's detection models want them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in shapes]


# Segmentation: a batch in, a dict of maps out.

SEGMENTED = batches((2, 64, 64), (1, 96, 128), (3, 97, 49))


def backbone(**layers: str) -> nn.Module:
    """A ResNet of one block a stage, giving 256 channels after `layer3` and 512 after `layer4`."""
    return IntermediateLayerGetter(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), return_layers=layers)


def fcn() -> nn.Module:
    return segmentation.FCN(backbone(layer3="aux", layer4="out"), FCNHead(512, 3), FCNHead(256, 3))


def deeplabv3() -> nn.Module:
    return segmentation.DeepLabV3(backbone(layer4="out"), DeepLabHead(512, 3, atrous_rates=(1, 2, 3)))


# Detection: lists of images in, lists of dicts out; with targets in train mode, a dict of losses.


def photographs(model: nn.Module, number: int) -> Arguments:
    shapes = (((3, 64, 80), (3, 90, 60)), ((3, 96, 128),), ((3, 71, 53), (3, 50, 101), (3, 64, 64)))[number]
    return (images(*shapes),), {}


def annotated(model: nn.Module) -> Arguments:
    """Two images and what is on them: boxes, labels, masks of the boxes, and three keypoints in each."""
    pictures = images((3, 64, 80), (3, 90, 60), seed=2)
    targets = []
    for picture, corners in zip(pictures, ([[4, 6, 40, 50], [30, 10, 76, 60]], [[8, 12, 50, 70]]), strict=True):
        boxes = torch.tensor(corners, dtype=torch.float32)
        masks = torch.zeros(len(corners), *picture.shape[1:], dtype=torch.uint8)
        keypoints = torch.ones(len(corners), 3, 3)
        for index, (left, top, right, bottom) in enumerate(corners):
            masks[index, top:bottom, left:right] = 1
            for point in range(3):
                keypoints[index, point, :2] = torch.tensor([left + 9 * point + 5, bottom - 11 * point - 5])
        labels = torch.arange(len(corners)) % 2 + 1
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints})
    return (pictures, targets), {}


SIZES = {"min_size": 64, "max_size": 128}
#: Two-stage detectors: few proposals, all scores, few detections.
TWO_STAGE: dict[str, Any] = {
    **SIZES,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_test": 12,
    "rpn_post_nms_top_n_train": 40,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 3,
}
ONE_STAGE: dict[str, Any] = {**SIZES, "score_thresh": 0.0, "detections_per_img": 3, "topk_candidates": 20}


def pyramid() -> nn.Module:
    return backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)


def tall_pyramid() -> nn.Module:
    """From stride 8 to 128, the two last made by convolutions: the pyramid of RetinaNet and FCOS."""
    return backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )


def boxes() -> dict[str, nn.Module]:
    """Narrow heads of the second stage, for two classes and the background."""
    return {"box_head": faster_rcnn.TwoMLPHead(256 * 7 * 7, 32), "box_predictor": faster_rcnn.FastRCNNPredictor(32, 3)}


def faster() -> nn.Module:
    return detection.FasterRCNN(pyramid(), **boxes(), **TWO_STAGE)


def mask() -> nn.Module:
    return detection.MaskRCNN(
        pyramid(),
        mask_head=mask_rcnn.MaskRCNNHeads(256, (16,), 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 16, 3),
        **boxes(),
        **TWO_STAGE,
    )


def keypoint() -> nn.Module:
    return detection.KeypointRCNN(
        pyramid(),
        keypoint_head=keypoint_rcnn.KeypointRCNNHeads(256, (16,)),
        keypoint_predictor=keypoint_rcnn.KeypointRCNNPredictor(16, 3),
        **boxes(),
        **TWO_STAGE,
    )


def ssd() -> nn.Module:
    """SSD300 on a VGG that is narrow where the images are large."""
    layers = vgg.make_layers([8, "M", 16, "M", 32, "M", 512, "M", 512, "M"])
    anchors = detection.anchor_utils.DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], steps=[8, 16, 32, 64, 100, 300]
    )
    options = {key: value for key, value in ONE_STAGE.items() if key not in SIZES}
    return detection.ssd.SSD(SSDFeatureExtractorVGG(layers, highres=False), anchors, (300, 300), 3, **options)


# Optical flow: two batches in, a list of flows out.


def frames(model: nn.Module, number: int) -> Arguments:
    shape = ((1, 3, 128, 128), (2, 3, 128, 160), (1, 3, 136, 128))[number]
    return tuple(images(shape, shape)), {}


# The resizes after the last convolution: each box's mask pasted into the image, each box's heatmaps at the size of the box.
# In train mode, the masks of the targets are resized with the images.
MASK = {"transform:0": "image", **fpn(4), "transform:1": "logits", "transform:2": "mask", "transform:3": "mask"}
KEYPOINT = {**IMAGE, **fpn(4), "roi_heads.keypoint_predictor": "logits", "roi_heads": "logits"}

SEGMENTATION: dict[str, tuple[Callable[[], nn.Module], Mapping[str, str]]] = {
    "fcn_resnet": (fcn, {"root:0": "logits", "root:1": "logits"}),
    "deeplabv3_resnet": (deeplabv3, {"classifier.0.convs.4": "context", "root": "logits"}),
    "deeplabv3_mobilenet_v3_large": (
        functools.partial(
            segmentation.deeplabv3_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=3
        ),
        {"classifier.0.convs.4": "context", "root": "logits"},
    ),
    "lraspp_mobilenet_v3_large": (
        functools.partial(segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=3),
        {"classifier": "feature => graph", "root": "logits"},
    ),
}
DETECTION: dict[str, tuple[Callable[[], nn.Module], Mapping[str, str]]] = {
    "fasterrcnn_resnet18_fpn": (faster, {**IMAGE, **fpn(4)}),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        functools.partial(
            detection.fasterrcnn_mobilenet_v3_large_320_fpn,
            weights=None,
            weights_backbone=None,
            num_classes=3,
            **TWO_STAGE,
        ),
        # Its two levels have one stride.
        {**IMAGE, "backbone.fpn": "identity"},
    ),
    "maskrcnn_resnet18_fpn": (mask, MASK),
    "keypointrcnn_resnet18_fpn": (keypoint, KEYPOINT),
    "retinanet_resnet18_fpn": (lambda: detection.RetinaNet(tall_pyramid(), 3, **ONE_STAGE), {**IMAGE, **fpn(3)}),
    "fcos_resnet18_fpn": (lambda: detection.FCOS(tall_pyramid(), 3, **ONE_STAGE), {**IMAGE, **fpn(3)}),
    "ssd300_vgg": (ssd, IMAGE),
    "ssdlite320_mobilenet_v3_large": (
        functools.partial(
            detection.ssdlite320_mobilenet_v3_large,
            weights=None,
            weights_backbone=None,
            num_classes=3,
            **{key: value for key, value in ONE_STAGE.items() if key not in SIZES},
        ),
        IMAGE,
    ),
}
FLOW = {
    "raft_large": (functools.partial(optical_flow.raft_large, weights=None), {}),
    "raft_small": (
        functools.partial(optical_flow.raft_small, weights=None),
        {f"root:{step}": "logits" for step in range(12)},
    ),
}

CASES = [
    *(
        seeded_case("torchvision", name, build, expected, SEGMENTED, batch=0)
        for name, (build, expected) in SEGMENTATION.items()
    ),
    *(
        Case("torchvision", name, functools.partial(seeded, build), photographs, annotated, count=3, expected=expected)
        for name, (build, expected) in DETECTION.items()
    ),
    *(
        Case("torchvision", name, functools.partial(seeded, build), frames, lambda model: frames(model, 0), 3, expected)
        for name, (build, expected) in FLOW.items()
    ),
]

# The hosts of the DySample paper as their users build them: published widths, depths and classes. Only the size that their
# transform brings every image to (800 to 1333 pixels) is set down, for time: no site depends on it.
PAPER: dict[str, Any] = {**TWO_STAGE, "max_size": 160}


def resnet101() -> nn.Module:
    return backbone_utils.resnet_fpn_backbone(backbone_name="resnet101", weights=None, trainable_layers=5)


HOSTS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, str]]] = {
    "fasterrcnn_resnet50_fpn": (
        lambda: detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **PAPER),
        {**IMAGE, **fpn(4)},
    ),
    "maskrcnn_resnet50_fpn": (
        lambda: detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **PAPER),
        MASK,
    ),
    "fasterrcnn_resnet101_fpn": (lambda: detection.FasterRCNN(resnet101(), 91, **PAPER), {**IMAGE, **fpn(4)}),
    "maskrcnn_resnet101_fpn": (lambda: detection.MaskRCNN(resnet101(), 91, **PAPER), MASK),
}
CASES += [
    Case(
        "torchvision",
        name,
        functools.partial(seeded, build),
        photographs,
        annotated,
        count=3,
        expected=expected,
        tested="101" not in name,  # deeper, and else the same
    )
    for name, (build, expected) in HOSTS.items()
]
