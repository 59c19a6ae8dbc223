"""The upsamplers of a patched model alone, as a `.safetensors` of kilobytes; the host's weights are somewhere else.

The header says so (`holds`), and has the Plan. The file goes onto a host that was patched in the same way, or onto an
original, which is patched on the way.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import PlanError
from ...nn.configs import nominal_scale
from ...plan.plan import Plan
from ...plan.site import Site
from ...shown import one_line
from ...surgery.apply import added_keys, is_patched, plan_of
from ...surgery.planning import check_model, class_name
from ...surgery.replay import apply_plan
from ..safety.memory_limit import Budget
from ..state_dict import assign_upsamplers, separated
from .description import UPSAMPLERS, carried_out, origin
from .safetensors import HEADER_KEY, write


def save(model: nn.Module, spec: str | None, path: Path) -> None:
    """Write the upsamplers of a patched model; `PlanError` where it is not patched."""
    plan_of(model)
    tensors, shared = separated(model, added_keys(model))
    header = {**origin(model, spec, shared), "holds": UPSAMPLERS}
    write(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)}, path)


def is_alone(header: Mapping[str, Any]) -> bool:
    """Whether a file with this header holds upsamplers alone."""
    return header.get("holds") == UPSAMPLERS


def put(model: nn.Module, plan: Plan, tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Give `model` the upsamplers in a file, after patching it where it is not patched. The host's weights stay as they are.

    Raises:
        PlanError: `plan`, which the file has, does not fit the model, or the model was patched in another way.
        SourceError: the tensors are not those of the plan. The model is as it was.
    """
    with carried_out(model, path):
        patch(model, plan, tensors, path)
        assign_upsamplers(model, tensors, path)


def patch(model: nn.Module, plan: Plan, tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """The first half of `put`."""
    if is_patched(model):
        differing = _differences(plan, plan_of(model))
        if differing:
            raise PlanError(
                f"{path} has the upsamplers of a model that was patched in another way than this {type(model).__name__}. Call "
                "upswap.unpatch(model) first, and load patches it as the file says:",
                *differing,
            )
        return
    check_model(model)  # which says what to do with a wrapped one
    inside = [name for name, module in model.named_modules() if class_name(module) == plan.model_class]
    if len(inside) == 1 and inside[0]:
        raise PlanError(
            f"{path} has the upsamplers of the {plan.model_class} at {inside[0]} in this model. Give that one"
        )
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    budget = Budget({**own, **tensors}, str(path))
    with carried_out(model, path):
        budget.check_numbers([site.all_channels for site in plan.swapped])
        # The caller's own model may take what it takes.
        apply_plan(model, plan, budget.building, contextlib.nullcontext)


def _differences(plan: Plan, own: Plan) -> list[str]:
    """How the upsamplers of a file's plan differ from those of a model's, a line for each."""
    theirs, mine = ({site.module: site for site in each.swapped} for each in (plan, own))
    lines = [f"  {site.name}: the model has none there" for place, site in theirs.items() if place not in mine]
    lines += [f"  {site.name}: the file has none for it" for place, site in mine.items() if place not in theirs]
    for place, site in theirs.items():
        if place in mine:
            there, here = _made(site, plan), _made(mine[place], own)
            lines += [
                f"  {site.name}: {name} is {there.get(name)} in the file and {here.get(name)} in the model"
                for name in dict.fromkeys((*there, *here))
                if there.get(name) != here.get(name)
            ]
    return lines


def _made(site: Site, plan: Plan) -> dict[str, Any]:
    """What an upsampler is made from. Two of the same tensors may compute other things with them."""
    return {
        "upsampler": plan.upsampler_of(site),
        **site.settings,
        **({} if site.guide is None else {"guide's channels": site.guide.channels, "guide": site.guide.place}),
        "mode": site.mode,
        "align_corners": site.align_corners,
        "channels": (site.channels, *site.other_channels),
        "ratio": nominal_scale(site),
    }


def without_host(path: Path, header: Mapping[str, Any]) -> str:
    """What to say of such a file where a whole model is wanted."""
    of = one_line(str(header.get("model_class")).rpartition(".")[2], 100)
    return (
        f"{path} holds the upsamplers of a patched {of} alone, without the "
        f"host's weights. Pass the model that has them: upswap.load({str(path)!r}, model). On the command line SOURCE has "
        f"them: upswap convert SOURCE --weights {shlex.quote(str(path))}"
    )
