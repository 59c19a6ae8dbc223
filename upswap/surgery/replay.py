"""Does a Plan made before still fit a model? Asked of its classes and their source, and of a run.

The class may be of another version than the one the Plan was made for. Its source shows a call that is gone or has
company; what mode or ratio a call has, how often it is made and whether it is reached at all can hang on anything, and
only a run shows it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from ..errors import InputError, OptionError, PlanError, RewriteError
from ..nn.registry import config_class, is_guided, make_config
from ..plan.plan import Plan, Rewritten, by_module, by_owner
from ..plan.site import Location, Site, Step
from ..probe.callsites.location import locate
from ..probe.inputs import describe
from ..probe.inputs.inputs import Inputs
from ..probe.observe import REAL_LIMIT, ModelFailed, observe
from ..probe.resize_calls import Call
from ..probe.survey import called_from, sizing
from .apply import apply
from .planning import check_model, class_name
from .routes.choose import Rewriting, replay_owner
from .routes.refusals import Misfit, does_not_fit
from .trial import doubtful, unproved

#: Numbers larger than this among the arguments are not run with: a model may count to them, and a file come from a stranger.
_COUNTABLE = 10_000


#: What something is done in, to bound it.
Within = Callable[[], contextlib.AbstractContextManager[Any]]


def check_plan(
    model: nn.Module, plan: Plan, building: Within = contextlib.nullcontext, running: Within = contextlib.nullcontext
) -> dict[str, Rewriting]:
    """The rewriting of each owner by its path, for a plan made before.

    The owners are rewritten inside `building`. The model is run inside `running`, or, where that raises `MemoryError`,
    without memory.
    Raises `PlanError` naming the sites of `plan` that `model` does not have as the plan knew it.
    """
    if not plan.swapped:
        raise PlanError("this plan swaps nothing")
    if plan.model_class != class_name(model):
        raise PlanError(f"this plan was made for {plan.model_class}, the model is a {class_name(model)}")
    config_class(plan.options.upsampler)  # first: the name may be that of no upsampler here
    for site in plan.swapped:
        try:
            name = plan.upsampler_of(site)
            make_config(name, site.config)
            if is_guided(name) and site.guide is None:
                raise OptionError(f"{name} takes a guide, and it has none")
        except OptionError as error:
            raise PlanError(f"this plan cannot be carried out: site {site.name}: {error}") from error
    rewritings: dict[str, Rewriting] = {}
    causes: dict[str, str] = {}
    paths = dict(model.named_modules())
    with building():
        for path, planned in by_module(plan.sites).items():
            if planned.is_changed:
                try:
                    rewritings[path] = _replayed(paths.get(path), path, planned, plan)
                except Misfit as misfit:
                    causes.update(misfit.causes)
    if not causes:
        causes = _seen_to_differ(model, plan, rewritings, running)
    if causes:
        raise does_not_fit("this plan does not fit the model", causes)
    return rewritings


def apply_plan(model: nn.Module, plan: Plan, building: Within, running: Within) -> None:
    """Carry out a plan made before, once it is seen to fit; `building`, `running` and what it raises are `check_plan`'s."""
    check_model(model)
    rewritings = check_plan(model, plan, building, running)
    with building():
        apply(model, plan, rewritings)


def _replayed(owner: nn.Module | None, path: str, planned: Rewritten, plan: Plan) -> Rewriting:
    sites, handing = planned
    swapped = [site for site in sites if site.swap]
    cause = None
    if owner is None:
        cause = f"the model has no module {path!r}"
    elif swapped and class_name(owner) != swapped[0].owner_class:
        cause = f"{path!r} is a {class_name(owner)}, the plan was made for a {swapped[0].owner_class}"
    if owner is None or cause is not None:
        raise Misfit(dict.fromkeys((site.name for site in (*swapped, *handing)), str(cause)))
    return replay_owner(owner, sites, plan.calls.get(path), handing, path)


# -- a run ----------------------------------------------------------------------------------------------------------------


def _seen_to_differ(
    model: nn.Module, plan: Plan, rewritings: Mapping[str, Rewriting], running: Within
) -> dict[str, str]:
    """The swapped sites that a run on the plan's own inputs shows to be others, and how; none where it cannot be run."""
    inputs = _inputs(model, plan.inputs)
    if inputs is None:
        return {}
    with contextlib.suppress(MemoryError), running():
        return _differences(model, plan, rewritings, inputs)
    # Fake tensors take no memory, but a model that caches what it computes would be left with them.
    with contextlib.suppress(MemoryError), running():
        return _differences(copy.deepcopy(model).to("meta"), plan, rewritings, inputs.map(lambda t: t.to("meta")))
    return {}


def _differences(model: nn.Module, plan: Plan, rewritings: Mapping[str, Rewriting], inputs: Inputs) -> dict[str, str]:
    """How the swapped sites differ in a run, which is one on fake tensors where the inputs have no memory."""
    try:
        seen = observe(model, inputs, fake=any(tensor.is_meta for tensor in inputs.tensors()))
    except ModelFailed:
        return {}
    # Of a resize layer that is no owner in the plan, the code that calls it is.
    seen = called_from(seen, {call.owner for call in seen.calls} - {site.owner for site in plan.sites})
    causes: dict[str, str] = {}
    owners = {path: sites for path, sites in by_owner(plan.sites).items() if any(site.swap for site in sites)}
    for path, sites in owners.items():
        causes.update(_compared(sites, [call for call in seen.calls if call.owner == path], seen.reads_values))
    detours = _doubtful_in_eval_mode(model, owners)
    if detours and not causes:
        causes.update(unproved(model, detours, rewritings, [seen], must_reach=not seen.reads_values))
    return causes


