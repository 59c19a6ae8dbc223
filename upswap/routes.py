"""The routes by which an owner's resize calls come to go through upsamplers, and the choice of the first faithful one.

- module: an `nn.Upsample` layer is replaced as a whole (`rewrite.py` does that).
- graph: the forward is traced by FX (`tracer.py`) and its resize nodes become calls of the upsamplers.
- source: the methods with the calls are compiled again with the call expressions changed (`recompile.py`).
"""

from __future__ import annotations

import keyword
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from .errors import PlanError, RewriteError, UpswapError
from .locate import is_function
from .recompile import Detour, Replacement, Resize, recompile
from .runtime import Target
from .sites import Location, Site, Step
from .straight import NotFaithful
from .tracer import trace
from .wrapped import attributes, replaced


class Rewriting(NamedTuple):
    """How an owner is rewritten: the route, and the methods that replace its own (none on the module route)."""

    route: str
    methods: dict[str, Any]


def rewrite_owner(owner: nn.Module, sites: Sequence[Site], forward: Any) -> Rewriting:
    """The first faithful route for an owner's swapped sites. The owner is not changed.

    `sites` are all sites of the owner; `forward` describes one run of it, as the probe saw it. Raises `RewriteError` where
    no route is faithful.
    """
    if all(site.op == "module" for site in sites):
        return Rewriting("module", {})
    if any(site.other_channels for site in sites):
        return Rewriting("source", source_methods(owner, sites))
    try:
        return Rewriting("graph", {"forward": graph_forward(owner, sites, forward)})
    except NotFaithful:
        return Rewriting("source", source_methods(owner, sites))


class Misfit(RewriteError):
    """An owner is not as a Plan made before knew it; `causes` has the sites that do not fit."""

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {cause}" for name, cause in causes.items()))
        self.causes = dict(causes)


def replay_owner(owner: nn.Module, sites: Sequence[Site], forward: Any) -> Rewriting:
    """`rewrite_owner` for sites of a Plan made before, perhaps of another version of the owner's class.

    Raises `Misfit` with each swapped site that is not as the Plan knew it.
    """
    swapped = [site for site in sites if site.swap]
    if swapped[0].op == "module":
        cause = _unlike_layer(owner, swapped[0])
        if cause is not None:
            raise Misfit({swapped[0].name: cause})
    try:
        return rewrite_owner(owner, sites, forward)
    except Misfit:
        raise
    except RewriteError as error:
        causes: dict[str, str] = {}
        for site in swapped:
            try:
                source_methods(owner, [site])
            except RewriteError as alone:
                causes[site.name] = str(alone)
        raise Misfit(causes or dict.fromkeys((site.name for site in swapped), str(error))) from error
    except UpswapError:
        raise
    except _DAMAGE as error:
        cause = f"its description in the plan is damaged ({type(error).__name__}: {error})"
        raise Misfit(dict.fromkeys((site.name for site in swapped), cause)) from error


# What making values from a damaged description raises.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)


def _unlike_layer(layer: nn.Module, site: Site) -> str | None:
    """How an `nn.Upsample` differs from the one a site was."""
    factor = getattr(layer, "scale_factor", None)
    factors = tuple(factor) if isinstance(factor, tuple | list) else (factor, factor)
    found = (getattr(layer, "mode", None), bool(getattr(layer, "align_corners", None)), factors)
    known = (site.mode, site.align_corners, site.scale)
    if found == known and getattr(layer, "size", None) is None:
        return None
    return (
        f"the layer is now {layer}, where it had mode={known[0]!r}, align_corners={known[1]}, scale_factor={known[2]}"
    )


