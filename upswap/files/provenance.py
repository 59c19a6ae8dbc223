"""Where a model came from: the source spec that is kept with it, and whether two models have the same modules."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from ..architectures.libraries import build
from ..architectures.spec import Spec, read_value, text_of
from ..errors import PlanError, SourceError
from ..surgery.apply import added_keys, plan_of

#: Attributes that say nothing of what a model computes.
_NO_SETTINGS = ("training", "name_or_path", "gradient_checkpointing", "grad_checkpointing")


def spec_of(model: nn.Module) -> str | None:
    """A spec that rebuilds the architecture of a model, patched or not; None where there is none that surely does.

    The models of SMP know the options they were made with, except those that are no plain data, and may have been
    changed since. So the spec is tried: what it builds has to have the same modules.
    """
    config = getattr(model, "_hub_mixin_config", None)
    if not isinstance(config, dict) or not any(
        _package(cls) == "segmentation_models_pytorch" for cls in type(model).__mro__
    ):
        return None
    import segmentation_models_pytorch as smp

    names = {cls: name for name, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    name = next((names[cls] for cls in type(model).__mro__ if cls in names), None)
    options = {
        key: value
        for key, value in config.items()
        if key != "encoder_weights" and key[:1] != "_" and value is not None  # the plan is no option
    }
    if name is None or not all(read_value(text_of(value)) == value for value in options.values()):
        return None
    spec = Spec("smp", name, options)
    return str(spec) if why_not_built_by(spec, model) is None else None


def why_not_built_by(spec: Spec, model: nn.Module) -> str | None:
    """What tells a model, patched or not, from what `spec` builds; None where that is the same architecture."""
    try:
        return None if same_modules(model, build(spec)) else "it builds a model of other modules or settings"
    except SourceError as error:
        return str(error)


def same_modules(model: nn.Module, rebuilt: nn.Module) -> bool:
    """Whether `model`, leaving upsamplers aside, has the modules of `rebuilt`: names, classes, settings, tied weights, and
    the buffers that are in no state dict, of which `rebuilt` may be on the meta device."""
    try:
        added = {site.module: site.op for site in plan_of(model).swapped}
    except PlanError:
        added = {}
    # The module route put an upsampler in the place of an nn.Upsample; the others added one.
    inside = tuple(f"{path}." for path in added)
    own = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
    theirs = dict(rebuilt.named_modules())
    if not (theirs.keys() <= own.keys() and own.keys() - theirs.keys() <= set(added)):
        return False
    if not all(name in added or _alike(own[name], module) for name, module in theirs.items()):
        return False
    return _shapes(model, added_keys(model)) == _shapes(rebuilt, ()) and _same_unsaved(model, rebuilt)


def _alike(mine: nn.Module, module: nn.Module) -> bool:
    if not isinstance(mine, type(module)) or mine.extra_repr() != module.extra_repr():
        return False
    own = _settings(mine)
    return all(own.get(name, value) == value for name, value in _settings(module).items())


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's own attributes; a list is as good as a tuple, which JSON does not have."""
    values = {name: _frozen(value) for name, value in vars(module).items() if name[:1] != "_"}
    return {name: value for name, value in values.items() if value is not ... and name not in _NO_SETTINGS}


def _frozen(value: Any) -> Any:
    """A plain value with tuples for lists; ... for any other."""
    if isinstance(value, tuple | list):
        items = tuple(map(_frozen, value))
        return ... if any(item is ... for item in items) else items
    return value if value is None or isinstance(value, bool | int | float | str) else ...


def _shapes(model: nn.Module, without: Container[str]) -> dict[str, tuple[Any, str]]:
    """The entries of a state dict, each with its shape and the first name that the same tensor has."""
    first: dict[int, str] = {}
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if key not in without}
    return {key: (getattr(value, "shape", None), first.setdefault(id(value), key)) for key, value in state.items()}


def _same_unsaved(model: nn.Module, rebuilt: nn.Module) -> bool:
    kept, own = rebuilt.state_dict(), dict(model.named_buffers())
    return all(
        buffer.is_meta or (name in own and torch.equal(own[name].cpu(), buffer.to(own[name].dtype).cpu()))
        for name, buffer in rebuilt.named_buffers()
        if name not in kept
    )


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
