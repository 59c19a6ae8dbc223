"""From the raw outputs of a DySample's convolutions to its output: one operation, with its own backward.

    field (B, 2 * groups * sh * sw, H, W)  -->  offsets  -->  + base positions  -->  x read there

`upsample` chooses how it is computed. Traced for export it is plain torch functions. Everywhere else what is kept for the
backward pass is `x` and `field` alone, since coordinates cost less to compute again than to keep; and compiled code sees a
single operator, because Inductor would compute the coordinates once for every channel (1.8 to 10 times slower on a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory_format as layout
from . import native, triton_launch
from . import positions as sampling
from .autograd import differentiable_once, is_exporting, plain_functions_wanted
from .cpu_gather import gather, prefers
from .positions import Mapping, Pair, Reading, Scheme
from .samplers import Points, read

_BORDER = 1  # grid_sampler's number for padding_mode="border"
_KERNELS = {"bilinear": 0, "bicubic": 2}  # and for the interpolation

# Of `_parts`, measured on torch 2.15: the numbers in one row of all channels of a part, and its fewest channels.
_ROW_READ, _ROW_WRITTEN = 2**11, 2**9
_FEWEST = 8


def upsample(x: Tensor, field: Tensor, reading: Reading) -> Tensor:
    """Read `x` at the positions of the resize that `reading` names plus the offsets in `field`.

    Args:
        x: (B, C, H, W), floating point, of any memory format.
        field: (B, n * groups * sh * sw, H, W) of `sampling.compute_dtype`, n = 2, or 4 with a scope: raw outputs of the
            convolutions, ordered (offset and scope, axis, group, sub-pixel) with the horizontal axis first.
        reading: the output's size, and how x and `field` are to be read.

    Returns:
        (B, C, h, w), of x's dtype and memory format.
    """
    if reading.sampler.name != "gridsample":
        return _read_otherwise(x, field, reading)
    if triton_launch.wanted(x) and not is_exporting() and _is_resized(field, reading):
        # The kernels take a field of the target's own size.
        field, reading = _at_target(field, reading)
    if torch.compiler.is_compiling() and not is_exporting():
        return _operator(x, field, reading.init_pos, reading.size, reading.factors, *_flat(reading.scheme))
    if plain_functions_wanted():
        return _forward(x, field, reading, plain=True)
    if torch.is_grad_enabled() and (x.requires_grad or field.requires_grad):
        out: Tensor = _Upsample.apply(x, field, reading)
        return out
    return _forward(x, field, reading)


def _forward(x: Tensor, field: Tensor, reading: Reading, *, plain: bool = False) -> Tensor:
    scheme = reading.scheme
    if not plain and triton_launch.usable(x, field, reading):
        out: Tensor = triton_launch.forward(x, field, scheme, reading.factors)
        return out
    if not plain and native.usable(x, field, scheme):
        offsets, own = _unscaled(field, reading)
        return native.forward(x, offsets, _base(x, reading, normal=False), reading.size, own)
    if not plain and prefers(x, scheme):
        rows, columns = _base(x, reading, normal=False)
        full = x.to(sampling.compute_dtype(x.dtype))
        offsets = _offsets(field, reading).view(x.shape[0], 2, scheme.groups, *reading.size)
        return gather(full, offsets, rows, columns, scheme.gain()).to(x.dtype)
    return _read(x, (_plain_grid if plain else _grid)(x, field, reading), scheme, plain=plain)


def _grid(x: Tensor, field: Tensor, reading: Reading) -> Tensor:
    """Where `grid_sample(align_corners=False)` reads `x`: (B * G, h, w, 2)."""
    rows, columns = _base(x, reading, normal=True)
    offsets = _offsets(field, reading).view(x.shape[0], 2, reading.scheme.groups, *reading.size)
    gain = reading.scheme.gain()
    horizontal = columns, offsets[:, 0], 2 * gain / x.shape[3]
    vertical = rows.unsqueeze(1), offsets[:, 1], 2 * gain / x.shape[2]
    grid = offsets.new_empty(x.shape[0], reading.scheme.groups, 2, *reading.size)
    for axis, (base, offset, k) in enumerate((horizontal, vertical)):
        torch.add(base, offset, alpha=k, out=grid[:, :, axis])
    # A view: only strides say that coordinates come last, and planes are written faster.
    return grid.flatten(0, 1).permute(0, 2, 3, 1)


def points(x: Tensor, field: Tensor, reading: Reading) -> Points:
    """Where `x` is read, in source pixels, before the border clamps it: (B, G, h, w) of each axis.

    For whoever converts the graph there is no tensor of more than four dimensions, and sizes in scalar arithmetic alone.
    """
    rows, columns = _base(x, reading, normal=False)
    groups, gain = reading.scheme.groups, reading.scheme.gain()
    offsets = _offsets(field, reading)
    return Points(offsets[:, groups:] * gain + rows.unsqueeze(1), offsets[:, :groups] * gain + columns)


def _plain_grid(x: Tensor, field: Tensor, reading: Reading) -> Tensor:
    """`_grid` of plain torch functions."""
    rows, columns = points(x, field, reading)
    horizontal, vertical = sampling.normalised(columns, x.shape[3]), sampling.normalised(rows, x.shape[2])
    return torch.stack((horizontal.flatten(0, 1), vertical.flatten(0, 1)), dim=-1)


def _read_otherwise(x: Tensor, field: Tensor, reading: Reading) -> Tensor:
    """`upsample` by a sampler that is not torch's."""
    full = x.to(sampling.compute_dtype(x.dtype)).contiguous()
    out = read(full, points(full, field, reading), reading.scheme.mapping.kernel, reading.sampler).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last) if layout.is_channels_last(x) else out


