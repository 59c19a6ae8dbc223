"""Carry out a Plan on a model, and undo it.

A module whose forward is rewritten gets a subclass of its own class, made for it: it stays the same object, with the same
children, parameters, attributes and `isinstance`. Everything is prepared before the first change to the model, so that a
failure leaves it as it was.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from . import inputs as _inputs
from .errors import PlanError, RewriteError
from .locate import method_of
from .preserve import preserved
from .recompile import Replacement, recompile
from .runtime import Target
from .sites import Location, Plan, Site, site_from_dict
from .tracer import NotFaithful, trace
from .upsamplers import make_upsampler

_RECORD = "_upswap_record"
_PLAN = "_upswap_plan"
_ORIGINAL = "_upswap_original"


# -- routes ---------------------------------------------------------------------------------------------------------------


def route_owner(owner: nn.Module, sites: Sequence[Site], arguments: Any) -> tuple[str, str]:
    """The first faithful route for an owner's swapped sites: (route, why not the ones before it).

    `sites` are all sites of the owner; `arguments` describes the arguments of its forward. Raises `RewriteError` where no route
    is faithful.
    """
    if all(site.op == "module" for site in sites):
        return "module", ""
    try:
        graph_forward(owner, sites, arguments)
    except NotFaithful as error:
        source_methods(owner, sites)
        return "source", str(error)
    return "graph", ""


def source_methods(owner: nn.Module, sites: Sequence[Site]) -> dict[str, types.FunctionType]:
    """The owner's methods that make resize calls, compiled again with their swapped calls sent through the upsamplers."""
    located = [(site, site.location) for site in sites if site.location is not None]
    methods: dict[str, types.FunctionType] = {}
    for function in dict.fromkeys(location.function for _, location in located):
        inside = [(site, location) for site, location in located if location.function == function]
        if not any(site.swap for site, _ in inside):
            continue
        name = function.rpartition(".")[2]
        method = getattr(type(owner), name, None)
        if not isinstance(method, types.FunctionType) or method_of(type(owner), method.__code__) is None:
            raise RewriteError(f"{type(owner).__qualname__} has no method {name} of its own to rewrite")
        methods[name] = recompile(method, _replacements(inside))
    return methods


def _replacements(inside: list[tuple[Site, Location]]) -> list[Replacement]:
    """For each call expression with a swapped site: where it is, and what each of its runs goes through."""
    calls: dict[tuple[str, int], list[tuple[Site, Location]]] = {}
    for site, location in inside:
        calls.setdefault((location.expression, location.index), []).append((site, location))
    result: list[Replacement] = []
    for runs in calls.values():
        if any(site.swap for site, _ in runs):
            targets: list[Target | None] = [None] * (1 + max(location.occurrence for _, location in runs))
            for site, location in runs:
                if site.swap:
                    targets[location.occurrence] = target_of(site)
            result.append((runs[0][1], targets))
    return result


def target_of(site: Site) -> Target:
    """What a rewritten call knows of its site."""
    return Target(site.name, child_of(site), site.channels, site.mode, site.align_corners)


def child_of(site: Site) -> str:
    """The name of a site's upsampler in its owner."""
    return (site.module or "").removeprefix(f"{site.owner}.")


def graph_forward(owner: nn.Module, sites: Sequence[Site], arguments: Any) -> Callable[..., Any]:
    """The owner's forward as the code of its FX graph, with the swapped resize nodes calling the upsamplers.

    Raises `NotFaithful` where the graph would not be right for every input.
    """
    if arguments is None:
        raise NotFaithful("the arguments of its forward cannot be described as plain data")
    if len({site.calls for site in sites}) > 1 or any(site.location is None for site in sites):
        raise NotFaithful("not every forward makes the same resize calls")
    if any(site.location.function.rpartition(".")[2] != "forward" for site in sites if site.location):
        raise NotFaithful("the resize stands outside its forward")
    tensor = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = "cpu" if tensor is None else tensor.device
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        values = _inputs.build(arguments, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
    with preserved(owner):  # in eval mode: a batch norm in training refuses a single point
        graph = trace(owner, values, mode)
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target is F.interpolate]
    if len(nodes) != len(sites):
        raise NotFaithful(f"the graph has {len(nodes)} resize calls, the probe saw {len(sites)}")
    for node, site in zip(nodes, sites, strict=True):
        if site.swap:
            _call_upsampler(graph, node, site)
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<upswap graph of {type(owner).__qualname__}>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _call_upsampler(graph: fx.Graph, node: fx.Node, site: Site) -> None:
    """Put a `call_module` of the site's upsampler in the place of a resize node."""
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if any(isinstance(given.get(name), fx.Node) for name in ("mode", "align_corners", "recompute_scale_factor", "scale_factor")):
        raise NotFaithful(f"site {site.name}: its mode or scale is an argument")
    if given.get("recompute_scale_factor"):
        raise NotFaithful(f"site {site.name}: its scale factor is recomputed at every call")
    size, factor = given.get("size"), given.get("scale_factor")
    positional = (given["input"],) if size is None else (given["input"], size)
    factors = factor if isinstance(factor, list | tuple) else (factor, factor)
    # The upsampler was built for the site's own factor and needs to be told only of others.
    keywords = {} if size is not None or tuple(factors) == site.scale else {"scale_factor": factor}
    with graph.inserting_before(node):
        call = graph.call_module(child_of(site), positional, keywords)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


