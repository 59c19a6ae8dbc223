"""The routes by which an owner's resize calls come to go through upsamplers, and the choice of the first faithful one.

- module: an `nn.Upsample` layer is replaced as a whole (`apply.py` does that).
- graph: the forward is traced by FX (`tracer.py`) and its resize nodes become calls of the upsamplers.
- source: the methods with the calls are compiled again with the call expressions changed (`rewrite_calls.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ...errors import RewriteError, UpswapError
from ...plan.site import Site
from .graph_route import graph_forward
from .kept_methods import attribute, mark
from .refusals import Misfit, NotFaithful
from .scriptable import with_script
from .source_route import source_methods


class Rewriting(NamedTuple):
    """How an owner is rewritten: the route, and the methods that replace its own (none on the module route)."""

    route: str
    methods: dict[str, Any]


def rewrite_owner(
    owner: nn.Module, sites: Sequence[Site], forward: Any, handing: Sequence[Site] = (), path: str = ""
) -> Rewriting:
    """The first faithful route for an owner's swapped sites. The owner is not changed.

    `sites` are all sites of the owner; `forward` describes one run of it, as the probe saw it. `handing` are the swapped sites of
    other modules whose guides the owner, at `path` in the model, hands down. Raises `RewriteError` where no route is faithful.
    """
    if handing or any(site.swap and site.guide is not None for site in sites):
        return _rewriting("source", owner, sites, source_methods(owner, sites, handing, path), guided=True)
    if all(site.op == "module" for site in sites):
        return Rewriting("module", {})
    if any(site.other_channels for site in sites):
        return _rewriting("source", owner, sites, source_methods(owner, sites))
    try:
        return _rewriting("graph", owner, sites, {"forward": graph_forward(owner, sites, forward)})
    except NotFaithful:
        return _rewriting("source", owner, sites, source_methods(owner, sites))


def _rewriting(
    route: str, owner: nn.Module, sites: Sequence[Site], methods: dict[str, Any], *, guided: bool = False
) -> Rewriting:
    scripted: dict[str, Any] = {}
    for name, new in methods.items():
        original = attribute(type(owner), name)
        mark(new, original)
        scripted |= with_script(new, original, owner, sites, len(scripted), guided=guided)
    return Rewriting(route, methods | scripted)


def replay_owner(
    owner: nn.Module, sites: Sequence[Site], forward: Any, handing: Sequence[Site] = (), path: str = ""
) -> Rewriting:
    """`rewrite_owner` for sites of a Plan made before, perhaps of another version of the owner's class.

    Raises `Misfit` with each swapped site that is not as the Plan knew it.
    """
    swapped = [site for site in sites if site.swap]
    if swapped and swapped[0].op == "module":
        cause = _unlike_layer(owner, swapped[0])
        if cause is not None:
            raise Misfit({swapped[0].name: cause})
    try:
        return rewrite_owner(owner, sites, forward, handing, path)
    except Misfit:
        raise
    except RewriteError as error:
        causes: dict[str, str] = {}
        for site in swapped[:_MOST_CAUSES]:
            try:
                source_methods(owner, [site])
            except RewriteError as alone:
                causes[site.name] = str(alone)
        unknown = swapped[_MOST_CAUSES:] if causes else [*swapped, *handing]
        raise Misfit(causes | dict.fromkeys((site.name for site in unknown), str(error))) from error
    except UpswapError:
        raise
    except _DAMAGE as error:
        cause = f"its description in the plan is damaged ({type(error).__name__}: {error})"
        raise Misfit(dict.fromkeys((site.name for site in (*swapped, *handing)), cause)) from error


# How many sites of an owner are looked at each by itself; a module of a model has a few.
_MOST_CAUSES = 100

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
