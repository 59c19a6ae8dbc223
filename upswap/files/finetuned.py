"""The weights of a patched model that was trained, given back to the model patched in the same way.

A state dict does not say how its model was patched; its tensors do. Where they are not those of the plan at hand, the
message says which options make it the same.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import SourceError
from ..nn.configs import Shapes, option_types
from ..nn.registry import config_class, make_upsampler
from ..nn.state_dicts import options_in, shapes_at, upsamplers_in
from ..plan.plan import Options, Plan
from ..plan.site import Site
from .formats import upsamplers as alone
from .state_dict import assign, below
from .weights import Weights


def give_trained(model: nn.Module, plan: Plan, weights: Weights) -> Weights:
    """Load weights with those of upsamplers into the patched `model`; what is said of them has the number.

    Raises:
        SourceError: the upsamplers are not those of `plan`; each that differs is named, with the option to give.
    """
    if weights.plan is not None:
        alone.put(model, weights.plan, weights.tensors, weights.path)
        return weights
    lines = differing(plan, weights)
    if lines:
        raise SourceError(
            f"{weights.path} holds the weights of a patched {type(model).__name__}, which was patched in another way:",
            *lines,
        )
    try:
        assign(model, weights.tensors, weights.path)
    except SourceError as error:
        advice = _other_values(plan, weights)
        if advice is None:
            raise
        raise SourceError(*error.args, advice) from error
    said = f"{len(weights.added)} of them of {len(plan.swapped)} upsamplers"
    return dataclasses.replace(weights, taken=f"{weights.taken}, {said}")


def differing(plan: Plan, weights: Weights) -> list[str]:
    """What tells the upsamplers in the weights from those of a plan, and what to give, line by line."""
    there = {name: tuple(weights.tensors[name].shape) for name in weights.added}
    found = [(site, below(site.module or "", there)) for site in plan.swapped]
    lines = _other_options(plan, [(site, shapes) for site, shapes in found if shapes])
    lost = [site.name for site, shapes in found if not shapes]
    if lost:
        flags = " ".join(f"--exclude {shlex.quote(name)}" for name in lost)
        names = ", ".join(f'"{name}"' for name in lost)
        lines.append(f"  it has no upsampler at {', '.join(lost)}. Give {flags} (in Python: exclude=[{names}])")
    known = tuple(f"{site.module}." for site in plan.swapped)
    return lines + _other_sites(plan, [name for name in weights.added if not name.startswith(known)], weights)


def _other_options(plan: Plan, found: Sequence[tuple[Site, Shapes]]) -> list[str]:
    """The lines on sites whose upsampler has other tensors, and what makes it the same at all sites, or at each."""
    upsampler = plan.options.upsampler
    other = [(site, shapes) for site, shapes in found if shapes_at(site, upsampler, site.config) != shapes]
    if not other:
        return []
    names = ", ".join(site.name for site, _ in other[:5])
    lines = [f"  the upsamplers have other tensors at {names}{' and so on' if len(other) > 5 else ''}"]
    ways = [list(options_in(site, shapes, upsampler)) for site, shapes in other]
    asked = (upsampler, plan.options.config)
    shared = [way for way in ways[0] if all(shapes_at(site, *way) == shapes for site, shapes in found)]
    if shared:
        name, options = min(shared, key=lambda way: distance(differing_options(*asked, *way)))
        return [*lines, f"Give {_flags(name, differing_options(*asked, name, options), upsampler)}"]
    for (site, _), ways_here in zip(other, ways, strict=True):
        changes = [differing_options(*asked, name, options) for name, options in ways_here if name == upsampler]
        if changes:
            values = min(changes, key=distance).items()
            lines.append(
                f"Give --override {shlex.quote(site.name)} {','.join(f'{key}={value}' for key, value in values)}"
            )
        else:
            lines.append(f"  those at {site.name} are of no options of {upsampler}")
    return lines


def _other_values(plan: Plan, weights: Weights) -> str | None:
    """What to give where the upsamplers have the shapes of the plan and yet refuse their tensors: options that take them."""
    upsampler = plan.options.upsampler
    for site in plan.swapped:
        inside = below(site.module or "", weights.tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in inside.items()}
        if loaded(site, upsampler, site.config, inside) is not None:
            continue
        ways = [way for way in options_in(site, shapes, upsampler) if loaded(site, *way, inside) is not None]
        changes = [(name, differing_options(upsampler, plan.options.config, name, options)) for name, options in ways]
        if changes:
            name, options = min(changes, key=lambda change: distance(change[1]))
            return f"Give {_flags(name, options, upsampler)}"
    return None


def loaded(site: Site, upsampler: str, options: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module | None:
    """The upsampler with these options at a site, and these tensors; None where it refuses them."""
    made = make_upsampler(dataclasses.replace(site, config=options), upsampler)
    try:
        made.load_state_dict(dict(tensors))
    except RuntimeError:
        return None
    return made


def distance(changed: Mapping[str, Any]) -> tuple[int, bool]:
    """How much there is to type; what is given is better than what is left out."""
    return len(changed), None in changed.values()


def differing_options(asked: str, config: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from what was asked; of another upsampler, from its defaults."""
    base = config if name == asked else dataclasses.asdict(config_class(name)())
    return {key: value for key, value in options.items() if base.get(key) != value}


def _flags(name: str, options: Mapping[str, Any], asked: str) -> str:
    """Options as they are typed on the command line, and in Python."""
    own = option_types(config_class(name)) if name == Options.upsampler else {}  # the default's have flags of their own
    flags = [f"--upsampler {name}"] if name != asked else []
    for key, value in options.items():
        if key not in own:
            flags.append(f"--set {key}={value}")
        elif value is False or value is None:
            flags.append(f"no --{key}")
        else:
            flags.append(f"--{key}" if value is True else f"--{key} {value}")
    python = [f"upsampler={name!r}"] if name != asked else []
    python += [f"{key}={value!r}" for key, value in options.items()]
    return f"{' '.join(flags)} (in Python: {', '.join(python)})"


def _other_sites(plan: Plan, names: Iterable[str], weights: Weights) -> list[str]:
    """The lines on tensors that belong to no site that the plan swaps."""
    rest = {name: weights.tensors[name] for name in names}
    lines: list[str] = []
    for path in upsamplers_in(rest):
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith(f"{path}.")}
        site = next((site for site in plan.kept if _may_hold(site, path, plan)), None)
        if site is None:
            lines.append(f"  it has an upsampler at {path}, which is no site of this model")
        elif site.kind not in plan.options.kinds:
            kinds = " ".join(f"--kind {kind}" for kind in (*plan.options.kinds, site.kind))
            several = ", ".join(f'"{kind}"' for kind in (*plan.options.kinds, site.kind))
            lines.append(
                f"  it has an upsampler at {site.name}, which is {site.kind}. Give {kinds} (in Python: kinds=[{several}])"
            )
        else:
            lines.append(f"  it has an upsampler at {site.name}, which is kept: {site.why}")
    if rest:
        lines.append(
            f"  unexpected: {', '.join(list(rest)[:5])}{f' and {len(rest) - 5} more' if len(rest) > 5 else ''}"
        )
    return lines


def _may_hold(site: Site, path: str, plan: Plan) -> bool:
    """Whether an upsampler at this path is one of a kept site: at its owner's place, or in it."""
    above, _, last = path.rpartition(".")
    alone = sum(other.owner == site.owner for other in plan.sites) == 1
    return path == site.owner or (above == site.owner and last == ("upsample" if alone else f"upsample_{site.ordinal}"))
