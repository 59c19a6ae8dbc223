"""The weights of a patched model that was trained, given back to the model patched in the same way.

A state dict does not say how its model was patched; its tensors do. Where they are not those of the plan at hand, the
options of `patch` are looked for that make it the same, and the message says what to type in place of what.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import FilterError, SourceError
from ..nn.configs import option_types
from ..nn.registry import config_class, make_upsampler
from ..nn.state_dicts import options_in, shapes_at, upsamplers_in
from ..plan.plan import Options, Override, Plan
from ..plan.site import Site
from ..probe.callsites.class_code import is_resize_layer
from ..shown import listed, one_line
from ..surgery.selection import SWAPPABLE, select
from .formats import upsamplers as alone
from .state_dict import assign, below
from .weights import Weights

_NO_OPTIONS = (
    "No options of the patch make the same upsamplers: the weights are of another model, or of upsamplers of a package that is "
    "not imported"
)

#: What to type for an option, on the command line and in Python.
_Typed = tuple[str, str]

#: The name of an upsampler, and its options.
Way = tuple[str, Mapping[str, Any]]


def give_trained(model: nn.Module, plan: Plan, weights: Weights) -> Weights:
    """Load weights with those of upsamplers into the patched `model`; what is said of them has the number.

    Raises:
        SourceError: the upsamplers are not those of `plan`; each that differs is named, with what to give or to leave out.
    """
    if weights.plan is not None:
        alone.put(model, weights.plan, weights.tensors, weights.path)
        return weights
    lines = differing(model, plan, weights)
    if lines:
        raise SourceError(
            f"{weights.path} holds the weights of a patched {type(model).__name__}, which was patched in another way:",
            *lines,
        )
    try:
        assign(model, weights.tensors, weights.path)
    except SourceError as error:
        advice = _advice(plan.options, _Patched(model, plan, weights).options())
        if not advice:
            raise
        raise SourceError(*error.args, *advice) from error
    said = f"{len(weights.added)} of them of {len(plan.swapped)} upsamplers"
    return dataclasses.replace(weights, taken=f"{weights.taken}, {said}")


def differing(model: nn.Module, plan: Plan, weights: Weights) -> list[str]:
    """What tells the upsamplers in the weights from those of a plan for `model`, line by line, and what to give for them."""
    patched = _Patched(model, plan, weights)
    lines = patched.differences()
    return [*lines, *(_advice(plan.options, patched.options()) or [_NO_OPTIONS])] if lines else []


class _Patched:
    """The patched model that weights are of, as far as their tensors show it beside the plan of another."""

    def __init__(self, model: nn.Module, plan: Plan, weights: Weights) -> None:
        self._model = model
        self._plan = plan
        self._rest = {name: weights.tensors[name] for name in weights.added}
        #: The tensors of upsamplers by the names of their sites, and the paths of those that are at none.
        self._inside: dict[str, dict[str, Any]] = {}
        self._elsewhere: list[str] = []
        for site in plan.swapped:
            self._take(site.name, site.module or "")
        self._lost = [site for site in plan.swapped if site.name not in self._inside]
        for path in upsamplers_in(self._rest):
            kept = next((site for site in plan.kept if _may_hold(site, path, plan)), None)
            if kept is None:
                self._elsewhere.append(path)
            self._take(None if kept is None else kept.name, path)

    def _take(self, name: str | None, path: str) -> None:
        """The tensors below a path, out of the rest, are those at the site of this name."""
        there = below(path, self._rest)
        self._rest = {key: tensor for key, tensor in self._rest.items() if not key.startswith(f"{path}.")}
        if there and name is not None:
            self._inside[name] = there

    def differences(self) -> list[str]:
        """What tells the upsamplers in the weights from those of the plan, by names and shapes, line by line."""
        plan = self._plan
        lines: list[str] = []
        other = [
            site.name
            for site in plan.swapped
            if site not in self._lost
            and shapes_at(site, plan.upsampler_of(site), site.config) != _shapes(self._inside[site.name])
        ]
        if other:
            lines.append(f"  the upsamplers have other tensors at {listed(other)}")
        if self._lost:
            lines.append(f"  it has no upsampler at {listed([site.name for site in self._lost])}")
        for site in plan.kept:
            if site.name in self._inside:
                what = f"kept: {site.why}" if site.kind in plan.options.kinds else site.kind
                lines.append(f"  it has an upsampler at {site.name}, which is {what}")
        lines += [
            f"  it has an upsampler at {one_line(path)}, where this patch has no site" for path in self._elsewhere
        ]
        if self._rest:
            lines.append(f"  unexpected: {listed([*self._rest])}")
        return lines

    def options(self) -> Options:
        """The options of `patch` that make upsamplers of these tensors, as near to those of the plan as there are any."""
        # What would be an error under `strict` is no reason to say nothing.
        asked = dataclasses.replace(self._plan.options, strict=False)
        more = self._elsewhere or any(site.name in self._inside for site in self._plan.kept)
        if self._lost and (more if asked.share_layers else any(map(self._is_layer, self._elsewhere))):
            # The sites are others then, and what else differs shows when these are known.
            return dataclasses.replace(asked, share_layers=not asked.share_layers)
        return self._configured(self._selecting(asked))

    def _is_layer(self, path: str) -> bool:
        """Whether the upsampler at a path is in the place of a layer, or one of several there for a number of channels each."""
        modules = dict(self._model.named_modules())
        return any(is_resize_layer(modules.get(place)) for place in (path, path.rpartition(".")[0]))

    def _selecting(self, asked: Options) -> Options:
        """The options with kinds and patterns that select the sites of the upsamplers."""
        sites = self._plan.sites
        wanted = [site for site in sites if site.name in self._inside and site.kind in SWAPPABLE]
        names = [site.name for site in wanted]
        missed = [name for name in names if not _matched(name, asked.include)] if asked.include else []
        options = dataclasses.replace(
            asked,
            kinds=tuple(dict.fromkeys((*asked.kinds, *(site.kind for site in wanted)))),
            include=(*asked.include, *map(glob.escape, missed)),
            exclude=tuple(pattern for pattern in asked.exclude if not any(_matched(name, [pattern]) for name in names)),
        )
        # A site that the options asked for select, and that is kept all the same, cannot be rewritten.
        refused = _selected(sites, asked) - {site.name for site in self._plan.swapped}
        unwanted = sorted(_selected(sites, options) - refused - self._inside.keys())
        return dataclasses.replace(options, exclude=(*options.exclude, *map(glob.escape, unwanted)))

    def _configured(self, options: Options) -> Options:
        """The options with an upsampler whose tensors, at the sites that they select, are those in the weights."""
        try:
            sites = select(self._plan.sites, options)
        except FilterError:  # an override is for sites that are not selected any more
            options = dataclasses.replace(options, overrides=())
            sites = select(self._plan.sites, options)
        sites = tuple(site for site in sites if site.swap and site.name in self._inside)
        asked = (options.upsampler, options.config)
        other = [site for site in sites if not self._takes(site, site.upsampler or options.upsampler, site.config)]
        if not other:
            return options
        ways = [
            way for way in self._ways(other[0], options.upsampler) if all(self._takes(site, *way) for site in sites)
        ]
        if ways:
            name, config = min(ways, key=lambda way: distance(asked, way))
            return dataclasses.replace(options, upsampler=name, config=config, overrides=())
        overrides = []
        for site in sites:
            ways = [(options.upsampler, site.config)]
            if site in other:
                ways = [way for way in self._ways(site, options.upsampler) if way[0] == options.upsampler]
            other_options = changed(asked, min(ways, key=lambda way: distance(asked, way))) if ways else {}
            if other_options:
                overrides.append(Override(site.name, other_options))
        return dataclasses.replace(options, overrides=tuple(overrides))

    def _ways(self, site: Site, upsampler: str) -> list[Way]:
        return [way for way in options_in(site, _shapes(self._inside[site.name]), upsampler) if self._takes(site, *way)]

    def _takes(self, site: Site, upsampler: str, config: Mapping[str, Any]) -> bool:
        """Whether an upsampler with these options loads the tensors at a site, their values too."""
        tensors = self._inside[site.name]
        return (
            shapes_at(site, upsampler, config) == _shapes(tensors)
            and loaded(site, upsampler, config, tensors) is not None
        )


def loaded(site: Site, upsampler: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module | None:
    """The upsampler with these options at a site, and these tensors; None where it refuses them."""
    made = make_upsampler(dataclasses.replace(site, config=config), upsampler)
    try:
        made.load_state_dict(dict(tensors))
    except RuntimeError:
        return None
    return made


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _matched(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _selected(sites: Sequence[Site], options: Options) -> set[str]:
    """The names of the sites that options select."""
    return {site.name for site in select(sites, dataclasses.replace(options, overrides=())) if site.swap}


def changed(asked: Way, way: Way) -> dict[str, Any]:
    """The options that differ from what was asked; of another upsampler, from its defaults."""
    base = asked[1] if way[0] == asked[0] else _defaults(way[0])
    return {key: value for key, value in way[1].items() if base.get(key) != value}


def distance(asked: Way, way: Way) -> tuple[int, int]:
    """How much there is to type or to leave out; what is left out is better."""
    return len(changed(asked, way)), sum(value != _defaults(way[0])[key] for key, value in way[1].items())


def _defaults(upsampler: str) -> dict[str, Any]:
    return dataclasses.asdict(config_class(upsampler)())


def _may_hold(site: Site, path: str, plan: Plan) -> bool:
    """Whether an upsampler at this path is one of a kept site: at its owner's place, or in it."""
    above, _, last = path.rpartition(".")
    alone = sum(other.owner == site.owner for other in plan.sites) == 1
    return path == site.owner or (above == site.owner and last == ("upsample" if alone else f"upsample_{site.ordinal}"))


