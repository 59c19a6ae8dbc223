"""From the keyword arguments of `patch` to `Options`: the upsampler's own are told from the rest, and each is checked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import OptionError
from ..nn.configs import UpsamplerConfig
from ..nn.registry import is_guided, make_config, name_of
from ..plan.plan import Options, Override, Plan

#: The options of a Plan that are no upsampler's.
_SHARED = tuple(
    field.name for field in dataclasses.fields(Options) if field.name not in ("upsampler", "config", "overrides")
)


def make_options(
    upsampler: str | UpsamplerConfig = "dysample",
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **given: Any,
) -> Options:
    """The options of a Plan.

    Args:
        upsampler: a name, or a config, which says the name too.
        overrides: for a site's name, or a pattern, the options of the upsampler that differ there.
        given: the other options of `Options`, and those of the upsampler.

    Raises:
        OptionError: no upsampler has that name, or it has no such option, or not with such a value.
    """
    shared = {name: given.pop(name) for name in _SHARED if name in given}
    if isinstance(upsampler, UpsamplerConfig):
        name = name_of(upsampler)
        given = {**dataclasses.asdict(upsampler), **given}
    elif isinstance(upsampler, str):
        name = upsampler
    else:
        raise OptionError(f"upsampler takes a name or a config, got {upsampler!r}")
    config = dataclasses.asdict(make_config(name, given, also=(*_SHARED, "overrides")))
    if is_guided(name) and is_guided(shared.get("unguided", Options.unguided)):
        raise OptionError(
            f"unguided={shared['unguided']!r} takes a guide itself: name one for the sites that have none"
        )
    changes: list[Override] = []
    for sites, options in (overrides or {}).items():
        if not options:
            raise OptionError(f"overrides[{sites!r}] takes the options that differ there, got {options!r}")
        make_config(name, {**config, **options})
        changes.append(Override(sites, dict(options)))
    shared |= {key: _several(shared[key]) for key in ("kinds", "include", "exclude") if key in shared}
    return Options(upsampler=name, config=config, overrides=tuple(changes), **shared)


def check_same_options(
    plan: Plan, given: Mapping[str, Any], path: str, *, alone: bool = False, trust: Iterable[str] = ()
) -> None:
    """`OptionError` where a model in `path`, which is patched as `plan` says, would be patched otherwise with the options given.

    What is not given may be as it is. `alone` says that the upsamplers in `path` have no host there. `trust` is what the file
    was opened with.
    """
    asked, has = make_options(**given), plan.options
    differ: list[str] = []
    for name in given:
        if name == "upsampler":
            wanted: Any = asked.upsampler
            there: Any = has.upsampler
        elif name in asked.config:
            wanted, there = asked.config[name], has.config.get(name)
            made = {site.settings.get(name) for site in plan.swapped}
            there = wanted if made == {wanted} else there  # 4 groups are 4, asked for or not
        else:
            wanted, there = getattr(asked, name), getattr(has, name)
        if wanted != there:
            differ.append(f"{name} is {_shown(there)} there, not {_shown(wanted)}")
    if differ:
        command = ["upswap", "revert", path, *(part for package in trust for part in ("--trust", package))]
        revert = f"; or take the upsamplers out and convert what that writes: {shlex.join(command)}"
        raise OptionError(
            f"{path} is patched already, in another way: {'; '.join(differ)}. Leave the options out{'' if alone else revert}"
        )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "not given"
    if isinstance(value, Override):
        return f"{value.sites} {dict(value.options)}"
    return "not given" if value is None else str(value)


def _several(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())
