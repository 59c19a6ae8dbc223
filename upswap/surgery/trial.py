"""Does rewriting an owner change anything by itself, and is each of its sites reached? Asked with the original resize as
a stand-in.

Where a site is reached through other functions, whether their rewritten form is the one that runs depends on how they are
called; a run tells.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import UpswapWarning
from ..nn.sampling import positions as sampling
from ..plan.site import Location, Site, child_of
from ..probe.observe import Observation, run_again
from ..probe.preserve import leaving_no_trace
from .routes.choose import Rewriting
from .routes.kept_methods import kept_functions, rebind


class _StandIn(nn.Module):
    """The original resize in an upsampler's place; it tells when it runs.

    It does not keep that itself, because the run leaves no trace on it either.
    """

    def __init__(self, site: Site, reached: Callable[[str], None]) -> None:
        super().__init__()
        self.site = site
        self.reached = reached

    def forward(
        self, x: torch.Tensor, size: Any = None, scale_factor: Any = None, guide: torch.Tensor | None = None
    ) -> torch.Tensor:
        if (guide is None) == (self.site.guide is None):
            self.reached(self.site.name)
        mode: Any = self.site.mode  # of a site to swap, one of `sampling.MODES`
        return sampling.Mapping(mode, self.site.align_corners).resize(x, size, scale_factor)


def doubtful(model: nn.Module, owners: Mapping[str, Sequence[Site]]) -> dict[str, Sequence[Site]]:
    """The owners with a swapped site that is reached through other functions, or in one that is kept as a value or is not
    the forward, or that has a guide.

    Whether the rewritten form is the one that runs, depends on how such a function is called.
    """
    kept = kept_functions(model)
    handing = {path for sites in owners.values() for site in sites if site.swap for path in site.handed_by}
    return {
        path: sites
        for path, sites in owners.items()
        if path in handing
        or any(site.swap and site.location is not None and _is_doubtful(site.location, kept) for site in sites)
        or any(site.swap and site.guide is not None for site in sites)
    }


def _is_doubtful(location: Location, kept: Collection[str]) -> bool:
    return len(location.steps) > 1 or location.function in kept or not location.function.endswith(".forward")


def unproved(
    model: nn.Module,
    owners: Mapping[str, Sequence[Site]],
    rewritings: Mapping[str, Rewriting],
    runs: Sequence[Observation],
    *,
    must_reach: bool = True,
) -> dict[str, str]:
    """The sites of rewritten owners that the original runs do not reach when rewritten, and why they cannot be swapped.

    `runs` are the observed ones in eval mode and, where there was one, in train mode. Without `must_reach` they may have taken
    another branch than the one with the site. The model is left as found.
    """
    reached: set[str] = set()
    stand_ins = {path: [_StandIn(site, reached.add) for site in sites if site.swap] for path, sites in owners.items()}
    for site in [module.site for modules in stand_ins.values() for module in modules]:
        for path in site.handed_by:
            stand_ins.setdefault(path, [])
    with _rewritten(model, stand_ins, rewritings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UpswapWarning)
        changed = not all(_same(seen.outputs, run_again(model, seen)) for seen in runs)
    problems: dict[str, str] = {}
    for path, modules in stand_ins.items():
        for module in modules:
            if changed:
                problems[module.site.name] = f"rewriting {path or 'the model'} changes what the model computes"
            elif must_reach and module.site.name not in reached and module.site.seen_in != "nowhere":
                location = module.site.location
                way = " -> ".join(step.expression for step in location.steps) if location else ""
                problems[module.site.name] = (
                    f"the function it stands in is not called in a way that can be rewritten: {way}"
                    if module.site.guide is None
                    else f"its guide does not come there: {module.site.guide.place}"
                )
    return problems


@contextlib.contextmanager
def _rewritten(
    model: nn.Module, stand_ins: Mapping[str, Sequence[_StandIn]], rewritings: Mapping[str, Rewriting]
) -> Iterator[None]:
    """Inside, the owners run their rewritten methods, with stand-ins that are attributes but no children."""
    with leaving_no_trace(model, training=None):
        for path, modules in stand_ins.items():
            owner = model.get_submodule(path)
            for module in modules:
                owner.__dict__[child_of(module.site)] = module
            owner.__class__ = type(type(owner).__name__, (type(owner),), dict(rewritings[path].methods))
        rebind(model.modules())
        yield


def _same(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> bool:
    return len(expected) == len(got) and all(
        a.shape == b.shape and (_has_no_values(a) or torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(expected, got, strict=True)
    )


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)
