"""The guide of a resize: the feature that its result is fused with, and where the code around has it at hand.

A guide is a learned map of the result's size in the next sum or concatenation that the result flows into, which is not
itself made by a resize. What is fused is known once the run is over; what is at hand is looked at while the resize runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

from ..plan.site import Key
from .callsites.stack import Hop, Place, position
from .dataflow import ADDITIONS, CONCATENATIONS, Flow, Node, Operand

#: How deep in containers a guide is looked for, and how long such a container may be.
_DEPTH, _LONGEST = 2, 64

#: One run of a function, told from any other.
Run = tuple[int, int]
#: A local name, and the keys that lead from its value to the guide.
Binding = tuple[str, tuple[Key, ...]]


class Relay(NamedTuple):
    """A module that hands a guide on: its path, and where its code calls the next; None for an `nn.Sequential`'s own."""

    path: str
    place: Place | None


class Held(NamedTuple):
    """A map that a local name leads to: itself, what made it, and how it is reached."""

    map: Operand
    node: Node
    binding: Binding


class AtHand(NamedTuple):
    """A module whose code, while it runs, has maps of the size of a resize's result.

    `homes` are the runs of the functions on the way to the resize, or to the call of the child that leads to it, of which
    the last has the `maps` at hand. `through` are the modules between it and the resize, outermost first.
    """

    owner: str
    place: Place
    through: tuple[Relay, ...]
    homes: tuple[Run, ...]
    maps: tuple[Held, ...]


@dataclasses.dataclass(frozen=True)
class Watched:
    """What is kept of a resize call until it is known what its result is fused with: `own` is its function, `above` are the
    modules that lead to it, nearest first; `checkpointed` says that `torch.utils.checkpoint` runs it."""

    source: Operand
    own: AtHand | None
    above: tuple[AtHand, ...]
    checkpointed: bool


class At(NamedTuple):
    """Where a result is fused: how many hops before the last on the way to the call the function with the expression is, and
    that."""

    before: int
    hop: Hop


@dataclasses.dataclass(frozen=True)
class Fused:
    """What the result of one resize call is fused with.

    `operand` is which tensor of the sum or concatenation the guide is. `own` are the bindings in the function that makes the call
    where the guide has its value when the call runs; `above` the same in modules above, nearest first. `at` is the expression
    that fuses the result itself, in a function on the way to the call; `at_above` the same of the nearest module above. Where the
    guide itself is at hand nowhere, the bindings are those of the map that it is computed from, which `source` says.
    """

    channels: int
    fusion: str
    operand: int
    own: frozenset[Binding]
    above: tuple[tuple[AtHand, frozenset[Binding]], ...]
    at: At | None
    at_above: At | None
    source: bool = False


class Fusion(NamedTuple):
    """Where a sum or concatenation stands: the run of the function, and the expression in it."""

    home: Run
    hop: Hop


def expression_in(home: FrameType, frame: FrameType) -> Hop:
    """The expression that `frame` is running, as one in the text of the function that `home` runs."""
    return Hop(home.f_code, position(frame), str(home.f_globals.get("__name__", "")))


def maps_in(frame: FrameType, size: Sequence[int], flow: Flow) -> tuple[Held, ...]:
    """The maps (N, C, *size) that the local names of a frame lead to, and how."""
    found: list[Held] = []
    for name, value in frame.f_locals.items():
        if name.isidentifier():
            found += (
                Held(Operand.of(tensor), flow.node_of(tensor), (name, path))
                for tensor, path in _maps(value, (), tuple(size))
            )
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
    fused = Fused(
        fusing.inputs[index].shape[1],
        "add" if fusing.name in ADDITIONS else "cat",
        index,
        *_bound(watched, lambda held: not written and held.map.tensor is guide.tensor),
        _in(at, watched.own),
        _in(at, watched.above[0] if watched.above else None),
    )
    if fused.own or fused.above or fused.at or fused.at_above:
        return fused
    source = _source_at_hand(fusing.inputs[index], node, watched, flow)
    if source is not None:
        own, above = _bound(watched, lambda held: held.node is source)
        return dataclasses.replace(fused, channels=source.shape[1], own=own, above=above, source=True)
    if written:
        return "the feature that it is fused with is written to after the call"
    return f"{_NOT_AT_HAND}, which torch.utils.checkpoint runs" if watched.checkpointed else _NOT_AT_HAND


