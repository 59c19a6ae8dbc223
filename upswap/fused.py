"""When the Triton kernels of `triton_sampler.py` compute a call: where they are asked for, and can.

They have been checked in Triton's interpreter and compiled for GPUs, and not been timed on one yet: until then they are asked
for by the environment variable `UPSWAP_TRITON=1`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

from torch import Tensor

from .sampling import Reading

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def wanted(x: Tensor) -> bool:
    """Whether kernels for `x`'s device are asked for and Triton is there."""
    if not (x.is_cuda or _INTERPRETED) or os.environ.get("UPSWAP_TRITON") != "1":
        return False
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels(x: Tensor, field: Tensor, reading: Reading) -> ModuleType | None:
    """The module whose `forward` and `backward` compute this call, None where torch's functions have to."""
    size, factors, scheme, init_pos = reading
    if not wanted(x) or init_pos is not None:
        return None
    if (scheme.cells[0] * field.shape[2], scheme.cells[1] * field.shape[3]) != tuple(size):
        return None
    from . import triton_sampler

    return triton_sampler if triton_sampler.supports(x, field, scheme, factors) else None
