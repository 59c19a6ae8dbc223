"""Carry out a Plan on a model, and undo it.

A module whose forward is rewritten gets a subclass of its own class, made for it: it stays the same object, with the same
children, parameters, attributes and `isinstance`. Everything is prepared before the first change to the model, so that a
failure leaves it as it was.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..architectures import host_config
from ..errors import PlanError
from ..nn.registry import make_upsampler
from ..plan.plan import Plan, by_module
from ..plan.site import Site, child_of
from ..probe.snapshot import all_or_nothing
from .integrations import mark, unmark
from .rewritten_class import Record, _record_of, rewritten_class
from .routes.choose import Rewriting
from .routes.kept_methods import rebind

_PLAN = "_upswap_plan"
_ORIGINAL = "_upswap_original"


# -- applying a plan ------------------------------------------------------------------------------------------------------


def apply(model: nn.Module, plan: Plan, rewritings: Mapping[str, Rewriting]) -> None:
    """Change `model` as `plan` says, with the rewriting of each owner by its path. On any error the model is as it was."""
    swapped = plan.swapped
    with torch.inference_mode(False):  # parameters made in it can never be trained
        made = {site.name: _new_upsampler(model, site, plan) for site in swapped}
    steps: list[Callable[[], None]] = []
    for path, (sites, handing) in by_module(plan.sites).items():
        if not handing and not any(site.swap for site in sites):
            continue
        owner = model.get_submodule(path)
        if sites and sites[0].op == "module":
            steps.append(_replacing(model, owner, made[sites[0].name]))
            continue
        record = Record(path, tuple(sites), plan.calls.get(path), handing=tuple(handing))
        cls = rewritten_class(type(owner), record, rewritings[path])
        children = [(site, made[site.name]) for site in sites if site.swap]
        steps.append(_subclassing(model, owner, cls, children))
    with all_or_nothing(model):  # a class of the model's may refuse what is done to it
        for step in steps:
            step()
        rebind(model.modules())
        model.__dict__[_PLAN] = plan.to_json()
        host_config.keep(model, plan.to_json())
        mark(model)


def _new_upsampler(model: nn.Module, site: Site, plan: Plan) -> nn.Module:
    owner = model.get_submodule(site.owner)
    device, dtype = _surroundings(model, site.owner)
    # Under autocast the tensor at a site has another dtype than the weights around it.
    module = make_upsampler(site, plan.upsampler_of(site)).to(device=device, dtype=dtype or getattr(torch, site.dtype))
    return module.train(owner.training)


def _surroundings(model: nn.Module, path: str) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating dtype of most weights of the module at `path`, or of the nearest module around it that has any.

    One parameter may lie elsewhere: transformers builds one of Mask2Former on the CPU under `torch.device("meta")`.
    """
    while True:
        weights: Counter[tuple[torch.device, torch.dtype | None]] = Counter()
        for tensor in model.get_submodule(path).parameters():
            if is_lazy(tensor):
                continue
            weights[tensor.device, tensor.dtype if tensor.is_floating_point() else None] += tensor.numel()
        if weights:
            return weights.most_common(1)[0][0]
        if not path:
            buffer = next(model.buffers(), None)
            return (None, None) if buffer is None else (buffer.device, None)
        path = path.rpartition(".")[0]


