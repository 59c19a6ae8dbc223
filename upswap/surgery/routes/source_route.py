"""The source route: which call expressions of an owner's methods are to be rewritten, by function; `rewrite_calls` does it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import RewriteError
from ...plan.site import Guide, Location, Relay, Site, Step, child_of
from ...probe.callsites.functions import attributes, replaced
from ...probe.callsites.location import is_function
from .guiding import GUIDE, TAKES_GUIDE, Handed, passing
from .rewrite_calls import Detour, Fuse, Hand, Replacement, Resize, recompile
from .runtime import Guided, Target


def source_methods(
    owner: nn.Module, sites: Sequence[Site], handing: Sequence[Site] = (), path: str = ""
) -> dict[str, Any]:
    """What replaces attributes of the owner's class: its methods that lead to swapped resizes, compiled again.

    `handing` are the swapped sites of other modules whose guides the owner, at `path` in the model, hands down.
    """
    passed = [site for site in handing if _relay(site, path) == Relay(path, None)]
    if passed:
        return passing(_next_child(owner, passed, path))
    located = [(site, site.location) for site in sites if site.location is not None]
    wanted = {location.steps for site, location in located if site.swap}
    # A call that is swapped at some of its runs only has kept sites to be counted too.
    chains: dict[tuple[Step, ...], list[tuple[Site, Location]]] = {}
    for site, location in located:
        if location.steps in wanted:
            chains.setdefault(location.steps, []).append((site, location))
    handing_at = _handing(handing, path)
    for steps in handing_at:
        if steps in chains:
            raise RewriteError(f"`{steps[-1].expression}` is a resize at one time and leads to one at another")
    apart = frozenset(location.steps[-1].expression for _, location in located)
    methods: dict[str, Any] = {}
    roots: dict[tuple[str, int], list[tuple[Step, ...]]] = {}
    for steps in (*chains, *handing_at):
        roots.setdefault((steps[0].function, steps[0].ordinal), []).append(steps)
    takes_guide = any(site.swap and site.guide is not None and site.guide.way == "handed" for site in sites) or any(
        _relay(site, path) is not None for site in handing
    )
    for (function, _), inside in roots.items():
        ends = {
            steps: handing_at[steps]
            if steps in handing_at
            else _resize(steps[-1], index, chains[steps], apart, len(steps) - 1)
            for index, steps in enumerate(inside)
        }
        at = {steps: [site for site, _ in chains.get(steps, ())] for steps in inside}
        tree = _replacements(inside, 0, ends, at)
        found = False
        for name, value in attributes(type(owner)):
            new = replaced(value, _recompiler(owner, inside[0][0], tree, len(inside), takes_guide))
            if new is not None:
                methods[name] = new
                found = True
        if not found:
            raise RewriteError(
                f"{type(owner).__qualname__} has no method {function.rpartition('.')[2]} of its own to rewrite"
            )
    return {**methods, TAKES_GUIDE: True} if takes_guide else methods


def _next_child(owner: nn.Module, handed: Sequence[Site], path: str) -> str:
    """The name of the child that a module on the way hands guides on to."""
    names = {".".join(_below(site, path)) for site in handed}
    if len(names) > 1 or type(owner).forward is not nn.Sequential.forward or names.isdisjoint(owner._modules):
        raise RewriteError(f"{path} is no nn.Sequential that hands one guide on to a child")
    return names.pop()


def _handing(sites: Sequence[Site], path: str) -> dict[tuple[Step, ...], Hand]:
    """The calls in which a module hands guides to children, by the ways that lead to them."""
    found: dict[tuple[Step, ...], list[Site]] = {}
    for site in sites:
        calling = _relay(site, path) or site.guide
        location = None if calling is None else calling.location
        if location is not None:
            found.setdefault(location.steps, []).append(site)
    hands: dict[tuple[Step, ...], Hand] = {}
    for steps, there in found.items():
        ways = [_binding_at(site, path) for site in there]
        names = tuple(dict.fromkeys(name for name, _ in ways))
        targets = [
            Handed(_below(site, path), names.index(name), keys) for site, (name, keys) in zip(there, ways, strict=True)
        ]
        if len({target.child for target in targets}) < len(targets):
            raise RewriteError(f"`{steps[-1].expression}` would hand two guides to one module")
        hands[steps] = Hand(steps[-1], targets, names, ", ".join(site.name for site in there))
    return hands


def _relay(site: Site, path: str) -> Relay | None:
    """What hands a site's guide on at a path; None where nothing does, or what hands it down first."""
    return None if site.guide is None else next((relay for relay in site.guide.through if relay.path == path), None)


