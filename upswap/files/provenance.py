"""Where a model came from: the source spec that is kept with it, and whether two models have the same modules."""

from __future__ import annotations

from torch import nn

from ..architectures.libraries import build
from ..architectures.spec import Spec, read_value, text_of
from ..errors import PlanError, SourceError
from ..surgery.apply import plan_of


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
    options = {key: value for key, value in config.items() if key != "encoder_weights" and value is not None}
    if name is None or not all(read_value(text_of(value)) == value for value in options.values()):
        return None
    spec = Spec("smp", name, options)
    try:
        return str(spec) if same_modules(model, build(spec)) else None
    except SourceError:
        return None


def same_modules(model: nn.Module, rebuilt: nn.Module) -> bool:
    """Whether `model`, leaving upsamplers aside, has the modules of `rebuilt`: names, classes, settings."""
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
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    return shapes == {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}


def _alike(mine: nn.Module, module: nn.Module) -> bool:
    return isinstance(mine, type(module)) and mine.extra_repr() == module.extra_repr()


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
