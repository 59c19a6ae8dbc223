"""FreqFusion against its authors' module and against its formula, written out in loops."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import upswap
from golden import KERNELS, differences, kernel_case
from slow_sums import sums
from upswap.nn import FreqFusion


def cases() -> dict[str, dict[str, Any]]:
    names = ("padding", "hamming", "norm", "resample", "groups", "compressed")
    with safe_open(KERNELS, "pt") as file:
        found = json.loads(file.metadata()["cases"])
    return {name: {key: case[key] for key in names} for name, case in found.items() if case["cls"] == "freqfusion"}


CASES = cases()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(module: Any) -> Any:
    """With kernels that are far from even, and offsets that show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("gain"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double()


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_authors_module_computes(name: str) -> None:
    case = kernel_case(name)
    module = FreqFusion(16, init="paper", **CASES[name])
    module.load_state_dict(case.state)
    assert module.state_dict().keys() == case.state.keys()
    for key, buffer in FreqFusion(16, init="paper", **CASES[name]).named_buffers():
        assert torch.allclose(buffer, case.state[key], atol=1e-7), key
    x, guide = case.inputs["lr"].requires_grad_(), case.inputs["hr"].requires_grad_()
    out = list(module.both(x, guide))
    assert torch.equal(module(x, guide=guide), out[1])
    found = differences(module, case, out, {"lr": x, "hr": guide})
    assert max(found.values()) < 2e-5, found


def similarities(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype)
    around = [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2) if (i, j) != (0, 0)]
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for n, (down, right) in enumerate(around):
                if 0 <= i + down < x.shape[2] and 0 <= j + right < x.shape[3]:
                    one, other = x[:, :, i, j], x[:, :, i + down, j + right]
                    out[:, n, i, j] = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    return torch.cat((x, out), dim=1)


def read(image: Tensor, row: float, column: float) -> Tensor:
    """A map (C, H, W) between its pixels, its border repeated."""
    row, column = (min(max(p, 0), n - 1) for p, n in zip((row, column), image.shape[1:], strict=True))
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            total += image[:, y, x] * max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
    return total


@torch.no_grad()
def defined(module: FreqFusion, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """The changed guide and the map, of a guide of twice the size; steps as in the paper's code."""

    def conv(x: Tensor, path: str) -> Tensor:
        at = module.get_submodule(path)
        return F.conv2d(x, at.weight, at.bias, padding=at.weight.shape[-1] // 2)

    def kernels(logits: Tensor) -> Tensor:
        side = round(logits.shape[1] ** 0.5)
        shape = np.outer(np.hamming(side), np.hamming(side)) if module.hamming else np.ones((side, side))
        weights = logits.softmax(dim=1) * torch.from_numpy(shape).flatten()[:, None, None]
        return weights / weights.sum(dim=1, keepdim=True)

    def total(x: Tensor, k: Tensor) -> Tensor:
        return sums(x, k, module.padding)

    a, low = conv(hr, "hr_channel_compressor"), conv(lr, "lr_channel_compressor")
    high = conv(a, "content_encoder2")
    a = 2 * a - total(a, kernels(high))
    logits = conv(a, "content_encoder")
    logits = logits + total(conv(low, "content_encoder"), kernels(logits))
    up = total(lr, kernels(logits))
    high = high + total(conv(low, "content_encoder2"), kernels(logits))
    changed = 2 * hr - total(hr, kernels(high))
    if not module.resample:
        return changed, up
    if module.norm:
        groups = module.compressed // 8
        a, low = (
            F.group_norm(x, groups, *module.dysampler[name].parameters())
            for x, name in ((a, "norm_hr"), (low, "norm_lr"))
        )
    a, low = similarities(a), similarities(low)
    scale = conv(low, "dysampler.direct_scale") + F.pixel_unshuffle(conv(a, "dysampler.hr_direct_scale"), 2)
    offset = conv(low, "dysampler.offset") + F.pixel_unshuffle(conv(a, "dysampler.hr_offset"), 2)
    offset = offset * scale.sigmoid() + module.dysampler.init_pos
    out, size = torch.zeros_like(up), up.shape[1] // module.groups
    for b, image in enumerate(up):
        for g in range(module.groups):
            part = slice(g * size, (g + 1) * size)
            for i in range(up.shape[2]):
                for j in range(up.shape[3]):
                    cell, last = i % 2 * 2 + j % 2, 4 * module.groups
                    right, down = (offset[b, n * last + g * 4 + cell, i // 2, j // 2] for n in (0, 1))
                    # A position in the map, where the upsampled one is read that has twice its pixels.
                    row, column = 2 * (i // 2 + 0.5 + down) - 0.5, 2 * (j // 2 + 0.5 + right) - 0.5
                    out[b, part, i, j] = read(image[part], float(row), float(column))
    return changed, out


@pytest.mark.parametrize(
    "options",
    [{}, {"hamming": False, "norm": False}, {"resample": False}, {"padding": "reflect", "groups": 2}],
    ids=str,
)
def test_it_is_its_formula(options: dict[str, Any]) -> None:
    module = FreqFusion(4, 3, init="paper", compressed=8, **options).double()
    module.reset_positions()  # in float64
    module, x, guide = moved(module), noise(1, 4, 3, 4), noise(1, 3, 6, 8, seed=2)
    for got, expected in zip(module.both(x, guide), defined(module, x, guide), strict=True):
        assert (got - expected).abs().max() < 1e-10


def test_what_is_added_is_what_the_guide_gains() -> None:
    for init in ("paper", "match"):
        module = moved(FreqFusion(8, init=init, compressed=8, additive=True))
        if init == "match":
            assert torch.equal(
                module(noise(1, 8, 3, 4), guide=noise(1, 8, 6, 8)),
                F.interpolate(noise(1, 8, 3, 4), (6, 8), mode="bilinear"),
            )
            with torch.no_grad():
                module.gain.add_(0.5)
                module.gain_hp.add_(torch.linspace(0, 1, 8))
        x, guide = noise(1, 8, 3, 4), noise(1, 8, 6, 8, seed=2)
        changed, up = module.both(x, guide)
        assert torch.allclose(guide + module(x, guide=guide), changed + up, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (12, 16), (6, 9)], ids=str)
def test_other_sizes(size: tuple[int, int]) -> None:
    module = moved(FreqFusion(8, 4, compressed=8))
    x, guide = noise(1, 8, 3, 4), noise(1, 4, *size, seed=2)
    changed, up = module.both(x, guide)
    assert torch.equal(changed, guide)
    assert torch.equal(up, F.interpolate(x, size, mode="bilinear"))
    module.load_state_dict({name: value for name, value in module.state_dict().items() if not name.startswith("gain")})
    changed, up = module.both(x, guide)
    assert changed.shape == guide.shape
    assert torch.allclose(up, module(x, guide=guide))
    assert not torch.allclose(up, F.interpolate(x, size, mode="bilinear"), atol=1e-2)


def test_parameters_are_as_many_as_counted() -> None:
    module = FreqFusion(256, init="paper")
    assert module.compressed == 64
    assert sum(parameter.numel() for parameter in module.parameters()) == 104690


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"groups": 3}, "groups=3 does not divide 16 channels"),
        ({"compressed": 12}, "compressed=12 is no multiple of 8"),
        ({"guide_channels": 8, "additive": True}, r"the guide has 8, the map 16\. Leave it out, and take both\(\)"),
        ({"padding": "zeros"}, "padding='zeros' is not one of zero, reflect"),
    ],
    ids=str,
)
def test_what_it_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(upswap.OptionError, match=says):
        FreqFusion(16, **options)
