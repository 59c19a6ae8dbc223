"""A model's resize calls as `Site`s: observed at one size, and at a second to tell what follows the input's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError, RewriteError
from ..plan.site import Location, Site
from .branches import unreached, with_modules_alike
from .callsites.class_code import is_resize_layer, runs_its_children, training_matters, why_fixed
from .callsites.location import locate
from .callsites.stack import Hop, Place
from .callsites.syntax import asks_for_shapes, other_positions
from .guide_ways import guide_of
from .guides import seen_by_caller
from .inputs.infer import Candidate, candidates
from .inputs.inputs import Inputs, as_inputs
from .inputs.variations import enlarged, training_inputs
from .observe import ModelFailed, Observation, first_that_runs, observe
from .resize_calls import Call, Caller

_UPSAMPLE_MODULES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
#: Layers that make a map larger with weights of their own; a model without resize calls has these.
_LEARNED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.PixelShuffle)


@dataclasses.dataclass
class Survey:
    """What was found: undecided sites, why some cannot be rewritten, and the runs that showed it: in eval mode at one size
    or two, and one in train mode where that matters."""

    sites: list[Site]
    unlocated: dict[str, str]
    runs: tuple[Observation, ...]
    trained: Observation | None
    hints: list[str]

    @property
    def inputs(self) -> Inputs:
        """What the model was run on first."""
        return self.runs[0].inputs

    @property
    def forwards(self) -> dict[str, Any]:
        """The first forward of each owner as plain data."""
        return self.runs[0].forwards


def survey(model: nn.Module, example_inputs: Any = None, *, share: bool = False, guides: bool = False) -> Survey:
    """Find every resize call of `model`, which is left untouched.

    A resize layer that is called from several places has a site at each of them; with `share`, it is one site. With `guides`,
    what each result is fused with is found too.

    Without `example_inputs`, images of growing size are tried until the model runs. A second run at another size tells
    ratios the architecture fixes from ones that follow the input; a model that takes one size only has no second run. A
    model whose own code asks whether it is in train mode is run in train mode too. Raises `InputError` where the model
    runs on none.
    """
    if example_inputs is None:
        first = first_that_runs(model, candidates(model), guides=guides)
    else:
        first = first_that_runs(model, [Candidate(as_inputs(example_inputs))], guides=guides)
    # Wider only, which costs less and shows as much; larger both ways for a model that takes square images only.
    second = _second(model, first, height=False, guides=guides) or _second(model, first, height=True, guides=guides)
    trained, hint = _trained(model, first, guides=guides) if training_matters(model, first.called) else (None, None)
    second, trained = second and as_seen_in(first, second), trained and as_seen_in(first, trained)
    first = with_modules_alike(model, first)
    second, trained = second and with_modules_alike(model, second), trained and with_modules_alike(model, trained)
    if not share:
        apart = _told_apart(model, first, second, trained) | _fused_by_callers(model, first, second, trained)
        first = called_from(first, apart)
        second, trained = second and called_from(second, apart), trained and called_from(trained, apart)
    sites, unlocated = _sites(model, first, second, trained, guides)
    hints = list(filter(None, (hint, _hint_of_unseen(first, trained), unreached(model, first, trained))))
    return Survey(sites, unlocated, (first, second) if second else (first,), trained, hints)


def called_from(run: Observation, layers: Set[str]) -> Observation:
    """The run with the calls that the resize layers at these paths make as those of the code that calls the layers."""
    calls = [
        dataclasses.replace(
            call, owner=call.caller.owner, place=call.caller.place, guide=seen_by_caller(call.guide, call.caller.owner)
        )
        if call.owner in layers and call.caller is not None
        else call
        for call in run.calls
    ]
    return dataclasses.replace(run, calls=calls)


def as_seen_in(first: Observation, run: Observation) -> Observation:
    """The run with the calls that another way of a branch made as those that the first run made in their place."""
    made = {(call.owner, call.place.hops) for call in first.calls}
    if made >= {(call.owner, call.place.hops) for call in run.calls}:
        return run
    ways = {
        (owner, (*hops[:-1], hops[-1]._replace(position=position))): hops
        for owner, hops in made
        if hops
        for position in other_positions(hops[-1].code, hops[-1].position)
    }
    calls = []
    for call in run.calls:
        hops = ways.get((call.owner, call.place.hops)) if (call.owner, call.place.hops) not in made else None
        place = call.place if hops is None else dataclasses.replace(call.place, hops=hops)
        calls.append(dataclasses.replace(call, place=place))
    return dataclasses.replace(run, calls=calls)


def _told_apart(
    model: nn.Module, first: Observation, second: Observation | None, trained: Observation | None
) -> set[str]:
    """The paths of the resize layers whose calls stand at several places that can each be rewritten.

    Such a layer has no weights: nothing but how it was written asks for one upsampler at all of its calls.
    """
    callers: dict[str, set[Caller | None]] = {}
    for call in (call for run in (first, second, trained) if run is not None for call in run.calls):
        if is_resize_layer(model.get_submodule(call.owner)):
            callers.setdefault(call.owner, set()).add(call.caller)
    moved = [called_from(run, callers.keys()).calls if run is not None else [] for run in (first, second)]
    varying = _varying(*moved)
    found: set[str] = set()
    for path, places in callers.items():
        if not all(caller is not None and _can_be_rewritten(model, caller) for caller in places):
            continue
        distinct = {
            (c.owner, c.place.hops, None if (c.owner, c.place.hops) in varying else c.place.occurrence)
            for c in places
            if c is not None
        }
        if len(distinct) > 1:
            found.add(path)
    return found


def _fused_by_callers(model: nn.Module, *runs: Observation | None) -> set[str]:
    """The paths of the resize layers whose results can be given their guides by the code that calls the layers alone, where the
    two are fused."""
    calls: dict[str, list[Call]] = {}
    for call in (call for run in runs if run is not None for call in run.calls):
        calls.setdefault(call.owner, []).append(call)
    return {path for path, made in calls.items() if all(_is_fused_by_caller(model, call) for call in made)}


def _is_fused_by_caller(model: nn.Module, call: Call) -> bool:
    guide, caller = call.guide, call.caller
    if isinstance(guide, str) or guide.at_above is None or caller is None:
        return False
    if any(not above.through for above, _ in guide.above):  # it can be handed to the layer
        return False
    return not isinstance(seen_by_caller(guide, caller.owner), str) and _can_be_rewritten(model, caller)


def _can_be_rewritten(model: nn.Module, caller: Caller) -> bool:
    owner = model.get_submodule(caller.owner)
    if why_fixed(owner) is not None or runs_its_children(owner):
        return False
    try:
        locate(caller.place)
    except RewriteError:
        return False
    return True


def _hint_of_unseen(*runs: Observation | None) -> str | None:
    """What is to be said of the resizes that no `F.interpolate` makes."""
    ways: dict[str, list[str]] = {}
    for path, way in dict.fromkeys(found for run in runs if run is not None for found in run.unseen):
        ways.setdefault(way, []).append(path or "the model itself")
    if not ways:
        return None
    shown = "; ".join(
        f"{way} in {', '.join(paths[:4])}" + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        for way, paths in ways.items()
    )
    return f"it also resizes in ways that upswap does not replace, write F.interpolate there to have it done: {shown}"


def learned_upsampling(model: nn.Module) -> list[str]:
    """The layers that enlarge maps with weights of their own, as `path (Class)`."""
    return [
        f"{path} ({type(module).__name__})" for path, module in model.named_modules() if isinstance(module, _LEARNED)
    ]


def _second(model: nn.Module, first: Observation, *, height: bool, guides: bool) -> Observation | None:
    try:
        return observe(model, enlarged(first.inputs, height=height), fake=first.fake, guides=guides)
    except ModelFailed:
        return None


def _trained(model: nn.Module, first: Observation, *, guides: bool) -> tuple[Observation | None, str | None]:
    """A run in train mode, or why there is none."""
    try:
        inputs = training_inputs(model, first.inputs)
        return observe(model, inputs, fake=first.fake, training=True, guides=guides), None
    except (InputError, ModelFailed) as error:
        return None, f"it was run in eval mode only, because in train mode it fails on the example inputs: {error}"


def _sites(
    model: nn.Module, first: Observation, second: Observation | None, trained: Observation | None, guides: bool
) -> tuple[list[Site], dict[str, str]]:
    varying = _varying(first.calls, second.calls if second else [])

    def place_of(call: Call) -> Place:
        varies = (call.owner, call.place.hops) in varying
        return dataclasses.replace(call.place, occurrence=None) if varies else call.place

    owners: dict[str, dict[Place, list[Call]]] = {}
    for call in first.calls:
        owners.setdefault(call.owner, {}).setdefault(place_of(call), []).append(call)
    again: dict[Any, list[Call]] = {}
    for call in second.calls if second else ():
        again.setdefault((call.owner, place_of(call)), []).append(call)
        owners.setdefault(call.owner, {}).setdefault(place_of(call), [])
    # In train mode a call may have other channels, and be one that eval mode does not make.
    training: dict[str, dict[Place, list[Call]]] = {}
    for call in trained.calls if trained else ():
        training.setdefault(call.owner, {}).setdefault(place_of(call), []).append(call)
        owners.setdefault(call.owner, {}).setdefault(place_of(call), [])
    sites: list[Site] = []
    unlocated: dict[str, str] = {}
    for owner, places in owners.items():
        module = model.get_submodule(owner)
        for ordinal, (place, calls) in enumerate(places.items()):
            base = owner or "root"
            name = base if len(places) == 1 else f"{base}:{ordinal}"
            location = None
            try:
                location = locate(place)
            except RewriteError as error:
                unlocated[name] = str(error)
            sites.append(
                _site(
                    _Place(name, owner, module, ordinal, location),
                    _Sightings(calls, training.get(owner, {}).get(place, []), again.get((owner, place), [])),
                    guides,
                )
            )
    return sites, unlocated


def _varying(first: list[Call], second: list[Call]) -> set[tuple[str, tuple[Hop, ...]]]:
    """The calls that run a number of times that follows the input: once a detection, or for the maps that need it.

    They are those that two input sizes show to, and those in a loop with a branch that asks for a shape: which of the runs is for
    which map could change with the input, though their number is the same.
    """

    def counts(calls: list[Call]) -> dict[tuple[str, tuple[Hop, ...]], int]:
        found: dict[tuple[str, tuple[Hop, ...]], int] = {}
        for call in calls:
            key = (call.owner, call.place.hops)
            found[key] = max(found.get(key, 0), (call.place.occurrence or 0) + 1)
        return found

    now, then = counts(first), counts(second)
    differ = {key for key, count in now.items() if key[1] and then.get(key, count) != count}
    return differ | {key for key, count in now.items() if count > 1 and _may_shift(key[1])}


def _may_shift(hops: tuple[Hop, ...]) -> bool:
    return any(asks_for_shapes(hop.code, hop.position, anywhere=index > 0) for index, hop in enumerate(hops))


class _Place(NamedTuple):
    """Where a site is: its name, the owner's path and module, which of the owner's calls it is, and its place in the source."""

    name: str
    owner: str
    module: nn.Module
    ordinal: int
    location: Location | None


class _Sightings(NamedTuple):
    """The calls that were seen at one place: in eval mode, in train mode, and at another input size."""

    evaluated: list[Call]
    trained: list[Call]
    others: list[Call]

    @property
    def again(self) -> Call | None:
        """The first at another input size."""
        return self.others[0] if self.others else None

    @property
    def calls(self) -> list[Call]:
        """All of the example size; where it made none there, that of the other size."""
        return [*self.evaluated, *self.trained] or ([self.again] if self.again is not None else [])

    @property
    def in_one_mode(self) -> list[Call]:
        return self.evaluated or self.trained or self.calls

    @property
    def only_trained(self) -> bool:
        return not self.evaluated and bool(self.trained)


def _purpose(place: _Place, seen: _Sightings) -> tuple[str, str]:
    """What the calls at one place are for, and the reason; "other" where that cannot be said of all of them."""
    kind, reason, _ = _kind(seen.calls[0], seen.again)
    kinds = sorted({_kind(other, None)[0] for other in seen.in_one_mode})
    varies = place.location is not None and place.location.occurrence is None
    if len(kinds) > 1 and varies and "feature" not in kinds:
        # What it is for does not change with the size of each map.
        kind, reason = ("logits" if "logits" in kinds else kind), f"{reason} (a number of times that follows the input)"
    elif len(kinds) > 1:
        kind, reason = "other", f"called for several purposes: {', '.join(kinds)}"
    if (
        len({(c.arguments["mode"], bool(c.arguments["align_corners"]), c.arguments["antialias"]) for c in seen.calls})
        > 1
    ):
        kind, reason = "other", "called in several modes, which one upsampler cannot stand for"
    if not seen.evaluated and not seen.trained and kind == "feature":
        kind = "other"
        reason = "made at another input size than the example's; pass example_inputs that lead here to have it swapped"
    return kind, reason


def _site(place: _Place, seen: _Sightings, guides: bool) -> Site:
    kind, reason = _purpose(place, seen)
    guide, no_guide = guide_of([*seen.evaluated, *seen.trained, *seen.others]) if guides else (None, "")
    calls = seen.calls
    call, again = calls[0], seen.again
    _, _, shown = _kind(call, again)
    channels = list(dict.fromkeys(other.in_shape[1] for other in calls))
    arguments = shown.arguments
    by_scale, scale = sizing(shown)
    return Site(
        name=place.name,
        owner=place.owner,
        owner_class=f"{type(place.module).__module__}.{type(place.module).__qualname__}",
        ordinal=place.ordinal,
        kind=kind,
        op="module" if type(place.module) in _UPSAMPLE_MODULES else "interpolate",
        mode=arguments["mode"],
        align_corners=bool(arguments["align_corners"]),
        antialias=bool(arguments["antialias"]),
        sized_by="scale_factor" if by_scale else "size",
        scale=scale,
        fixed_ratio=True if by_scale else None if again is None else _ratio(call) == _ratio(again),
        channels=channels[0],
        other_channels=tuple(channels[1:]),
        in_shape=shown.in_shape,
        out_shape=shown.out_shape,
        dtype=str(call.dtype).removeprefix("torch."),
        calls=0 if call.twin else len(seen.in_one_mode),
        location=place.location,
        reason=reason,
        notes=_notes(seen),
        seen_in="nowhere" if call.twin else "train" if seen.only_trained else "eval",
        guide=guide,
        no_guide=no_guide,
    )


def _notes(seen: _Sightings) -> tuple[str, ...]:
    """What follows from how the calls at one place were seen."""
    call, again = seen.calls[0], seen.again
    notes: list[str] = []
    if call.twin:
        notes.append(f"not run on the example, where the values choose: as {call.twin}, which is like it")
    if seen.only_trained:
        notes.append("in train mode only")
    ratios = list(dict.fromkeys(f"x{min(_ratio(other)):.3g}" for other in seen.in_one_mode))
    if len(ratios) > 1:
        notes.append(f"one upsampler for several ratios: {', '.join(ratios)}")
    height, width = call.in_shape[-2:]
    grows = again is not None and again.in_shape[-2:] != call.in_shape[-2:]
    if call.mode_is_nearest and min(height, width) <= 2 and not grows:
        notes.append(f"its map is {height}x{width}, at whose border nearest has no gradient for the offsets")
    return tuple(notes)


def _kind(call: Call, again: Call | None) -> tuple[str, str, Call]:
    """The kind of a call seen at one or two input sizes, the reason, and the sighting it was read from.

    A small image can make a feature map a single point, or a pooled grid as large as the map it joins; the second size tells.
    """
    if call.kind not in ("feature", "context", "identity", "downsample"):
        return call.kind, call.reason, call
    if again is None:
        if call.pooled:
            return "context", "its source is a pooled grid", call
        return call.kind, call.reason, call
    # Small images can leave a single point of any map; only a pooled one stays so.
    constant = call.in_shape[-2:] == again.in_shape[-2:] and (call.in_shape[-2:] != (1, 1) or again.pooled)
    if constant and call.out_shape[-2:] != again.out_shape[-2:] and (again.pooled or call.kind != "downsample"):
        grid = "x".join(map(str, call.in_shape[-2:]))
        return "context", f"its source is {grid} at every input size: the ratio follows the input", call
    if call.out_shape[-2:] == again.out_shape[-2:] and call.in_shape[-2:] != again.in_shape[-2:]:
        grid = "x".join(map(str, call.out_shape[-2:]))
        return "context", f"its target is {grid} at every input size: the ratio follows the input", call
    if call.kind != "feature" and again.kind == "feature":
        return again.kind, again.reason, again
    return call.kind, call.reason, call


def sizing(call: Call) -> tuple[bool, tuple[float, float]]:
    """Whether a scale factor decides a call's output size, and that factor, or the ratio of the sizes."""
    arguments = call.arguments
    by_scale = arguments["size"] is None and not arguments["recompute_scale_factor"] and arguments["mode"] != "area"
    return by_scale, _pair(arguments["scale_factor"]) if by_scale else _ratio(call)


def _ratio(call: Call) -> tuple[float, float]:
    height, width = (new / old for old, new in zip(call.in_shape[-2:], call.out_shape[-2:], strict=True))
    return height, width


def _pair(factor: Any) -> tuple[float, float]:
    if not isinstance(factor, Sequence):
        return float(factor), float(factor)
    return float(factor[0]), float(factor[-1])
