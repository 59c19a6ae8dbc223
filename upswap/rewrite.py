"""Carry out a Plan on a model, and undo it.

A module whose forward is rewritten gets a subclass of its own class, made for it: it stays the same object, with the same
children, parameters, attributes and `isinstance`. Everything is prepared before the first change to the model, so that a
failure leaves it as it was.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .errors import PlanError, RewriteError
from .routes import Misfit, Rewriting, child_of, replay_owner
from .schema import made
from .sites import PLAN_SCHEMA, ModulePath, Plan, Site, check_schema
from .upsamplers import make_upsampler

_RECORD = "_upswap_record"
_PLAN = "_upswap_plan"
_ORIGINAL = "_upswap_original"


# -- applying a plan ------------------------------------------------------------------------------------------------------


def apply(model: nn.Module, plan: Plan, rewritings: Mapping[str, Rewriting]) -> None:
    """Change `model` as `plan` says, with the rewriting of each owner by its path. On any error the model is as it was."""
    swapped = plan.swapped
    made = {site.name: _new_upsampler(model, site, plan) for site in swapped}
    steps: list[Callable[[], None]] = []
    for path, sites in by_owner(plan.sites).items():
        if not any(site.swap for site in sites):
            continue
        owner = model.get_submodule(path)
        if sites[0].op == "module":
            steps.append(_replacing(model, owner, made[sites[0].name]))
            continue
        record = Record(path, tuple(sites), plan.calls.get(path))
        cls = rewritten_class(type(owner), record, rewritings[path])
        children = [(site, made[site.name]) for site in sites if site.swap]
        steps.append(_subclassing(model, owner, cls, children))
    for step in steps:
        step()
    model.__dict__[_PLAN] = plan.to_json()


def by_owner(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites grouped by their owner's path, in order."""
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.owner, []).append(site)
    return owners


def _new_upsampler(model: nn.Module, site: Site, plan: Plan) -> nn.Module:
    owner = model.get_submodule(site.owner)
    near = next(itertools.chain(owner.parameters(), model.parameters(), model.buffers()), None)
    # Under autocast the tensor at a site has another dtype than the weights around it.
    dtype = near.dtype if near is not None and near.is_floating_point() else getattr(torch, site.dtype)
    module = make_upsampler(site, plan.options).to(device=None if near is None else near.device, dtype=dtype)
    return module.train(owner.training)


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


@dataclasses.dataclass(frozen=True)
class Record:
    """What a rewritten module needs to be rewritten again, as plain data: pickles and copies carry it.

    `path` is the module's in the model, `sites` are all of its sites, and `forward` describes one run of it, which the
    graph route traces.
    """

    path: ModulePath
    sites: tuple[Site, ...]
    forward: Any
    schema: int = PLAN_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "path": self.path,
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "forward": self.forward,
            "schema": self.schema,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """The record `to_dict` described; `PlanError` for anything else, and for a newer upswap's."""
        if not isinstance(data, Mapping):
            raise PlanError(f"a rewritten module is described by an object, got {type(data).__name__}")
        check_schema(data.get("schema"), f"the rewritten module {str(data.get('path'))[:80]!r}", None)
        return made(cls, data, "record")


def rewritten_class(original: type, record: Record, rewriting: Rewriting) -> type:
    """A subclass of the owner's class whose methods send its swapped resize calls through the upsamplers."""
    namespace = {
        **rewriting.methods,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        _RECORD: record,
    }
    # Given its base afterwards, so that a base that keeps a register of its subclasses does not hear of this one.
    metaclass = type(original)
    cls: type = metaclass(original.__name__, (nn.Module,), namespace)
    try:
        cls.__bases__ = (original,)
    except TypeError as error:
        names = ", ".join(site.name for site in record.sites if site.swap)
        raise RewriteError(
            f"{original.__qualname__} has a memory layout of its own and cannot be subclassed in place ({error}); "
            f"exclude {names}"
        ) from error
    return cls


def _record_of(module: nn.Module) -> Record | None:
    return vars(type(module)).get(_RECORD)


def does_not_fit(what: str, causes: Mapping[str, str]) -> PlanError:
    """The error for sites that are not as a Plan knew them, with the cause of each."""
    lines = [f"  {name}: {cause}" for name, cause in causes.items()]
    return PlanError(
        "\n".join(
            [
                f"{what}. Install the version of their library that they were patched with, or patch the model anew:",
                *lines,
            ]
        )
    )


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
    for site in plan_of(model).swapped:
        owner = model.get_submodule(site.owner)
        if _record_of(owner) is None and _ORIGINAL not in owner.__dict__:
            raise PlanError(
                f"site {site.name}: the class of {site.owner or 'the model'} was changed after the patch, to "
                f"{type(owner).__qualname__}; undo that first (parametrisations, sharding)"
            )
    for module in list(model.modules()):
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
    del model.__dict__[_PLAN]


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every upsampler in a patched model."""
    for site in plan_of(model).swapped:
        if site.module is not None:
            yield site.module, model.get_submodule(site.module)


# -- pickling -------------------------------------------------------------------------------------------------------------


_misfits: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("misfits", default=None)


@contextlib.contextmanager
def all_misfits() -> Iterator[None]:
    """Inside, a rewritten module that no longer fits its class does not end the unpickling; the end names all of them."""
    found: dict[str, str] = {}
    token = _misfits.set(found)
    try:
        yield
    finally:
        _misfits.reset(token)
    if found:
        raise does_not_fit("the rewritten modules in this file do not fit their classes any more", found)


class Pending(nn.Module):
    """A rewritten module between being made by the unpickler and getting its state, when it becomes itself again."""

    def __setstate__(self, state: Any) -> None:
        original, data = self.__dict__.pop("_target")
        self.__class__ = original
        self.__setstate__(state)
        record = Record.from_dict(data)
        try:
            self.__class__ = rewritten_class(original, record, replay_owner(self, record.sites, record.forward))
        except Misfit as misfit:
            found = _misfits.get()
            if found is None:
                raise does_not_fit("this rewritten module does not fit its class any more", misfit.causes) from misfit
            found.update(misfit.causes)


def _pending(original: type, record: Mapping[str, Any]) -> Pending:
    """What a pickle of a rewritten module calls: the class it had before, and how to rewrite it. No code is in the file."""
    if not issubclass(original, nn.Module):
        raise PlanError(f"{original!r} is not a module class")
    module = Pending.__new__(Pending)
    module.__dict__["_target"] = (original, record)
    return module


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    record = _record_of(self)
    if record is None:  # a class made from the rewritten one later, by parametrisation or sharding
        return cast(tuple[Any, ...], object.__reduce_ex__(self, protocol))
    return _pending, (type(self).__bases__[0], record.to_dict()), self.__getstate__()