def source_methods(owner: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
    """What replaces attributes of the owner's class: its methods that lead to swapped resizes, compiled again."""
    located = [(site, site.location) for site in sites if site.location is not None]
    wanted = {location.steps for site, location in located if site.swap}
    # A call that is swapped at some of its runs only has kept sites to be counted too.
    chains: dict[tuple[Step, ...], list[tuple[Site, Location]]] = {}
    for site, location in located:
        if location.steps in wanted:
            chains.setdefault(location.steps, []).append((site, location))
    methods: dict[str, Any] = {}
    roots: dict[tuple[str, int], list[tuple[Step, ...]]] = {}
    for steps in chains:
        roots.setdefault((steps[0].function, steps[0].ordinal), []).append(steps)
    for (function, _), inside in roots.items():
        resizes = {steps: _resize(steps[-1], index, chains[steps]) for index, steps in enumerate(inside)}
        tree = _replacements(inside, 0, resizes)
        found = False
        for name, value in attributes(type(owner)):
            new = replaced(value, _recompiler(owner, inside[0][0], tree, len(inside)))
            if new is not None:
                methods[name] = new
                found = True
        if not found:
            raise RewriteError(
                f"{type(owner).__qualname__} has no method {function.rpartition('.')[2]} of its own to rewrite"
            )
    return methods


def _recompiler(
    owner: nn.Module, step: Step, tree: list[Replacement], counters: int
) -> Callable[[types.FunctionType], types.FunctionType | None]:
    def change(function: types.FunctionType) -> types.FunctionType | None:
        module = function.__globals__.get("__name__", "")
        if step.function != function.__code__.co_qualname or not is_function(step, function.__code__, module):
            return None
        return recompile(function, owner, tree, counters)

    return change


def _resize(step: Step, counter: int, runs: list[tuple[Site, Location]]) -> Resize:
    """One call, and what each of its runs goes through."""
    if runs[0][1].occurrence is None:
        return Resize(step, None, [target_of(runs[0][0])])
    occurrences = {location.occurrence or 0: site for site, location in runs}
    targets = [occurrences.get(index) for index in range(1 + max(occurrences))]
    return Resize(step, counter, [target_of(site) if site is not None and site.swap else None for site in targets])


def _replacements(
    chains: Sequence[tuple[Step, ...]], depth: int, resizes: Mapping[tuple[Step, ...], Resize]
) -> list[Replacement]:
    """The calls to be replaced in the function that the chains of steps have in common at `depth`."""
    ends = [resizes[steps] for steps in chains if len(steps) == depth + 1]
    detours: dict[Step, dict[tuple[str, str, int], list[tuple[Step, ...]]]] = {}
    for steps in chains:
        if len(steps) > depth + 1:
            after = steps[depth + 1]
            functions = detours.setdefault(steps[depth], {})
            functions.setdefault((after.module, after.function, after.ordinal), []).append(steps)
    return [
        *ends,
        *(
            Detour(
                step,
                [(group[0][depth + 1], _replacements(group, depth + 1, resizes)) for group in functions.values()],
            )
            for step, functions in detours.items()
        ),
    ]


def target_of(site: Site) -> Target:
    """What a rewritten call knows of its site."""
    return Target(site.name, child_of(site), (site.channels, *site.other_channels), site.mode, site.align_corners)


def child_of(site: Site) -> str:
    """The name of a site's upsampler in its owner.

    Raises `PlanError` for what is no plain name: a plan may come from a stranger's file, and names become code.
    """
    name = (site.module or "").rpartition(".")[2]
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
    locations = [site.location for site in sites if site.location is not None]
    if any(len(location.steps) > 1 or location.function.rpartition(".")[2] != "forward" for location in locations):
        raise NotFaithful("the resize stands outside its forward")
    tensor = next(iter((*owner.parameters(), *owner.buffers())), None)
    device = "cpu" if tensor is None else tensor.device
    graph = trace(owner, forward, torch.device(device))
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target is F.interpolate]
    if len(nodes) != len(sites):
        raise NotFaithful(f"the graph has {len(nodes)} resize calls, the probe saw {len(sites)}")
    causes: dict[str, str] = {}
    for node, site in zip(nodes, sites, strict=True):
        if site.swap:
            unlike = _unlike_node(node, site)
            if unlike is not None:
                causes[site.name] = unlike
            else:
                _call_upsampler(graph, node, site)
    if causes:
        raise Misfit(causes)
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<upswap graph of {type(owner).__qualname__}>", "exec"), namespace)  # noqa: S102 - FX wrote it
    made: types.FunctionType = namespace["forward"]
    for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__"):
        setattr(made, attribute, getattr(type(owner).forward, attribute))
    return made


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