def _doubtful_in_eval_mode(model: nn.Module, owners: Mapping[str, Sequence[Site]]) -> dict[str, list[Site]]:
    """The sites that a run in eval mode reaches, of the owners with swapped ones that a run has to prove."""
    reached = {path: [s for s in sites if _in_eval_mode(s)] for path, sites in doubtful(model, owners).items()}
    return {path: sites for path, sites in reached.items() if any(site.swap for site in sites)}


def _inputs(model: nn.Module, description: Mapping[str, Any]) -> Inputs | None:
    """Inputs as described, on the model's device; None where they cannot be made, or are too large to be run with."""
    generator = torch.Generator().manual_seed(0)

    def value(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.rand(shape, generator=generator, dtype=torch.float32).to(dtype)
        return torch.zeros(shape, dtype=dtype)

    near = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if near is None else near.device
    try:
        # First without memory: a description may be of any size.
        shapes = describe.build(description, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
        if not isinstance(shapes, Inputs) or _counts_far(shapes):
            return None
        # Without elements, but with a side that a model goes along.
        if any(size > _COUNTABLE for tensor in shapes.tensors() for size in tensor.shape):
            return None
        if sum(tensor.numel() for tensor in shapes.tensors()) > REAL_LIMIT:
            return None
        return shapes.map(lambda tensor: value(list(tensor.shape), tensor.dtype).to(device))
    except (InputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # described badly or not at all
        return None


def _counts_far(value: Any) -> bool:
    if isinstance(value, Inputs):
        return _counts_far((value.args, value.kwargs))
    if isinstance(value, tuple | list):
        return any(map(_counts_far, value))
    if isinstance(value, dict):
        return any(map(_counts_far, value.values()))
    return isinstance(value, int | float) and not abs(value) <= _COUNTABLE


def _in_eval_mode(site: Site) -> bool:
    return site.seen_in == "eval"


def _compared(sites: Sequence[Site], calls: Sequence[Call], chosen: bool) -> dict[str, str]:
    """How the swapped sites of an owner whose forward was run differ from the calls it made.

    `chosen` says that values may have chosen which calls were made and how often, so that this proves nothing.
    """
    if sites[0].op == "module":
        located: list[tuple[Call, Location | None]] = [(call, sites[0].location) for call in calls]
    else:
        located = [(call, _location(call)) for call in calls]
    known = _runs_of_lines(sites)
    changed = {site.name: _changed(site, located, known, chosen) for site in sites if site.swap}
    causes = {name: cause for name, cause in changed.items() if cause is not None}
    new = [where for _, where in located if where is not None and where.steps not in known]
    if new and not causes and not chosen:
        what = f"its module makes a resize call that the plan does not know: `{new[0].steps[-1].expression}`"
        causes = {site.name: what for site in sites if site.swap}
    return causes


def _runs_of_lines(sites: Sequence[Site]) -> dict[tuple[Step, ...], set[int | None]]:
    """The runs of each line that the sites are, by the way to it."""
    known: dict[tuple[Step, ...], set[int | None]] = {}
    for site in sites:
        if site.location is not None:
            known.setdefault(site.location.steps, set()).add(site.location.occurrence)
    return known


def _changed(
    site: Site,
    located: Sequence[tuple[Call, Location | None]],
    known: Mapping[tuple[Step, ...], Set[int | None]],
    chosen: bool,
) -> str | None:
    """How a site differs from the calls that a run made where it stands; None where it does not.

    Each call comes with its place; `known` has the runs of each line that the plan knows.
    """
    if site.location is None:
        return None
    steps, run = site.location.steps, site.location.occurrence
    made = [(call, where.occurrence) for call, where in located if where is not None and where.steps == steps]
    mine = [call for call, occurrence in made if run in (None, occurrence)]
    if not mine and _in_eval_mode(site) and not chosen:
        return (
            "the call is not made any more" if run in (None, 0) else f"run {run + 1} of the call is not made any more"
        )
    runs = known[steps]
    if None not in runs and not chosen and any(occurrence not in runs for _, occurrence in made):
        return f"the call is made more often than it was, {len(runs)} time(s) in a run of its module"
    return _unlike(site, mine) if mine else None


def _location(call: Call) -> Location | None:
    try:
        return locate(call.place)
    except RewriteError:
        return None


def _unlike(site: Site, calls: Sequence[Call]) -> str | None:
    """How a site's calls differ from what the plan says of it."""
    known = (site.mode, site.align_corners, site.antialias)
    for call in calls:
        given = call.arguments
        found = (given["mode"], bool(given["align_corners"]), bool(given["antialias"]))
        if found != known:
            return (
                f"it resizes with mode={found[0]!r}, align_corners={found[1]}, antialias={found[2]}, where it had "
                f"mode={known[0]!r}, align_corners={known[1]}, antialias={known[2]}"
            )
        if call.in_shape[1] not in (site.channels, *site.other_channels):
            return f"it resizes {call.in_shape[1]} channels, where it had {site.channels}"
    _, ratio = sizing(calls[0])
    if site.fixed_ratio and ratio != site.scale:
        return f"it resizes by {ratio}, where it did by {site.scale}"
    return None
