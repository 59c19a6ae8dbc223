"""LDA-AQU against its authors' module and against its formula, written out in loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upswap
from golden import differences, kernel_case
from upswap.nn import LDAAQU


def build(channels: int = 8, scale: Any = 2, **options: Any) -> LDAAQU:
    """The published operator, with points far from their grid."""
    torch.manual_seed(0)
    module = LDAAQU(channels, scale, **{"reduction_factor": 2, "init": "paper", **options})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std=0.4)
    return module.double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("scale", [2, 4])
def test_it_is_what_the_authors_module_computes(scale: int) -> None:
    case = kernel_case(f"lda_aqu_x{scale}")
    module = LDAAQU(16, scale, init="paper")
    module.load_state_dict(case.state)
    assert module.state_dict().keys() == case.state.keys()
    x = case.inputs["x"].requires_grad_()
    found = differences(module, case, [module(x)], {"x": x})
    assert max(found.values()) < 2e-5, found


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(dim=0)
    return (
        centred / (centred.square().mean(dim=0) + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    )


def read(image: Tensor, row: float, column: float) -> Tensor:
    """A map (C, H, W) between its pixels, zero outside."""
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            total += image[:, y, x] * max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
    return total


@torch.no_grad()
def defined(module: LDAAQU, x: Tensor, size: tuple[int, int]) -> Tensor:
    """The formula, one image, output pixel and point at a time."""
    out = torch.zeros(x.shape[0], x.shape[1], *size, dtype=x.dtype)
    side, groups, heads = module.k_u, module.n_groups, module.nh
    for b, image in enumerate(x):
        normed = layer_norm(image, module.layer_norm["norm"])
        keys = torch.einsum("dc,chw->dhw", module.proj_k.weight[:, :, 0, 0], normed)
        queries = torch.einsum("dc,chw->dhw", module.proj_q.weight[:, :, 0, 0], normed)
        queries = F.interpolate(queries[None], size, mode="bilinear", align_corners=True)[0]
        depth = keys.shape[0]
        taps = torch.zeros(depth, side * side, *size, dtype=x.dtype)
        values = torch.zeros(x.shape[1], side * side, *size, dtype=x.dtype)
        for g in range(groups):
            part, own = (
                slice(g * depth // groups, (g + 1) * depth // groups),
                slice(g * x.shape[1] // groups, (g + 1) * x.shape[1] // groups),
            )
            first, last = module.conv_offset["0"], module.conv_offset["3"]
            hidden = F.conv2d(queries[part][None], first.weight, padding=module.k_e // 2, groups=first.weight.shape[0])[
                0
            ]
            hidden = F.gelu(layer_norm(hidden, module.conv_offset["1"]["norm"]))
            moves = (
                F.conv2d(hidden[None], last.weight, last.bias, padding=module.k_e // 2)[0].tanh() * module.range_factor
            )
            for i in range(size[0]):
                for j in range(size[1]):
                    for tap in range(side * side):
                        row = i + tap // side - side // 2 + float(moves[2 * tap, i, j])
                        column = j + tap % side - side // 2 + float(moves[2 * tap + 1, i, j])
                        row *= (image.shape[1] - 1) / max(size[0] - 1, 1)
                        column *= (image.shape[2] - 1) / max(size[1] - 1, 1)
                        taps[part, tap, i, j] = read(keys[part], row, column)
                        values[own, tap, i, j] = read(image[own], row, column)
        for head in range(heads):
            part, own = (
                slice(head * depth // heads, (head + 1) * depth // heads),
                slice(head * x.shape[1] // heads, (head + 1) * x.shape[1] // heads),
            )
            biased = taps[part]
            if module.relative_position_bias_table is not None:
                biased = biased + module.relative_position_bias_table[0, head, 0].T[:, :, None, None]
            scores = (queries[part][:, None] * depth**-0.5 * biased).sum(dim=0)
            out[b, own] = (scores.softmax(dim=0) * values[own]).sum(dim=1)
    return out


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, None), ({"nh": 2, "n_groups": 1}, (7, 5)), ({"rpb": False, "k_u": 1, "scale": 3}, None), ({"nh": 4}, (5, 9))],
    ids=str,
)
def test_it_is_its_formula(options: dict[str, Any], size: tuple[int, int] | None) -> None:
    module, x = build(**options), noise(1, 8, 4, 3)
    got = module(x, size)
    assert (got - defined(module, x, tuple(got.shape[2:]))).abs().max() < 1e-10
    assert (copy.deepcopy(module).float()(x.float(), size) - got).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_sides_of_one(shape: tuple[int, int]) -> None:
    module, x = build(range_factor=2), noise(2, 8, *shape)
    for size in ((2 * shape[0], 2 * shape[1]), shape, (shape[0], 5)):
        assert (module(x, size) - defined(module, x, size)).abs().max() < 1e-10


def test_what_it_cannot_be() -> None:
    with pytest.raises(upswap.OptionError, match="n_groups=2 does not divide 9 channels and the 2"):
        LDAAQU(9)
    with pytest.raises(upswap.OptionError, match="k_u must be odd"):
        LDAAQU(8, k_u=2)


def test_options_are_fitted_to_the_channels_of_a_site() -> None:
    host = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 3)).eval()
    model = upswap.patch(copy.deepcopy(host), noise(1, 3, 9, 9).float(), upsampler="lda_aqu")
    (site,) = upswap.plan_of(model).swapped
    assert (model[1].n_groups, model[1].reduction_factor) == (1, 4)
    assert "n_groups 1, for 6 channels" in site.why
    with pytest.raises(upswap.OptionError, match="n_groups 1, for 6 channels would be needed"):
        upswap.patch(copy.deepcopy(host), noise(1, 3, 9, 9).float(), upsampler="lda_aqu", strict=True)
    same = upswap.load(copy.deepcopy(model.state_dict()), copy.deepcopy(host))
    assert type(same[1]) is LDAAQU
