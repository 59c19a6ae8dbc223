"""Patched models inside of others: wrapped for several devices, compiled, averaged, or a part of a trainer's module."""

from __future__ import annotations

import inspect

from torch import nn

from ..errors import OptionError, PlanError
from .apply import is_patched

#: Where torch's wrappers keep the model that they run.
_WRAPPED = {
    "torch.nn.parallel.distributed": "module",
    "torch.nn.parallel.data_parallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "_fsdp_wrapped_module",
    "torch.optim.swa_utils": "module",
    "torch._dynamo.eval_frame": "_orig_mod",
}


def find_patched(model: nn.Module) -> dict[str, nn.Module]:
    """The patched models in `model` by their paths in it, "" for itself."""
    return {path: module for path, module in model.named_modules() if is_patched(module)}


def patched_models(model: nn.Module) -> dict[str, nn.Module]:
    """The same; `PlanError` where there is none."""
    found = find_patched(model)
    if not found:
        raise PlanError(f"this {type(model).__name__} is not patched; upswap.patch(model) does that")
    return found


def the_patched(model: nn.Module) -> nn.Module:
    """The one patched model in `model`; `PlanError` where there are none or several."""
    found = patched_models(model)
    if len(found) > 1:
        paths = ", ".join(found)
        raise PlanError(f"this {type(model).__name__} has several patched models in it: {paths}. Give one of them")
    return next(iter(found.values()))


def held(model: nn.Module) -> nn.Module:
    """The model in an object that has none of its own to run, as a YOLO of ultralytics; `model` itself where it is one.

    Such an object defines no forward and has one child. Torch's wrappers are others: `unwrapped`.
    """
    while not _runs(model) and type(model).__module__ not in _WRAPPED and len(model._modules) == 1:
        (child,) = model._modules.values()
        if child is None:
            break
        model = child
    return model


def _runs(model: nn.Module) -> bool:
    """Whether a module has a forward; a scripted one's is not to be looked up by its class."""
    return "forward" in model.__dict__ or inspect.getattr_static(type(model), "forward") is not nn.Module.forward


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in an object that holds it and in torch's wrappers (DistributedDataParallel, torch.compile, AveragedModel)."""
    model = held(model)
    while (name := _WRAPPED.get(type(model).__module__)) is not None and name in model._modules:
        model = getattr(model, name)
    return model


def check_not_wrapped(model: nn.Module) -> None:
    """`OptionError` for a model that is wrapped or sharded, whose wrapper would not hear of new parameters."""
    inner = _WRAPPED.get(type(model).__module__)
    if inner is not None and inner in model._modules:
        raise OptionError(
            f"this model is wrapped in {type(model).__name__}; patch the model inside, model.{inner}, before it is wrapped"
        )
    sharded = _sharded(model)
    if sharded is not None:
        raise OptionError(
            f"{sharded or 'this model'} is sharded by fully_shard, which would leave new parameters out; patch it before"
        )


def _sharded(model: nn.Module) -> str | None:
    """The path of the first module that `fully_shard` was called on; None where there is none."""
    for path, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed"):
                return path
    return None