def _replacing(model: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Replace a module wherever it is registered, carrying over attributes and hooks that are not its class's own."""
    plain = type(old)().__dict__
    for name, value in old.__dict__.items():
        if name not in plain or "_hooks" in name or name in ("scale_factor", "size", "recompute_scale_factor"):
            new.__dict__[name] = value
    new.__dict__[_ORIGINAL] = old

    def replace() -> None:
        _swap_everywhere(model, old, new)

    return replace


def _swap_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _subclassing(
    model: nn.Module, owner: nn.Module, cls: type, children: Sequence[tuple[Site, nn.Module]]
) -> Callable[[], None]:
    added = [(_holder(model, site), child_of(site), child) for site, child in children]
    for holder, name, _ in added:
        # Known before anything is changed; a plan from a file may name a method.
        if hasattr(owner, name) or hasattr(holder, name):
            raise PlanError(
                f"site {', '.join(site.name for site, _ in children)}: {name!r} is the name of something else already"
            )

    def change() -> None:
        for holder, name, child in added:
            holder.add_module(name, child)
            if holder is not owner:
                # An attribute but no child: the owner's code finds it there, and does not run it with its children.
                owner.__dict__[name] = child
        owner.__class__ = cls

    return change


def _holder(model: nn.Module, site: Site) -> nn.Module:
    """The module among whose children a site's upsampler is."""
    above = (site.module or "").rpartition(".")[0]
    if above != site.owner and not site.owner.startswith(f"{above}." if above else ""):
        raise PlanError(f"site {site.name}: {site.module!r} is not in its owner or a module above it")
    return model.get_submodule(above)


# -- undoing --------------------------------------------------------------------------------------------------------------


def is_patched(model: nn.Module) -> bool:
    """Whether `apply` has been called on this model, and `undo` has not."""
    return _PLAN in model.__dict__


def patched_inside(model: nn.Module) -> str | None:
    """The path of a submodule that was patched by itself, or None."""
    return next((path for path, m in model.named_modules() if path and (_PLAN in m.__dict__ or _record_of(m))), None)


def plan_of(model: nn.Module) -> Plan:
    """The Plan a patched model was patched with; `PlanError` where it was not."""
    if not is_patched(model):
        raise PlanError(f"this {type(model).__name__} is not patched; upswap.patch(model) does that")
    return Plan.from_json(model.__dict__[_PLAN])


def undo(model: nn.Module) -> None:
    """Give a patched model its classes, modules and state-dict keys back; trained weights of the host stay."""
    plan = plan_of(model)
    for site in plan.swapped:
        for path in (site.owner, *site.handed_by):
            module = model.get_submodule(path)
            if _record_of(module) is None and _ORIGINAL not in module.__dict__:
                raise PlanError(
                    f"site {site.name}: the class of {path or 'the model'} was changed after the patch, to "
                    f"{type(module).__qualname__}; undo that first (parametrisations, sharding)"
                )
    with all_or_nothing(model):
        for module in list(model.modules()):
            _undo_module(model, module)
        rebind(model.modules())
        del model.__dict__[_PLAN]
        host_config.drop(model, plan.to_json())
        unmark(model)


@contextlib.contextmanager
def unpatched_on_error(*models: nn.Module) -> Iterator[None]:
    """Inside, whatever is raised, Ctrl-C too, leaves those of `models` unpatched that are not patched now."""
    originals = [model for model in models if not is_patched(model)]
    try:
        yield
    except BaseException:
        for model in filter(is_patched, originals):
            undo(model)
        raise


def _undo_module(model: nn.Module, module: nn.Module) -> None:
    record = _record_of(module)
    if record is not None:
        for site in record.sites:
            if site.swap:
                del _holder(model, site)._modules[child_of(site)]
                module.__dict__.pop(child_of(site), None)
        module.__class__ = type(module).__bases__[0]
    if _ORIGINAL in module.__dict__:
        original = module.__dict__[_ORIGINAL]
        original.train(module.training)
        _swap_everywhere(model, module, original)


def original_layer(upsampler: nn.Module) -> nn.Module | None:
    """The layer whose place an upsampler took, also one that was wrapped since; None where it was a call."""
    kept = (module.__dict__[_ORIGINAL] for module in upsampler.modules() if _ORIGINAL in module.__dict__)
    return cast("nn.Module | None", next(kept, None))


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every upsampler in a patched model."""
    for site in plan_of(model).swapped:
        if site.module is not None:
            yield site.module, model.get_submodule(site.module)


def added_keys(model: nn.Module) -> set[str]:
    """The keys of a state dict that are the upsamplers', by every path of a module that is shared; none of a model as it was."""
    made = {id(module) for _, module in installed(model)} if is_patched(model) else set()
    paths = tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in made)
    return {key for key in model.state_dict() if key.startswith(paths)}
