"""When the Triton kernels of `triton_kernels.py` compute a call, and how they are launched.

They have been checked in Triton's interpreter and compiled for GPUs, and not been timed on one yet: until then they are asked
for by the environment variable `UPSWAP_TRITON=1`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory_format as layout
from . import positions as sampling
from .positions import Pair, Ratio, Reading, Scheme

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def wanted(x: Tensor) -> bool:
    """Whether kernels for `x`'s device are asked for and Triton is there."""
    if not (x.is_cuda or _INTERPRETED) or os.environ.get("UPSWAP_TRITON") != "1":
        return False
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(x: Tensor, field: Tensor, reading: Reading) -> bool:
    """Whether `forward` and `backward` here compute this call; elsewhere torch's functions have to."""
    size, factors, scheme, init_pos, _ = reading
    if not wanted(x) or init_pos is not None:
        return False
    if (scheme.cells[0] * field.shape[2], scheme.cells[1] * field.shape[3]) != tuple(size):
        return False
    return supports(x, field, scheme, factors)


_MODES = ("bilinear", "nearest", "nearest-exact")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_WARPS = 4
# With fewer programs than this a GPU of about 130 multiprocessors is not busy.
_FEW_PROGRAMS = 256


class _Call(NamedTuple):
    """All of a call but the tensors' elements: what it needs is worked out once for every call that is alike."""

    shape: torch.Size
    strides: tuple[int, ...]
    element_size: int
    channels_last: bool
    field_shape: torch.Size
    field_strides: tuple[int, ...]
    scheme: Scheme
    factors: Ratio | None

    @staticmethod
    def of(x: Tensor, field: Tensor, scheme: Scheme, factors: Ratio | None) -> _Call:
        channels_last = layout.is_channels_last(x)
        how = x.shape, x.stride(), x.element_size(), channels_last
        return _Call(*how, field.shape, field.stride(), scheme, factors)

    @property
    def target(self) -> Pair:
        """The output's (h, w)."""
        return self.field_shape[2] * self.scheme.cells[0], self.field_shape[3] * self.scheme.cells[1]

    @property
    def per_group(self) -> int:
        """Channels of a group."""
        return self.shape[1] // self.scheme.groups

    @property
    def layout(self) -> torch.memory_format:
        """Of x, and so of the output and of the gradient of x."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def supports(x: Tensor, field: Tensor, scheme: Scheme, factors: Ratio | None) -> bool:
    """Whether `forward` and `backward`, whose arguments these are, compute this call.

    Not: float64, bicubic and area, empty tensors, an image that spans 2^31 elements, an axis of more than 2^24 pixels,
    whose indices float32 cannot tell apart.
    """
    if scheme.mapping.mode not in _MODES or x.dtype not in _DTYPES or field.dtype not in (x.dtype, torch.float32):
        return False
    return _fits(_Call.of(x, field, scheme, factors))


@functools.lru_cache(maxsize=1024)
def _fits(call: _Call) -> bool:
    if 0 in call.shape or 0 in call.field_shape or max(*call.shape[2:], *call.target) > 2**24:
        return False
    spans = (
        1 + sum((n - 1) * stride for n, stride in zip(shape[1:], strides[1:], strict=True))
        for shape, strides in ((call.shape, call.strides), (call.field_shape, call.field_strides))
    )
    programs = (_programs(_blocks(call, backward), call) for backward in (False, True))
    return max(*spans, *programs, call.shape[1] * math.prod(call.target)) < 2**31


def forward(x: Tensor, field: Tensor, scheme: Scheme, factors: Ratio | None) -> Tensor:
    """Read `x` at the points of `field`.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16, of any strides; contiguous and channels_last ones are fast.
        field: (B, K * 2 * G * sh * sw, FH, FW), of x's dtype or float32, of any strides: what the convolutions gave, in
            source pixels before sigmoid and gain, ordered (offset and, with a scope, K = 2, scope; horizontal and
            vertical; group; sub-pixel row by row).
        scheme: G, (sh, sw), whether there is a scope, and the resize that offsets of 0 give.
        factors: the (vertical, horizontal) scale factors the caller of the resize gave, None where it gave a size.

    Returns:
        (B, C, FH * sh, FW * sw), of x's dtype and memory format.
    """
    from .triton_kernels import forward_kernel

    call = _Call.of(x, field, scheme, factors)
    shape = (*x.shape[:2], *call.target)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=call.layout)
    _launch(forward_kernel, (x, field, out), _arguments(call, backward=False))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    field: Tensor,
    scheme: Scheme,
    factors: Ratio | None,
    *,
    deterministic: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `x` and of `field`.

    Many points add to the gradient of one pixel of x, in any order, so its last bits differ from run to run. With
    `deterministic` the sums are of 64-bit integers, which are the same in every order; see `_units`.

    Args:
        grad: (B, C, FH * sh, FW * sw), the gradient of what `forward` gave, of any strides.
        x: as given to `forward`.
        field: as given to `forward`.
        scheme: as given to `forward`.
        factors: as given to `forward`.
        deterministic: whether the same call must give the same bits again.
        needs: whether the gradients of x and of field are wanted.

    Returns:
        Both, each of its tensor's dtype, that of x in x's memory format, and None where it is not wanted.
    """
    from .triton_kernels import backward_kernel

    of_x, of_field = needs
    if not of_x and not of_field:
        return None, None
    layout = _Call.of(x, field, scheme, factors).layout
    grad = grad.contiguous(memory_format=layout)
    grad_x = grad_field = units = None
    # The kernel writes gradients at the places it reads their tensors from.
    if of_x:
        x = x.contiguous(memory_format=layout)
        summed = torch.int64 if deterministic else torch.float32
        grad_x = torch.empty(x.shape, dtype=summed, device=x.device, memory_format=layout).zero_()
        units = _units(grad, scheme.groups) if deterministic else None
    if of_field:
        grad_field = torch.empty_like(field)
        if grad_field.stride() != field.stride():
            field = torch.empty_like(field).copy_(field)
    arguments = _arguments(_Call.of(x, field, scheme, factors), backward=True)
    wanted = {"OF_X": of_x, "OF_FIELD": of_field, "FIXED_POINT": units is not None}
    _launch(backward_kernel, (grad, x, field, grad_x, grad_field, units), arguments, **wanted)
    if grad_x is None:
        return None, grad_field
    if units is None:
        return grad_x.to(x.dtype), grad_field
    of_groups = (1, (scheme.groups, -1))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    torch.div(grad_x.unflatten(*of_groups), units[:, :, None, None, None], out=result.unflatten(*of_groups))
    return result, grad_field


