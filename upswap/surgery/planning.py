"""From a model to a Plan: survey, select, and the first faithful route for every owner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..errors import NothingToSwapError, OptionError, RewriteError
from ..nn.registry import is_exact, is_guided, make_config
from ..plan.plan import Options, Plan, Rewritten, by_module
from ..plan.site import Site
from ..probe.callsites.class_code import CONTAINERS, asks_for_layers, runs_its_children, why_fixed
from ..probe.observe import Observation
from ..probe.resize_calls import described
from ..probe.survey import Survey, learned_upsampling, survey
from . import apply as rewrite
from .routes.choose import Rewriting, rewrite_owner
from .selection import select, without_guide
from .trial import doubtful, unproved
from .wrappers import check_not_wrapped


@dataclasses.dataclass(frozen=True)
class Decision:
    """A Plan, the rewriting of each owner by its path, and the runs in eval mode that the Plan was made from."""

    plan: Plan
    rewritings: dict[str, Rewriting]
    runs: tuple[Observation, ...]


def decide(model: nn.Module, example_inputs: Any, options: Options) -> Decision:
    """What `patch` would do to `model`, which is left untouched.

    Raises `InputError`, `FilterError`, `OptionError`; with `options.strict`, `RewriteError` for a chosen site that no
    route can rewrite (it is kept, with the reason, otherwise).
    """
    make_config(options.upsampler, options.config)  # first: the name may be that of no upsampler
    found = survey(model, example_inputs, share=options.share_layers, guides=is_guided(options.upsampler))
    chosen = select(found.sites, options)
    owners = _route_owners(model, chosen, found, options)
    rewritings = {path: rewriting for path, (_, rewriting) in owners.items() if rewriting is not None}
    plan = Plan(
        model_class=class_name(model),
        options=options,
        sites=tuple(site for routed, _ in owners.values() for site in routed),
        inputs=described(found.inputs) or {},
        calls={path: found.forwards[path] for path, rewriting in rewritings.items() if rewriting.route == "graph"},
        upswap_version=__version__,
    )
    plan = dataclasses.replace(plan, hints=(*found.hints, *_hints(model, plan)))
    return Decision(plan, rewritings, found.runs)


#: The sites of an owner with their routes, and its rewriting where any is swapped.
_Routed = tuple[list[Site], Rewriting | None]


def _route_owners(model: nn.Module, chosen: Sequence[Site], found: Survey, options: Options) -> dict[str, _Routed]:
    """Every module's sites with their routes, by its path; a site whose guide cannot be brought to it does without."""
    while True:
        try:
            return _all_routed(model, chosen, found, options.strict)
        except _GuidesLost as lost:
            # Each time with fewer guides.
            chosen = [
                without_guide(site, lost.causes[site.name], options) if site.name in lost.causes else site
                for site in chosen
            ]


class _GuidesLost(Exception):
    """Sites, by their names, whose guides cannot be brought to them, and why."""

    def __init__(self, causes: dict[str, str]) -> None:
        super().__init__(causes)
        self.causes = causes


def _all_routed(model: nn.Module, chosen: Sequence[Site], found: Survey, strict: bool) -> dict[str, _Routed]:
    """Every module's sites with their routes, by its path; a run proves those that the model's code may go around.

    Raises `_GuidesLost` where that is for a guide.
    """
    groups = by_module(chosen)
    owners = {path: _routed(model, path, group, found, strict) for path, group in groups.items()}
    rewritten = {path: routed for path, (routed, rewriting) in owners.items() if rewriting is not None}
    detours = doubtful(model, rewritten)
    if detours:
        known = {path: rewriting for path, (_, rewriting) in owners.items() if rewriting is not None}
        runs = [run for run in (found.runs[0], found.trained) if run is not None]
        problems = unproved(model, detours, known, runs)
        lost = {site.name: problems[site.name] for site in chosen if site.guide is not None and site.name in problems}
        if lost:
            raise _GuidesLost(lost)
        found.unlocated.update(problems)
        again = {path: groups[path] for path in detours}
        owners.update({path: _routed(model, path, group, found, strict) for path, group in again.items()})
    return owners


