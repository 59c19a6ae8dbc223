"""Which sites are swapped: kinds, include and exclude patterns, and what the upsampler can take. Every site gets a reason."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from ..errors import FilterError
from ..nn.factories import dysample_settings
from ..plan.plan import Options
from ..plan.site import Site
from ..probe.kinds import MODES

#: Kinds an upsampler can stand in for; the others are never swapped, and `kinds=` that names one says why at the site.
SWAPPABLE = ("feature", "logits", "gate", "context")


def select(sites: Sequence[Site], options: Options) -> tuple[Site, ...]:
    """The same sites, each with `swap`, `reason` and, where swapped, the upsampler's `settings`.

    Raises `FilterError` for a pattern that matches no site.
    """
    names = [site.name for site in sites]
    check_patterns("include", options.include, names)
    check_patterns("exclude", options.exclude, names)
    return tuple(_decide(site, options) for site in sites)


def check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """`FilterError` for each pattern that matches none of the names, with the nearest of them."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or list(names[:3])
            raise FilterError(
                f"{option} pattern {pattern!r} matches none of the {len(names)} sites"
                + (f"; near it: {', '.join(near)}" if near else "")
                + ". The names are those that `upswap inspect` lists; * matches any part of one."
            )


def _decide(site: Site, options: Options) -> Site:
    keep = _why_kept(site, options)
    if keep is not None:
        return dataclasses.replace(site, swap=False, reason=keep)
    if options.upsampler != "dysample":
        return dataclasses.replace(site, swap=True)
    settings, notes = dysample_settings(site, options)
    if site.other_channels:
        counts = ", ".join(map(str, (site.channels, *site.other_channels)))
        notes.append(f"an upsampler each for {counts} channels")
    return dataclasses.replace(site, swap=True, reason="; ".join([site.reason, *notes]), settings=settings)


def _why_kept(site: Site, options: Options) -> str | None:
    if site.kind not in SWAPPABLE or site.kind not in options.kinds:
        return site.reason
    if options.include and not any(fnmatch.fnmatchcase(site.name, pattern) for pattern in options.include):
        return "not included"
    excluded = next((p for p in options.exclude if fnmatch.fnmatchcase(site.name, p)), None)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if site.antialias or site.mode not in MODES:
        return f"mode {site.mode!r}{' with antialias' if site.antialias else ''} has no sampling equivalent"
    if min(site.scale) < 1 or max(site.scale) <= 1:
        return "does not make its input larger at the example size"
    if site.kind == "context" and site.fixed_ratio is not True:
        return f"{site.reason}; no fixed ratio to learn an upsampler for"
    return None
