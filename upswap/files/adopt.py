"""Weights given to a model: to one that is as they are of, or to an original, which is patched as their tensors say.

Tensors do not say every option. Where upsamplers of several fit and compute different things, it is left to the user.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError, SourceError
from ..nn.registry import config_class
from ..nn.state_dicts import options_in, shapes_at
from ..plan.plan import Options, Plan
from ..plan.site import Site
from ..surgery.apply import added_keys, is_patched, unpatched_on_error
from ..surgery.operation import Operation
from ..surgery.options import make_options
from ..surgery.selection import SWAPPABLE
from ..surgery.wrappers import patched_models, the_patched, unwrapped
from .finetuned import Way, changed, differing, distance, loaded
from .formats import upsamplers as alone
from .formats.pt import Contents
from .reading import IN_MEMORY, Held
from .state_dict import assign, below
from .weights import Weights, weights_for

#: A site, and the tensors of the upsampler there.
_Found = tuple[Site, dict[str, torch.Tensor]]


def adopt(model: nn.Module, held: Held | Contents, key: str | None = None) -> Weights:
    """Load weights that were read into `model`, which is patched on the way where they are of a patched one and it is not.

    Raises:
        SourceError: as `weights_for`; or the model is patched in another way, or cannot be patched in the same. The model is
            as it was.
    """
    inner = unwrapped(model)
    patched = any(map(is_patched, inner.modules()))
    try:
        weights = weights_for(inner, held, key=key)
    except SourceError as error:
        raise (_patched_otherwise(inner, held, key) if patched else None) or error from None
    if weights.plan is not None:
        alone.put(the_patched(inner) if patched else model, weights.plan, weights.tensors, weights.path)
    elif not weights.added:
        assign(inner, weights.tensors, weights.path)
    elif not weights.upsamplers:
        raise SourceError(
            f"{weights.path} does not hold the weights of this {type(inner).__name__}: {weights.unexpected}"
        )
    elif patched:
        raise _other_patch(inner, weights.path, f": {weights.unexpected}")
    else:
        _patch_alike(model, weights, _call(weights.path))
    return weights


def _patched_otherwise(model: nn.Module, held: Held | Contents, key: str | None) -> SourceError | None:
    """The error for weights that fit the host of a patched model and not its upsamplers; None where they fit neither."""
    own = {
        f"{path}.{name}".removeprefix("."): name
        for path, at in patched_models(model).items()
        for name in added_keys(at)
    }
    try:
        weights = weights_for(model, held, key=key, without=own)
    except SourceError:
        return None
    if not weights.added:
        return SourceError(
            f"{weights.path} has no upsamplers: it has the weights of the host of this patched {type(model).__name__} alone. "
            f"Load them before the patch: {_call(weights.path, 'upswap.unpatch(model)')}, then upswap.patch(model). To keep the "
            'upsamplers as they are, upswap.save(model, "upsamplers.safetensors", only="upsamplers") first, and load that last'
        )
    return _other_patch(model, weights.path) if weights.upsamplers else None


def _other_patch(model: nn.Module, path: str | Path, how: str = "") -> SourceError:
    return SourceError(
        f"{path} has the weights of a {type(model).__name__} that was patched in another way than this one{how}. "
        f"{_call(path, 'upswap.unpatch(model)')} patches it as they say"
    )


def _call(path: str | Path, model: str = "model") -> str:
    return f"upswap.load({'state_dict' if path == IN_MEMORY else repr(str(path))}, {model})"


def _patch_alike(model: nn.Module, weights: Weights, call: str) -> None:
    """Patch `model` so that it has the upsamplers in `weights`, and load them."""
    try:
        operation = _operation(model, weights)
    except _Undecided as error:
        raise SourceError(
            f"{weights.path} has the weights of a patched {type(model).__name__}, and this one cannot be patched alike:",
            *error.lines,
            f"Patch it before, as it was patched for the training: upswap.patch(model), with the options of then; and {call}",
        ) from None
    except InputError as error:
        raise InputError(
            *error.args,
            f"{weights.path} has upsamplers, for which the model has to be patched: upswap.patch(model, example_inputs), "
            f"with the options it was patched with for the training; and {call}",
        ) from error
    with unpatched_on_error(model):
        operation.apply()
        assign(model, weights.tensors, weights.path)


class _Undecided(Exception):
    """What is in the way of a patch, in lines."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(*lines)
        self.lines = lines