def class_name(model: nn.Module) -> str:
    """The importable name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _routed(model: nn.Module, path: str, planned: Rewritten, found: Survey, strict: bool) -> _Routed:
    """The sites of one module with their routes and upsamplers' paths; kept, with the reason, where no route is faithful.

    Raises `_GuidesLost` for those with guides, whose guides may be what is not.
    """
    sites, handing = planned
    owner = model.get_submodule(path)
    checked: list[Site] = []
    for site in (_as_call(model, owner, site) for site in sites):
        problem = _problem(model, owner, path, site, found) if site.swap else None
        if problem is not None and site.guide is not None:
            raise _GuidesLost({site.name: problem})
        if problem is not None:
            checked.append(_kept(site, problem, strict))
        elif site.swap:
            checked.append(dataclasses.replace(site, module=_module_path(model, owner, site, len(sites))))
        else:
            checked.append(site)
    if not handing and not any(site.swap for site in checked):
        return checked, None
    fixed = why_fixed(owner) if handing else None
    try:
        if fixed is not None:
            raise RewriteError(fixed)
        rewriting = rewrite_owner(owner, checked, found.forwards.get(path), handing, path)
    except RewriteError as error:
        guided = [site for site in (*checked, *handing) if site.swap and site.guide is not None]
        if guided:
            raise _GuidesLost(dict.fromkeys((site.name for site in guided), str(error))) from error
        return [_kept(site, str(error), strict) if site.swap else site for site in checked], None
    return [dataclasses.replace(site, route=rewriting.route) if site.swap else site for site in checked], rewriting


def _problem(model: nn.Module, owner: nn.Module, path: str, site: Site, found: Survey) -> str | None:
    """Why a site cannot be rewritten whatever the route, or None."""
    if site.op == "module":
        return None
    fixed = why_fixed(owner)
    if fixed is not None:
        return fixed
    if not path and isinstance(owner, CONTAINERS):
        return f"the model is itself a {type(owner).__name__}, which runs whatever is put into it"
    return found.unlocated.get(site.name)


def _as_call(model: nn.Module, owner: nn.Module, site: Site) -> Site:
    """An `nn.Upsample` whose place cannot be taken by a module that is called with the input alone, or that is handed a guide, as
    the call its forward makes."""
    handed = site.guide is not None and site.guide.way == "handed"
    if site.op == "module" and site.swap and (handed or not _replaceable(model, owner, site)):
        return dataclasses.replace(site, op="interpolate")
    return site


def _replaceable(model: nn.Module, layer: nn.Module, site: Site) -> bool:
    if layer is model or "forward" in layer.__dict__ or asks_for_layers(model):
        return False
    if getattr(layer, "size", None) is not None or _is_listed(model, layer):
        return False
    factor = getattr(layer, "scale_factor", None)
    factors = factor if isinstance(factor, tuple | list) else (factor,)
    # One that rounds its output size first has another ratio at every input size.
    return site.sized_by == "scale_factor" or all(float(value).is_integer() for value in factors if value is not None)


def _is_listed(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a plain list or dict of some module holds the layer: it would go on using the old one."""
    for holder in model.modules():
        for name, value in holder.__dict__.items():
            items = value if isinstance(value, list | tuple) else value.values() if type(value) is dict else ()
            if not name.startswith("_") and any(item is layer for item in items):
                return True
    return False


def _kept(site: Site, problem: str, strict: bool) -> Site:
    if strict:
        raise RewriteError(f"site {site.name}: {problem}; exclude the site, or drop strict to keep it as it is")
    return dataclasses.replace(site, swap=False, reason=f"cannot be rewritten: {problem}", module=None, route=None)


def _module_path(model: nn.Module, owner: nn.Module, site: Site, count: int) -> str:
    """Where a site's upsampler goes: the replaced layer's own path, or a free name in the owner.

    An owner that runs whatever it contains has none; then the nearest module above does.
    """
    if site.op == "module":
        return site.owner
    name = "upsample" if count == 1 else f"upsample_{site.ordinal}"
    holder, above = owner, site.owner
    while above and runs_its_children(holder):
        above, _, last = above.rpartition(".")
        holder, name = model.get_submodule(above), f"{last}_{name}"
        if not name.isidentifier():
            name = f"_{name}"
    while hasattr(owner, name) or hasattr(holder, name):
        name = f"{name}_{site.ordinal}" if count == 1 else f"{name}_"
    return f"{above}.{name}" if above else name


def _inexact(plan: Plan) -> list[str]:
    """What is to be said of an upsampler that is not the original resize at step 0."""
    if is_exact(plan):
        return []
    return [f"{plan.options.upsampler} with these options is not exact at step 0: the model has to be trained"]


def _hints(model: nn.Module, plan: Plan) -> list[str]:
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    hints = [f"compiled by TorchScript, whose resizes cannot be seen: {', '.join(scripted[:4])}"] if scripted else []
    if plan.swapped:
        return hints + _inexact(plan)
    learned = learned_upsampling(model)
    shown = ", ".join(learned[:4]) + (f" and {len(learned) - 4} more" if len(learned) > 4 else "")
    if learned:
        hints.append(f"it makes maps larger with layers of its own, which upswap leaves alone: {shown}")
    return hints


def nothing_to_swap(plan: Plan) -> NothingToSwapError:
    """The error for a plan that swaps nothing: what was found instead, and what to do."""
    name = plan.model_class.rpartition(".")[2]
    if not plan.sites:
        found = [f"{name} makes no resize call (F.interpolate, nn.Upsample) on the example inputs"]
    else:
        found = [f"{name} has {len(plan.sites)} resize call(s), none of them to be swapped:"]
        found += [f"  {site.name}: {site.kind}: {site.why}" for site in plan.sites]
        kinds = sorted({site.kind for site in plan.sites} & {"logits", "gate", "context"} - set(plan.options.kinds))
        if kinds:
            found.append(f"kinds= (--kind) can open: {', '.join(kinds)}")
    return NothingToSwapError(f"nothing to swap: {found[0]}", *found[1:], *plan.hints)


def check_model(model: nn.Module) -> None:
    """`OptionError` for what is not a module that can be rewritten, with the way out."""
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            "this is a TorchScript module, whose code is compiled; patch the Python model it was made from"
        )
    if isinstance(model, torch.export.ExportedProgram):
        raise OptionError(
            "this is an ExportedProgram, a graph without classes; patch the Python model it was made from"
        )
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected a torch.nn.Module, got a {type(model).__name__}")
    inside = None if rewrite.is_patched(model) else rewrite.patched_inside(model)
    if inside is not None:
        raise OptionError(
            f"the submodule {inside} is patched already; upswap.unpatch it first, then patch the whole model"
        )
    check_not_wrapped(model)
