"""Ultralytics' detectors, segmenters and pose models from their YAML files, at their smallest scale; and YOLOv7's shape.

In eval mode the inputs are images; in train mode they are the batch dict that makes the model compute its own loss.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zoos.case import Arguments, Case

# Read once, when ultralytics is imported: no look-up of the network, no installing, and a settings file that is not the user's.
_SETTINGS = tempfile.TemporaryDirectory(prefix="upswap-ultralytics-")
os.environ["YOLO_CONFIG_DIR"] = _SETTINGS.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_VERBOSE"] = "false"

# The import puts a retrying `torch.save` in torch's place and sets how tensors print, which other tests are to see nothing of.
_save = torch.save
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.utils import DEFAULT_CFG  # noqa: E402

torch.save = _save
torch.set_printoptions(profile="default")

CLASSES = 4
FEATURE = "feature => source"
LAYER = "feature => module"

#: (height, width, batch) of the eval inputs; sides are multiples of the largest stride, as these models ask.
SIZES = ((64, 64, 1), (96, 64, 2), (64, 160, 3))
SIZES_P6 = ((64, 64, 1), (128, 64, 2), (64, 192, 3))


def layers(*indices: int) -> dict[str, str]:
    """The sites of the `nn.Upsample` rows of a YAML file."""
    return {f"model.{index}": LAYER for index in indices}


def model(cls: type[nn.Module], name: str, divide: int = 1, head: tuple[Any, ...] = ()) -> Callable[[], nn.Module]:
    """A builder. `divide` makes narrower what has no scale `n` in its file; `head` are further arguments of the last layer."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = tasks.yaml_model_load(f"{name}.yaml")
        config["nc"] = 1 if name.endswith("depth") else CLASSES
        if divide > 1:
            for row in config["backbone"] + config["head"]:
                row[3] = _narrowed(row[3], divide)
        config["head"][-1][3] += head
        built = cls(config, nc=config["nc"], verbose=False)
        built.nc, built.args = config["nc"], copy.copy(DEFAULT_CFG)  # the trainer puts them there; the losses read them
        if isinstance(built, tasks.YOLOEModel):
            built.set_classes([str(index) for index in range(CLASSES)], torch.randn(1, CLASSES, 512))
        return built.eval()

    return build


def _narrowed(arguments: Any, divide: int) -> Any:
    """Arguments of a YAML row with every number of channels divided; smaller numbers are kernels, strides and counts."""
    if isinstance(arguments, list):
        return [_narrowed(argument, divide) for argument in arguments]
    return arguments // divide if type(arguments) is int and arguments >= 32 else arguments


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(sizes: tuple[tuple[int, int, int], ...] = SIZES) -> Callable[[nn.Module, int], Arguments]:
    def inputs(_: nn.Module, number: int) -> Arguments:
        height, width, batch = sizes[number]
        return (torch.rand(batch, 3, height, width, generator=_random(number)),), {}

    return inputs


BOXES = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.7, 0.6, 0.3, 0.4], [0.5, 0.5, 0.6, 0.6], [0.4, 0.3, 0.5, 0.4]])
#: The same with an angle.
TURNED = torch.cat([BOXES, torch.tensor([[0.1], [0.4], [0.7], [1.0]])], 1)


