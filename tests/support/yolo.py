"""Data sets and settings for ultralytics' own trainers: four images, no network, nothing plotted.

The images are 96x96, so that the deepest map has 3x3 points: nearest sampling at the border has no gradient by position.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from ultralytics import YOLO

import zoos.ultralytics_zoo  # noqa: F401 - its settings have to be there before ultralytics is imported

#: A model of each family, and of each task that resizes, by the YAML that builds it.
MODELS = (
    "yolov5n", "yolov8n", "yolo11n", "yolo12n", "yolo26n",
    "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolo11n-seg", "yolo26n-seg", "yolo26n-pose", "yolo26n-obb",
)  # fmt: skip

#: Its scheduler is made before the first step of the optimiser, and its data loader has no worker to pin for.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]

_KEYPOINTS = 3


def data_for(task: str, folder: Path) -> str:
    """The YAML of a data set of two classes for a task, made in `folder`."""
    root = folder / f"data-{task}"
    if not root.exists():
        draw = random.Random(0)
        for number in range(4):
            image = Image.new("RGB", (96, 96), (40 * number, 90, 200 - 30 * number))
            lines = []
            for kind in range(2):
                x, y = draw.randint(4, 40), draw.randint(4, 40)
                box = (x, y, x + draw.randint(28, 50), y + draw.randint(28, 50))
                ImageDraw.Draw(image).rectangle(box, fill=(250 * kind, 30, 60))
                lines.append(f"{kind} {_label(task, *(side / 96 for side in box))}")
            for name in ("images", "labels"):
                (root / name).mkdir(parents=True, exist_ok=True)
            image.save(root / "images" / f"{number}.png")
            (root / "labels" / f"{number}.txt").write_text("\n".join(lines))
        keypoints = f"kpt_shape: [{_KEYPOINTS}, 3]\n" if task == "pose" else ""
        (root / "data.yaml").write_text(
            f"path: {root}\ntrain: images\nval: images\nnames: {{0: dark, 1: bright}}\n{keypoints}"
        )
    return str(root / "data.yaml")


def _label(task: str, left: float, top: float, right: float, bottom: float) -> str:
    box = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    corners = (left, top, right, top, right, bottom, left, bottom)
    if task in ("segment", "obb"):
        numbers: tuple[float, ...] = corners
    elif task == "pose":
        numbers = (*box, *(left, top, 2, right, top, 2, right, bottom, 2))
    else:
        numbers = box
    return " ".join(map(str, numbers))


def settings(yolo: YOLO, folder: Path, **more: Any) -> dict[str, Any]:
    """What `yolo.train` is given: short, small, on the CPU, and at a rate at which one epoch shows."""
    return {
        "data": data_for(yolo.task, folder), "epochs": 1, "imgsz": 96, "batch": 2, "nbs": 2, "device": "cpu",
        "workers": 0, "plots": False, "amp": False, "optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0,
        "mosaic": 0.0, "verbose": False, "project": str(folder / "runs"), "name": "train", "exist_ok": True, **more,
    }  # fmt: skip


def image_in(folder: Path, task: str = "detect") -> str:
    """One image of the data set of a task."""
    return str(Path(data_for(task, folder)).parent / "images" / "0.png")
