"""Upsamplers under `torch.fx`, where one is a node of a graph as torch's own layers are, and under `torch.jit.script`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

from torch import fx

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def scripted_as(source: Callable[..., Any]) -> Callable[[_Forward], _Forward]:
    """Let `torch.jit.script` compile `source` in the place of a function; its own source may be more than that knows."""

    def marked(forward: _Forward) -> _Forward:
        old: Any = forward
        # TorchScript looks up what the source names among the globals of the function that it was given.
        made: Any = FunctionType(old.__code__, source.__globals__, old.__name__, old.__defaults__, old.__closure__)
        functools.update_wrapper(made, forward)
        # It asks `inspect` for the source, which goes by `__wrapped__`. Signatures and help stay the function's own.
        made.__signature__ = inspect.signature(forward)
        made.__wrapped__ = source
        return cast(_Forward, made)

    return marked


def leaf(forward: _Forward) -> _Forward:
    """Make a module's forward, of `(self, x, size=None, scale_factor=None)`, a `call_module` in any FX trace.

    One that takes a guide has it after these.

    FX's own rule is the package a class is defined in, which no tracer has upswap in: quantisation has a tracer of its own.
    """

    proxy = fx.Proxy  # names no global, as `scripted_as` may give it others

    @functools.wraps(forward)
    def traced(self: Any, x: Any, size: Any = None, scale_factor: Any = None, **guided: Any) -> Any:
        if isinstance(x, proxy):
            given = {"size": size, "scale_factor": scale_factor, **guided}
            given = {name: value for name, value in given.items() if value is not None}
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), given)
        return forward(self, x, size, scale_factor, **guided)

    return cast(_Forward, traced)
