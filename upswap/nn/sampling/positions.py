"""Where each output pixel of a resize reads its input, and reading there: pure functions of tensors and numbers.

A resize of an axis from `n` to `m` pixels reads, for output index `o`, the source position `p(o)` in source pixels
(pixel centres lie at the integers 0 .. n-1). With `r = n / m`, or `r = 1 / scale_factor` where the caller of the
resize gave one:

    bilinear, bicubic   align_corners=False   p = (o + 0.5) * r - 0.5
                        align_corners=True    p = o * (n - 1) / (m - 1), 0 where m = 1
    nearest                                   p = min(floor(o * r), n - 1)
    nearest-exact                             p = min(floor((o + 0.5) * r), n - 1)
    area, for m >= n                          p = (floor(o * n / m) + ceil((o + 1) * n / m) - 1) / 2

Source of the formulas: aten/src/ATen/native/UpSample.h (`area_pixel_compute_source_index`, `nearest_idx`,
`nearest_exact_idx`) and AdaptivePooling.h (`start_index`, `end_index`; an adaptive window of an upsampling covers one
or two pixels, so its mean is one bilinear sample halfway). Reading at `p` with a bilinear kernel (a bicubic one for
bicubic) gives exactly that resize; reading at `p + d` is what a learned upsampler does with its offsets `d`.

The same formulas stand in `nn/scripted.py` for TorchScript, and in `triton_kernels.py` for CUDA; tests hold them together.

`p` is never clamped here before `d` is added: border padding clamps `p + d`, and clamping `p` first would be off by up
to half a pixel wherever the first or last row has an offset pointing inwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import is_exporting, plain_functions_wanted
from .memory_format import is_channels_last
from .samplers import GRIDSAMPLE, Sampler

Mode = Literal["nearest", "nearest-exact", "area", "bilinear", "bicubic"]
Pair = tuple[int, int]
Ratio = tuple[float, float]

MODES: tuple[Mode, ...] = ("nearest", "nearest-exact", "area", "bilinear", "bicubic")

# How many pixels, rows plus columns, an output may have for torch's CPU `nearest` to take its direct kernel.
_DIRECT_KERNEL_EXTENT = 128

# Numbers in a field up to which torch's own pixel_shuffle takes less time than a permutation and a copy.
_SMALL_FIELD = 2**13


class NearestKernel(NamedTuple):
    """What sets apart the kernels torch has for `nearest` and `nearest-exact`; see `nearest_kernel`."""

    dtype: torch.dtype
    """Of the product of index and step that is floored: a last bit there is a whole pixel."""
    copies: tuple[int, ...] = ()
    """Ratios m / n at which `nearest` repeats pixels evenly whatever the scale factor says, 2.01 for one."""


class Mapping(NamedTuple):
    """Which source position an output pixel reads: the mode of a resize and its `align_corners`."""

    mode: Mode
    align_corners: bool = False

    @property
    def kernel(self) -> str:
        """The `mode` of `grid_sample` that reads as this resize does: "bicubic" for bicubic, "bilinear" otherwise."""
        return "bicubic" if self.mode == "bicubic" else "bilinear"

    def describe(self) -> str:
        """The mapping in words, for messages."""
        return f"{self.mode}, align_corners=True" if self.align_corners else self.mode

    def resize(
        self, x: Tensor, size: int | Sequence[int] | None, scale_factor: float | Sequence[float] | None = None
    ) -> Tensor:
        """The resize itself, of `x` (B, C, H, W); the arguments are those of `F.interpolate`."""
        align_corners = self.align_corners if self.mode in ("bilinear", "bicubic") else None
        return F.interpolate(x, size, scale_factor, self.mode, align_corners)


class Scheme(NamedTuple):
    """How the raw outputs of a DySample's convolutions, a field, are read."""

    groups: int
    """Groups of channels with points of their own."""
    cells: Pair
    """Sub-pixels of a pixel of the field, (vertical, horizontal)."""
    scope: bool
    """Whether the second half of its channels scales the offsets in the first."""
    mapping: Mapping
    """The resize that offsets of 0 give."""
    decomposed: bool = False
    """Whether that resize is the one that torch.compile takes apart, which rounds in a way of its own."""

    def gain(self) -> float:
        """The constant part of the scope, in source pixels: the paper's static 0.25, or 0.5 * sigmoid(scope)."""
        # No property: a strict torch.export of torch 2.10 does not trace one of a named tuple as a number.
        return 0.5 if self.scope else 0.25


