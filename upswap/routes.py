"""The routes by which an owner's resize calls come to go through upsamplers, and the choice of the first faithful one.

- module: an `nn.Upsample` layer is replaced as a whole (`rewrite.py` does that).
- graph: the forward is traced by FX (`tracer.py`) and its resize nodes become calls of the upsamplers.
- source: the methods with the calls are compiled again with the call expressions changed (`recompile.py`).
"""

from __future__ import annotations

import keyword
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from .errors import PlanError, RewriteError
from .locate import method_of
from .recompile import Replacement, recompile
from .runtime import Target
from .sites import Location, Site
from .straight import NotFaithful
from .tracer import trace


class Rewriting(NamedTuple):
    """How an owner is rewritten: the route, and the methods that replace its own (none on the module route)."""

    route: str
    methods: dict[str, types.FunctionType]


def rewrite_owner(owner: nn.Module, sites: Sequence[Site], forward: Any) -> Rewriting:
    """The first faithful route for an owner's swapped sites. The owner is not changed.

    `sites` are all sites of the owner; `forward` describes one run of it, as the probe saw it. Raises `RewriteError` where
    no route is faithful.
    """
    if all(site.op == "module" for site in sites):
        return Rewriting("module", {})
    try:
        return Rewriting("graph", {"forward": graph_forward(owner, sites, forward)})
    except NotFaithful:
        return Rewriting("source", source_methods(owner, sites))


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
    """The name of a site's upsampler in its owner.

    Raises `PlanError` for what is no plain name: a plan may come from a stranger's file, and names become code.
    """
    name = (site.module or "").removeprefix(f"{site.owner}.")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise PlanError(f"site {site.name}: {name!r} cannot be the name of a module")
    return name


def graph_forward(owner: nn.Module, sites: Sequence[Site], forward: Any) -> types.FunctionType:
    """The owner's forward as the code of its FX graph, with the swapped resize nodes calling the upsamplers.

    Raises `NotFaithful` where the graph would not be right for every input.
    """
    if forward is None:
        raise NotFaithful("the arguments of its forward cannot be described as plain data")
    if len({site.calls for site in sites}) > 1 or any(site.location is None for site in sites):
        raise NotFaithful("not every forward makes the same resize calls")
    if any(site.location.function.rpartition(".")[2] != "forward" for site in sites if site.location):
        raise NotFaithful("the resize stands outside its forward")
    tensor = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = "cpu" if tensor is None else tensor.device
    graph = trace(owner, forward, torch.device(device))
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target is F.interpolate]
    if len(nodes) != len(sites):
        raise NotFaithful(f"the graph has {len(nodes)} resize calls, the probe saw {len(sites)}")
    for node, site in zip(nodes, sites, strict=True):
        if site.swap:
            _call_upsampler(graph, node, site)
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<upswap graph of {type(owner).__qualname__}>", "exec"), namespace)  # noqa: S102 - FX wrote it
    made: types.FunctionType = namespace["forward"]
    for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__"):
        setattr(made, attribute, getattr(type(owner).forward, attribute))
    return made


def _call_upsampler(graph: fx.Graph, node: fx.Node, site: Site) -> None:
    """Put a `call_module` of the site's upsampler in the place of a resize node."""
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if any(
        isinstance(given.get(name), fx.Node)
        for name in ("mode", "align_corners", "recompute_scale_factor", "scale_factor")
    ):
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