def _binding_at(site: Site, path: str) -> tuple[str, tuple[Any, ...]]:
    """The name that leads to a site's guide in the code of the module at a path, and the keys after it."""
    if site.guide is None or _relay(site, path) is not None:
        return GUIDE, ()
    return site.guide.name, site.guide.path


def _below(site: Site, path: str) -> tuple[str, ...]:
    """The path, from the module at `path` on, of the next that a site's guide is handed to."""
    way = (*site.handed_by, site.owner)
    child = way[way.index(path) + 1]
    if path and not child.startswith(f"{path}."):
        raise RewriteError(f"{child} is not in {path}, which calls it")
    return tuple((child.removeprefix(f"{path}.") if path else child).split("."))


def _recompiler(
    owner: nn.Module, step: Step, tree: list[Replacement], counters: int, takes_guide: bool
) -> Callable[[types.FunctionType], types.FunctionType | None]:
    def change(function: types.FunctionType) -> types.FunctionType | None:
        module = function.__globals__.get("__name__", "")
        if step.function != function.__code__.co_qualname or not is_function(step, function.__code__, module):
            return None
        return recompile(function, owner, tree, counters, takes_guide)

    return change


def _fuses(sites: Iterable[Site], level: int) -> list[Fuse]:
    """The expressions in the function of the step number `level` where results of swapped sites are fused with their guides."""
    found: dict[Step, list[str]] = {}
    for site in sites:
        guide = site.guide if site.swap else None
        if guide is not None and guide.fusing is not None and guide.level == level:
            found.setdefault(guide.fusing, []).append(site.name)
    return [Fuse(step, tuple(names)) for step, names in found.items()]


def _fusings(sites: Iterable[Site], level: int) -> tuple[Step, ...]:
    """The same, by themselves."""
    return tuple(each.step for each in _fuses(sites, level))


def _resize(step: Step, counter: int, runs: list[tuple[Site, Location]], apart: frozenset[str], level: int) -> Resize:
    """One call, in the function of the step number `level`, and what each of its runs goes through."""
    guides = [site.guide for site, _ in runs if site.swap and site.guide is not None]
    names = tuple(dict.fromkeys(_local(guide) for guide in guides if guide.fusing is None))
    fusings = _fusings((site for site, _ in runs), level)
    if runs[0][1].occurrence is None:
        return Resize(step, None, [target_of(runs[0][0], names)], apart, names, fusings)
    occurrences = {location.occurrence or 0: site for site, location in runs}
    targets = [occurrences.get(index) for index in range(1 + max(occurrences))]
    sent = [target_of(site, names) if site is not None and site.swap else None for site in targets]
    return Resize(step, counter, sent, apart, names, fusings)


def _local(guide: Guide) -> str:
    """The name that has a guide, or holds it, in the function with the call."""
    return GUIDE if guide.way == "handed" else guide.name


def _replacements(
    chains: Sequence[tuple[Step, ...]],
    depth: int,
    resizes: Mapping[tuple[Step, ...], Resize | Hand],
    sites: Mapping[tuple[Step, ...], Sequence[Site]],
) -> list[Replacement]:
    """The calls to be replaced in the function that the chains of steps have in common at `depth`; `sites` has those of each."""
    ends = [resizes[steps] for steps in chains if len(steps) == depth + 1]
    detours: dict[Step, dict[tuple[str, str, int], list[tuple[Step, ...]]]] = {}
    for steps in chains:
        if len(steps) > depth + 1:
            after = steps[depth + 1]
            functions = detours.setdefault(steps[depth], {})
            functions.setdefault((after.module, after.function, after.ordinal), []).append(steps)
    return [
        *ends,
        *_fuses((site for steps in chains for site in sites[steps]), depth),
        *(
            Detour(
                step,
                [
                    (group[0][depth + 1], _replacements(group, depth + 1, resizes, sites))
                    for group in functions.values()
                ],
                _fusings((site for group in functions.values() for steps in group for site in sites[steps]), depth),
            )
            for step, functions in detours.items()
        ),
    ]


def target_of(site: Site, names: Sequence[str]) -> Target:
    """What a rewritten call knows of its site; `names` are the locals that it passes."""
    guide, guided = site.guide, None
    if guide is not None:
        local = None if guide.way == "fusion" else names.index(_local(guide))
        # What is handed down is the guide itself.
        guided = Guided(
            guide.channels, local, guide.path if guide.way == "local" else (), guide.operand, guide.fusion == "cat"
        )
    channels = (site.channels, *site.other_channels)
    return Target(site.name, child_of(site), channels, site.mode, site.align_corners, guided)
