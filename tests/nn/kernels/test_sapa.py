"""SAPA-B against its formula, written out in loops: the authors' module runs on CUDA alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import upswap
from slow_sums import window
from upswap.nn import SAPA


def build(channels: int = 8, guide_channels: int = 6, **options: Any) -> SAPA:
    """The published operator, with scores that are far apart."""
    torch.manual_seed(0)
    module = SAPA(channels, guide_channels, **{"init": "paper", "embedding_dim": 4, **options})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if name.startswith("norm") and "weight" in name else 0.0, std=0.5)
    return module.double()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(module: SAPA, x: Tensor, norm: Any, groups: int) -> Tensor:
    """`x` (C, H, W): over groups of channels and all pixels (conv), over the channels of a pixel (linear)."""
    if not module.norm:
        return x
    parts = [x] if module.form == "linear" else list(x.chunk(groups))
    over = (0,) if module.form == "linear" else (0, 1, 2)
    parts = [
        (part - part.mean(over, True)) / (part.var(over, correction=0, keepdim=True) + 1e-5).sqrt() for part in parts
    ]
    return torch.cat(parts) * norm.weight[:, None, None] + norm.bias[:, None, None]


@torch.no_grad()
def defined(module: SAPA, x: Tensor, guide: Tensor, groups: tuple[int, int]) -> Tensor:
    side, size = module.up_kernel_size, guide.shape[2:]
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for b in range(x.shape[0]):
        y = normed(module, guide[b], getattr(module, "norm_y", None), groups[0])
        z = normed(module, x[b], getattr(module, "norm_x", None), groups[1])
        queries = torch.einsum("dc,chw->dhw", module.q.weight.flatten(1), y) + module.q.bias[:, None, None]
        keys = torch.einsum("dc,chw->dhw", module.k.weight.flatten(1), z) + module.k.bias[:, None, None]
        for i in range(size[0]):
            for j in range(size[1]):
                place = i * x.shape[2] // size[0], j * x.shape[3] // size[1]
                scores = [float(queries[:, i, j] @ key) for key in window(keys, *place, side)]
                weights = torch.tensor(scores, dtype=x.dtype).softmax(dim=0)
                for weight, value in zip(weights, window(x[b], *place, side), strict=True):
                    out[b, :, i, j] += weight * value
    return out


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"form": "linear"}, {"up_kernel_size": 3}], ids=str)
@pytest.mark.parametrize("size", [(8, 10), (7, 9), (12, 5), (11, 13)], ids=str)
def test_it_is_its_formula(options: dict[str, Any], size: tuple[int, int]) -> None:
    module, x, guide = build(**options), noise(2, 8, 4, 5), noise(2, 6, *size, seed=2)
    assert (module(x, guide=guide) - defined(module, x, guide, (2, 8))).abs().max() < 1e-10


def test_the_border_loses_weight() -> None:
    """Of equal scores 9 of 25 weights lie inside at a corner: 0.36, as was measured of the authors' module."""
    module = SAPA(32, init="paper")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    out = module(torch.ones(1, 32, 8, 8), guide=torch.ones(1, 32, 16, 16))
    assert out[0, 0, 0, 0].item() == pytest.approx(0.36)
    assert torch.allclose(out[..., 4:-4, 4:-4], torch.ones(()))


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"q.weight": (32, 128, 1, 1), "k.weight": (32, 256, 1, 1), "norm_y.weight": (128,)}),
        ({"form": "linear"}, {"q.weight": (64, 128), "k.weight": (64, 256), "norm_x.bias": (256,)}),
    ],
    ids=str,
)
def test_the_state_dict_is_that_of_the_authors_module(
    options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    state = SAPA(256, 128, init="paper", **options).state_dict()
    assert set(state) == {f"{part}.{name}" for part in ("norm_y", "norm_x", "q", "k") for name in ("weight", "bias")}
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in state.items()}.items()
    assert {"q.weight", "q.bias", "k.weight", "k.bias"} == set(SAPA(8, norm=False, init="paper").state_dict())


def test_parameters_are_as_many_as_counted() -> None:
    assert sum(parameter.numel() for parameter in SAPA(256, init="paper").parameters()) == 17472
    with pytest.raises(upswap.OptionError, match="use form='conv'"):
        SAPA(8, form="linear", norm=False)
