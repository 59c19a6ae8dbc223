"""What rewritten code calls when it runs: one resize call, sent through the upsampler of its site."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...errors import UpswapWarning
from ...probe.callsites.class_code import is_resize_layer
from ...probe.callsites.functions import replaced

#: The functions that resize, with the arguments their names imply.
_IMPLIED: dict[Any, dict[str, Any]] = {
    F.interpolate: {},
    F.upsample: {},
    F.upsample_nearest: {"mode": "nearest"},
    F.upsample_bilinear: {"mode": "bilinear", "align_corners": True},
}


class Guided(NamedTuple):
    """How the upsampler of a site gets its guide, of so many channels.

    It is what `path` leads to from the local of that number among those that the call passes; or with `local` None the tensor
    number `operand` of those that the result is fused with, which `concatenated` says of the two.
    """

    channels: int
    local: int | None
    path: tuple[Any, ...]
    operand: int
    concatenated: bool


class Target(NamedTuple):
    """The upsampler of one site and the situation it was made for."""

    site: str
    child: str
    channels: tuple[int, ...]
    mode: str
    align_corners: bool
    guide: Guided | None = None


class Sent(NamedTuple):
    """One resize that goes through an upsampler: of a guided one with the locals that were passed, and the run's own list."""

    target: Target
    upsampler: nn.Module
    locals: tuple[Any, ...]
    run: list[Any]


class Pending(NamedTuple):
    """A resize whose result is to be corrected where it is fused: what was computed from what, and as how it was asked for.

    `versions` are how often result and input had been written to, None where that is not counted.
    """

    result: torch.Tensor
    input: torch.Tensor
    versions: tuple[int | None, int | None]
    size: Any
    scale_factor: Any
    target: Target
    upsampler: nn.Module


class Rewriter(Protocol):
    """What gives functions on the way to a resize their rewritten form (`rewrite_calls.Helper`)."""

    indirect: bool

    def of(self, function: FunctionType, owner: nn.Module) -> FunctionType | None:
        """The function compiled again, or None for one that is not known."""


def resize(
    targets: tuple[Target | None, ...],
    counter: int | None,
    run: list[Any],
    owner: nn.Module,
    original: Callable[..., torch.Tensor],
    *args: Any,
    _upswap_locals: tuple[Any, ...] = (),
    **kwargs: Any,
) -> torch.Tensor:
    """The call `original(*args, **kwargs)` of a rewritten function.

    `targets` has an entry for each time this call runs in one forward of its owner; None, and any run beyond those, is
    the original call. `run[counter]` counts the runs of this call, from 0 in every forward; without a counter, the first
    target is that of every run. `_upswap_locals` are the values of the names that guides are found by.
    """
    occurrence = 0
    if counter is not None:
        occurrence = run[counter]
        run[counter] = occurrence + 1
    target = targets[occurrence] if occurrence < len(targets) else None
    if target is None:
        return original(*args, **kwargs)
    to = Sent(target, getattr(owner, target.child), _upswap_locals, run)
    sent = _sent(to, original)
    if sent is not None:
        return sent(*args, **kwargs)
    # `checkpoint(F.interpolate, x)`: torch runs the resize it is handed, and runs it again in the backward pass.
    for index, value in enumerate(args):
        sent = _sent(to, value)
        if sent is not None:
            return original(*args[:index], sent, *args[index + 1 :], **kwargs)
    for name, value in kwargs.items():
        sent = _sent(to, value)
        if sent is not None:
            return original(*args, **{**kwargs, name: sent})
    _say(f"site {target.site}: the resize was called through {original!r}, which upswap does not know")
    return original(*args, **kwargs)


def _sent(to: Sent, resize: Any) -> Callable[..., torch.Tensor] | None:
    """A resize as a function that goes through the upsampler; None for what is no resize."""
    if isinstance(resize, functools.partial):
        inner = _sent(to, resize.func)
        return None if inner is None else functools.partial(inner, *resize.args, **resize.keywords)
    if is_resize_layer(resize):
        return functools.partial(_layer, to, resize)
    if isinstance(resize, MethodType) and is_resize_layer(resize.__self__) and resize.__func__.__name__ == "forward":
        return _without_hooks(to, resize.__self__)
    if resize is nn.Upsample.forward:  # `super().forward(x)` of a layer that is a subclass
        return functools.partial(_inherited, to)
    if isinstance(resize, FunctionType) and resize in _IMPLIED:
        return functools.partial(through, to, **_IMPLIED[resize])
    return None


def _without_hooks(to: Sent, layer: nn.Upsample) -> Callable[..., torch.Tensor]:
    return functools.partial(
        through,
        to,
        size=layer.size,
        scale_factor=layer.scale_factor,
        mode=layer.mode,
        align_corners=layer.align_corners,
        recompute_scale_factor=layer.recompute_scale_factor,
    )


def _inherited(to: Sent, layer: nn.Upsample, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The resize of an `nn.Upsample`, called from a forward of its own."""
    return _without_hooks(to, layer)(*args, **kwargs)


def _layer(to: Sent, layer: nn.Upsample, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The call of an `nn.Upsample`, sent through an upsampler; its hooks run as they would have."""
    call = _without_hooks(to, layer)
    if not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks):
        return call(*args, **kwargs)
    hooked = object.__new__(_Hooked)
    hooked.__dict__ = {**layer.__dict__, "_upswap_call": call}
    return cast(torch.Tensor, hooked(*args, **kwargs))


