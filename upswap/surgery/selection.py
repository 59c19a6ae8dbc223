"""Which sites are swapped: kinds, include and exclude patterns, and what the upsampler can take. Every site gets a reason."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from ..errors import FilterError, OptionError
from ..nn.configs import UpsamplerConfig
from ..nn.registry import by_channels, is_guided, make_config
from ..plan.plan import Options, Override
from ..plan.site import Guide, Site
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
    _check_overrides(options.overrides, names)
    decided = tuple(_decide(site, options) for site in sites)
    _check_overrides_reach(options.overrides, decided)
    return decided


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
        # Where it was seen is said of a kept one too; what follows for its upsampler is not.
        return dataclasses.replace(site, swap=False, reason=keep, notes=site.notes if site.seen_in != "eval" else ())
    guided = is_guided(options.upsampler)
    if guided and site.guide is None:
        return without_guide(site, site.no_guide or "it was not looked for", options)
    override = _override_for(site.name, options.overrides)
    values = {**options.config, **(override.options if override is not None else {})}
    config = make_config(options.upsampler, values)
    fitted, notes = config.fit(site, strict=options.strict)
    if site.other_channels:
        for other in by_channels(site)[1:]:
            config.fit(other, strict=options.strict)
        counts = ", ".join(map(str, (site.channels, *site.other_channels)))
        notes = (*notes, f"an upsampler each for {counts} channels")
    if override is not None:
        changed = ", ".join(f"{name}={value}" for name, value in override.options.items())
        notes = (*notes, f"{changed} by the override {override.sites!r}")
    guide = site.guide if guided else None
    if guide is not None:
        notes = (_guided(guide), *notes)
    site = dataclasses.replace(site, guide=guide, no_guide=site.no_guide if guided else "", upsampler=None)
    return _swapped(site, config, fitted, notes)


def without_guide(site: Site, why: str, options: Options) -> Site:
    """The site swapped for the upsampler that sites without a guide get; `OptionError` with `strict`."""
    if options.strict:
        raise OptionError(
            f"{site.name}: {options.upsampler} takes a guide, and the site has none: {why}; exclude the site, or drop strict"
        )
    config = make_config(options.unguided, {})
    fitted, notes = config.fit(site)
    bare = dataclasses.replace(site, guide=None, no_guide=why, upsampler=options.unguided)
    return _swapped(bare, config, fitted, (f"{options.unguided}, without a guide: {why}", *notes))


def _swapped(site: Site, config: UpsamplerConfig, fitted: UpsamplerConfig, notes: Iterable[str]) -> Site:
    return dataclasses.replace(
        site,
        swap=True,
        config=dataclasses.asdict(config),
        settings=dataclasses.asdict(fitted),
        notes=(*site.notes, *notes),
    )


def _guided(guide: Guide) -> str:
    """A guide in words."""
    where = {
        "fusion": f"where the two are fused: {guide.place}",
        "local": f"by {guide.place}",
        "handed": f"by {guide.place} of {guide.holder or 'the model'}",
    }
    what = " with what the fused one is computed from" if guide.source else ""
    return f"guided {where[guide.way]}{what} ({guide.channels} channels)"


def _override_for(name: str, overrides: Sequence[Override]) -> Override | None:
    """The override for a site: one with its exact name, else the first whose pattern matches."""
    exact = [override for override in overrides if override.sites == name]
    return next(iter([*exact, *(o for o in overrides if _matches(o, name))]), None)


def _matches(override: Override, name: str) -> bool:
    pattern = override.sites
    return pattern == name or (pattern.startswith("re:") and re.fullmatch(pattern[3:], name) is not None)


def _check_overrides(overrides: Sequence[Override], names: Sequence[str]) -> None:
    """`FilterError` for an override whose pattern is none, or matches no site."""
    for override in overrides:
        pattern = override.sites
        try:
            matched = any(_matches(override, name) for name in names)
        except re.error as error:
            raise FilterError(f"override {pattern!r}: {pattern[3:]!r} is no regular expression: {error}") from error
        if not matched:
            near = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=3, cutoff=0.3) or list(names[:3])
            raise FilterError(
                f"override {pattern!r} matches none of the {len(names)} sites"
                + (f"; near it: {', '.join(near)}" if near else "")
                + ". It takes the exact name of a site, as `upswap inspect` lists them, or re: and a regular expression"
            )


def _check_overrides_reach(overrides: Sequence[Override], sites: Sequence[Site]) -> None:
    """`FilterError` for an override whose sites are all kept: what was asked for would be lost without a word."""
    for override in overrides:
        matched = [site for site in sites if _matches(override, site.name)]
        if not any(site.swap and site.upsampler is None for site in matched):
            why = "; ".join(f"{site.name}: {site.why}" for site in matched[:3])
            what = "are kept" if not any(site.swap for site in matched) else "have no guide"
            raise FilterError(f"override {override.sites!r} is for sites that {what}: {why}")


def _why_kept(site: Site, options: Options) -> str | None:
    """Why a site is kept, None where it is swapped. A table written as code: the first rule that fits."""
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