# -- applying a plan ------------------------------------------------------------------------------------------------------


def apply(model: nn.Module, plan: Plan) -> None:
    """Change `model` as `plan` says. On any error the model is as it was."""
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
        cls = rewritten_class(owner, record)
        children = {child_of(site): made[site.name] for site in sites if site.swap}
        steps.append(_subclassing(owner, cls, children))
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
    near = next(iter((*owner.parameters(), *model.parameters(), *model.buffers())), None)
    module = make_upsampler(site, plan.options, "cpu" if near is None else near.device)
    return module.train(owner.training)


def _replacing(model: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Replace a module wherever it is registered, carrying over attributes and hooks that are not its class's own."""
    plain = type(old)().__dict__
    for name, value in old.__dict__.items():
        if name not in plain or (name.endswith("_hooks") and value):
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


def _subclassing(owner: nn.Module, cls: type, children: Mapping[str, nn.Module]) -> Callable[[], None]:
    def change() -> None:
        for name, child in children.items():
            owner.add_module(name, child)
        owner.__class__ = cls

    return change


@dataclasses.dataclass(frozen=True)
class Record:
    """What a rewritten module needs to be rewritten again, as plain data: pickles and copies carry it."""

    path: str
    sites: tuple[Site, ...]
    arguments: Any

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return {"path": self.path, "sites": [dataclasses.asdict(site) for site in self.sites], "arguments": self.arguments}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The record `to_dict` described; `PlanError` for anything else."""
        try:
            return cls(data["path"], tuple(site_from_dict(site) for site in data["sites"]), data["arguments"])
        except (KeyError, TypeError) as error:
            raise PlanError(f"not a record upswap wrote: {error}") from error


def rewritten_class(owner: nn.Module, record: Record) -> type:
    """A subclass of the owner's class whose forward sends its swapped resize calls through the upsamplers."""
    original = type(owner)
    route = next(site.route for site in record.sites if site.swap)
    if route == "graph":
        methods: dict[str, Any] = {"forward": graph_forward(owner, record.sites, record.arguments)}
        for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__"):
            setattr(methods["forward"], attribute, getattr(original.forward, attribute))
    else:
        methods = dict(source_methods(owner, record.sites))
    namespace = {
        **methods,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        _RECORD: record,
    }
    return types.new_class(original.__name__, (original,), exec_body=lambda body: body.update(namespace))


def _record_of(module: nn.Module) -> Record | None:
    return vars(type(module)).get(_RECORD)


# -- undoing --------------------------------------------------------------------------------------------------------------


def is_patched(model: nn.Module) -> bool:
    """Whether `apply` has been called on this model, and `undo` has not."""
    return _PLAN in model.__dict__


def plan_of(model: nn.Module) -> Plan:
    """The Plan a patched model was patched with; `PlanError` where it was not."""
    if not is_patched(model):
        raise PlanError(f"this {type(model).__name__} is not patched; upswap.patch(model) does that")
    return Plan.from_json(model.__dict__[_PLAN])


def undo(model: nn.Module) -> None:
    """Give a patched model its classes, modules and state-dict keys back; trained weights of the host stay."""
    for module in list(model.modules()):
        record = _record_of(module)
        if record is not None:
            for site in record.sites:
                if site.swap:
                    del module._modules[child_of(site)]
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


class Pending(nn.Module):
    """A rewritten module between being made by the unpickler and getting its state, when it becomes itself again."""

    def __setstate__(self, state: Any) -> None:
        original, data = self.__dict__.pop("_target")
        self.__class__ = original
        self.__setstate__(state)
        self.__class__ = rewritten_class(self, Record.from_dict(data))


def _pending(original: type, record: Mapping[str, Any]) -> Pending:
    """What a pickle of a rewritten module calls: the class it had before, and how to rewrite it. No code is in the file."""
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise PlanError(f"{original!r} is not a module class")
    module = Pending.__new__(Pending)
    module.__dict__["_target"] = (original, record)
    return module


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    record: Record = vars(type(self))[_RECORD]
    return _pending, (type(self).__bases__[0], record.to_dict()), self.__getstate__()