# -- options as they are typed --------------------------------------------------------------------------------------------


def _advice(asked: Options, wanted: Options) -> list[str]:
    """What to type to have the options `wanted`, where `asked` was typed; no line where that is the same."""
    before, after = _typed(asked), _typed(wanted)
    given = [typed for typed in after if typed not in before]
    left = [typed for typed in before if typed not in after]
    if not given and not left:
        return []
    line, python = (
        f"{_all(given, form)} in place of {_all(left, form)}" if given and left else _all(given or left, form)
        for form in (0, 1)
    )
    return [f"{'Give' if given else 'Leave out'} {line} (in Python: {python})"]


def _all(typed: Sequence[_Typed], form: int) -> str:
    return (" ", ", ")[form].join(one[form] for one in typed)


def _typed(options: Options) -> list[_Typed]:
    """Options that are not the defaults, as they are typed on the command line, and in Python."""
    name, typed = options.upsampler, []
    if name != Options.upsampler:
        typed.append((f"--upsampler {name}", f"upsampler={name!r}"))
    own = option_types(config_class(name)) if name == Options.upsampler else {}  # the default's have flags of their own
    for key, value in changed((name, _defaults(name)), (name, options.config)).items():
        flag = f"--{key.replace('_', '-')}"
        shown = (
            f"--set {shlex.quote(f'{key}={value}')}" if key not in own else flag if value is True else f"{flag} {value}"
        )
        typed.append((shown, f"{key}={value!r}"))
    for several, flag in (("kinds", "--kind"), ("include", "--include"), ("exclude", "--exclude")):
        values = getattr(options, several)
        if values != getattr(Options, several):
            typed.append((" ".join(f"{flag} {shlex.quote(value)}" for value in values), f"{several}={list(values)}"))
    if options.overrides:
        changes = [
            f"--override {shlex.quote(one.sites)} {shlex.quote(','.join(f'{key}={value}' for key, value in one.options.items()))}"
            for one in options.overrides
        ]
        typed.append((" ".join(changes), f"overrides={ {one.sites: dict(one.options) for one in options.overrides} }"))
    if options.unguided != Options.unguided:
        typed.append((f"--unguided {options.unguided}", f"unguided={options.unguided!r}"))
    if options.share_layers:
        typed.append(("--share-layers", "share_layers=True"))
    return typed
