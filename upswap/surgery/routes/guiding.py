"""What rewritten code calls to bring guides to upsamplers: where a result is fused, and where a module hands a guide down."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .runtime import Pending, _say, _version, reached, unlike_guide, upsampled

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_ADDITIONS = (operator.add, operator.iadd, torch.add)

#: The keyword by which modules hand a guide down, and what says that one takes it.
GUIDE, TAKES_GUIDE = "_upswap_guide", "_upswap_takes_guide"


class Handed(NamedTuple):
    """A guide that a call hands down: to the module at the path `child`, from the local of that number, by `path`."""

    child: tuple[str, ...]
    local: int
    path: tuple[Any, ...]


def fuse(counters: int, run: list[Any], fusing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The sum or concatenation `fusing(*args, **kwargs)`, in which results of resizes of this run are corrected first.

    `run` has them behind its `counters` counters. An operand that is none of them stays what it is.
    """
    if len(run) == counters:
        return fusing(*args, **kwargs)
    if any(fusing is known for known in _CONCATENATIONS) and (args or "tensors" in kwargs):
        given = args[0] if args else kwargs["tensors"]
        operands = _corrected(counters, run, list(given))
        return fusing(operands, *args[1:], **kwargs) if args else fusing(**{**kwargs, "tensors": operands})
    if any(fusing is known for known in _ADDITIONS) and len(args) == 2:
        return fusing(*_corrected(counters, run, list(args)), **kwargs)
    for pending in run[counters:]:
        _say(f"site {pending.target.site}: {fusing!r} fuses its result, which upswap does not know")
    return fusing(*args, **kwargs)


def check_fused(sites: tuple[str, ...], counters: int, run: list[Any], value: Any) -> Any:
    """The value of a function that fuses the results of the resizes at these sites; one that was not fused is told of.

    A hook of a resize layer may have put another tensor in the place of its result.
    """
    for pending in run[counters:]:
        if any(pending.target.site == site for site in sites):
            _say(f"site {pending.target.site}: its result did not come to where it is fused with its guide")
    return value


def _corrected(counters: int, run: list[Any], operands: list[Any]) -> list[Any]:
    """The operands with those corrected that are results of resizes, which are then done with."""
    waiting, known = run[counters:], list(operands)
    del run[counters:]
    for pending in waiting:
        places = [index for index, operand in enumerate(known) if operand is pending.result]
        if len(places) != 1:
            run.append(pending)
            continue
        place, spec = places[0], pending.target.guide
        guide = operands[spec.operand] if spec.operand < len(operands) else None
        unlike = _unlike(pending, guide, [other.result for other in waiting])
        if unlike is not None:
            _say(f"site {pending.target.site}: {unlike}")
            continue
        asked = (pending.upsampler, pending.input, pending.size, pending.scale_factor)
        if spec.concatenated and getattr(pending.upsampler, "changes_guide", False):
            operands[spec.operand], operands[place] = upsampled(*asked, guide=guide, both=True)
        else:
            operands[place] = upsampled(*asked, guide=guide)
    return operands


def _unlike(pending: Pending, guide: Any, results: Sequence[torch.Tensor]) -> str | None:
    """Why a result cannot be corrected with a guide, or None."""
    if (_version(pending.result), _version(pending.input)) != pending.versions:
        return "its input or its result was written to before it was fused"
    if any(guide is result for result in results):
        return "it is fused with another resize in the place of its guide"
    result: Any = pending.result
    shape = None if isinstance(result, fx.Proxy) else result.shape[2:]
    channels = 0 if pending.target.guide is None else pending.target.guide.channels
    return unlike_guide(guide, channels, pending.input, shape)


def hand(
    targets: tuple[Handed, ...],
    owner: nn.Module,
    original: Any,
    *args: Any,
    _upswap_locals: tuple[Any, ...] = (),
    **kwargs: Any,
) -> Any:
    """The call `original(*args, **kwargs)` of a child of `owner`, with a guide where it is one that one is handed to.

    A child that takes none, because something was put in its place, is called without: its own resize says so.
    """
    for target in targets:
        child: Any = owner
        for name in target.child:
            child = child._modules.get(name)
        if _is_same(original, child):
            guide = reached(_upswap_locals[target.local], target.path)
            if guide is not None and getattr(child, TAKES_GUIDE, False):
                return original(*args, _upswap_guide=guide, **kwargs)
            return original(*args, **kwargs)
    return original(*args, **kwargs)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two are one module; `torch.export` has another object for it, with the same attributes."""
    if one is other or torch.compiler.is_dynamo_compiling():
        return one is other
    return isinstance(one, nn.Module) and isinstance(other, nn.Module) and one.__dict__ is other.__dict__


def passing(name: str) -> dict[str, Any]:
    """The methods of an `nn.Sequential` that hands a guide on to its child `name`."""

    def forward(self: nn.Sequential, input: Any, *, _upswap_guide: Any = None) -> Any:
        for key, module in self._modules.items():
            if key == name and _upswap_guide is not None and getattr(module, TAKES_GUIDE, False):
                input = module(input, _upswap_guide=_upswap_guide)
            else:
                input = module(input)
        return input

    return {"forward": forward, TAKES_GUIDE: True}
