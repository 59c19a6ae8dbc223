"""From a model to a Plan: survey, select, and the first faithful route for every owner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import inputs as _inputs
from ._version import __version__
from .errors import InputError, NothingToSwapError, PlanError, RewriteError
from .inputs import Inputs
from .rewrite import by_owner
from .routes import route_owner
from .select import select
from .sites import Options, Plan, Site
from .survey import Survey, learned_upsampling, survey

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def make_plan(model: nn.Module, example_inputs: Any, options: Options) -> Plan:
    """What `patch` would do to `model`, which is left untouched.

    Raises `InputError`, `FilterError`, `OptionError`; with `options.strict`, `RewriteError` for a chosen site that no route can
    rewrite (it is kept, with the reason, otherwise).
    """
    found = survey(model, example_inputs)
    chosen = select(found.sites, options)
    sites: list[Site] = []
    calls: dict[str, Any] = {}
    for path, group in by_owner(chosen).items():
        routed = _routed(model, path, group, found, options.strict)
        sites += routed
        if any(site.route == "graph" for site in routed):
            calls[path] = found.arguments[path]
    return Plan(
        model_class=class_name(model),
        options=options,
        sites=tuple(sites),
        inputs=_described(found.inputs),
        calls=calls,
        hints=tuple(_hints(model, sites)),
        upswap_version=__version__,
    )


def class_name(model: nn.Module) -> str:
    """The importable name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _routed(model: nn.Module, path: str, sites: Sequence[Site], found: Survey, strict: bool) -> list[Site]:
    """The sites of one owner with their routes and upsamplers' paths; kept, with the reason, where none is faithful."""
    owner = model.get_submodule(path)
    checked: list[Site] = []
    for site in sites:
        problem = _problem(owner, path, site, found) if site.swap else None
        if problem is None:
            checked.append(
                dataclasses.replace(site, module=_module_path(owner, site, len(sites))) if site.swap else site
            )
        else:
            checked.append(_kept(site, problem, strict))
    if not any(site.swap for site in checked):
        return checked
    try:
        route, _ = route_owner(owner, checked, found.arguments.get(path))
    except RewriteError as error:
        return [_kept(site, str(error), strict) if site.swap else site for site in checked]
    return [dataclasses.replace(site, route=route) if site.swap else site for site in checked]


def _problem(owner: nn.Module, path: str, site: Site, found: Survey) -> str | None:
    """Why a site cannot be rewritten whatever the route, or None."""
    if site.op == "module":
        if not path:
            return "the model is this one layer: there is nothing to hold its replacement"
        return "an nn.Upsample with a fixed output size" if getattr(owner, "size", None) is not None else None
    if isinstance(owner, _CONTAINERS):
        return f"its owner, a {type(owner).__name__}, runs whatever is put into it"
    return found.unlocated.get(site.name)


def _kept(site: Site, problem: str, strict: bool) -> Site:
    if strict:
        raise RewriteError(f"site {site.name}: {problem}; exclude the site, or drop strict to keep it as it is")
    return dataclasses.replace(site, swap=False, reason=f"cannot be rewritten: {problem}", module=None, route=None)


def _module_path(owner: nn.Module, site: Site, count: int) -> str:
    """Where a site's upsampler goes: the replaced layer's own path, or a free name in the owner."""
    if site.op == "module":
        return site.owner
    name = "upsample" if count == 1 else f"upsample_{site.ordinal}"
    while hasattr(owner, name):
        name = f"{name}_{site.ordinal}" if count == 1 else f"{name}_"
    return f"{site.owner}.{name}" if site.owner else name


def _described(inputs: Inputs) -> Any:
    try:
        return _inputs.describe(inputs)
    except InputError:  # the user's own types; the plan does without a description of them
        return {}


def _hints(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    if any(site.swap for site in sites):
        return []
    learned = learned_upsampling(model)
    shown = ", ".join(learned[:4]) + (f" and {len(learned) - 4} more" if len(learned) > 4 else "")
    return [f"it makes maps larger with layers of its own, which upswap leaves alone: {shown}"] if learned else []


def nothing_to_swap(plan: Plan) -> NothingToSwapError:
    """The error for a plan that swaps nothing: what was found instead, and what to do."""
    name = plan.model_class.rpartition(".")[2]
    if not plan.sites:
        found = f"{name} makes no resize call (F.interpolate, nn.Upsample) on the example inputs"
    else:
        lines = [f"  {site.name}: {site.kind}: {site.reason}" for site in plan.sites]
        found = f"{name} has {len(plan.sites)} resize call(s), none of them to be swapped:\n" + "\n".join(lines)
        kinds = sorted({site.kind for site in plan.sites} & {"logits", "gate", "context"} - set(plan.options.kinds))
        if kinds:
            found += f"\nkinds= (--kind) can open: {', '.join(kinds)}"
    return NothingToSwapError("\n".join([f"nothing to swap: {found}", *plan.hints]))


def check_plan(model: nn.Module, plan: Plan) -> None:
    """`PlanError` naming every site of `plan` that `model` does not have as the plan knew it."""
    if not plan.swapped:
        raise PlanError("this plan swaps nothing")
    if plan.model_class != class_name(model):
        raise PlanError(f"this plan was made for {plan.model_class}, the model is a {class_name(model)}")
    problems: list[str] = []
    paths = dict(model.named_modules())
    for path, sites in by_owner(plan.sites).items():
        swapped = [site for site in sites if site.swap]
        if not swapped:
            continue
        owner = paths.get(path)
        names = ", ".join(site.name for site in swapped)
        if owner is None:
            problems.append(f"{names}: the model has no module {path!r}")
        elif class_name(owner) != swapped[0].owner_class:
            problems.append(
                f"{names}: {path!r} is a {class_name(owner)}, the plan was made for a {swapped[0].owner_class}"
            )
        else:
            try:
                route, _ = route_owner(owner, sites, plan.calls.get(path))
                if route != swapped[0].route:
                    problems.append(f"{names}: the plan takes the {swapped[0].route} route, the model needs {route}")
            except RewriteError as error:
                problems.append(f"{names}: {error}")
    if problems:
        raise PlanError("this plan does not fit the model; make it again:\n" + "\n".join(f"  {p}" for p in problems))
