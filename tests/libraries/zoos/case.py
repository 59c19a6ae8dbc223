"""One model of a zoo: how to build it small with random weights, and what to run it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

#: `model(*args, **kwargs)`
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that resizes something, or that is right to have nothing to swap.

    `build()` gives the same random weights each time, in eval mode. `inputs(model, 0)` and `inputs(model, 1)` are eval inputs
    of two sizes (two batches of one size, where the model takes one size only); further numbers, up to `count`, are odd sizes
    and other batches. `training(model)` is a batch for train mode, with targets where the model computes its own loss; None
    where it cannot be trained. All are seeded and new at each call.
    """

    zoo: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], Arguments]
    training: Callable[[nn.Module], Arguments] | None
    count: int = 2
    #: Site name -> "kind" or "kind => route", every site; None where only the checks are of interest.
    expected: Mapping[str, str] | None = None
    #: Whether `upswap.patch(model)` is to find example inputs by itself; else it is given `inputs(model, 0)`.
    inferred: bool = True
    #: max|difference| / max|output| at step 0 in float32, with the reason beside it where it is not the promised 1e-5.
    tolerance: float = 1e-5
    #: Options of `patch`.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: In the tests as well as in the coverage command.
    tested: bool = True