def _units(grad: Tensor, groups: int) -> Tensor:
    """In how many units per 1 to sum gradients as 64-bit integers, for each image and group: (B, groups).

    Every point of a group may read the same pixel, so a sum is at most the number of points times the largest gradient,
    and that has to fit: a unit is about 2^-61 of it. At 512 x 512 points that is 2^-43 of the largest gradient, and
    gradients a million times smaller still have the 24 bits of float32. Where a gradient is not finite it is NaN, for
    which no sum of integers could stand, so that a scaler of mixed precision sees it.
    """
    peak = torch.linalg.vector_norm(grad.unflatten(1, (groups, -1)), math.inf, dim=(2, 3, 4), dtype=torch.float32)
    bits = 62 - (grad.shape[2] * grad.shape[3]).bit_length()
    # 2^127 is the largest power of two in float32: gradients all below about 1e-30 lose bits.
    exponent = (bits - torch.frexp(peak).exponent).clamp(max=127)
    return torch.exp2(exponent.float()) + (peak - peak)


class _Blocks(NamedTuple):
    """What a program takes at a time: output pixels, in rows of `columns`, and channels."""

    pixels: int
    columns: int
    channels: int


def _blocks(call: _Call, backward: bool) -> _Blocks:
    """Blocks of as many elements as registers hold, of many pixels unless that leaves most of a GPU idle."""
    # For channels_last, 16 channels are 64 bytes in a row in float32; with more, more threads compute the same positions.
    columns, channels = (8, 16) if call.channels_last else (32, 4)
    # Compiled for sm_90 these take 32 to 80 registers a thread, and twice as many elements up to 250.
    elements = 1024 if _vector(call) > 1 and not backward else 512
    width, per_group = (1 << (n - 1).bit_length() for n in (call.target[1], call.per_group))
    for wanted in (channels, 4 * channels):
        channels = min(wanted, per_group)
        blocks = _Blocks(elements // channels, min(columns, width), channels)
        if _programs(blocks, call) >= _FEW_PROGRAMS:
            break
    return blocks


def _programs(blocks: _Blocks, call: _Call) -> int:
    """How many programs the blocks make: one for each tile of pixels of each group of each image."""
    height, width = call.target
    tiles = -(-height // (blocks.pixels // blocks.columns)) * -(-width // blocks.columns)
    return tiles * call.shape[0] * call.scheme.groups


def _vector(call: _Call) -> int:
    """For channels_last: the channels in 16 bytes, if that divides where each pixel's channels of each group start."""
    wanted = 16 // call.element_size
    starts = (call.per_group, call.strides[0], *call.strides[2:])
    return wanted if call.channels_last and not any(start % wanted for start in starts) else 1


def _axis(scheme: Scheme, source: int, target: int, factor: float | None) -> tuple[float, float]:
    """Step and centre of the base grid along an axis.

    Output index o reads at (o + centre) * step - centre, or for the nearest modes at (o + centre) * step rounded down:
    `sampling.positions`, for the kernels that torch has on a GPU.
    """
    mode, align_corners = scheme.mapping
    if mode == "bilinear" and align_corners:
        return (source - 1) / max(target - 1, 1), 0.0
    if mode != "nearest-exact" and not scheme.decomposed and sampling._is_copy(source, target, factor):
        return 1.0, 0.0
    return sampling.step(source, target, factor), 0.0 if mode == "nearest" else 0.5


class _Arguments(NamedTuple):
    """What both kernels are launched with besides tensors."""

    programs: int
    numbers: tuple[float, ...]
    options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _arguments(call: _Call, *, backward: bool) -> _Arguments:
    scheme, per_group, source, target = call.scheme, call.per_group, call.shape[2:], call.target
    blocks = _blocks(call, backward)
    (step_y, centre_y), (step_x, centre_x) = (
        _axis(scheme, *axis) for axis in zip(source, target, call.factors or (None, None), strict=True)
    )
    sizes = scheme.groups, per_group, *source, *target
    options = {
        "CELLS_Y": scheme.cells[0],
        "CELLS_X": scheme.cells[1],
        "SCOPE": scheme.scope,
        "GAIN": scheme.gain(),
        "NEAREST": scheme.mapping.mode != "bilinear",
        "CHANNELS_LAST": call.channels_last,
        "VECTOR": _vector(call),
        "PIXELS": blocks.pixels,
        "COLUMNS": blocks.columns,
        "CHANNELS": blocks.channels,
        "WHOLE": per_group % blocks.channels == 0,
        "num_warps": _WARPS,
        "enable_fp_fusion": True,  # as torch's own kernels are compiled; unset, triton 3.9 warns
    }
    numbers = *sizes, *call.strides, *call.field_strides, step_y, step_x, centre_y, centre_x
    return _Arguments(_programs(blocks, call), numbers, options)


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], arguments: _Arguments, **wanted: bool) -> None:
    with torch.cuda.device_of(tensors[0]):  # triton launches on the current device
        kernel[(arguments.programs,)](*tensors, *arguments.numbers, **arguments.options, **wanted)
