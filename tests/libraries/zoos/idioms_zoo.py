"""The idioms of code bases that no zoo here has, each as a small model of this repository's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zoos import idioms_iterative, idioms_pyramids, idioms_saliency
from zoos.case import Arguments, Case, batches, seeded_case

SOURCE = "feature => source"
LAYER = "feature => module"

IMAGES = batches((2, 32, 32), (1, 48, 64), (3, 41, 37))


def images(count: int) -> Callable[[nn.Module, int], Arguments]:
    """So many images side by side."""

    def inputs(model: nn.Module, number: int) -> Arguments:
        (image,), _ = IMAGES(model, number)
        return tuple(image.roll(shift, 3) for shift in range(count)), {}

    return inputs


def steps(model: nn.Module, number: int) -> Arguments:
    """An image and a time step."""
    (image,), _ = IMAGES(model, number)
    return (image, torch.arange(len(image)) * 7 + 3), {}


def text_and_target(model: nn.Module) -> Arguments:
    (image,), _ = IMAGES(model, 0)
    return (image,), {"target": (image[:, :1] > 0).float()}


def classes_and_target(model: nn.Module) -> Arguments:
    (image,), _ = IMAGES(model, 0)
    return (image, image.abs()[:, 0].long().clamp(max=2)), {"mode": "loss"}


def case(
    cls: type[nn.Module],
    expected: Mapping[str, str],
    inputs: Callable[[nn.Module, int], Arguments] = IMAGES,
    training: Callable[[nn.Module], Arguments] | None = None,
    *,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Case:
    """A model under the name of its class, or `name` where it is made with `arguments`."""
    build = functools.partial(cls, **(arguments or {}))
    return seeded_case("idioms", name or cls.__name__, build, expected, inputs, training=training, **fields)


def numbered(owner: str, *decided: str) -> dict[str, str]:
    """The sites of an owner that makes several calls, in the order it makes them."""
    return {f"{owner}:{number}": one for number, one in enumerate(decided)}


BOTH = (SOURCE, SOURCE)
BOTH_WAYS = {
    f"cell.{cell}.fnode.{node}.combine.resample.{level}.upsample": SOURCE
    for cell in (0, 1)
    for node, level in ((0, 2), (1, 3))
}
SEGMENTOR = {
    **numbered("decode_head.psp_modules", "context", "context", "context"),
    # The way down, then what is fused.
    **numbered("decode_head", SOURCE, SOURCE, SOURCE, SOURCE),
    "root": "logits",
}

CASES = [
    # U-2-Net: sides that are returned and fused are logits, what joins a level of the same U is a feature.
    case(
        idioms_saliency.NestedU,
        {
            **numbered("stage1", *BOTH),
            **numbered("stage1d", *BOTH),
            **numbered("root", *BOTH, "logits", "logits"),
        },
    ),
    # The same by recursion and layers made in the forward; the last side output has the size already.
    case(
        idioms_saliency.RecursiveU,
        {
            **numbered("stage1", *BOTH),
            "stage2": SOURCE,
            "stage2d": SOURCE,
            **numbered("root", "logits", SOURCE, "logits"),
            **numbered("stage1d", *BOTH),
        },
    ),
    # BASNet: the layer for x2 is decided on at each of its calls.
    case(
        idioms_saliency.Boundary,
        {**numbered("root", *BOTH, "logits"), "upscore4": "logits", "refunet.upscore2": LAYER},
    ),
    # PraNet: its decoder has one layer for six calls; the estimates that it makes smaller and larger are all logits.
    case(
        idioms_saliency.ReverseAttention,
        {**numbered("agg1", *BOTH, *BOTH, *BOTH), **numbered("root", *["logits"] * 5)},
        batches((2, 64, 64), (1, 64, 96), (3, 128, 64)),
    ),
    # docTR's DB.
    case(
        idioms_pyramids.TextDetector,
        {**numbered("fpn", SOURCE, SOURCE, SOURCE), **{f"fpn.out_branches.{level}.3": LAYER for level in (1, 2, 3)}},
        training=text_and_target,
    ),
    case(
        idioms_pyramids.LevelHeads,
        numbered("root", SOURCE, SOURCE, SOURCE),
        batches((2, 32, 32), (1, 48, 64), (3, 40, 24)),
    ),
    # mmsegmentation. The auxiliary head runs for the loss alone.
    case(idioms_pyramids.Segmentor, SEGMENTOR, training=classes_and_target),
    case(
        idioms_pyramids.Segmentor,
        SEGMENTOR,
        training=classes_and_target,
        name="Segmentor aligned",
        arguments={"align_corners": True},
    ),
    # effdet.
    case(idioms_pyramids.BothWays, BOTH_WAYS, batches((2, 32, 32), (1, 64, 64), (3, 32, 64))),
    case(
        idioms_pyramids.BothWays,
        BOTH_WAYS,
        batches((2, 32, 32), (1, 64, 64), (3, 32, 64)),
        name="BothWays attn bilinear",
        arguments={"weight_method": "attn", "upsample": "bilinear"},
    ),
    # diffusers. An image that is no multiple of 4 leads to the call with a size.
    case(
        idioms_iterative.DenoisingUNet,
        {"up_blocks.0.upsamplers.0": SOURCE, "up_blocks.1.upsamplers.0": SOURCE},
        steps,
        inferred=False,
    ),
    # RAFT-Stereo: a block that runs nine times has one upsampler a call.
    case(idioms_iterative.RecurrentFlow, numbered("update_block", *BOTH), images(2), inferred=False),
    # PIDNet: what only measures how alike two maps are is a gate, what is laid over is a feature.
    case(
        idioms_iterative.TwoBranches,
        {
            **numbered("pag", "gate", "feature => graph"),
            **numbered("spp", SOURCE, "context"),
            "root": SOURCE,
            "final_layer": "logits",
        },
        batches((2, 32, 32), (1, 48, 64), (3, 80, 32)),
    ),
    case(idioms_iterative.Scripted, {"root": SOURCE}, batches((2, 32, 32), (1, 48, 64), (3, 40, 24))),
]
