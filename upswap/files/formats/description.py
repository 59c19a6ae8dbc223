"""What a file says of its model: how it is built, its plan, and what is checked before either is believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...architectures.spec import parse
from ...errors import OptionError, PlanError, SourceError, UntrustedFileError, UpswapError
from ...plan.plan import Plan
from ...surgery.apply import is_patched, plan_of, undo
from ...surgery.replay import apply_plan
from ..safety import allowed_names as trusting
from ..safety.judgement import check_parts
from ..safety.memory_limit import allocating_at_most, check_numbers
from ..state_dict import assign

HEADER_SCHEMA = 1


def describe(model: nn.Module, spec: str | None, shared: Mapping[str, str]) -> dict[str, Any]:
    """What a file says about its model, as plain data; `docs/plan.md` lists the entries."""
    try:
        plan: dict[str, Any] | None = plan_of(model).to_dict()
    except PlanError:
        plan = None
    return {
        "schema": HEADER_SCHEMA,
        "upswap_version": __version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "source": spec,
        "training": model.training,
        "shared": dict(shared),
        "plan": plan,
    }


def check_description(found: Any, path: Path) -> dict[str, Any]:
    """A description read from `path`, or `SourceError` where it is not one this version knows."""
    if not isinstance(found, dict) or (found and found.get("schema") != HEADER_SCHEMA):
        version = found.get("upswap_version") if isinstance(found, dict) else None
        raise SourceError(
            f"{path} was written by upswap {version}, in a form this upswap ({__version__}) does not know; "
            "update upswap to load it"
        )
    shared = found.get("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: its shared tensors are not named")
    return found


def restored(
    description: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    path: Path,
    model: nn.Module | None,
    build: Callable[[], nn.Module],
) -> nn.Module:
    """The model that `description` describes with the weights `tensors`: built by `build` unless given as `model`."""
    if model is not None and is_patched(model):
        raise OptionError(
            f"the model given for {path} is patched already; upswap.unpatch(model) first, or give a new one"
        )
    tensors = all_names(tensors, description, path)
    try:
        spec = parse(description["source"]) if model is None and isinstance(description.get("source"), str) else None
        if spec is not None:
            check_numbers(spec.options, tensors, str(path))
        with allocating_at_most(tensors, str(path)):
            made = build().train(bool(description.get("training"))) if model is None else model
            if model is None and (spec is None or spec.scheme != "python"):
                check_parts(made, str(path))
            if description.get("plan") is not None:
                apply_plan(made, _checked(description["plan"], made, path))
        assign(made, tensors, path, keep_dtype=True)
    except Exception as error:  # the entries of a damaged or made-up description reach all of the above
        if model is not None and is_patched(model):
            undo(model)  # the caller's own
        if isinstance(error, UpswapError):
            raise
        cause = trusting.shown((str(error).splitlines() or [""])[0])
        raise SourceError(f"{path} describes a model that cannot be made: {type(error).__name__}: {cause}") from error
    return made


def _checked(found: Any, model: nn.Module, path: Path) -> Plan:
    """The Plan in a stranger's description."""
    plan = Plan.from_dict(found)
    try:
        trusting.check_names(vars(site) for site in plan.sites)
        trusting.check_values(plan.calls, {type(module).__module__ for module in model.modules()})
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path} is refused: {error}") from error
    return plan


def all_names(tensors: dict[str, torch.Tensor], description: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """`tensors` under all the names that a state dict had, the shared ones too."""
    shared = description.get("shared", {})
    if not all(name in tensors for name in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: it shares tensors that it does not hold")
    return {**tensors, **{alias: tensors[name] for alias, name in shared.items()}}
