"""How an upsampler can be given its guide, by a way that is right in every run that was seen, and by the text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from ..errors import RewriteError
from ..plan.site import Guide, Relay
from .callsites.certain import follows, is_bound
from .callsites.location import locate, locate_fusion
from .callsites.stack import Hop, Place
from .callsites.syntax import call_at, function_node, fusion_at, other_ways
from .guides import AtHand, Binding, Fused
from .resize_calls import Call

#: What concatenations and sums are called as functions of torch.
_FUNCTIONS = ("cat", "concat", "concatenate", "add")


def guide_of(calls: Sequence[Call]) -> tuple[Guide | None, str]:
    """The guide of the calls at one place, in all runs that made them, and how it is reached; or None and why there is none."""
    found = [call.guide for call in calls if isinstance(call.guide, Fused)]
    without = [call.guide for call in calls if isinstance(call.guide, str)]
    if without:
        why = without[0] or "it was not run on the example"
        return None, f"it has a guide in some of its runs only: {why}" if found else why
    channels = {(call.in_shape[1], fused.channels) for call, fused in zip(calls, found, strict=True)}
    if len(channels) > 1 or len({(fused.fusion, fused.source) for fused in found}) > 1:
        return None, "what it is fused with differs between its runs"
    problem = ""
    for way in (_by_fusion, _by_name, _from_above):
        try:
            guide = way([call.place for call in calls], found)
        except RewriteError as error:
            problem = problem or str(error)
        else:
            if guide is not None:
                return guide, ""
    return None, problem or "the feature that it is fused with is not at hand by one expression in all of its runs"


def _by_fusion(places: Sequence[Place], found: Sequence[Fused]) -> Guide | None:
    """Where the result and its guide are fused, in a function on the way to the call."""
    at, operands = {fused.at for fused in found}, {fused.operand for fused in found}
    where = next(iter(at))
    if len(at) > 1 or len(operands) > 1 or where is None:
        return None
    hop, level = where.hop, len(places[0].hops) - 1 - where.before
    call = places[0].hops[level]
    if hop.code is not call.code:
        return None
    fusion = fusion_at(hop.code, hop.position)
    if not _can_be_changed(fusion):
        raise RewriteError(f"it is fused in a way that cannot be rewritten: {ast.unparse(fusion)}")
    if not _holds(call, lambda node, expression: follows(node, expression, fusion)):
        raise RewriteError(f"it is fused in a branch that may not run after it: {ast.unparse(fusion)}")
    return Guide(
        found[0].channels,
        found[0].fusion,
        "fusion",
        fusing=locate_fusion(hop),
        level=level,
        operand=next(iter(operands)),
    )


def _can_be_changed(fusion: ast.AST) -> bool:
    """Whether a fusing expression can be one that corrects an operand first."""
    if isinstance(fusion, ast.Call):
        before, _, name = ast.unparse(fusion.func).rpartition(".")
        return before in ("", "torch") and name in _FUNCTIONS
    # The target of `a[i] += b` is written twice.
    return not isinstance(fusion, ast.AugAssign) or not any(
        isinstance(part, ast.Call) for part in ast.walk(fusion.target)
    )


def _by_name(places: Sequence[Place], found: Sequence[Fused]) -> Guide | None:
    """A local name of the function that makes the call."""
    binding = _binding(places[0], [fused.own for fused in found])
    return binding and Guide(
        found[0].channels, found[0].fusion, "local", name=binding[0], path=binding[1], source=found[0].source
    )


def _from_above(places: Sequence[Place], found: Sequence[Fused]) -> Guide | None:
    """A local name of a module's code above, from which it is handed down."""
    problem: RewriteError | None = None
    for above, _ in found[0].above:
        there = [_at(above, fused) for fused in found]
        try:
            binding = _binding(above.place, there)
            if binding is not None:
                return Guide(
                    found[0].channels,
                    found[0].fusion,
                    "handed",
                    name=binding[0],
                    path=binding[1],
                    source=found[0].source,
                    holder=above.owner,
                    through=tuple(
                        Relay(relay.path, None if relay.place is None else locate(relay.place))
                        for relay in above.through
                    ),
                    location=locate(above.place),
                )
        except RewriteError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def _at(above: AtHand, fused: Fused) -> frozenset[Binding]:
    """The bindings of a guide in the code of a module above, by the way that another call had to it."""
    same = (bindings for other, bindings in fused.above if _way(other) == _way(above))
    return next(same, frozenset())


def _way(above: AtHand) -> object:
    relays = [(relay.path, None if relay.place is None else relay.place.hops) for relay in above.through]
    return above.owner, above.place.hops, relays


def _binding(place: Place, sets: Sequence[frozenset[Binding]]) -> Binding | None:
    """The shortest binding that all runs have, of a name that is certainly bound where the call stands; None where they have
    none."""
    common = frozenset.intersection(*sets)
    if not common:
        return None
    certain = [binding for binding in common if _holds(place.hops[-1], lambda n, c, b=binding: is_bound(n, c, b[0]))]
    if not certain:
        names = ", ".join(sorted({name for name, _ in common}))
        raise RewriteError(f"what holds its guide is not bound in every case where it is resized: {names}")
    return min(certain, key=lambda binding: (len(binding[1]), binding[0], str(binding[1])))


def _holds(call: Hop, question: Callable[..., bool]) -> bool:
    """Whether something holds at a call, and at those that a branch makes in its place."""
    node, expression = function_node(call.code), call_at(call.code, call.position)
    return all(question(node, each) for each in (expression, *other_ways(node, expression)))
