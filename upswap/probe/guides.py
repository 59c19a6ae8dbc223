"""The guide of a resize: the feature that its result is fused with, and where the code around has it at hand.

A guide is a learned map of the result's size in the next sum or concatenation that the result flows into, which is not
itself made by a resize. What is fused is known once the run is over; what is at hand is looked at while the resize runs.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

from ..plan.site import Key
from .callsites.stack import Hop, Place, position
from .dataflow import ADDITIONS, CONCATENATIONS, Flow, Node, Operand

#: How deep in containers a guide is looked for, and how long such a container may be.
_DEPTH, _LONGEST = 2, 64
#: Functions that make maps larger: what they give has no more detail than what they took.
_ENLARGE = frozenset({"interpolate", "conv_transpose2d", "pixel_shuffle"})

#: One run of a function, told from any other.
Run = tuple[int, int]
#: A local name, and the keys that lead from its value to the guide.
Binding = tuple[str, tuple[Key, ...]]


class AtHand(NamedTuple):
    """A module whose code, while it runs, has maps at hand for a resize in a layer that it calls.

    `through` are the modules between, outermost first, each of which runs its children one after the other. `maps` has the
    maps of the result's size, with where they are bound.
    """

    owner: str
    place: Place
    through: tuple[str, ...]
    home: Run
    maps: tuple[tuple[weakref.ref[torch.Tensor], Binding], ...]


@dataclasses.dataclass(frozen=True)
class Watched:
    """What is kept of a resize call until it is known what its result is fused with: `own` is its function, `above` the
    module that calls the layer whose forward it is."""

    source: Operand
    own: AtHand | None
    above: AtHand | None


@dataclasses.dataclass(frozen=True)
class Fused:
    """What the result of one resize call is fused with.

    `operand` is which tensor of the sum or concatenation the guide is. `own` are the bindings in the function that makes the call
    where the guide has its value when the call runs; `above` the same in a module above. `at` is the expression that fuses
    the result itself, where that stands in the function that makes the call; `at_above` where it stands in that above.
    """

    channels: int
    fusion: str
    operand: int
    own: frozenset[Binding]
    above: AtHand | None
    bound_above: frozenset[Binding]
    at: Hop | None
    at_above: Hop | None


class Fusion(NamedTuple):
    """Where a sum or concatenation stands: the run of the function, and the expression in it."""

    home: Run
    hop: Hop


def expression_in(home: FrameType, frame: FrameType) -> Hop:
    """The expression that `frame` is running, as one in the text of the function that `home` runs."""
    return Hop(home.f_code, position(frame), str(home.f_globals.get("__name__", "")))


def maps_in(frame: FrameType, size: Sequence[int]) -> tuple[tuple[weakref.ref[torch.Tensor], Binding], ...]:
    """The maps (N, C, *size) that the local names of a frame lead to, and how."""
    found: list[tuple[weakref.ref[torch.Tensor], Binding]] = []
    for name, value in frame.f_locals.items():
        if name.isidentifier():
            found += ((weakref.ref(tensor), (name, path)) for tensor, path in _maps(value, (), tuple(size)))
    return tuple(found)


def _maps(value: Any, path: tuple[Key, ...], size: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, tuple[Key, ...]]]:
    if isinstance(value, torch.Tensor):
        if value.dim() == 4 and tuple(value.shape[2:]) == size:
            yield value, path
    elif len(path) < _DEPTH and isinstance(value, list | tuple) and len(value) <= _LONGEST:
        for index, item in enumerate(value):
            yield from _maps(item, (*path, index), size)
    elif len(path) < _DEPTH and isinstance(value, dict) and len(value) <= _LONGEST:
        for key, item in value.items():
            if type(key) in (int, str):
                yield from _maps(item, (*path, key), size)


def fused_with(node: Node, watched: Watched, flow: Flow, fusions: Mapping[int, Fusion]) -> Fused | str:
    """What the result of a resize call, `node` in the flow, is fused with; or why that can be no guide.

    `fusions` has where sums and concatenations stand, by the numbers of the calls.
    """
    found, other = fused_operands(node)
    tensors = {id(operand.tensor): (fusing, index, operand) for fusing, index, operand in found}
    if not tensors:
        return other
    if len(tensors) > 1:
        return "it is fused with several features of its size"
    fusing, index, guide = found[0]
    if flow.written(watched.source, node.order + 1):
        return "its input is written to after the call"
    where = fusions.get(fusing.order)
    written = flow.written(guide, node.order + 1)
    direct = len(found) == 1 and node.users == [fusing] and not flow.written(guide, fusing.order)
    at = where if direct and not any(output is node for output in flow.outputs) else None
    own = frozenset() if written or watched.own is None else _bindings(guide, watched.own)
    above = watched.above
    bound = frozenset() if written or above is None else _bindings(guide, above)
    fused = Fused(
        fusing.inputs[index].shape[1],
        "add" if fusing.name in ADDITIONS else "cat",
        index,
        own,
        above if bound or _in(at, above) is not None else None,
        bound,
        _in(at, watched.own),
        _in(at, above),
    )
    if not (own or bound or fused.at or fused.at_above):
        if written:
            return "the feature that it is fused with is written to after the call"
        return _NOT_AT_HAND
    return fused


def seen_by_caller(guide: Fused | str, caller: str) -> Fused | str:
    """What is fused with the result of a resize layer, as the code of the module that calls the layer has it."""
    if isinstance(guide, str):
        return guide
    above = guide.above
    if above is None or above.through or above.owner != caller:
        return _NOT_AT_HAND
    return dataclasses.replace(
        guide, own=guide.bound_above, above=None, bound_above=frozenset(), at=guide.at_above, at_above=None
    )


_NOT_AT_HAND = "the feature that it is fused with is not at hand where it is resized"


def _bindings(guide: Operand, at_hand: AtHand) -> frozenset[Binding]:
    return frozenset(binding for tensor, binding in at_hand.maps if tensor is guide.tensor)


def _in(fusion: Fusion | None, at_hand: AtHand | None) -> Hop | None:
    return fusion.hop if fusion is not None and at_hand is not None and fusion.home == at_hand.home else None


def fused_operands(node: Node) -> tuple[list[tuple[Node, int, Operand]], str]:
    """The guides in the next fusions that a map flows into: each fusion, which of its operands it is, and that; and what to say
    where there is none."""
    why = "its result is fused with no feature of its size"
    found: list[tuple[Node, int, Operand]] = []
    after = _after(node)
    seen = {id(node)}
    queue = list(node.users)
    for user in queue:
        if id(user) in seen:
            continue
        seen.add(id(user))
        if user.operands and len(user.operands) == len(user.inputs):
            guides = []
            for index, (operand, source) in enumerate(zip(user.operands, user.inputs, strict=True)):
                if source is node or id(source) in after:
                    continue
                no_guide = _why_no_guide(source, node)
                if no_guide is None:
                    guides.append((user, index, operand))
                elif no_guide:
                    why = no_guide
            found += guides
            if guides or user.name in CONCATENATIONS:
                continue
        if user.shape[2:] == node.shape[2:] and user.name not in _ENLARGE:
            queue += user.users
    return found, why


def _after(node: Node) -> set[int]:
    """The nodes that a node flows into."""
    return {id(later) for later in node.downstream()}


def _why_no_guide(source: Node, node: Node) -> str | None:
    """Why an operand is no guide of the map `node`: "" where that needs no words, None for one that is."""
    if len(source.shape) != 4 or source.shape[2:] != node.shape[2:] or not source.from_input:
        return ""
    if source.integral or not source.learned:
        return "what it is fused with is no learned feature"
    if _is_enlarged(source):
        return "what it is fused with was made larger itself"
    if source.shape[0] != node.shape[0]:
        return "what it is fused with has another batch"
    return None


def _is_enlarged(node: Node) -> bool:
    """Whether a map comes from a smaller one and nothing else."""
    while True:
        sources = [source for source in node.inputs if source.from_input]
        if node.name in _ENLARGE and sources and sources[0].shape[2:] != node.shape[2:]:
            return True
        if len(sources) != 1 or sources[0].shape[2:] != node.shape[2:]:
            return False
        node = sources[0]
