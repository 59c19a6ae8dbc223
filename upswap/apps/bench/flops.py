"""FLOPs of a call, resizes and sampling among them, which `torch.utils.flop_counter` counts as 0.

The rule is torch's own: 2 FLOPs for every multiplication with its addition, by the plain definition of an operation, whatever
its kernel does; what is no sum of products is not counted (activations, sums of two maps). A resize or a sampling is a sum of
products: every value of its output is the weighted sum of so many values of its input, its taps. The weights themselves, and
the positions they come from, are elementwise arithmetic that a pixel's channels share, and are left out like other elementwise
arithmetic. So DySample costs its convolutions and 8 FLOPs a value whichever way its sampling is computed: through
`grid_sample`, through `embedding_bag`, or as the one operator that compiled code sees.

    nearest   1 tap, of weight 1: a copy, 0
    bilinear  2 x 2 taps: 8 a value     (aten/src/ATen/native/UpSample.h, GridSamplerUtils.h)
    bicubic   4 x 4 taps: 32 a value

The way back to the input adds the gradient of every output value, times the same weights, to that of each of its taps: as many
again, and for nearest one addition. The way back to positions needs, for each of two axes, the sum of the taps times the
derivatives of their weights, and that times the gradient added up over a point's channels: 2 * (2 * taps + 2) a value
(`grid_sampler_2d_backward` in aten/src/ATen/native/GridSampler.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...nn.sampling import sampler  # noqa: F401 - it defines torch.ops.upswap.upsample
from ...probe.inputs.inputs import as_inputs

_aten = torch.ops.aten

_TAPS = {"nearest": 0, "bilinear": 4, "bicubic": 16}
# By the numbers of `GridSamplerInterpolation` and of `EmbeddingBagMode`.
_KERNELS = ("bilinear", "nearest", "bicubic")
_SUM, _MEAN = 0, 1

Shape = Sequence[int]


def count(function: Callable[..., Any], inputs: Any = ()) -> int:
    """FLOPs of one call of a model or function, by torch's formulas and those here.

    Args:
        function: what is called; a backward pass in it counts too. Compiled code is not looked into: give the original.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `(args, kwargs)`.

    Raises:
        InputError: `inputs` is none of these.
    """
    given = as_inputs(inputs)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        function(*given.args, **given.kwargs)
    return int(counter.get_total_flops())


def _resize(mode: str) -> Callable[..., int]:
    def formula(*_args: Any, out_shape: Shape, **_kwargs: Any) -> int:
        return 2 * _TAPS[mode] * prod(out_shape)

    return formula


def _resize_backward(mode: str) -> Callable[..., int]:
    def formula(grad: Shape, *_args: Any, **_kwargs: Any) -> int:
        return (2 * _TAPS[mode] or 1) * prod(grad)

    return formula


def _grid_sample(_x: Shape, _grid: Shape, kernel: int, *_args: Any, out_shape: Shape, **_kwargs: Any) -> int:
    return 2 * _TAPS[_KERNELS[kernel]] * prod(out_shape)


def _grid_sample_backward(
    grad: Shape,
    _x: Shape,
    _grid: Shape,
    kernel: int,
    _padding: int,
    _align_corners: bool,
    wanted: Sequence[bool] = (True, True),
    **_kwargs: Any,
) -> int:
    to_input, to_positions = wanted
    return _sampling_backward(_KERNELS[kernel], prod(grad), to_input, to_positions)


def _sampling_backward(mode: str, values: int, to_input: bool = True, to_positions: bool = True) -> int:
    taps = _TAPS[mode]
    a_value = 0
    if to_input:
        a_value += 2 * taps or 1
    if to_positions and taps:  # nearest has no gradient there
        a_value += 2 * (2 * taps + 2)
    return a_value * values


def _embedding_bag(
    table: Shape,
    indices: Shape,
    _offsets: Shape,
    _scale_by_frequency: bool = False,
    mode: int = _SUM,
    _sparse: bool = False,
    weights: Shape | None = None,
    *_args: Any,
    out_shape: Any,
    **_kwargs: Any,
) -> int:
    """Rows of a table, as long as `table[1]`, summed in bags: an addition a value, with weights a product too."""
    if mode not in (_SUM, _MEAN):
        return 0  # the largest: comparisons
    summed = prod(indices) * table[1] * (1 if weights is None else 2)
    return summed + (prod(out_shape[0]) if mode == _MEAN else 0)


def _embedding_bag_backward(weights_at: int) -> Callable[..., int]:
    """The gradient of every bag added, times the weight if there is one (argument `weights_at`), to each of its rows."""

    def formula(grad: Shape, indices: Shape, *args: Any, **_kwargs: Any) -> int:
        return prod(indices) * grad[1] * (1 if args[weights_at - 2] is None else 2)

    return formula


def _embedding_bag_weights_backward(grad: Shape, _table: Shape, indices: Shape, *_args: Any, **_kwargs: Any) -> int:
    """For every weight the product of its row with the gradient of its bag."""
    return 2 * prod(indices) * grad[1]


def _upsample(x: Shape, field: Shape, _init_pos: Any, size: Shape, *how: Any, out_shape: Shape, **_kwargs: Any) -> int:
    """`torch.ops.upswap.upsample`: a sampling, and a bilinear resize of the offsets where they are not made at that size."""
    return 2 * _TAPS[_mode(how)] * prod(out_shape) + 2 * _TAPS["bilinear"] * _resized_offsets(field, size, how)


def _upsample_backward(
    _grad: Shape, x: Shape, field: Shape, _init_pos: Any, size: Shape, *how: Any, **_kwargs: Any
) -> int:
    sampling = _sampling_backward(_mode(how), x[0] * x[1] * prod(size))
    # Offsets are made once more, and the gradient goes back through their resize.
    return sampling + 2 * 2 * _TAPS["bilinear"] * _resized_offsets(field, size, how)


def _mode(how: Sequence[Any]) -> str:
    _factors, _groups, _cells, _scope, mode, *_ = how
    return "bicubic" if mode == "bicubic" else "bilinear"


def _resized_offsets(field: Shape, size: Shape, how: Sequence[Any]) -> int:
    """Values of the field of offsets after its resize to `size`; 0 where it is made at that size."""
    _factors, groups, cells, *_ = how
    if tuple(size) == (field[2] * cells[0], field[3] * cells[1]):
        return 0
    return field[0] * 2 * groups * prod(size)


#: A formula for each operator that torch has none for, as `FlopCounterMode(custom_mapping=FORMULAS)` takes them.
FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.upsample_nearest2d: _resize("nearest"),
    _aten.upsample_nearest2d_backward: _resize_backward("nearest"),
    _aten._upsample_nearest_exact2d: _resize("nearest"),
    _aten._upsample_nearest_exact2d_backward: _resize_backward("nearest"),
    _aten.upsample_bilinear2d: _resize("bilinear"),
    _aten.upsample_bilinear2d_backward: _resize_backward("bilinear"),
    _aten.upsample_bicubic2d: _resize("bicubic"),
    _aten.upsample_bicubic2d_backward: _resize_backward("bicubic"),
    _aten.grid_sampler_2d: _grid_sample,
    _aten.grid_sampler_2d_backward: _grid_sample_backward,
    _aten._embedding_bag: _embedding_bag,
    _aten._embedding_bag_forward_only: _embedding_bag,
    _aten._embedding_bag_backward: _embedding_bag_backward(weights_at=10),
    _aten._embedding_bag_dense_backward: _embedding_bag_backward(weights_at=8),
    _aten._embedding_bag_per_sample_weights_backward: _embedding_bag_weights_backward,
    torch.ops.upswap.upsample: _upsample,
    torch.ops.upswap.upsample_backward: _upsample_backward,
}
