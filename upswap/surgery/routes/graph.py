"""The graph route: the owner's forward traced, and the resize nodes replaced by calls of upsamplers."""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...plan.site import Site, child_of
from .names import TRACED, odd_names
from .refusals import Misfit, NotFaithful
from .tracer import trace


def graph_forward(owner: nn.Module, sites: Sequence[Site], forward: Any) -> types.FunctionType:
    """The owner's forward as the code of its FX graph, with the swapped resize nodes calling the upsamplers.

    Raises `NotFaithful` where the graph would not be right for every input.
    """
    _check_traceable(sites, forward)
    odd = next(odd_names(owner, TRACED), None)
    if odd is not None:
        raise NotFaithful(f"a part of a {odd[0]} has the name {odd[1]!r}")
    tensor = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    graph = trace(owner, forward, device)
    _call_upsamplers(graph, sites)
    return _compile(graph, owner)


def _check_traceable(sites: Sequence[Site], forward: Any) -> None:
    """`NotFaithful` where a trace could not stand for the owner's forward, whatever it shows."""
    if forward is None:
        raise NotFaithful("the arguments of its forward cannot be described as plain data")
    if len({site.calls for site in sites}) > 1 or any(site.location is None for site in sites):
        raise NotFaithful("not every forward makes the same resize calls")
    locations = [site.location for site in sites if site.location is not None]
    if any(len(location.steps) > 1 or location.function.rpartition(".")[2] != "forward" for location in locations):
        raise NotFaithful("the resize stands outside its forward")


def _call_upsamplers(graph: fx.Graph, sites: Sequence[Site]) -> None:
    """Put calls of the upsamplers in the place of the resize nodes that are swapped; `Misfit` names those that differ."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target is F.interpolate]
    if len(nodes) != len(sites):
        raise NotFaithful(f"the graph has {len(nodes)} resize calls, the probe saw {len(sites)}")
    causes: dict[str, str] = {}
    for node, site in zip(nodes, sites, strict=True):
        if not site.swap:
            continue
        unlike = _unlike_node(node, site)
        if unlike is not None:
            causes[site.name] = unlike
        else:
            _call_upsampler(graph, node, site)
    if causes:
        raise Misfit(causes)


def _compile(graph: fx.Graph, owner: nn.Module) -> types.FunctionType:
    """The graph as a function in the place of the owner's forward.

    No name of the model goes into the text that FX writes: there each path is a number, and the syntax tree gets the path as
    a constant.
    """
    paths: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = paths.setdefault(str(node.target), f"_upswap_path_{len(paths)}")
    code = graph.python_code("self")
    tree = _Paths({alias: path for path, alias in paths.items()}).visit(ast.parse(code.src))
    namespace: dict[str, Any] = dict(code.globals)
    filename = f"<upswap graph of {type(owner).__qualname__}>"
    exec(compile(ast.fix_missing_locations(tree), filename, "exec"), namespace)  # noqa: S102 - FX wrote it
    made: types.FunctionType = namespace["forward"]
    for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__"):
        setattr(made, attribute, getattr(type(owner).forward, attribute))
    return made


class _Paths(ast.NodeTransformer):
    """Puts the parts of a module in the place of the attributes that stand for their paths."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = paths

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """`self.alias` as `getattr(self.first, "0")`."""
        self.generic_visit(node)
        if node.attr not in self.paths:
            return node
        value = node.value
        for part in self.paths[node.attr].split("."):
            if part.isidentifier():
                value = ast.Attribute(value, part, ast.Load())
            else:
                value = ast.Call(ast.Name("getattr", ast.Load()), [value, ast.Constant(part)], [])
        return value


def _call_upsampler(graph: fx.Graph, node: fx.Node, site: Site) -> None:
    """Put a `call_module` of the site's upsampler in the place of a resize node."""
    given = _given(node)
    size = given.get("size")
    # The upsampler was built for the site's own factor.
    positional = (given["input"],) if size is None else (given["input"], size)
    with graph.inserting_before(node):
        call = graph.call_module(child_of(site), positional)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a resize node by name."""
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _unlike_node(node: fx.Node, site: Site) -> str | None:
    """How a resize node differs from the call a site was: not at all, in the version of the code that was surveyed."""
    given = _given(node)
    if any(
        isinstance(given.get(name), fx.Node)
        for name in ("mode", "align_corners", "recompute_scale_factor", "scale_factor")
    ):
        raise NotFaithful(f"site {site.name}: its mode or scale is an argument")
    if given.get("recompute_scale_factor"):
        raise NotFaithful(f"site {site.name}: its scale factor is recomputed at every call")
    found = (given.get("mode", "nearest"), bool(given.get("align_corners")), bool(given.get("antialias")))
    known = (site.mode, site.align_corners, site.antialias)
    if found != known:
        return f"it resizes with {_settings(*found)}, where it had {_settings(*known)}"
    channels = given["input"].meta["value"].shape[1]
    if channels != site.channels:
        return f"it resizes {channels} channels, where it had {site.channels}"
    factor = given.get("scale_factor")
    if given.get("size") is None and factor is not None:
        factors = tuple(map(float, factor)) if isinstance(factor, list | tuple) else (float(factor), float(factor))
        if factors != site.scale:
            return f"it has the scale factor {factor}, where it had {site.scale}"
    return None


def _settings(mode: Any, align_corners: bool, antialias: bool) -> str:
    return f"mode={mode!r}, align_corners={align_corners}" + (", antialias=True" if antialias else "")
