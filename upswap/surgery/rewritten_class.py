"""The subclass that a rewritten module gets, the record it carries, and how both are pickled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from ..errors import PlanError, RewriteError
from ..plan.decode import made
from ..plan.plan import PLAN_SCHEMA, check_schema
from ..plan.schema1 import upgrade_site
from ..plan.site import ModulePath, Site
from ..shown import brief
from .routes.choose import Rewriting, replay_owner
from .routes.kept_methods import late_method, rebind
from .routes.refusals import Misfit, does_not_fit

_RECORD = "_upswap_record"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a rewritten module needs to be rewritten again, as plain data: pickles and copies carry it.

    `path` is the module's in the model, `sites` are all of its sites, and `forward` describes one run of it, which the
    graph route traces. `handing` are the swapped sites of other modules whose guides it hands down.
    """

    path: ModulePath
    sites: tuple[Site, ...]
    forward: Any
    schema: int = PLAN_SCHEMA
    handing: tuple[Site, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {
            "path": self.path,
            "sites": [site.to_dict() for site in self.sites],
            "forward": self.forward,
            "schema": self.schema,
            # As in `Site.to_dict`.
            **({"handing": [site.to_dict() for site in self.handing]} if self.handing else {}),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """The record `to_dict` described; `PlanError` for anything else, and for a newer upswap's."""
        if not isinstance(data, Mapping):
            raise PlanError(f"a rewritten module is described by an object, got {type(data).__name__}")
        check_schema(data.get("schema"), f"the rewritten module {brief(data.get('path'))}", None)
        if data["schema"] == 1 and isinstance(data.get("sites"), list):
            data = {**data, "sites": [upgrade_site(site, {}) for site in data["sites"]]}
        return made(cls, {**data, "schema": PLAN_SCHEMA}, "record")


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
        names = ", ".join(site.name for site in (*record.sites, *record.handing) if site.swap)
        raise RewriteError(
            f"{original.__qualname__} has a memory layout of its own and cannot be subclassed in place ({error}); "
            f"exclude {names}"
        ) from error
    return cls


def _record_of(module: nn.Module) -> Record | None:
    return vars(type(module)).get(_RECORD)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was rewritten."""
    return type(module) if _record_of(module) is None else type(module).__bases__[0]


# -- pickling -------------------------------------------------------------------------------------------------------------


class Pending(nn.Module):
    """A rewritten module between being made by the unpickler and getting its state, when it becomes itself again."""

    def __getattr__(self, name: str) -> Any:
        """A method, which a pickle asks for where the module keeps it as a value."""
        target = self.__dict__.get("_target")
        if target is None or not callable(getattr(target[0], name, None)):
            raise AttributeError(name)
        return late_method(self, target[0], name)

    def __setstate__(self, state: Any) -> None:
        original, data = self.__dict__.pop("_target")
        self.__class__ = original
        self.__setstate__(state)
        try:
            _rewrite(self, data)
        except Misfit as misfit:
            raise does_not_fit("this rewritten module does not fit its class any more", misfit.causes) from misfit


def rewrite_all(modules: Iterable[tuple[nn.Module, Any]]) -> None:
    """Rewrite modules of a file, each as its record says in plain data; `PlanError` names all sites that do not fit."""
    causes: dict[str, str] = {}
    for module, data in modules:
        try:
            _rewrite(module, data)
        except Misfit as misfit:
            causes.update(misfit.causes)
    if causes:
        raise does_not_fit("the rewritten modules in this file do not fit their classes any more", causes)


def _rewrite(module: nn.Module, data: Any) -> None:
    record = Record.from_dict(data)
    rewriting = replay_owner(module, record.sites, record.forward, record.handing, record.path)
    module.__class__ = rewritten_class(type(module), record, rewriting)
    rebind([module])


def restore(original: type, record: Mapping[str, Any]) -> Pending:
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
    return restore, (type(self).__bases__[0], record.to_dict()), self.__getstate__()
