"""Upsamplers known by their tensors alone: each is found, and nothing else is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from tiny_host import image, tiny
from upswap.nn import CARAFE, LDAAQU, DySample
from upswap.nn.state_dicts import options_in, upsamplers_in


def state(**modules: nn.Module) -> dict[str, torch.Tensor]:
    return nn.ModuleDict(modules).state_dict()


@pytest.mark.parametrize(
    "module",
    [
        DySample(64),
        DySample(64, style="pl"),
        DySample(64, dyscope=True),
        DySample(64, mode="bicubic"),
        DySample(12, (1.5, 3), groups=3),
        CARAFE(64),
        CARAFE(64, up_kernel=3),
        CARAFE(64, init="paper"),
        LDAAQU(64),
        LDAAQU(64, rpb=False, init="paper"),
    ],
)
def test_upsamplers_are_found(module: nn.Module) -> None:
    assert upsamplers_in(state(host=nn.Conv2d(1, 1, 1), up=module)) == ["up"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"offset.weight": (18, 4, 3, 3), "offset.bias": (18,)},  # of a deformable convolution
        {"offset.weight": (18, 4, 1, 1), "offset.bias": (18,), "weight": (4, 4, 3, 3)},
        {"offset.weight": (18, 4, 1, 1), "offset.bias": (18,), "a.b.c": (1,)},
        {"offset.weight": (7, 4, 1, 1), "offset.bias": (7,)},
        {"offset.weight": (4, 4), "offset.bias": (4,)},
        {"weight": (4, 4, 1, 1), "bias": (4,)},
    ],
)
def test_other_modules_are_not(tensors: dict[str, tuple[int, ...]]) -> None:
    assert upsamplers_in({f"x.{name}": torch.zeros(shape) for name, shape in tensors.items()}) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"style": "pl", "groups": 1},
        {"dyscope": True},
        {"upsampler": "carafe", "up_kernel": 3},
        {"upsampler": "carafe", "init": "paper"},
        {"upsampler": "lda_aqu", "reduction_factor": 2, "k_e": 5, "nh": 2},
        {"upsampler": "lda_aqu", "rpb": False, "k_u": 5, "init": "paper"},
    ],
)
def test_options_are_read_off_shapes(options: dict[str, Any]) -> None:
    model = upswap.patch(tiny(), image(), **options)
    for site in upswap.plan_of(model).swapped:
        shapes = {
            name: tuple(value.shape) for name, value in upswap.upsamplers(model)[site.module].state_dict().items()
        }
        name, values = options.get("upsampler", "dysample"), {k: v for k, v in options.items() if k != "upsampler"}
        found = [way for upsampler, way in options_in(site, shapes, name) if upsampler == name]
        assert any(values.items() <= way.items() for way in found), site.name


def test_shapes_of_nothing_have_no_options() -> None:
    site = upswap.plan_of(upswap.patch(tiny(), image())).swapped[0]
    assert [*options_in(dataclasses.replace(site, channels=5), {"offset.weight": (6, 4, 1, 1)}, "dysample")] == []
