"""One patch of one model from beginning to end: decide, capture, apply, compare. Whoever patches goes through here."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan.plan import Options, Plan
from .apply import apply
from .checking.verification import Capture, Report, capture_from_runs, compare
from .planning import check_model, decide, nothing_to_swap


class Operation:
    """The steps of a patch, to be taken in order: made (which decides), `capture`, `apply`, `compare`.

    Only `apply` changes the model. `capture` and `compare` may be left out together.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, options: Options) -> None:
        check_model(model)
        self.model = model
        self._decision = decide(model, example_inputs, options)
        self._before: Capture | None = None

    @property
    def plan(self) -> Plan:
        """What is to be done; it may swap nothing."""
        return self._decision.plan

    def capture(self) -> Capture:
        """What the model computes before the patch, from the runs that the plan was made from where they have it."""
        self._before = capture_from_runs(self.model, self._decision.runs)
        return self._before

    def check_swaps(self) -> None:
        """`NothingToSwapError` where the plan swaps nothing."""
        if not self.plan.swapped:
            raise nothing_to_swap(self.plan)

    def apply(self, model: nn.Module | None = None) -> None:
        """Carry the plan out on the model, or on `model`, a copy of it; raises as `check_swaps`."""
        self.check_swaps()
        self.model = self.model if model is None else model
        apply(self.model, self.plan, self._decision.rewritings)

    def compare(self) -> Report:
        """The patched model against what was captured."""
        if self._before is None:
            raise RuntimeError("nothing was captured before the patch: call capture() before apply()")
        return compare(self._before, self.model)
