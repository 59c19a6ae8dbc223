"""What a file says of its model: how it is built, its plan, and what is checked before either is believed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...architectures.spec import parse_stored
from ...errors import OptionError, PlanError, SourceError, UntrustedFileError, UpswapError
from ...plan.plan import Plan
from ...shown import one_line
from ...surgery.apply import is_patched, plan_of, unpatched_on_error
from ...surgery.replay import apply_plan
from ..safety import allowed_names as trusting
from ..safety.instance_rules import check_parts
from ..safety.memory_limit import Budget
from ..state_dict import assign
from .traits import check_traits, give_traits, traits_of

HEADER_SCHEMA = 1

#: What a file holds of which `holds` says so; without that entry it is the whole model.
UPSAMPLERS = "upsamplers"


def describe(model: nn.Module, spec: str | None, shared: Mapping[str, str]) -> dict[str, Any]:
    """What a file says about its model, as plain data; `docs/plan.md` lists the entries."""
    return {**origin(model, spec, shared), **traits_of(model)}


def origin(model: nn.Module, spec: str | None, shared: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of how its model is made: all of a description but the model's traits."""
    try:
        plan: dict[str, Any] | None = plan_of(model).to_dict()
    except PlanError:
        plan = None
    return {
        "schema": HEADER_SCHEMA,
        "upswap_version": __version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "source": spec,
        "shared": dict(shared),
        "plan": plan,
    }


def check_description(found: Any, path: Path) -> dict[str, Any]:
    """A description read from `path`, or `SourceError` where it is not one this version knows."""
    known = isinstance(found, dict) and (not found or found.get("schema") == HEADER_SCHEMA)
    if not known or found.get("holds") not in (None, UPSAMPLERS):
        version = found.get("upswap_version") if isinstance(found, dict) else None
        raise SourceError(
            f"{path} was written by upswap {version}, in a form this upswap ({__version__}) does not know; "
            "update upswap to load it"
        )
    shared = found.get("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: its shared tensors are not named")
    check_traits(found, path)
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
    budget = Budget(tensors, str(path))
    with carried_out(model, path):
        spec = description.get("source") if model is None else None
        spec = parse_stored(spec) if isinstance(spec, str) else None
        if spec is not None:
            budget.check_numbers(spec.options)
        if model is None:
            with budget.building():
                made = build()
            if spec is None or spec.scheme != "python":
                check_parts(made, str(path))
        else:
            made = model
        if description.get("plan") is not None:
            plan = checked_plan(description["plan"], made, path)
            budget.check_numbers([site.all_channels for site in plan.swapped])
            # The caller's own model may take what it takes.
            apply_plan(made, plan, budget.building, budget.running if model is None else contextlib.nullcontext)
        assign(made, tensors, path, keep_dtype=True)
        give_traits(made, description)
    return made


@contextlib.contextmanager
def carried_out(model: nn.Module | None, path: str | Path) -> Iterator[None]:
    """Inside, a description is carried out, on the caller's `model` if there is one. An error leaves it unpatched if it was.

    The entries of a damaged or made-up description reach everything; whatever they raise becomes a `SourceError`.
    """
    try:
        with unpatched_on_error(*() if model is None else (model,)):
            yield
    except UpswapError:
        raise
    except Exception as error:
        cause = one_line((str(error).splitlines() or [""])[0], 300)
        raise SourceError(f"{path} describes a model that cannot be made: {type(error).__name__}: {cause}") from error


def checked_plan(found: Any, model: nn.Module, path: Path) -> Plan:
    """The Plan in a stranger's description of `model`, which is read from `path`."""
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
