"""One upsampler in a `Status`, or in `Offsets`."""

from __future__ import annotations

import dataclasses
from typing import Literal

State = Literal["as initialised", "trained", "lost", "no values", "unknown"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One upsampler, at its path in the model."""

    path: str
    state: State
    """As its initialisation left it; other than that; lost: what it learned, or step 0, is gone (see `problems`); on the meta
    device; or of a kind whose values tell nothing."""
    trainable: bool
    in_optimizer: bool | None
    """Whether all of its trainable parameters are in the optimiser; None where none was given."""
    in_ema: bool | None
    """Whether all of its keys are in the averaged weights; None where none were given."""
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is lost: no problem was found."""
        return not self.problems


@dataclasses.dataclass(frozen=True)
class Moved:
    """How far one upsampler moves its points, in pixels of the map that it reads: lengths of offsets."""

    path: str
    mean: float
    p95: float
    """The 95th percentile."""
    by_content: float
    """The mean length of what depends on the map: what is left after the mean offset of each sub-pixel of each group."""