def _bound(
    watched: Watched, is_guide: Callable[[Held], bool]
) -> tuple[frozenset[Binding], tuple[tuple[AtHand, frozenset[Binding]], ...]]:
    """The bindings of a guide in the function that makes a call, and those in the modules above, of those that have any."""

    def of(at_hand: AtHand) -> frozenset[Binding]:
        return frozenset(held.binding for held in at_hand.maps if is_guide(held))

    above = tuple((at_hand, of(at_hand)) for at_hand in watched.above)
    own = frozenset() if watched.own is None else of(watched.own)
    return own, tuple((at_hand, bindings) for at_hand, bindings in above if bindings)


def _source_at_hand(guide: Node, node: Node, watched: Watched, flow: Flow) -> Node | None:
    """The last map before the guide that it is computed from alone, of those at hand that stay as they are."""
    held = [each for at_hand in (watched.own, *watched.above) if at_hand is not None for each in at_hand.maps]
    after = {id(later) for later in node.downstream()}
    nodes = {
        id(each.node): each.node
        for each in held
        if id(each.node) not in after
        and each.node is not node
        and _why_no_guide(each.node, node) is None
        and comes_from(guide, each.node)
        and not flow.written(each.map, node.order + 1)
    }
    return max(nodes.values(), key=lambda each: each.order, default=None)


def comes_from(guide: Node, source: Node) -> bool:
    """Whether a map is computed from another of its size, and from nothing else that flows from the model's input."""
    queue, seen = [guide], {id(guide)}
    for current in queue:
        if current is source:
            continue
        if current.source is not None or current.shape[2:] != guide.shape[2:]:
            return False
        for each in current.inputs:
            if each.from_input and id(each) not in seen:
                seen.add(id(each))
                queue.append(each)
    return any(current is source for current in queue)


def seen_by_caller(guide: Fused | str, caller: str) -> Fused | str:
    """What is fused with the result of a resize layer, as the code of the module that calls the layer has it."""
    if isinstance(guide, str):
        return guide
    own = [bindings for above, bindings in guide.above if not above.through and above.owner == caller]
    moved = dataclasses.replace(
        guide,
        own=own[0] if own else frozenset(),
        above=tuple(each for each in guide.above if each[0].through and each[0].owner != caller),
        at=guide.at_above,
        at_above=None,
    )
    return moved if moved.own or moved.at else _NOT_AT_HAND


_NOT_AT_HAND = "the feature that it is fused with is not at hand where it is resized"


def _in(fusion: Fusion | None, at_hand: AtHand | None) -> At | None:
    """Where a fusion stands among the functions on the way to a call; None where it stands in none of them."""
    if fusion is None or at_hand is None or at_hand.through or fusion.home not in at_hand.homes:
        return None
    return At(len(at_hand.homes) - 1 - at_hand.homes.index(fusion.home), fusion.hop)


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
        if user.shape[2:] == node.shape[2:] and user.name != "interpolate":
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
    """Whether a map comes from resizes that made smaller ones larger, and nothing else."""
    queue, seen = [node], {id(node)}
    for current in queue:
        sources = [source for source in current.inputs if source.from_input]
        if current.name == "interpolate" and sources and sources[0].shape[2:] != current.shape[2:]:
            continue
        if not sources or any(source.shape[2:] != current.shape[2:] for source in sources):
            return False
        for source in sources:
            if id(source) not in seen:
                seen.add(id(source))
                queue.append(source)
    return True
