"""What the Triton kernels are compared with: for the tests in triton's interpreter and for `benchmarks/gpu.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upswap.nn.sampling import positions as sampling
from upswap.nn.sampling.positions import Mapping, NearestKernel, Scheme

CUDA = NearestKernel(torch.float32, copies=(1,))
HALVES = (torch.float16, torch.bfloat16)
MAPPINGS = (Mapping("bilinear"), Mapping("bilinear", True), Mapping("nearest"), Mapping("nearest-exact"))

STRIDES = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every other channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels of a wider channels_last tensor": lambda t: torch.cat((t, t), 1).contiguous(
        memory_format=torch.channels_last
    )[:, : t.shape[1]],
    "one image for all": lambda t: t[:1].expand(t.shape),
    "cropped": lambda t: F.pad(t, (1, 2, 3, 0))[:, :, 3:, 1:-2],
}


def target_of(field: Tensor, scheme: Scheme) -> tuple[int, int]:
    return field.shape[2] * scheme.cells[0], field.shape[3] * scheme.cells[1]


def points(x: Tensor, field: Tensor, scheme: Scheme, factors: Any) -> Tensor:
    """Positions in source pixels in float64, (2, B * G, h, w), horizontal first."""
    batch, groups, target = x.shape[0], scheme.groups, target_of(field, scheme)
    field = field.double()
    if scheme.scope:
        offset, scope = field.chunk(2, dim=1)
        field = 0.5 * scope.sigmoid() * offset
    else:
        field = 0.25 * field
    field = field.reshape(batch, 2, groups, *scheme.cells, *field.shape[2:]).permute(1, 0, 2, 5, 3, 6, 4)
    field = field.reshape(2, batch * groups, *target)
    rows, columns = (
        sampling.positions(scheme.mapping, *axis, dtype=torch.float32, device=field.device, kernel=CUDA).double()
        for axis in zip(x.shape[2:], target, factors or (None, None), strict=True)
    )
    return torch.stack((field[0] + columns, field[1] + rows.unsqueeze(1)))


def reference(x: Tensor, field: Tensor, scheme: Scheme, factors: Any = None) -> Tensor:
    """In float64, through torch's own sampler."""
    height, width = x.shape[2:]
    horizontal, vertical = points(x, field, scheme, factors)
    grid = torch.stack(((2 * horizontal + 1) / width - 1, (2 * vertical + 1) / height - 1), dim=-1)
    maps = x.double().reshape(x.shape[0] * scheme.groups, -1, height, width)
    out = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return out.reshape(*x.shape[:2], *target_of(field, scheme))


def off_the_kinks(x: Tensor, field: Tensor, scheme: Scheme, factors: Any) -> Tensor:
    """The field, with points moved that read so near a pixel's centre that rounding decides on which side they are.

    The gradient of an offset jumps there, and elsewhere only in the border, which is at pixels' centres too.
    """
    for _ in range(50):
        position = points(x, field, scheme, factors)
        near = (position - position.round()).abs().amin(0) < 1e-3
        if not near.any():
            break
        # As the field has them: groups, sub-pixels, pixels; both axes, and offset and scope, alike. The move grows with
        # a value, for rounding to bfloat16 would take 0.37 off again from 128 on.
        near = near.reshape(x.shape[0], scheme.groups, field.shape[2], scheme.cells[0], field.shape[3], scheme.cells[1])
        near = near.permute(0, 1, 3, 5, 2, 4).unsqueeze(1)
        parts = field.reshape(x.shape[0], -1, *near.shape[2:])
        field = torch.where(near, parts + 0.37 + parts.abs() / 64, parts).reshape(field.shape)
    assert not near.any()
    return field


def make(
    shape: tuple[int, int, int, int],
    scheme: Scheme,
    *,
    field_size: tuple[int, int] | None = None,
    factors: Any = None,
    spread: float = 3.0,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    field_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """An x, a field and a gradient of the output; a spread of 3 puts offsets at about a pixel, 40 far outside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    offsets = 2 * scheme.groups * math.prod(scheme.cells)
    field = torch.randn(shape[0], 2 * offsets, *(field_size or shape[2:]), generator=generator)
    field[:, :offsets] *= spread
    if not scheme.scope:
        field = field[:, :offsets].contiguous()
    field = off_the_kinks(x, field.to(field_dtype), scheme, factors)
    grad = torch.randn(*shape[:2], *target_of(field, scheme), generator=generator).to(dtype)
    given = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=given), field, grad.contiguous(memory_format=given)


def error(got: Tensor | None, expected: Tensor) -> float:
    """The largest difference relative to the largest value; not a number where one is not."""
    assert got is not None
    assert got.shape == expected.shape
    return (got.double() - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
