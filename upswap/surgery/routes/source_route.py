"""The source route: which call expressions of an owner's methods are to be rewritten, by function; `rewrite_calls` does it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import RewriteError
from ...plan.site import Location, Site, Step, child_of
from ...probe.callsites.functions import attributes, replaced
from ...probe.callsites.location import is_function
from .rewrite_calls import Detour, Replacement, Resize, recompile
from .runtime import Target


def source_methods(owner: nn.Module, sites: Sequence[Site]) -> dict[str, Any]:
    """What replaces attributes of the owner's class: its methods that lead to swapped resizes, compiled again."""
    located = [(site, site.location) for site in sites if site.location is not None]
    wanted = {location.steps for site, location in located if site.swap}
    # A call that is swapped at some of its runs only has kept sites to be counted too.
    chains: dict[tuple[Step, ...], list[tuple[Site, Location]]] = {}
    for site, location in located:
        if location.steps in wanted:
            chains.setdefault(location.steps, []).append((site, location))
    apart = frozenset(location.steps[-1].expression for _, location in located)
    methods: dict[str, Any] = {}
    roots: dict[tuple[str, int], list[tuple[Step, ...]]] = {}
    for steps in chains:
        roots.setdefault((steps[0].function, steps[0].ordinal), []).append(steps)
    for (function, _), inside in roots.items():
        resizes = {steps: _resize(steps[-1], index, chains[steps], apart) for index, steps in enumerate(inside)}
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


def _resize(step: Step, counter: int, runs: list[tuple[Site, Location]], apart: frozenset[str]) -> Resize:
    """One call, and what each of its runs goes through."""
    if runs[0][1].occurrence is None:
        return Resize(step, None, [target_of(runs[0][0])], apart)
    occurrences = {location.occurrence or 0: site for site, location in runs}
    targets = [occurrences.get(index) for index in range(1 + max(occurrences))]
    sent = [target_of(site) if site is not None and site.swap else None for site in targets]
    return Resize(step, counter, sent, apart)


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
