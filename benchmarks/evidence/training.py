"""Training and testing one model: crops, AdamW or SGD, a schedule, and the same order of the data for every arm."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from metrics import Metrics
from torch import Tensor, nn

import upswap
from data import VOID, Split

_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
#: What the sides of an image have to be multiples of.
_STRIDE = 32


class Recipe(NamedTuple):
    """How a model is trained."""

    steps: int
    lr: float
    seed: int
    side: int = 96
    batch: int = 8
    optimizer: str = "adamw"
    upsampler_lr_mult: float | None = None
    """The upsamplers' rate over the host's; None for the default of `upswap.param_groups`."""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """The part of the steps in which the rate rises; after that it falls as a cosine to zero."""


def train(model: nn.Module, split: Split, recipe: Recipe) -> list[float]:
    """Train in place; the losses. The order of the data and the crops are those of the seed, whatever the model is."""
    generator = torch.Generator().manual_seed(recipe.seed)
    groups = upswap.param_groups(
        model, recipe.lr, weight_decay=recipe.weight_decay, upsampler_lr_mult=recipe.upsampler_lr_mult
    )
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if recipe.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    model.train()
    losses = []
    for _ in range(recipe.steps):
        images, labels = _batch(split, recipe, generator)
        logits = model(images)
        loss = F.cross_entropy(_at(logits, labels), labels, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, classes: int, batch: int = 8) -> dict[str, Any]:
    """The figures of a model on a split, on whole images."""
    model.eval()
    found = Metrics(classes)
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        height, width = images.shape[2:]
        margin = (-width % _STRIDE, -height % _STRIDE)
        padded = F.pad(_normal(images), (0, margin[0], 0, margin[1]), mode="replicate")
        found.add(_at(model(padded)[..., :height, :width], labels), labels.long())
    return found.result()


def _rate(step: int, recipe: Recipe) -> float:
    rising = max(1, round(recipe.warmup * recipe.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, recipe.steps - rising)))


def _batch(split: Split, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images, cropped and half of them mirrored."""
    side, fine = recipe.side, split.labels.shape[1] // split.images.shape[2]

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    images, labels = [], []
    for _ in range(recipe.batch):
        index = number(len(split.images))
        top, left = (number(size - side + 1) for size in split.images.shape[2:])
        image = split.images[index, :, top : top + side, left : left + side]
        label = split.labels[index, fine * top : fine * (top + side), fine * left : fine * (left + side)]
        flip = number(2)
        images.append(image.flip(-1) if flip else image)
        labels.append(label.flip(-1) if flip else label)
    return _normal(torch.stack(images)), torch.stack(labels).long()


def _normal(images: Tensor) -> Tensor:
    return (images.float() / 255 - _MEAN) / _STD


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits at the resolution of the labels."""
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