def batch(side: int = 96, **more: Any) -> Callable[[nn.Module], Arguments]:
    """Two images with two objects each, and every kind of target that a head here asks for.

    The deepest map has 3x3 points, not 2x2: nearest sampling at the border of a map has no gradient by position.
    """

    def training(_: nn.Module) -> Arguments:
        random = _random(9)
        masks = torch.zeros(2, side // 4, side // 4)  # object n of an image is n + 1
        masks[:, 3:11, 2:9], masks[:, 9:15, 9:14] = 1, 2
        targets = {
            "img": torch.rand(2, 3, side, side, generator=random),
            "batch_idx": torch.tensor([0.0, 0.0, 1.0, 1.0]),
            "cls": torch.arange(CLASSES).float()[:, None],
            "bboxes": BOXES.clone(),
            "masks": masks,
            "sem_masks": masks.long(),
            "keypoints": torch.cat([torch.rand(4, 17, 2, generator=random), torch.ones(4, 17, 1)], 2),
            "semantic_mask": torch.randint(0, CLASSES, (2, side, side), generator=random),
            "depth": 1 + 9 * torch.rand(2, side, side, generator=random),
            "txt_feats": torch.randn(2, CLASSES, 512, generator=random),
            **copy.deepcopy(more),
        }
        return (targets,), {}

    return training


def prompts(height: int, width: int, images: int, count: int) -> torch.Tensor:
    """Masks of the objects meant, at an eighth of the image's size."""
    marks = torch.zeros(images, count, height // 8, width // 8)
    for index in range(count):
        marks[:, index, index : index + 3, index : index + 4] = 1
    return marks


def prompted(_: nn.Module, number: int) -> Arguments:
    return images()(_, number)[0], {"vpe": prompts(*SIZES[number], 3)}


class Elan(nn.Module):
    """YOLOv7's aggregation block: a chain of convolutions whose every stage goes into the last."""

    def __init__(self, channels: int, out: int, depth: int = 4) -> None:
        super().__init__()
        width = out // 4
        self.first, self.second = conv(channels, width, 1), conv(channels, width, 1)
        self.chain = nn.ModuleList(conv(width, width, 3) for _ in range(depth))
        self.last = conv(width * (2 + depth // 2), out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages = [self.first(x), self.second(x)]
        y = stages[-1]
        for number, layer in enumerate(self.chain):
            y = layer(y)
            if number % 2:
                stages.append(y)
        return self.last(torch.cat(stages, 1))


class Yolov7StandIn(nn.Module):
    """YOLOv7's shape, which ultralytics does not have: ELAN blocks, top-down by nearest x2 and concatenation, bottom-up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(conv(channels, channels, 3, 2), Elan(channels, 2 * channels)) for channels in (16, 32, 64)
        )
        self.reduce5, self.reduce4 = conv(128, 32, 1), conv(32, 16, 1)
        self.route4, self.route3 = conv(64, 32, 1), conv(32, 16, 1)
        self.up5 = nn.Upsample(None, 2, "nearest")
        self.up4 = nn.Upsample(None, 2, "nearest")
        self.elan4, self.elan3 = Elan(64, 32), Elan(32, 16)
        self.down3, self.down4 = conv(16, 16, 3, 2), conv(32, 32, 3, 2)
        self.elan4b, self.elan5b = Elan(48, 32), Elan(64, 32)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 3 * (CLASSES + 5), 1) for channels in (16, 32, 32))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        pyramid = [x := stage(x) for stage in self.stages]
        p5 = self.reduce5(pyramid[2])
        p4 = self.elan4(torch.cat([self.up5(p5), self.route4(pyramid[1])], 1))
        p3 = self.elan3(torch.cat([self.up4(self.reduce4(p4)), self.route3(pyramid[0])], 1))
        n4 = self.elan4b(torch.cat([self.down3(p3), p4], 1))
        n5 = self.elan5b(torch.cat([self.down4(n4), p5], 1))
        return [head(level) for head, level in zip(self.heads, (p3, n4, n5), strict=True)]


def conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU()
    )


def yolov7() -> nn.Module:
    torch.manual_seed(0)
    return Yolov7StandIn().eval()


def case(
    name: str,
    build: Callable[[], nn.Module],
    expected: Mapping[str, str],
    *,
    inputs: Callable[[nn.Module, int], Arguments] | None = None,
    training: Callable[[nn.Module], Arguments] | None = None,
    **options: Any,
) -> Case:
    return Case(
        "ultralytics", name, build, inputs or images(), training or batch(), count=3, expected=expected, **options
    )


DETECT, SEGMENT, POSE, OBB = tasks.DetectionModel, tasks.SegmentationModel, tasks.PoseModel, tasks.OBBModel
RTDETR, WORLD = tasks.RTDETRDetectionModel, tasks.WorldModel
YOLOE, YOLOE_SEG = tasks.YOLOEModel, tasks.YOLOESegModel

#: Each fuses maps of the strides from its own on; the first of them is of its own stride already, the others come from deeper.
FUSE_V9E = {
    "model.16:0": "identity",
    **{f"model.16:{i}": FEATURE for i in range(1, 5)},
    "model.18:0": "identity",
    **{f"model.18:{i}": FEATURE for i in range(1, 4)},
    "model.21:0": "identity",
    **{f"model.21:{i}": FEATURE for i in range(1, 3)},
    "model.24:0": "identity",
    "model.24:1": FEATURE,
    "model.27": "identity",
}
SAVPE = {f"model.22.savpe.{path}": LAYER for path in ("cv2.1.1", "cv2.2.1", "cv1.1.2", "cv1.2.2")}
NARROW_DECODER = (64, 20, 2, 4, 2, 64)  # channels, queries, points, heads, layers, feed-forward

CASES = [
    case("yolov3-tiny", model(DETECT, "yolov3-tiny", 4), layers(17)),
    case("yolov3", model(DETECT, "yolov3", 4), layers(17, 24)),
    case("yolov5n", model(DETECT, "yolov5n"), layers(11, 15)),
    case(
        "yolov5n-p6",
        model(DETECT, "yolov5n-p6"),
        layers(13, 17, 21),
        inputs=images(SIZES_P6),
        training=batch(192),
        tested=False,
    ),
    # Its necks are made larger by transposed convolutions.
    case("yolov6n", model(DETECT, "yolov6n"), {}),
    case("yolov7 stand-in", yolov7, {"up5": LAYER, "up4": LAYER}, training=lambda m: images()(m, 1)),
    case("yolov8n", model(DETECT, "yolov8n"), layers(10, 13)),
    case("yolov8n-p2", model(DETECT, "yolov8n-p2"), layers(10, 13, 16), tested=False),
    case(
        "yolov8n-p6",
        model(DETECT, "yolov8n-p6"),
        layers(12, 15, 18),
        inputs=images(SIZES_P6),
        training=batch(192),
        tested=False,
    ),
    case("yolov8n-ghost", model(DETECT, "yolov8n-ghost"), layers(10, 13), tested=False),
    case("yolov8n-seg", model(SEGMENT, "yolov8n-seg"), layers(10, 13)),
    case("yolov8n-pose", model(POSE, "yolov8n-pose"), layers(10, 13)),
    case("yolov8n-obb", model(OBB, "yolov8n-obb"), layers(10, 13), training=batch(bboxes=TURNED), tested=False),
    case("yolov9t", model(DETECT, "yolov9t"), layers(10, 13), tested=False),
    case("yolov9c", model(DETECT, "yolov9c", 8), layers(10, 13), tested=False),
    case("yolov9e", model(DETECT, "yolov9e", 8), {**FUSE_V9E, **layers(30, 33)}),
    case("yolov10n", model(DETECT, "yolov10n"), layers(11, 14)),
    case("yolo11n", model(DETECT, "yolo11n"), layers(11, 14)),
    case("yolo11n-seg", model(SEGMENT, "yolo11n-seg"), layers(11, 14)),
    case("yolo11n-pose", model(POSE, "yolo11n-pose"), layers(11, 14)),
    case("yolo12n", model(DETECT, "yolo12n"), layers(9, 12)),
    case("yolo12n-seg", model(SEGMENT, "yolo12n-seg"), layers(9, 12), tested=False),
    case("yolo12n-pose", model(POSE, "yolo12n-pose"), layers(9, 12), tested=False),
    case("yolo26n", model(DETECT, "yolo26n"), layers(11, 14), tested=False),
    case(
        "yolo26n-seg",
        model(SEGMENT, "yolo26n-seg"),
        {**layers(11, 14), "model.23.proto:0": FEATURE, "model.23.proto:1": FEATURE},
    ),
    case("yolo26n-pose", model(POSE, "yolo26n-pose"), layers(11, 14), tested=False),
    # Its loss resizes the logits to the labels, after the model.
    case("yolo26n-sem", model(tasks.SemanticSegmentationModel, "yolo26n-sem"), layers(11, 14)),
    case(
        "yolo26n-depth",
        model(tasks.DepthModel, "yolo26n-depth"),
        {**layers(11, 14), "model.23:0": FEATURE, "model.23:1": FEATURE},
    ),
    case("rtdetr-l", model(RTDETR, "rtdetr-l", 4, NARROW_DECODER), layers(13, 18)),
    case("rtdetr-resnet50", model(RTDETR, "rtdetr-resnet50", 4, NARROW_DECODER), layers(8, 13), tested=False),
    case("yolov8n-rtdetr", model(RTDETR, "yolov8n-rtdetr", 1, NARROW_DECODER), layers(10, 13), tested=False),
    case("yolov8n-world", model(WORLD, "yolov8n-world"), layers(10, 13), tested=False),
    case("yolov8n-worldv2", model(WORLD, "yolov8n-worldv2"), layers(10, 13)),
    case("yoloe-v8n", model(YOLOE, "yoloe-v8n"), layers(10, 13), tested=False),
    case(
        "yoloe-v8n, visual prompts",
        model(YOLOE, "yoloe-v8n"),
        {**layers(10, 13), **SAVPE},
        inputs=prompted,
        # As many prompts as the model last had classes would give a loss of zero.
        training=batch(visuals=prompts(96, 96, 2, 5)),
        inferred=False,
    ),
    case("yoloe-v8n-seg", model(YOLOE_SEG, "yoloe-v8n-seg"), layers(10, 13), tested=False),
    case("yoloe-11n", model(YOLOE, "yoloe-11n"), layers(11, 14), tested=False),
]
