"""Weighted sums of windows and points, and products with windows, against loops and torch's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upswap.nn.sampling.reassembly import reassemble, reassemble_points, window_products

SIZES = [(10, 12), (9, 11), (5, 6), (13, 16), (15, 18), (7, 12)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(x: Tensor, size: tuple[int, int], side: int, **pad: Any) -> Tensor:
    """(B, C, k, k, h, w): what each output pixel has around its source pixel."""
    padded = F.pad(x, (side // 2,) * 4, **pad)
    rows, columns = (torch.arange(m) * n // m for n, m in zip(x.shape[2:], size, strict=True))
    taps = [[padded[:, :, rows + i][..., columns + j] for j in range(side)] for i in range(side)]
    return torch.stack([torch.stack(row, 2) for row in taps], 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("padding", "pad"), [("zero", {}), ("reflect", {"mode": "reflect"})])
def test_windows_are_summed(size: tuple[int, int], padding: Any, pad: dict[str, Any]) -> None:
    for side in (1, 3, 5):
        x, kernels = noise(2, 3, 5, 6), noise(2, *size, side * side, seed=1)
        expected = torch.einsum("bcthw,bhwt->bchw", windows(x, size, side, **pad).flatten(2, 3), kernels)
        assert (reassemble(x, kernels, padding) - expected).abs().max() < 1e-12


def test_a_map_too_small_to_be_reflected_repeats_its_border() -> None:
    x, kernels = noise(1, 2, 1, 2), noise(1, 2, 4, 25, seed=1)
    reached = x[:, :, :, [0, 1, 0, 1, 0]], x[:, :, :, [1, 0, 1, 0, 0]]  # from the first pixel, from the second
    for column, taps in enumerate(reached):
        expected = (taps.expand(1, 2, 5, 5).flatten(2) * kernels[:, None, 0, 2 * column]).sum(-1)
        got = reassemble(x, kernels, "reflect")[..., 0, 2 * column]
        assert got.isfinite().all()
        if column == 1:
            assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_windows_are_multiplied(size: tuple[int, int]) -> None:
    queries, keys = noise(2, 4, *size), noise(2, 4, 5, 6, seed=1)
    expected = torch.einsum("bdhw,bdthw->bhwt", queries, windows(keys, size, 3).flatten(2, 3))
    assert (window_products(queries, keys, 3) - expected).abs().max() < 1e-12


def test_points_are_read_as_grid_sample_reads_them() -> None:
    x = noise(2, 3, 5, 6)
    rows, columns = 3 * noise(2, 7, 8, 4, seed=1) + 2, 3 * noise(2, 7, 8, 4, seed=2) + 2
    weights = noise(2, 7, 8, 4, seed=3)
    grid = torch.stack((2 * columns / 5 - 1, 2 * rows / 4 - 1), dim=-1)
    taps = [F.grid_sample(x, grid[:, :, :, t], align_corners=True) for t in range(4)]
    expected = sum(tap * weights[..., t].unsqueeze(1) for t, tap in enumerate(taps))
    assert (reassemble_points(x, rows, columns, weights) - expected).abs().max() < 1e-12


def test_gradients() -> None:
    x, kernels = noise(1, 2, 3, 4).requires_grad_(), noise(1, 5, 8, 9, seed=1).requires_grad_()
    for padding in ("zero", "reflect"):
        assert torch.autograd.gradcheck(lambda *given: reassemble(*given, padding), (x, kernels))  # noqa: B023
    keys = noise(1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: window_products(*given, 3), (noise(1, 2, 5, 8).requires_grad_(), keys)
    )
    points = [noise(1, 4, 5, 2, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    assert torch.autograd.gradcheck(reassemble_points, (x, *points))
