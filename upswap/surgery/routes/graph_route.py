"""The graph route: the owner's forward traced, and the resize nodes replaced by calls of upsamplers."""

from __future__ import annotations

import ast
import keyword
import types
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...plan.site import Site, child_of
from .refusals import Misfit, NotFaithful
from .traceable import unplain_name
from .tracer import trace


def graph_forward(owner: nn.Module, sites: Sequence[Site], forward: Any) -> types.FunctionType:
    """The owner's forward as the code of its FX graph, with the swapped resize nodes calling the upsamplers.

    Raises `NotFaithful` where the graph would not be right for every input.
    """
    _check_traceable(owner, sites, forward)
    tensor = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    graph = trace(owner, forward, device)
    _call_upsamplers(graph, sites)
    return _compile(graph, owner)


def _check_traceable(owner: nn.Module, sites: Sequence[Site], forward: Any) -> None:
    """`NotFaithful` where a trace could not stand for the owner's forward, whatever it shows."""
    odd = unplain_name(owner)
    if odd is not None:
        raise NotFaithful(f"{odd!a} in it is no name that FX could write down")
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

    It is made as a syntax tree, and not as FX would from text: a name in a tree stays a name, whatever is in it.
    """
    writer = _Writer()
    tree = ast.parse("def forward(self): pass")
    definition = cast(ast.FunctionDef, tree.body[0])
    nodes = list(graph.nodes)
    definition.args.args += [ast.arg(str(node.target)) for node in nodes if node.op == "placeholder"]
    definition.body = writer.body(nodes)
    exec(  # noqa: S102
        compile(ast.fix_missing_locations(tree), f"<upswap graph of {type(owner).__qualname__}>", "exec"),
        writer.globals,
    )
    made: types.FunctionType = writer.globals["forward"]
    for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__", "__defaults__"):
        setattr(made, attribute, getattr(type(owner).forward, attribute))
    return made


class _Writer:
    """Syntax trees of the nodes of a graph; `globals` has the functions and constants that they name."""

    def __init__(self) -> None:
        self.globals: dict[str, Any] = {}
        self._attribute = self._named(getattr)
        self._slice = self._named(slice)

    def body(self, nodes: Sequence[fx.Node]) -> list[ast.stmt]:
        """A statement for each node, and one that lets go of the values no later node needs."""
        last = {used: node for node in nodes for used in node.all_input_nodes}
        statements: list[ast.stmt] = []
        for node in nodes:
            if node.op == "output":
                statements.append(ast.Return(self.value(node.args[0])))
                continue
            if node.name != node.target or node.op != "placeholder":
                statements.append(ast.Assign([ast.Name(node.name, ast.Store())], self._made_by(node)))
            done = [used for used in node.all_input_nodes if last[used] is node]
            if done:
                statements.append(ast.Assign([ast.Name(used.name, ast.Store()) for used in done], ast.Constant(None)))
        return statements

    def _made_by(self, node: fx.Node) -> ast.expr:
        if node.op == "placeholder":
            return ast.Name(str(node.target), ast.Load())
        if node.op == "get_attr":
            return self._inside_self(str(node.target))
        given = [self.value(argument) for argument in node.args]
        function: ast.expr
        if node.op == "call_module":
            function = self._inside_self(str(node.target))
        elif node.op == "call_method":
            function = ast.Attribute(given.pop(0), str(node.target), ast.Load())
        else:
            function = self._named(node.target)
        return ast.Call(function, given, [ast.keyword(name, self.value(value)) for name, value in node.kwargs.items()])

    def _inside_self(self, path: str) -> ast.expr:
        found: ast.expr = ast.Name("self", ast.Load())
        for name in path.split("."):
            if name.isidentifier() and not keyword.iskeyword(name):
                found = ast.Attribute(found, name, ast.Load())
            else:  # a number, in a container
                found = ast.Call(self._attribute, [found, ast.Constant(name)], [])
        return found

    def value(self, value: Any) -> ast.expr:
        """An argument of a node."""
        if isinstance(value, fx.Node):
            return ast.Name(value.name, ast.Load())
        if isinstance(value, list | tuple):
            items = [self.value(item) for item in value]
            return ast.List(items, ast.Load()) if isinstance(value, list) else ast.Tuple(items, ast.Load())
        if isinstance(value, dict):
            return ast.Dict([self.value(key) for key in value], [self.value(item) for item in value.values()])
        if value is None or type(value) in (bool, int, float, complex, str, EllipsisType):
            return ast.Constant(value)
        if isinstance(value, slice):
            return ast.Call(self._slice, [self.value(part) for part in (value.start, value.stop, value.step)], [])
        return self._named(value)

    def _named(self, value: Any) -> ast.Name:
        name = f"_upswap_{len(self.globals)}"
        self.globals[name] = value
        return ast.Name(name, ast.Load())


def _call_upsampler(graph: fx.Graph, node: fx.Node, site: Site) -> None:
    """Put a `call_module` of the site's upsampler in the place of a resize node."""
    given = _given(node)
    size = given.get("size")
    # The upsampler was built for the site's own factor.
    positional = (given["input"],) if size is None else (given["input"], size)
    with graph.inserting_before(node):
        call = graph.call_module(child_of(site), positional)
    call.meta = dict(node.meta)  # the next resize may be of this one's output
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
