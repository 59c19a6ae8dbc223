"""The functions a user calls on a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .errors import UpswapWarning
from .plan.plan import Options, Plan
from .surgery import apply as rewrite
from .surgery.planning import check_model, decide, nothing_to_swap
from .surgery.replay import check_plan

Patterns = str | Iterable[str] | None


def patch(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    upsampler: str = "dysample",
    style: str = "lp",
    groups: int | None = None,
    dyscope: bool = False,
    init: str = "match",
    cascade: bool = False,
    kinds: str | Iterable[str] = ("feature",),
    include: Patterns = None,
    exclude: Patterns = None,
    plan: Plan | None = None,
    strict: bool = False,
    inplace: bool = True,
) -> nn.Module:
    """Replace the model's feature upsampling by learned upsamplers, and give the model back.

    The model stays the same object of the same class (as `isinstance` sees it), with every state-dict key it had; new
    keys are added. With `init="match"` dysample computes what the model computed before, until it is trained.

    Args: model: any module that runs; left as it was if anything fails. example_inputs: a tensor, a tuple of positional
        arguments, a dict of keyword arguments, or `(args, kwargs)`. Left out, a batch of one small image is made, with
        the channels of the model's first convolution. upsampler: "dysample", "carafe", or one that is registered or in
        an installed package (docs/upsamplers.md). style: "lp" or "pl", DySample's two ways to predict offsets. groups:
        groups of channels that share sampling points; 4 for lp and 8 for pl by default. dyscope: whether the range of the
        offsets is learned too. init: "match" (the original function) or "paper" (DySample's own initialisation). cascade:
        replace x4 and x8 by chains of x2, as DySample's authors did; step 0 is then not exact. kinds: the kinds of resize
        to replace; see `upswap.KINDS`. include, exclude: patterns over site names, as `upswap.inspect` lists them.
        plan: a Plan made before, carried out as it is; the other options are then not read. strict: raise where the
        default is to fall back and say so in the plan. inplace: whether to change `model` or a deep copy of it.

    Raises:
        NothingToSwapError: no resize call may be replaced; the message says what there is instead.
        InputError: no example inputs were found that the model runs on.
        FilterError, OptionError: a pattern matches nothing, an option cannot be used.
        PlanError: `plan` does not fit the model; each site that does not is named.

    A model that is patched already is given back as it is, with an `UpswapWarning`.
    """
    check_model(model)
    if rewrite.is_patched(model):
        count = len(rewrite.plan_of(model).swapped)
        warnings.warn(
            f"this {type(model).__name__} is patched already ({count} upsamplers); nothing was changed. "
            "upswap.unpatch(model) first to patch it in another way.",
            UpswapWarning,
            stacklevel=2,
        )
        return model
    if plan is None:
        options = Options(
            upsampler=upsampler,
            style=style,
            groups=groups,
            dyscope=dyscope,
            init=init,
            cascade=cascade,
            kinds=_several(kinds),
            include=_several(include),
            exclude=_several(exclude),
            strict=strict,
        )
        decision = decide(model, example_inputs, options)
        plan, rewritings = decision.plan, decision.rewritings
        if not plan.swapped:
            raise nothing_to_swap(plan)
    else:
        rewritings = check_plan(model, plan)
    if not inplace:
        model = copy.deepcopy(model)
    rewrite.apply(model, plan, rewritings)
    return model


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    upsampler: str = "dysample",
    style: str = "lp",
    groups: int | None = None,
    dyscope: bool = False,
    init: str = "match",
    cascade: bool = False,
    kinds: str | Iterable[str] = ("feature",),
    include: Patterns = None,
    exclude: Patterns = None,
    strict: bool = False,
) -> Plan:
    """What `patch` with the same options would do: every resize call, what was decided and why. The model is not changed.

    For a patched model, the Plan it was patched with.
    """
    check_model(model)
    if rewrite.is_patched(model):
        return rewrite.plan_of(model)
    options = Options(
        upsampler=upsampler,
        style=style,
        groups=groups,
        dyscope=dyscope,
        init=init,
        cascade=cascade,
        kinds=_several(kinds),
        include=_several(include),
        exclude=_several(exclude),
        strict=strict,
    )
    return decide(model, example_inputs, options).plan


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: the original classes, modules and state-dict keys, with the host's weights as they are now.

    Raises `PlanError` where the model is not patched.
    """
    rewrite.plan_of(model)
    rewrite.undo(model)
    return model


def plan_of(model: nn.Module) -> Plan:
    """The Plan a model was patched with; `PlanError` where it is not patched."""
    return rewrite.plan_of(model)


def upsamplers(model: nn.Module) -> dict[str, nn.Module]:
    """The upsamplers of a patched model by their paths, in the order of the sites."""
    return dict(rewrite.installed(model))


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that the patch added."""
    for module in upsamplers(model).values():
        yield from module.parameters()


def param_groups(
    model: nn.Module, lr: float, upsampler_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two optimiser groups: the host's trainable parameters at `lr`, the upsamplers' at `upsampler_lr` (`lr` by default).

    DySample's published configurations use no multiplier; `weight_decay` is for both.
    """
    added = {id(parameter) for parameter in parameters(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in added], "lr": lr, "weight_decay": weight_decay},
        {
            "params": [p for p in trainable if id(p) in added],
            "lr": lr if upsampler_lr is None else upsampler_lr,
            "weight_decay": weight_decay,
        },
    ]


def freeze_host(model: nn.Module) -> nn.Module:
    """Make the upsamplers' parameters the only ones that require gradients. Modes (train, eval) are not touched."""
    added = {id(parameter) for parameter in parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in added)
    return model


def _several(value: Patterns) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())