def _read(x: Tensor, grid: Tensor, scheme: Scheme, *, plain: bool = False) -> Tensor:
    """`x` (B, C, H, W) at the points of `grid`: (B, C, h, w), of x's dtype and memory format."""
    batch, channels, height, width = x.shape
    parts = 1 if plain else _parts(x, scheme, _ROW_READ)
    full = x.to(sampling.compute_dtype(x.dtype))
    full = full.contiguous() if plain else layout.contiguous(full)
    by_part = full.view(batch * scheme.groups * parts, channels // scheme.groups // parts, height, width)
    points = _repeated(grid, parts)
    out = F.grid_sample(by_part, points, mode=scheme.mapping.kernel, padding_mode="border", align_corners=False)
    out = out.view(batch, channels, *grid.shape[1:3]).to(x.dtype)
    if not layout.is_channels_last(x):
        return out
    return out.contiguous(memory_format=torch.channels_last) if plain else layout.channels_last(out)


def _parts(x: Tensor, scheme: Scheme, row: int) -> int:
    """How many parts a group is read in on a CPU, each with about `row` numbers in one row of all its channels.

    torch's kernel takes all channels of a point before the next point: few enough of them, and the rows they are read from
    stay in the cache. On a map 120 wide the backward pass of a group of 64 channels takes half the time in parts of 8.
    """
    if type(x) is not Tensor or x.device.type != "cpu":  # fake tensors have sizes that cannot be compared freely
        return 1
    return _divided(x.shape[1] // scheme.groups, max(_FEWEST, row // x.shape[3]))


@cache
def _divided(channels: int, wanted: int) -> int:
    """Into how many equal parts `channels` are divided for each to have about `wanted`, and none fewer than `_FEWEST`."""
    whole = [n for n in range(1, channels + 1) if channels % n == 0 and (n == 1 or channels // n >= _FEWEST)]
    return min(whole, key=lambda n: abs(math.log(channels / n / wanted)))


def _repeated(grid: Tensor, parts: int) -> Tensor:
    """A grid (B * G, h, w, 2) for each of the parts of a group: (B * G * parts, h, w, 2)."""
    if parts == 1:
        return grid
    planes = grid.permute(0, 3, 1, 2).unsqueeze(1).expand(-1, parts, -1, -1, -1)
    return planes.flatten(0, 1).permute(0, 2, 3, 1)


def _backward(
    grad: Tensor,
    x: Tensor,
    field: Tensor | None,
    grid: Tensor,
    reading: Reading,
    predicted: Pair,
    *,
    of_x_too: bool,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of `x` and of the field, whose H and W are `predicted`; the field's own values matter with a scope."""
    size, scheme = reading.size, reading.scheme
    dtype = sampling.compute_dtype(x.dtype)
    batch, channels, height, width = x.shape
    parts = _parts(x, scheme, _ROW_WRITTEN)
    by_part = (batch * scheme.groups * parts, channels // scheme.groups // parts)
    of_x, of_grid = torch.ops.aten.grid_sampler_2d_backward(
        layout.contiguous(grad.to(dtype)).view(*by_part, *size),
        layout.contiguous(x.to(dtype)).view(*by_part, height, width),
        _repeated(grid, parts),
        _KERNELS[scheme.mapping.kernel],
        _BORDER,
        False,
        [of_x_too, True],
    )
    if parts > 1:
        of_grid = of_grid.view(-1, parts, *size, 2).sum(1)
    # The steps of `_grid` and `_offsets`, backwards.
    of_offsets = of_grid.new_empty(batch, 2, scheme.groups, *size)
    for axis, n in enumerate((width, height)):
        torch.mul(of_grid[..., axis].view(batch, scheme.groups, *size), 2 * scheme.gain() / n, out=of_offsets[:, axis])
    of_field = _of_field(of_offsets.flatten(1, 2), field, reading, predicted)
    if not of_x_too:
        return None, of_field
    of_x = of_x.view(x.shape).to(x.dtype)
    return layout.channels_last(of_x) if layout.is_channels_last(x) else of_x, of_field


def _of_field(of_offsets: Tensor, field: Tensor | None, reading: Reading, predicted: Pair) -> Tensor:
    """The gradient of the field from that of `_offsets`; its own values matter with a scope."""
    size, scheme = reading.size, reading.scheme
    batch = of_offsets.shape[0]
    shuffled = (scheme.cells[0] * predicted[0], scheme.cells[1] * predicted[1])
    if tuple(size) != shuffled:
        of_offsets = torch.ops.aten.upsample_bilinear2d_backward(
            of_offsets, size, [batch, 2 * scheme.groups, *shuffled], False
        )
    of_field = sampling.unshuffle(of_offsets, scheme.cells)
    return of_field if field is None else torch.ops.aten.glu_backward(of_field, field, 1)


def _backward_of_field(
    grad: Tensor, x: Tensor, field: Tensor, reading: Reading, *, of_x_too: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of `x` and `field`, where the grid was not kept."""
    scheme, factors = reading.scheme, reading.factors
    if triton_launch.usable(x, field, reading):
        deterministic = torch.are_deterministic_algorithms_enabled()
        of_x, of_field = triton_launch.backward(
            grad, x, field, scheme, factors, deterministic=deterministic, needs=(of_x_too, True)
        )
        return of_x, cast(Tensor, of_field)
    predicted = (field.shape[2], field.shape[3])
    if native.usable(x, field, scheme):
        offsets, own = _unscaled(field, reading)
        base = _base(x, reading, normal=False)
        of_x, of_offsets = native.backward(grad, x, offsets, base, own, of_x_too=of_x_too)
        if own is not scheme:  # resized
            return of_x, _of_field(of_offsets, field if scheme.scope else None, reading, predicted)
        return of_x, torch.ops.aten.glu_backward(of_offsets, field, 1) if scheme.scope else of_offsets
    grid = _grid(x, field, reading)
    return _backward(grad, x, field if scheme.scope else None, grid, reading, predicted, of_x_too=of_x_too)


def _base(x: Tensor, reading: Reading, *, normal: bool) -> tuple[Tensor, Tensor]:
    """Positions the resize itself reads, (h,) and (w,): in source pixels, or `normal`, as `grid_sample` takes them."""
    size, factors, scheme, init_pos, _ = reading
    dtype = sampling.compute_dtype(x.dtype)
    if init_pos is not None:
        per_pixel = init_pos.to(dtype).view(2, scheme.groups, *scheme.cells)[:, 0]
        columns, rows = per_pixel[0, 0], per_pixel[1, :, 0]
        rows = sampling.repeated_positions(rows, x.shape[2])
        columns = sampling.repeated_positions(columns, x.shape[3])
        return (
            (sampling.normalised(rows, x.shape[2]), sampling.normalised(columns, x.shape[3]))
            if normal
            else (rows, columns)
        )
    kernel = sampling.nearest_kernel(x, size, decomposed=scheme.decomposed)
    how = (scheme.mapping, dtype, kernel, scheme.decomposed, normal)
    vertical, horizontal = (None, None) if factors is None else factors
    # Of a real tensor on the CPU: on another device a tensor belongs to a stream, a fake or transformed one to its mode.
    is_real = type(x) is Tensor and x.device.type == "cpu" and not plain_functions_wanted()
    along = _kept_axis if is_real else _axis
    return along(x.shape[2], size[0], vertical, x.device, *how), along(x.shape[3], size[1], horizontal, x.device, *how)


def _axis(
    source: int,
    target: int,
    factor: float | None,
    device: torch.device,
    mapping: Mapping,
    dtype: torch.dtype,
    kernel: sampling.NearestKernel,
    decomposed: bool,
    normal: bool,
) -> Tensor:
    found = sampling.positions(
        mapping, source, target, factor, dtype=dtype, device=device, kernel=kernel, decomposed=decomposed
    )
    return sampling.normalised(found, source) if normal else found


def _kept_axis(*key: Any) -> Tensor:
    """`_axis` of the same arguments, from the last time: on small maps its few tiny operations cost more than sampling."""
    found = _KEPT.get(key)
    if found is None:
        found = _axis(*key)
        if type(found) is Tensor:
            if len(_KEPT) >= _MOST_KEPT:
                _KEPT.clear()
            _KEPT[key] = found
    return found


_KEPT: dict[tuple[Any, ...], Tensor] = {}
_MOST_KEPT = 256


def _offsets(field: Tensor, reading: Reading) -> Tensor:
    """Offsets before their constant gain, in source pixels: (B, 2 * G, h, w), horizontal first."""
    size, scheme = reading.size, reading.scheme
    if scheme.scope:
        field = F.glu(field, dim=1)  # offset * sigmoid(scope)
    resized = _is_resized(field, reading)
    offsets = sampling.shuffle(field, scheme.cells)
    if resized:
        # Offsets are in source pixels at any resolution: their values stay.
        offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
    return offsets


def _unscaled(field: Tensor, reading: Reading) -> tuple[Tensor, Scheme]:
    """Offsets before their constant gain and how they are read: still of the field's resolution, if that is the target's."""
    scheme = reading.scheme
    if _is_resized(field, reading):
        return _offsets(field, reading), scheme._replace(cells=(1, 1))
    return F.glu(field, dim=1) if scheme.scope else field, scheme


def _is_resized(field: Tensor, reading: Reading) -> bool:
    """Whether offsets are predicted at another resolution than that of the output."""
    vertical, horizontal = reading.scheme.cells
    if reading.factors == reading.scheme.cells:  # whatever the size
        return False
    return not sampling.known_equal(reading.size, (vertical * field.shape[2], horizontal * field.shape[3]))


def _at_target(field: Tensor, reading: Reading) -> tuple[Tensor, Reading]:
    """A field with one pixel for every output pixel, that is read as `field` is."""
    plain = reading.scheme._replace(cells=(1, 1), scope=False)
    offsets, gain = _offsets(field, reading), reading.scheme.gain()
    return offsets if plain.gain() == gain else offsets * (gain / plain.gain()), reading._replace(scheme=plain)


class _Upsample(torch.autograd.Function):
    """`upsample` in eager mode, where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, field: Tensor, reading: Reading) -> Tensor:
        ctx.reading, ctx.predicted = reading._replace(init_pos=None), (field.shape[2], field.shape[3])
        scheme = reading.scheme
        by_field = triton_launch.usable(x, field, reading) or native.usable(x, field, scheme) or prefers(x, scheme)
        grid = None if by_field else _grid(x, field, reading)
        if grid is None or scheme.scope or grid.numel() > field.numel():
            ctx.save_for_backward(x, field, reading.init_pos, None)
        else:  # as large as the field, and all that the backward pass needs
            ctx.save_for_backward(x, None, None, grid)
        out = _forward(x, field, reading) if grid is None else _read(x, grid, scheme)
        # autograd lets nobody change a view in place that was made in here: the same tensor, and no view.
        return (
            out.new_empty(0).set_(out.untyped_storage(), out.storage_offset(), out.shape, out.stride())
            if out._is_view()
            else out
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, field, init_pos, grid = ctx.saved_tensors
        reading, of_x_too = ctx.reading._replace(init_pos=init_pos), ctx.needs_input_grad[0]
        if grid is None:
            return *_backward_of_field(grad, x, field, reading, of_x_too=of_x_too), None
        return *_backward(grad, x, None, grid, reading, ctx.predicted, of_x_too=of_x_too), None


# -- the operator that compiled code sees ---------------------------------------------------------------------------------

_SCHEME = "SymInt[] size, float[]? factors, int groups, int[] cells, bool scope, str mode, bool align_corners, bool decomposed"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_LIBRARY = torch.library.Library("upswap", "DEF")
_LIBRARY.define(f"upsample(Tensor x, Tensor field, Tensor? init_pos, {_SCHEME}) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    f"upsample_backward(Tensor grad, Tensor x, Tensor field, Tensor? init_pos, {_SCHEME}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_operator = torch.ops.upswap.upsample.default


def _flat(scheme: Scheme) -> tuple[int, Pair, bool, str, bool, bool]:
    """A scheme as an operator's arguments."""
    return scheme.groups, scheme.cells, scheme.scope, *scheme.mapping, scheme.decomposed


def _reading(
    init_pos: Tensor | None,
    size: Sequence[int],
    factors: Sequence[float] | None,
    groups: int,
    cells: Sequence[int],
    scope: bool,
    mode: Any,
    align_corners: bool,
    decomposed: bool,
) -> Reading:
    scheme = Scheme(groups, (cells[0], cells[1]), scope, Mapping(mode, align_corners), decomposed)
    return Reading((size[0], size[1]), None if factors is None else (factors[0], factors[1]), scheme, init_pos)


def _run(x: Tensor, field: Tensor, *how: Any) -> Tensor:
    return _forward(x, field, _reading(*how))


def _run_backward(grad: Tensor, x: Tensor, field: Tensor, *how: Any) -> tuple[Tensor | None, Tensor]:
    of_x, of_field = _backward_of_field(grad, x, field, _reading(*how), of_x_too=True)
    return of_x, of_field.contiguous()


def _shape(x: Tensor, field: Tensor, init_pos: Tensor | None, size: Any, *how: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *size).contiguous(memory_format=layout.format_of(x))


def _shapes(grad: Tensor, x: Tensor, field: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape).contiguous(memory_format=layout.format_of(x)), field.new_empty(field.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, field, init_pos, *ctx.how = inputs
    ctx.save_for_backward(x, field, init_pos)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_x, of_field = torch.ops.upswap.upsample_backward(grad, *ctx.saved_tensors, *ctx.how)
    return of_x, of_field, *(None,) * (1 + len(ctx.how))


_LIBRARY.impl("upsample", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("upsample_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("upswap::upsample", _shape, lib=_LIBRARY)
torch.library.register_fake("upswap::upsample_backward", _shapes, lib=_LIBRARY)
torch.library.register_autograd("upswap::upsample", _differentiate, setup_context=_keep, lib=_LIBRARY)
