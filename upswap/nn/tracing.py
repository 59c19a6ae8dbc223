"""Upsamplers under `torch.fx`: one is a node of a graph, as torch's own layers are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import fx

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def leaf(forward: _Forward) -> _Forward:
    """Make a module's forward, of `(self, x, size=None, scale_factor=None)`, a `call_module` in any FX trace.

    FX's own rule is the package a class is defined in, which no tracer has upswap in: quantisation has a tracer of its own.
    """

    @functools.wraps(forward)
    def traced(self: Any, x: Any, size: Any = None, scale_factor: Any = None) -> Any:
        if isinstance(x, fx.Proxy):
            given = {
                name: value for name, value in (("size", size), ("scale_factor", scale_factor)) if value is not None
            }
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), given)
        return forward(self, x, size, scale_factor)

    return cast(_Forward, traced)
