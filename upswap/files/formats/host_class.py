"""A class of transformers that patches what it builds, as the plan in the configuration says.

`from_pretrained` makes a model of its class without values, then gives it the weights. Patched in between, the model takes
those of its upsamplers as any other: from whichever files, under converted names, of the type and on the device asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...architectures import host_config
from ...errors import PlanError, UpswapWarning
from ...plan.plan import Plan
from ...surgery.apply import added_keys, is_patched, plan_of, undo
from ...surgery.planning import class_name
from ...surgery.replay import Within, apply_plan
from ..safety.memory_limit import Budget
from .description import checked_plan


def patching(
    cls: Any,
    budget: Budget | None = None,
    building: Within = contextlib.nullcontext,
    running: Within = contextlib.nullcontext,
    plan: str | None = None,
    patched: list[nn.Module] | None = None,
) -> Any:
    """A subclass of a model class, whose instances are of `cls` itself, and patched where their configuration has a plan.

    `plan` is what is meant where it has none. What was patched is added to `patched`. It is patched inside `building`, and run
    inside `running` to see that the plan fits. What is made raises `PlanError` where it does not fit, `UntrustedFileError` for
    names that no plan has, and `SourceError` for numbers that `budget` does not explain.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = cls
        cls.__init__(self, config, *args, **kwargs)
        # Only what has no values yet is to be on the meta device, which is where transformers makes everything.
        with torch.device("cpu"):
            found = patch_as_kept(self, budget, building, running, plan)
        if patched is not None:
            patched.extend(found)

    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__init__": __init__}
    made = type(cls)(cls.__name__, (nn.Module,), namespace)
    made.__bases__ = (cls,)  # afterwards, so that a base that keeps a register of its subclasses does not hear of it
    return made


def patch_as_kept(
    model: nn.Module, budget: Budget | None, building: Within, running: Within, plan_beside: str | None = None
) -> list[nn.Module]:
    """Patch a model, or its parts, as its configuration says, or else as `plan_beside` does, in the way of `patching`.

    Returns what was patched.
    """
    if is_patched(model):  # a class of the user's own may patch what it builds itself
        return []
    path = Path(str(getattr(getattr(model, "config", None), "name_or_path", "")) or type(model).__name__)
    plans: dict[str, Plan] = {}
    for text in host_config.plans_in(host_config.kept_by(model) or plan_beside):
        try:
            plans[text] = checked_plan(json.loads(text), model, path)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the config.json of {path} has an upswap_plan that is no plan: {error}") from error
    # Of several, the others are those of models that shared the configuration: what is patched as a whole has no patched parts.
    whole = {text: plan for text, plan in plans.items() if plan.model_class == class_name(model)}
    whole = whole or {text: plan for text, plan in plans.items() if _is_a(model, plan.model_class)}
    found = []
    for text, plan in (whole or plans).items():
        if budget is not None:
            budget.check_numbers([site.all_channels for site in plan.swapped])
        part = _part_of(model, plan, path)
        if part is not None:
            plan = _for_class(plan, class_name(part))
            host_config.drop(model, text)  # which another upswap may have written in other words
            apply_plan(part, plan, building, running)
            host_config.keep(model, plan.to_json())
            found.append(part)
    return found


def _part_of(model: nn.Module, plan: Plan, path: Path) -> nn.Module | None:
    """What a plan is of: the configuration of a model is that of its parts too, one of which may be what was patched."""
    meant = [module for module in model.modules() if class_name(module) == plan.model_class]
    meant = meant or [module for module in model.modules() if _is_a(module, plan.model_class)]
    if len(meant) == 1:
        return meant[0]
    warnings.warn(
        f"{path} has the plan of a {plan.model_class.rpartition('.')[2]}, of which this {type(model).__name__} has {len(meant)}: "
        "it was not patched",
        UpswapWarning,
        stacklevel=2,
    )
    return None


def undo_without_weights(
    model: nn.Module, patched: list[nn.Module], missing: Collection[str], path: str | Path
) -> set[str]:
    """Take out of `model` the upsamplers of those parts of whose upsamplers no weight was there, with a warning; their keys.

    The configuration of an original has a plan where it is that of a patched model too.

    Args:
        model: what was loaded.
        patched: the parts of it that `patching` patched.
        missing: the keys of the model that had no weights.
        path: where it was loaded from, as a message names it.
    """
    gone: set[str] = set()
    paths = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    for part in patched:
        keys = {f"{paths[id(part)]}{key}" for key in added_keys(part)}
        if keys <= set(missing):
            warnings.warn(
                f"{path} has the plan of a patched {type(part).__name__}, and no weights of its upsamplers: taken for the "
                "original",
                UpswapWarning,
                stacklevel=3,
            )
            host_config.drop(model, plan_of(part).to_json())
            undo(part)
            gone |= keys
    return gone


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of the class of that importable name, or of one derived from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(module).__mro__)


def _for_class(plan: Plan, name: str) -> Plan:
    """A plan, for a class derived from the one that it was made for; whether it fits is seen when it is carried out."""
    sites = [dataclasses.replace(site, owner_class=site.owner_class if site.owner else name) for site in plan.sites]
    return dataclasses.replace(plan, model_class=name).replace_sites(sites)