class _Hooked(nn.Upsample):
    """An `nn.Upsample` with the attributes and hooks of another, whose forward is a call of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.__dict__["_upswap_call"](input))


def enter(
    helper: Rewriter,
    sites: str,
    run: list[Any],
    owner: nn.Module,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The call `original(*args, **kwargs)`, which leads to resizes in another function, with that function rewritten.

    The function may be `original`, or be wrapped by it, or (`helper.indirect`) be handed to it to be called: by `checkpoint`.
    """

    def found(function: FunctionType) -> Any:
        new = helper.of(function, owner)
        # What torch calls for the model it may call again later, so that it counts for itself.
        run_of_it = None if helper.indirect else run
        return None if new is None else functools.partial(new, _upswap_owner=owner, _upswap_run=run_of_it)

    new = replaced(original, found)
    if new is not None:
        return new(*args, **kwargs)
    if helper.indirect:
        for index, value in enumerate(args):
            new = replaced(value, found)
            if new is not None:
                return original(*args[:index], new, *args[index + 1 :], **kwargs)
        for name, value in kwargs.items():
            new = replaced(value, found)
            if new is not None:
                return original(*args, **{**kwargs, name: new})
    _say(f"{sites}: {original!r} leads to no resize that upswap knows")
    return original(*args, **kwargs)


def through(
    to: Sent,
    input: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Upsample `input` of shape (N, C, H, W) as `F.interpolate` would have been asked to.

    A call that is not the one the upsampler was made for is what it was before, that of `F.interpolate`, and a warning
    names the site.
    """
    target, unlike = to.target, None
    traced: Any = input  # an FX trace has no shapes to look at
    # Compared one by one: where torch 2.9 compiles for any size, a number in a tuple is never `in` it.
    if not isinstance(traced, fx.Proxy) and (input.dim() != 4 or all(input.shape[1] != n for n in target.channels)):
        takes = " or ".join(map(str, target.channels))
        unlike = f"its upsampler takes (N, {takes}, H, W), this call has {tuple(input.shape)}"
    elif mode != target.mode or bool(align_corners) != target.align_corners or antialias:
        unlike = (
            f"its upsampler stands for mode={target.mode!r}, align_corners={target.align_corners}, this call asks for "
            f"mode={mode!r}, align_corners={align_corners}, antialias={antialias}"
        )
    original = functools.partial(
        F.interpolate, input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    )
    if unlike is not None:
        _say(f"site {target.site}: {unlike}")
        return original()
    if size is None and scale_factor is not None and recompute_scale_factor:
        factors = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor, scale_factor)
        size = [math.floor(n * factor) for n, factor in zip(input.shape[-2:], factors, strict=True)]
        scale_factor = None
    if target.guide is None:
        return upsampled(to.upsampler, input, size, scale_factor)
    if target.guide.local is None:
        result = original()
        versions = (_version(result), _version(input))
        to.run.append(Pending(result, input, versions, size, scale_factor, target, to.upsampler))
        return result
    guide = reached(to.locals[target.guide.local], target.guide.path)
    unlike = unlike_guide(guide, target.guide.channels, input, _size(input, size, scale_factor))
    if unlike is not None:
        _say(f"site {target.site}: {unlike}")
        return original()
    return upsampled(to.upsampler, input, size, scale_factor, guide=guide)


def upsampled(upsampler: nn.Module, input: torch.Tensor, size: Any, scale_factor: Any, **guided: Any) -> Any:
    """`input` by an upsampler, asked for as `F.interpolate` was; with `both` that comes after the changed guide."""
    if size is not None:
        return upsampler(input, size, **guided)
    return upsampler(input, None, scale_factor, **guided)


def _size(input: torch.Tensor, size: Any, scale_factor: Any) -> Any:
    """The (h, w) that a resize is asked for."""
    if size is not None:
        return (size, size) if isinstance(size, int) else size
    factors = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor, scale_factor)
    return [math.floor(n * factor) for n, factor in zip(input.shape[-2:], factors, strict=True)]


def _say(what: str) -> None:
    if not torch.compiler.is_dynamo_compiling():  # which cannot warn; an export says so when it is made
        warnings.warn(f"{what}; the original ran", UpswapWarning, stacklevel=4)


# -- guides ---------------------------------------------------------------------------------------------------------------


def reached(value: Any, path: Sequence[Any]) -> Any:
    """What indices and keys lead to from a value; None where they lead nowhere."""
    for key in path:
        if (isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)) or (
            isinstance(value, dict) and key in value
        ):
            value = value[key]
        else:
            return None
    return value


def unlike_guide(guide: Any, channels: int, input: torch.Tensor, size: Any) -> str | None:
    """Why a value is no guide of so many channels for a map that is resized to `size`, or None."""
    if isinstance(guide, fx.Proxy):  # as in `through`
        return None
    if not isinstance(guide, torch.Tensor):
        return "its guide is not there"
    if guide.dim() != 4 or guide.shape[1] != channels or guide.shape[0] != input.shape[0]:
        return f"its guide has to be ({input.shape[0]}, {channels}, h, w), and is {tuple(guide.shape)}"
    if guide.shape[2] != size[0] or guide.shape[3] != size[1]:
        return f"its guide has the size {tuple(guide.shape[2:])}, and the result {tuple(size)}"
    if guide.device != input.device:
        return f"its guide is on {guide.device}, and the map on {input.device}"
    # Under autocast layers give other types than resizes, and the upsampler's convolutions take either.
    if guide.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        return f"its guide is {guide.dtype}, and the map {input.dtype}"
    return None


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted, or where the code alone is looked at."""
    traced: Any = tensor
    if isinstance(traced, fx.Proxy) or torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version
