"""A class of transformers that patches what it builds, as the plan in the configuration says.

`from_pretrained` makes a model of its class without values, then gives it the weights. Patched in between, the model takes
those of its upsamplers as any other: from whichever files, under converted names, of the type and on the device asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...architectures import host_config
from ...errors import PlanError, UpswapWarning
from ...plan.plan import Plan
from ...surgery.apply import is_patched
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
) -> Any:
    """A subclass of a model class, whose instances are of `cls` itself, and patched where their configuration has a plan.

    `plan` is what is meant where it has none. It is patched inside `building`, and run inside `running` to see that the plan
    fits. What is made raises `PlanError` where it does not fit, `UntrustedFileError` for names that no plan has, and
    `SourceError` for numbers that `budget` does not explain.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = cls
        cls.__init__(self, config, *args, **kwargs)
        # Only what has no values yet is to be on the meta device, which is where transformers makes everything.
        with torch.device("cpu"):
            patch_as_kept(self, budget, building, running, plan)

    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__init__": __init__}
    made = type(cls)(cls.__name__, (nn.Module,), namespace)
    made.__bases__ = (cls,)  # afterwards, so that a base that keeps a register of its subclasses does not hear of it
    return made


def patch_as_kept(
    model: nn.Module, budget: Budget | None, building: Within, running: Within, plan_beside: str | None = None
) -> None:
    """Patch a model as its configuration says, or else as `plan_beside` does, in the way of `patching`."""
    text, name = host_config.kept_by(model) or plan_beside, type(model).__name__
    if text is None or is_patched(model):  # a class of the user's own may patch what it builds itself
        return
    path = Path(str(getattr(getattr(model, "config", None), "name_or_path", "")) or name)
    try:
        plan = checked_plan(json.loads(text), model, path)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the config.json of {path} has an upswap_plan that is no plan: {error}") from error
    if budget is not None:
        budget.check_numbers([(site.channels, site.other_channels) for site in plan.swapped])
    # The configuration of a model is that of its parts too, one of which may be what was patched.
    meant = [module for module in model.modules() if class_name(module) == plan.model_class]
    meant = meant or [module for module in model.modules() if _is_a(module, plan.model_class)]
    if len(meant) != 1:
        warnings.warn(
            f"{path} has the plan of a {plan.model_class.rpartition('.')[2]}, of which this {name} has {len(meant)}: it was "
            "not patched",
            UpswapWarning,
            stacklevel=2,
        )
        return
    plan = _for_class(plan, class_name(meant[0]))
    host_config.drop(model, text)  # which another upswap may have written in other words
    apply_plan(meant[0], plan, building, running)
    host_config.keep(model, plan.to_json())


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of the class of that importable name, or of one derived from it."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(module).__mro__)


def _for_class(plan: Plan, name: str) -> Plan:
    """A plan, for a class derived from the one that it was made for; whether it fits is seen when it is carried out."""
    sites = [dataclasses.replace(site, owner_class=site.owner_class if site.owner else name) for site in plan.sites]
    return dataclasses.replace(plan, model_class=name).replace_sites(sites)
