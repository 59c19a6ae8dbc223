"""Checks and normal forms of what a user gives an upsampler: each returns the value it will use or says what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .sampling.positions import Pair, Ratio, scaled_size


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(choices)}")


def positive_int(name: str, value: Any) -> int:
    """A count; OptionError unless it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise OptionError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """(vertical, horizontal) from one value for both axes or a sequence of two; OptionError for other lengths."""
    if not isinstance(value, Sequence):
        return value, value
    if len(value) != 2:
        raise OptionError(f"{name} must be one number or (vertical, horizontal), got {value!r}")
    return value[0], value[1]


def scale_pair(scale: Any) -> Ratio:
    """(vertical, horizontal) factors, ints where they are integral; OptionError unless finite and at least 1."""
    message = f"scale must be one number or (vertical, horizontal), finite and at least 1, got {scale!r}"
    factors = pair("scale", scale)
    if any(isinstance(factor, (bool, str)) for factor in factors):
        raise OptionError(message)
    try:
        vertical, horizontal = (float(factor) for factor in factors)
    except (TypeError, ValueError) as error:
        raise OptionError(message) from error
    if not (1 <= vertical < math.inf and 1 <= horizontal < math.inf):
        raise OptionError(message)
    return (
        int(vertical) if vertical.is_integer() else vertical,
        int(horizontal) if horizontal.is_integer() else horizontal,
    )


def whole(n: object) -> int:
    """One entry of a size: an int, which may be symbolic; OptionError otherwise."""
    if isinstance(n, int):
        return n
    if isinstance(n, torch.SymInt) or (torch.jit.is_tracing() and isinstance(n, torch.Tensor)):  # type: ignore[attr-defined]
        return n  # type: ignore[return-value]  # int() would tie a compiled or traced graph to this one value
    if isinstance(n, Integral):
        return int(n)
    raise OptionError(f"size must be an int or a pair of ints, got {n!r}")


class Target(NamedTuple):
    """What a call of an upsampler is to give."""

    size: Pair
    """The output's (h, w)."""
    factors: Ratio | None
    """The scale factors it came from, None where it did not."""
    smaller: bool
    """Whether that is smaller than the input along an axis."""


def target(x: Tensor, size: Any, scale_factor: Any, scale: Ratio) -> Target:
    """What `size` and `scale_factor`, as `F.interpolate` takes them, or else `scale`, ask for `x` (B, C, H, W).

    Raises:
        OptionError: both size and scale_factor are given, or one of them is not one value or a pair.
    """
    if size is None:
        factors = scale if scale_factor is None else pair("scale_factor", scale_factor)
        # Factors are plain numbers: asking them, where they are given, puts no guard on sizes into a compiled graph.
        return Target(scaled_size((x.shape[2], x.shape[3]), factors), factors, min(factors) < 1)
    if scale_factor is not None:
        raise OptionError("give size or scale_factor, not both")
    height, width = (whole(n) for n in pair("size", size))
    return Target((height, width), None, not (height >= x.shape[2] and width >= x.shape[3]))


def plain(scale: Ratio) -> str:
    """A pair of factors as a user would write it: "2" or "(3, 2)"."""
    return str(scale[0]) if scale[0] == scale[1] else str(scale)