def _operation(model: nn.Module, weights: Weights) -> Operation:
    """The patch that gives `model` upsamplers for all the tensors in `weights` that it does not know, and no others."""
    first = operation = Operation(model, None, make_options())
    for options in ({}, {"kinds": SWAPPABLE}, {"share_layers": True}, {"kinds": SWAPPABLE, "share_layers": True}):
        operation = operation if not options else Operation(model, None, make_options(**options))
        found = list(_found(operation.plan, weights))
        if sum(len(tensors) for _, tensors in found) == len(weights.added):
            break
    else:
        raise _Undecided(differing(model, first.plan, weights))
    kinds = tuple(dict.fromkeys(site.kind for site, _ in found))
    places = {site.name for site, _ in found}
    without = [site.name for site in operation.plan.swapped if site.kind in kinds and site.name not in places]
    upsampler, values, overrides = _options(found)
    asked = make_options(
        upsampler,
        kinds=kinds,
        exclude=[glob.escape(name) for name in without],
        share_layers=operation.plan.options.share_layers,
        overrides=overrides,
        **values,
    )
    if asked != operation.plan.options:
        operation = Operation(model, None, asked)
    lines = differing(model, operation.plan, weights)
    if lines:
        raise _Undecided(lines)
    return operation


def _found(plan: Plan, weights: Weights) -> Iterator[_Found]:
    """The sites that a plan swaps for which there are tensors, with these."""
    added = {name: weights.tensors[name] for name in weights.added}
    for site in plan.swapped:
        tensors = below(site.module or "", added)
        if tensors:
            yield site, tensors


def _options(found: Sequence[_Found]) -> tuple[str, Mapping[str, Any], dict[str, dict[str, Any]]]:
    """The upsampler, the options, and those of single sites, that make upsamplers of these tensors.

    Of options that make the same, those are taken that are nearest to the defaults.
    """
    ways: list[list[Way]] = []
    for site, tensors in found:
        ways.append(_ways(site, tensors))
        # What one site has no candidate for, as more groups than it has channels, another may have.
        shared = [way for way in ways[-1] if all(_made(*one, way) is not None for one in found)]
        if shared:
            name, values = _the_one(shared, found)
            return name, values, {}
    each = [_the_one(here, [one]) for here, one in zip(ways, found, strict=True)]
    name, values = each[0]
    if any(other != name for other, _ in each):
        raise _Undecided(
            [f"  {site.name} has one of {other}" for (site, _), (other, _) in zip(found, each, strict=True)]
        )
    overrides = {
        site.name: changed((name, values), way) for (site, _), way in zip(found, each, strict=True) if way[1] != values
    }
    return name, values, overrides


def _ways(site: Site, tensors: Mapping[str, torch.Tensor]) -> list[Way]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found: list[Way] = [
        way for way in options_in(site, shapes, Options.upsampler) if loaded(site, *way, tensors) is not None
    ]
    if not found:
        raise _Undecided([f"  the tensors at {site.name} are of no upsampler that is known here"])
    return found


def _made(site: Site, tensors: Mapping[str, torch.Tensor], way: Way) -> nn.Module | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return loaded(site, *way, tensors) if shapes_at(site, *way) == shapes else None


def _the_one(ways: Sequence[Way], found: Sequence[_Found]) -> Way:
    """The one way among those that fit, counting those that compute the same as one; `_Undecided` where there are several."""
    default = Options.upsampler, dataclasses.asdict(config_class(Options.upsampler)())
    ranked = sorted(ways, key=lambda way: distance(default, way))
    different: list[tuple[Way, list[torch.Tensor]]] = []
    for way in ranked:
        results = [result for site, tensors in found for result in _results(site, tensors, way)]
        if not any(_same(results, others) for _, others in different):
            different.append((way, results))
    if len(different) > 1:
        raise _Undecided(
            ["  it may be any of these, which compute different things with the same tensors:"]
            + [f"    {_text(*way, default)}" for way, _ in different]
        )
    return ranked[0]


def _text(name: str, options: Mapping[str, Any], default: Way) -> str:
    given = [f"upsampler={name!r}"] if name != default[0] else []
    given += [f"{key}={value!r}" for key, value in changed(default, (name, options)).items()]
    return f"upswap.patch({', '.join(['model', *given])})"


@torch.no_grad()
def _results(site: Site, tensors: Mapping[str, torch.Tensor], way: Way) -> list[torch.Tensor]:
    """What an upsampler of this way computes of noise, in each form in which it is called."""
    made = cast(nn.Module, loaded(site, *way, tensors))  # each way is one that takes them
    generator = torch.Generator().manual_seed(0)
    results: list[torch.Tensor] = []
    for channels in (site.channels, *site.other_channels):
        x = torch.randn(1, channels, 5, 6, generator=generator)
        results += [made.eval()(x), made(x, (11, 17))]
    return results


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in zip(one, other, strict=True))
