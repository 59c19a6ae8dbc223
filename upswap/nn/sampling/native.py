"""The compiled code of `native.c`: when it computes a call, and how it is called.

It is compiled when a wheel of upswap is built on a machine with a C compiler. Where it is absent, and for what it does not
compute, torch's functions are used, as they are with the environment variable `UPSWAP_NATIVE=0`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import compile_native
from . import memory_format as layout
from .positions import Pair, Scheme

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The fewest channels that a thread gets of a group that is divided among threads.
_FEWEST = 8
# A call indexes an image with 32 bits.
_LARGEST = 2**31
# Fewer numbers in an output are not worth waking a thread for.
_SMALL = 2**15

_TENSORS = ("x", "field", "rows", "columns", "out", "of_x", "of_field", "scratch")
_NUMBERS = (
    *("images", "height", "width", "channels", "groups", "target_height", "target_width", "cells_y", "cells_x"),
    *("planar", "slices"),
)


class _Call(ctypes.Structure):
    """`Call` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("field_strides", ctypes.c_int64 * 4),
        ("of_field_strides", ctypes.c_int64 * 5),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("gain", ctypes.c_float),
    )


@functools.cache
def library() -> Any:
    """The compiled code, None where there is none that this machine can run."""
    if compile_native.is_x86() and "AVX" not in torch.backends.cpu.get_cpu_capability():
        return None
    try:
        found, number = ctypes.CDLL(str(compile_native.BINARY)), compile_native.source_number()
    except OSError:  # there is none, or it is of another platform, or lacks its runtime of OpenMP
        return None
    for function in (found.upswap_source, found.upswap_scratch):
        function.restype = ctypes.c_int64
    if found.upswap_source() != number:  # of a checkout that went on
        return None
    for function in (found.upswap_forward, found.upswap_backward):
        function.argtypes, function.restype = (ctypes.POINTER(_Call), ctypes.c_int), None
    return found


def usable(x: Tensor, field: Tensor, scheme: Scheme) -> bool:
    """Whether `forward` and `backward` here compute this call.

    Not: float64, bicubic, empty maps, lines of one pixel, images of 2^31 numbers; subclasses of Tensor, and whatever has to see
    every operator or function, as a mode of torch's does. upswap's own probe is one.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or field.dtype != torch.float32:
        return False
    if scheme.mapping.kernel != "bilinear" or os.environ.get("UPSWAP_NATIVE") == "0":
        return False
    if type(x) not in (Tensor, nn.Parameter) or type(field) is not Tensor or _is_watched():
        return False
    if x.numel() == 0 or min(x.shape[2:]) < 2 or math.prod(x.shape[1:]) >= _LARGEST:
        return False
    found = library()
    return found is not None and (torch.get_num_threads() == 1 or bool(found.upswap_parallel()))


def _is_watched() -> bool:
    """Whether a mode is active that sees what is called; that of `torch.device` and `set_default_device` looks at nothing."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def forward(x: Tensor, offsets: Tensor, base: tuple[Tensor, Tensor], size: Pair, scheme: Scheme) -> Tensor:
    """Read `x` at base positions plus offsets times the scheme's gain; outside `x`, its border goes on.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16, of any strides.
        offsets: (B, 2 * G * sh * sw, h / sh, w / sw), float32, of any strides: horizontal before vertical, then group, then
            sub-pixel row by row.
        base: (h,) vertical and (w,) horizontal base positions in source pixels, float32.
        size: (h, w).
        scheme: G, (sh, sw) and the gain; a scope is multiplied into the offsets already.

    Returns:
        (B, C, h, w), of x's dtype and memory format. NaN where an offset is NaN.
    """
    memory_format = layout.format_of(x)
    full = x.to(torch.float32).contiguous(memory_format=memory_format)
    shape = (*x.shape[:2], *size)
    out = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=memory_format)
    call = _call(full, offsets, base, out, scheme)
    call.planar = memory_format == torch.contiguous_format
    _run(library().upswap_forward, call, _threads(out))
    return out.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, offsets: Tensor, base: tuple[Tensor, Tensor], scheme: Scheme, *, of_x_too: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of `x` and `offsets`.

    Args:
        grad: (B, C, h, w), the gradient of what `forward` gave, of any strides and floating dtype.
        x: as given to `forward`.
        offsets: as given to `forward`.
        base: as given to `forward`.
        scheme: as given to `forward`.
        of_x_too: whether the gradient of x is wanted, else it is None.

    Returns:
        Both, each of its tensor's dtype and shape, that of x in x's memory format. The same bits for the same number of threads.
    """
    last = layout.is_channels_last(x)
    grad = grad.to(torch.float32)
    grad = layout.channels_last(grad) if last else layout.contiguous(grad)
    full = layout.channels_last(x.to(torch.float32))
    of_x = torch.zeros_like(full) if of_x_too else None
    call = _call(full, offsets, base, grad, scheme)
    call.planar, call.slices = not last, _slices(x.shape[0], x.shape[1], scheme.groups, _threads(grad))
    of_offsets = offsets.new_empty((max(1, call.slices // scheme.groups), *offsets.shape))
    call.of_x, call.of_field = None if of_x is None else of_x.data_ptr(), of_offsets.data_ptr()
    call.of_field_strides = (ctypes.c_int64 * 5)(*of_offsets.stride())
    _run(library().upswap_backward, call, min(_threads(grad), call.images * call.slices))
    of_offsets = of_offsets[0] if len(of_offsets) == 1 else of_offsets.sum(0)
    if of_x is None:
        return None, of_offsets
    return (of_x if last else layout.contiguous(of_x)).to(x.dtype), of_offsets


def _call(x: Tensor, offsets: Tensor, base: tuple[Tensor, Tensor], out: Tensor, scheme: Scheme) -> _Call:
    call = _Call()
    rows, columns = base
    call.x, call.field, call.out = x.data_ptr(), offsets.data_ptr(), out.data_ptr()
    call.rows, call.columns = rows.data_ptr(), columns.data_ptr()
    call.field_strides = (ctypes.c_int64 * 4)(*offsets.stride())
    call.images, call.channels, call.height, call.width = x.shape
    call.target_height, call.target_width = out.shape[2:]
    call.groups, (call.cells_y, call.cells_x), call.gain = scheme.groups, scheme.cells, scheme.gain()
    return call


def _threads(out: Tensor) -> int:
    return torch.get_num_threads() if out.numel() >= _SMALL else 1


def _run(function: Any, call: _Call, threads: int) -> None:
    numbers = threads * library().upswap_scratch(ctypes.byref(call))
    scratch = torch.empty(numbers, dtype=torch.float32, device="cpu")
    call.scratch = scratch.data_ptr()
    function(ctypes.byref(call), threads)


@functools.lru_cache(maxsize=256)
def _slices(batch: int, channels: int, groups: int, threads: int) -> int:
    """In how many slices of channels an image is divided for every thread to have one: whole groups, or parts of groups."""
    fitting = [
        n
        for n in range(1, channels + 1)
        if groups % n == 0 or (n % groups == 0 and channels % n == 0 and channels // n >= _FEWEST)
    ]
    return next((n for n in fitting if batch * n >= threads), fitting[-1])