class Reading(NamedTuple):
    """All that says where a call reads its input, but for the field."""

    size: Pair
    """The output's (h, w)."""
    factors: Ratio | None
    """The scale factors it came from, None where it did not."""
    scheme: Scheme
    """How the field is to be read."""
    init_pos: Tensor | None = None
    """The module's buffer, where its values are to be used and not the formula."""
    sampler: Sampler = GRIDSAMPLE
    """How the map is read at its positions."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype positions and samples are computed in: float64 for float64, float32 for everything else.

    A half-precision coordinate is off by about 0.25 pixels (float16) or 2 pixels (bfloat16) at width 1024.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_size(size: Pair, scale_factor: Ratio) -> Pair:
    """The output size `F.interpolate` gives an (H, W) input for a (vertical, horizontal) scale factor.

    Integral factors multiply as integers, so that under torch.compile and torch.export the result stays an exact
    multiple of the symbolic input size.
    """
    height, width = (
        n * int(factor) if float(factor).is_integer() else _floor(n * factor)
        for n, factor in zip(size, scale_factor, strict=True)
    )
    return height, width


def _floor(number: Any) -> Any:
    """The integer below; of a size that `torch.jit.trace` follows, which is a tensor, one that it follows too."""
    return number.floor().long() if isinstance(number, Tensor) else math.floor(number)


def known_equal(target: Pair, size: Pair) -> bool:
    """Whether two sizes are equal; for symbolic ones, whether they are so at every value they may take.

    Asking symbolic sizes with `==` would tie a compiled graph to the answer, and the next size would recompile it. A trace of
    `torch.jit.trace` keeps the answer whatever comes: there no sizes are known to be equal.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if not torch.compiler.is_compiling():
        return target == size
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy: only where it is needed

    return all(statically_known_true(a == b) for a, b in zip(target, size, strict=True))


def positions(
    mapping: Mapping,
    source: int,
    target: int,
    scale_factor: float | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    kernel: NearestKernel | None = None,
    decomposed: bool = False,
) -> Tensor:
    """Source positions of every output pixel along one axis, in source pixels, before any clamping to the border.

    Args:
        mapping: the resize to reproduce.
        source: number of input pixels, n.
        target: number of output pixels, m; for area at least n.
        scale_factor: the factor the caller of the resize gave for this axis, None where it gave a size.
        dtype: float32 or float64. The arithmetic follows torch's own rounding in that dtype, since one rounding
            error more moves a nearest neighbour by a whole pixel.
        device: where to build the result.
        kernel: for nearest and nearest-exact, the kernel torch takes; None for the plain formula in float32.
        decomposed: whether the resize is the one torch.compile decomposes.

    Returns:
        (target,) positions.
    """
    mode, align_corners = mapping
    if mode == "area":
        return _area_positions(source, target, dtype, device)
    if mode == "nearest" or mode == "nearest-exact":
        kernel = kernel or NearestKernel(torch.float32)
        index = torch.arange(target, dtype=kernel.dtype, device=device)
        copies = kernel.copies if mode == "nearest" else ()
        return _nearest_positions(index, source, target, scale_factor, mode == "nearest-exact", copies).to(dtype)
    index = torch.arange(target, dtype=dtype, device=device)
    if align_corners:
        return index * _quotient(source - 1, target - 1, index)
    if mode == "bilinear" and not decomposed and _is_copy(source, target, scale_factor):
        return index
    return (index + 0.5) * _step_for(source, target, scale_factor, index) - 0.5


def step(source: int, target: int, scale_factor: float | None) -> float:
    """Source pixels between neighbouring output pixels."""
    return source / target if scale_factor is None else 1.0 / scale_factor


def _step_for(source: int, target: int, scale_factor: float | None, index: Tensor) -> float | Tensor:
    """The same, to be multiplied with an index."""
    return _quotient(source, target, index) if scale_factor is None else 1.0 / scale_factor


def _quotient(a: int, b: int, like: Tensor) -> float | Tensor:
    """a / b, where b is at least 1, else a.

    Of sizes that an exported graph leaves open, a tensor: few converters know the division of two sizes, or their maximum.
    """
    if is_exporting() and not (type(a) is int and type(b) is int):
        divisor = torch.full((), b, dtype=torch.float64, device=like.device).clamp(min=1)
        return (a / divisor).to(like.dtype)
    # max() and not a branch: a branch on the target's size would be one more reason to recompile.
    return a / max(b, 1)


def _is_copy(source: int, target: int, scale_factor: float | None) -> bool:
    """Whether torch copies an axis although its scale factor is not 1: rounding to whole pixels removed its effect.

    Compiled code does not: there the resize is decomposed, and asking for the sizes would tie the graph to them.
    """
    return scale_factor is not None and not float(scale_factor).is_integer() and target == source


def _nearest_positions(
    index: Tensor, source: int, target: int, scale_factor: float | None, exact: bool, copies: tuple[int, ...]
) -> Tensor:
    for ratio in copies:
        if _is_copy(ratio * source, target, scale_factor):
            return (index / ratio).floor()
    by = _step_for(source, target, scale_factor, index)
    position = (index + 0.5) * by if exact else index * by
    # torch floors with floorf in every dtype.
    return position.float().floor().clamp(max=source - 1)


