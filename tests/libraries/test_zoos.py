"""Every model of every zoo that is small enough to test: all checks of `invariants.Run`, one test a model.

The zoos' other models are for `benchmarks/coverage.py`, which makes the same checks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

import invariants
from zoos.case import Case

#: Those with a cheaper model among the others whose sites are of the same kind.
SLOW = {
    "monai-AHNet",
    "monai-BasicUNetPlusPlus",
    "monai-MCFCN",
    "monai-RegUNet",
    "monai-SPADEAutoencoderKL",
    "monai-SPADEDiffusionModelUNet",
    "monai-SPADENet with encoder",
    "monai-VoxelMorph",
    "smp-panoptic_fpn-resnet101",
    "smp-panoptic_fpn-resnet50",
    "torchvision-fasterrcnn_resnet18_fpn",
    "torchvision-fasterrcnn_resnet50_fpn",
    "torchvision-fcos_resnet18_fpn",
    "torchvision-keypointrcnn_resnet18_fpn",
    "torchvision-maskrcnn_resnet18_fpn",
    "torchvision-maskrcnn_resnet50_fpn",
    "torchvision-retinanet_resnet18_fpn",
    "transformers-chmv2",
    "transformers-d-fine",
    "transformers-data2vec-vision",
    "transformers-deimv2-dinov3",
    "transformers-depth-anything-small",
    "transformers-dpt-dinov2",
    "transformers-dpt-segmentation",
    "transformers-edgetam-video",
    "transformers-maskformer-resnet",
    "transformers-mobilevit-v2",
    "transformers-oneformer-swin",
    "transformers-pp-doclayout-v3",
    "transformers-pp-ocr-v5-server-det",
    "transformers-rt-detr",
    "transformers-sam2-video",
    "transformers-sam3-lite-text",
    "transformers-sam3-tracker-video",
    "transformers-segformer-b1",
    "transformers-zoedepth-nk",
    "ultralytics-rtdetr-l",
    "ultralytics-yolo11n-pose",
    "ultralytics-yolo11n-seg",
    "ultralytics-yolo12n",
    "ultralytics-yolo26n-seg",
    "ultralytics-yolov10n",
    "ultralytics-yolov3",
    "ultralytics-yolov5n",
    "ultralytics-yolov6n",
    "ultralytics-yolov8n-pose",
    "ultralytics-yolov8n-worldv2",
    "ultralytics-yolov9e",
}


def cases() -> Iterator[Any]:
    """The tested cases; of a zoo that is not installed, one that is skipped."""
    for zoo, library in invariants.ZOOS.items():
        if importlib.util.find_spec(library) is None:
            yield pytest.param(None, id=zoo, marks=pytest.mark.skip(reason=f"{library} is not installed"))
        else:
            for case in invariants.cases_of(zoo):
                if case.tested:
                    name = f"{zoo}-{case.name}"
                    yield pytest.param(case, id=name, marks=pytest.mark.slow if name in SLOW else ())


@pytest.mark.parametrize("case", list(cases()))
def test_a_model_of_a_zoo(case: Case) -> None:
    for name, check in invariants.Run(case).checks().items():
        try:
            check()
        except BaseException as error:
            error.add_note(f"in the check {name!r} of {case.zoo} {case.name}")
            raise


#: What the largest hosts of the paper are held to: not what needs their gradients in float64.
EVAL_ONLY = ("sites", "step 0", "stand-ins", "keys", "learning", "unpatch")


def hosts() -> Iterator[Any]:
    """The paper's hosts that are too large for all checks, at their real configuration."""
    for zoo, library in invariants.ZOOS.items():
        if importlib.util.find_spec(library) is not None:
            module = importlib.import_module(f"zoos.{zoo}_zoo")
            for case in getattr(module, "PAPER_CASES", ()):
                if not case.tested:
                    yield pytest.param(case, id=f"{zoo}-{case.name}")


@pytest.mark.parametrize("case", list(hosts()))
def test_a_large_host_of_the_paper(case: Case) -> None:
    made = invariants.Run(case).checks()
    for name in EVAL_ONLY:
        made[name]()
