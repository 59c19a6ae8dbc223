"""Other inputs made from given ones: larger, to tell sizes that follow the image from constants, and fit for train mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .infer import is_of
from .inputs import Inputs, map_tensors


def enlarged(inputs: Inputs, *, height: bool = True) -> Inputs:
    """The same inputs with every image larger, and random; wider only, where `height` is not set.

    Images are tensors (N, C, H, W) of floats, or with more dimensions before these, and images (C, H, W) in a list; masks
    of their height and width grow with them. Sides grow by half where that keeps multiples of 32, else by 32, and become
    twice as long where they were no multiples. Only the short side of an image grows where the other is four times as
    long: models that resize their images to a longest side would make the rest of it the same again. A list of images that is
    the only argument gets one more.
    """
    images = images_of(inputs)
    grids = {tuple(image.shape[-2:]) for image in images}
    chosen = set(map(id, images))
    generator = torch.Generator().manual_seed(0)

    def larger(tensor: torch.Tensor) -> torch.Tensor:
        is_image = id(tensor) in chosen
        if not is_image and (tensor.is_floating_point() or tensor.dim() != 3 or tuple(tensor.shape[-2:]) not in grids):
            return tensor
        old_height, old_width = tensor.shape[-2:]
        grow_width = old_width <= 4 * old_height
        grow_height = (height or not grow_width) and old_height <= 4 * old_width
        shape = (
            *tensor.shape[:-2],
            _grown(old_height) if grow_height else old_height,
            _grown(old_width) if grow_width else old_width,
        )
        if not is_image:
            return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
        return torch.randn(shape, generator=generator).to(device=tensor.device, dtype=tensor.dtype)

    return _one_more(inputs.map(larger))


def _one_more(inputs: Inputs) -> Inputs:
    """With one more image, where the only argument is a list of them: what a model does for each image, it does more often."""
    if len(inputs.args) != 1 or inputs.kwargs or not isinstance(inputs.args[0], list):
        return inputs
    images = inputs.args[0]
    if not images or not all(isinstance(image, torch.Tensor) and image.dim() == 3 for image in images):
        return inputs
    return Inputs(([*images, images[-1].flip(-1)],), {})


def _grown(side: int) -> int:
    if side % 32:
        return side * 2
    return side * 3 // 2 if side % 64 == 0 else side + 32


def images_of(inputs: Inputs) -> list[torch.Tensor]:
    """The images among the arguments: float tensors of four or more dimensions, and those of three that stand in a list."""
    found: list[torch.Tensor] = []

    def collect(value: Any, *, listed: bool) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.dim() >= (3 if listed else 4):
                found.append(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                collect(item, listed=False)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item, listed=True)

    for argument in (*inputs.args, *inputs.kwargs.values()):
        collect(argument, listed=False)
    return found


def training_inputs(model: nn.Module, inputs: Inputs) -> Inputs:
    """Eval inputs made fit for train mode: a batch of two at least, and the targets that torchvision's detection models need.

    Batch norm refuses a single value a channel, which a batch of one image gives where a map is one point. Tensors whose
    first dimension is the batch are doubled, the copies mirrored so that they differ.
    """
    if is_of(model, "torchvision.models.detection"):
        return _detection_targets(model, inputs)
    images = images_of(inputs)
    if not images or any(len(image) > 1 for image in images):
        return inputs

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or len(tensor) != 1:
            return tensor
        return torch.cat([tensor, tensor.flip(-1) if tensor.dim() > 3 else tensor])

    return inputs.map(doubled)


def _detection_targets(model: nn.Module, inputs: Inputs) -> Inputs:
    """Two images of the size given, with two boxes each, and for each box what the model's heads are trained on."""
    images = map_tensors(inputs.args[0] if inputs.args else inputs.kwargs.get("images"), lambda image: image)
    if not isinstance(images, list) or not images or inputs.args[1:] or inputs.kwargs.get("targets") is not None:
        return inputs
    images = images if len(images) > 1 else [*images, images[0].flip(-1)]
    heads = getattr(model, "roi_heads", None)
    keypoints = getattr(getattr(heads, "keypoint_predictor", None), "kps_score_lowres", None)
    targets = []
    for image in images:
        height, width = image.shape[-2:]
        boxes = image.new_tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.4, 0.9, 0.9]]) * image.new_tensor([width, height] * 2)
        target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64, device=image.device)}
        if getattr(heads, "mask_predictor", None) is not None:
            target["masks"] = torch.ones(2, height, width, dtype=torch.uint8, device=image.device)
        if keypoints is not None:
            middles = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
            visible = torch.ones_like(middles[..., :1])
            target["keypoints"] = torch.cat([middles, visible], -1).repeat(1, keypoints.out_channels, 1)
        targets.append(target)
    return Inputs((), {"images": images, "targets": targets})