def _area_positions(source: int, target: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    index = torch.arange(target, device=device)
    first = torch.div(index * source, target, rounding_mode="floor")
    end = torch.div((index + 1) * source + (target - 1), target, rounding_mode="floor")
    return (first + (end - 1)).to(dtype) * 0.5


def nearest_kernel(x: Tensor, target: Pair, *, decomposed: bool = False) -> NearestKernel:
    """The kernel torch takes for the `nearest` or `nearest-exact` resize of `x` (B, C, H, W) to `target`.

    On the CPU two kernels disagree by whole pixels in float64, and for scale factors such as 2.01, whose effect
    rounding to whole output pixels removes; size and layout decide (measured on torch 2.15: the direct one runs for
    outputs of at most 128 rows plus columns, and for channels_last with more than 3 channels). The CUDA kernel is as in
    aten/src/ATen/native/cuda/UpSampleNearest2d.cu, the compiled one as in torch/_decomp/decompositions.py.
    """
    if decomposed:
        return NearestKernel(torch.float32)
    if x.device.type != "cpu":
        return NearestKernel(torch.float32, copies=(1,))
    if sum(target) <= _DIRECT_KERNEL_EXTENT or (x.shape[1] > 3 and is_channels_last(x)):
        return NearestKernel(torch.float32, copies=(1, 2))
    return NearestKernel(compute_dtype(x.dtype))


def initial_positions(mapping: Mapping, scale: Pair, groups: int) -> Tensor | None:
    """The authors' `init_pos`: positions of the sub-pixels, in source pixels from the centre of the pixel they lie in.

    For the half-pixel mapping (i - (s - 1) / 2) / s for sub-pixel i of s along an axis; for the nearest family 0.

    Returns:
        (1, 2 * groups * sh * sw, 1, 1) float64 on the CPU, ordered (axis, group, sub-pixel), horizontal first and
        sub-pixels row by row; or None where the positions are not the same for every pixel (align_corners), or a
        bilinear kernel does not read at them (bicubic).
    """
    if mapping.mode == "bicubic" or mapping.align_corners:
        return None
    vertical, horizontal = scale
    if mapping.mode == "bilinear":
        index = [torch.arange(s, dtype=torch.float64, device="cpu") for s in scale]
        rows, columns = ((i - (s - 1) / 2) / s for i, s in zip(index, scale, strict=True))
    else:
        rows, columns = (torch.zeros(s, dtype=torch.float64, device="cpu") for s in scale)
    axes = torch.stack((columns.expand(vertical, horizontal), rows.unsqueeze(1).expand(vertical, horizontal)))
    return axes.reshape(2, 1, -1).repeat(1, groups, 1).reshape(1, -1, 1, 1)


def repeated_positions(sub_pixels: Tensor, source: int) -> Tensor:
    """Positions along an axis of `source` pixels whose sub-pixels are all at `sub_pixels` (s,): (source * s,)."""
    index = torch.arange(source, dtype=sub_pixels.dtype, device=sub_pixels.device)
    return (index.unsqueeze(1) + sub_pixels).flatten()


def shuffle(field: Tensor, scale: Pair) -> Tensor:
    """Spread sub-pixels over space: (B, N * sh * sw, H, W) -> (B, N, sh * H, sw * W), as `pixel_shuffle` does.

    Unlike `F.pixel_shuffle` it takes a different factor for each axis.
    """
    batch, channels, height, width = field.shape
    vertical, horizontal = scale
    channels //= vertical * horizontal
    plain = plain_functions_wanted()
    if vertical == horizontal and (plain or _shuffles_fast(field)):
        return F.pixel_shuffle(field, vertical)
    if plain:  # who converts the graph may know no more than four dimensions
        by_row = field.reshape(batch * channels * vertical, horizontal, height * width).transpose(1, 2)
        by_row = by_row.reshape(batch * channels, vertical, height, width * horizontal).transpose(1, 2)
        return by_row.reshape(batch, channels, height * vertical, width * horizontal)
    by_cell = field.reshape(batch, channels, vertical, horizontal, height, width)
    return by_cell.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, height * vertical, width * horizontal)


def _shuffles_fast(field: Tensor) -> bool:
    """Whether torch's own pixel_shuffle is the faster way (measured on torch 2.15, on a CPU); it cannot train on no images."""
    return field.numel() > 0 and (field.numel() <= _SMALL_FIELD or is_channels_last(field))


def unshuffle(field: Tensor, scale: Pair) -> Tensor:
    """The inverse of `shuffle`: (B, N, sh * H, sw * W) -> (B, N * sh * sw, H, W)."""
    batch, channels, height, width = field.shape
    vertical, horizontal = scale
    height, width = height // vertical, width // horizontal
    field = field.reshape(batch, channels, height, vertical, width, horizontal).permute(0, 1, 3, 5, 2, 4)
    return field.reshape(batch, channels * vertical * horizontal, height, width)


def normalised(position: Tensor, size: int) -> Tensor:
    """Positions along an axis of `size` pixels as `grid_sample(align_corners=False)` takes them: (2 p + 1) / n - 1."""
    # In this order only the division rounds by more than p's own last bit.
    return (2 * position + (1 - size)) / size
