"""What an optimiser is given of a patched model, and at which rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import OptionError
from ..surgery.apply import installed
from ..surgery.wrappers import find_patched, patched_models

M = TypeVar("M", bound=nn.Module)


def upsamplers(model: nn.Module) -> dict[str, nn.Module]:
    """The upsamplers of a patched model by their paths, in the order of the sites; of one that is not patched, none.

    Of a model that holds patched ones (wrapped, compiled, a LightningModule) those of all of them, by their paths in it.
    """
    return {
        f"{prefix}.{path}" if prefix else path: module
        for prefix, patched in find_patched(model).items()
        for path, module in installed(patched)
    }


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that the patch added."""
    for module in upsamplers(model).values():
        yield from module.parameters()


def param_groups(
    model: nn.Module,
    lr: float,
    upsampler_lr: float | None = None,
    weight_decay: float | None = None,
    *,
    upsampler_lr_mult: float | None = None,
    upsampler_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model as groups for an optimiser, those of the upsamplers last.

    One script so trains a model that is patched and one that is not, which has no group of upsamplers.

    Norms, biases and other parameters of one dimension have no weight decay, as in timm; nor have the upsamplers, whose zero is
    the resize they replace. A group that would be empty is left out. Each has a `name`: "host", "host_no_decay", "upsamplers".

    Args:
        model: any model; a patched one, or one that holds patched ones, has upsamplers.
        lr: the learning rate of the host.
        upsampler_lr: that of the upsamplers; `lr` where it is left out.
        weight_decay: that of the host's other parameters. Left out, the optimiser's own stays in force.
        upsampler_lr_mult: the upsamplers' learning rate as a multiple of `lr`, in place of `upsampler_lr`.
        upsampler_weight_decay: the weight decay of the upsamplers.

    Raises:
        OptionError: both `upsampler_lr` and `upsampler_lr_mult` are given.
    """
    if upsampler_lr is not None and upsampler_lr_mult is not None:
        raise OptionError("give upsampler_lr or upsampler_lr_mult, not both")
    if upsampler_lr is None:
        upsampler_lr = lr if upsampler_lr_mult is None else lr * upsampler_lr_mult
    added = {id(parameter) for parameter in parameters(model)}
    kept: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            one_dimensional = parameter.ndim <= 1 or name.endswith(".bias")
            (new if id(parameter) in added else no_decay if one_dimensional else kept).append(parameter)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": kept, "lr": lr, **decay, "name": "host"},
        {"params": no_decay, "lr": lr, "weight_decay": 0.0, "name": "host_no_decay"},
        {"params": new, "lr": upsampler_lr, "weight_decay": upsampler_weight_decay, "name": "upsamplers"},
    ]
    return [group for group in groups if group["params"]]


def freeze_host(model: M) -> M:
    """Make the upsamplers' parameters the only ones that require gradients. Modes (train, eval) are not touched.

    Raises `PlanError` where the model is not patched.
    """
    patched_models(model)
    added = {id(parameter) for parameter in parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in added)
    return model


def check_can_join(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`OptionError` where an optimiser of `model` cannot be given a group: a scheduler counted its groups when it was made."""
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise OptionError(f"the {type(optimizer).__name__} has none of the parameters of this {type(model).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError("LBFGS takes one group of parameters: make it after the patch, of model.parameters()")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise OptionError(
            "a learning-rate scheduler was made for this optimizer already, and would not know the upsamplers' group. "
            "Patch first, then make the scheduler"
        )


def add_to_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Give an optimiser the upsamplers' parameters that it lacks, as a group of its own defaults; how many there were.

    The group has no weight decay, as in `param_groups`.

    Args:
        model: a patched model, or one that holds patched ones.
        optimizer: one that has parameters of the model.

    Raises:
        OptionError: the optimiser cannot be given a group: it has a learning-rate scheduler already, is LBFGS, or of another
            model.
        PlanError: the model is not patched.
    """
    patched_models(model)
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    added = {id(parameter) for parameter in parameters(model)} - known
    missing = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in added]
    if missing:
        check_can_join(model, optimizer)
        named = any("param_names" in group for group in optimizer.param_groups)
        decay = {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}
        optimizer.add_param_group({"params": missing if named else [parameter for _, parameter in missing], **decay})
    return len(missing)
