"""Does a patched model compute what the original computed?

`verify` compares two models. `capture` before a patch and `compare` after it do the same with one model in memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import InputError, VerificationError
from ...nn.registry import is_exact, is_own
from ...plan.plan import Plan
from ...probe.dataflow import tensors_in
from ...probe.inputs import infer as _examples
from ...probe.inputs import variations as _variations
from ...probe.inputs.inputs import Inputs, as_inputs
from ...probe.observe import Observation, first_that_runs
from ...probe.preserve import leaving_no_trace
from ..apply import is_patched, undo
from ..wrappers import held

#: The largest difference relative to max|output| that counts as equal, by dtype: float32 as promised, half types their rounding.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One output tensor at one input size. `scale` is max|original|; differences are absolute."""

    inputs: str
    output: int
    shape: tuple[int, ...]
    max_abs_diff: float
    scale: float
    tolerance: float
    problem: str = ""

    @property
    def max_rel_diff(self) -> float:
        """max|patched - original| / max|original|."""
        return self.max_abs_diff / self.scale if self.scale else self.max_abs_diff

    @property
    def ok(self) -> bool:
        """Whether the tensors are equal within the tolerance of their dtype."""
        return not self.problem and self.max_rel_diff <= self.tolerance


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a verification: a row for each output tensor at each input size."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every output agrees. A report of no rows is not ok: nothing was compared."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def max_abs_diff(self) -> float:
        """The largest absolute difference of any output."""
        return max((row.max_abs_diff for row in self.rows), default=float("nan"))

    @property
    def max_rel_diff(self) -> float:
        """The largest difference relative to its own output."""
        return max((row.max_rel_diff for row in self.rows), default=float("nan"))

    def __repr__(self) -> str:
        verdict = "equal" if self.ok else "NOT equal"
        return f"<Report: {verdict}, {len(self.rows)} outputs, relative difference {self.max_rel_diff:.1e}>"

    def __str__(self) -> str:
        lines = [
            f"{'equal' if row.ok else row.problem or 'differs':<8} output {row.output} {row.shape} at {row.inputs}: "
            f"difference {row.max_abs_diff:.1e}, relative {row.max_rel_diff:.1e}, allowed {row.tolerance:.0e}"
            for row in self.rows
        ]
        return "\n".join([repr(self), *lines])

    def check(self, plan: Plan) -> None:
        """`VerificationError` where the patched model is not what `plan` promises: equal, or of the same shapes and types."""
        exact = is_exact(plan)
        broken = [row for row in self.rows if row.problem or (exact and not row.ok)]
        if broken or not self.rows:
            rows = "; ".join(
                f"output {row.output} at {row.inputs}: {row.problem or f'relative difference {row.max_rel_diff:.1e}'}"
                for row in broken
            )
            found = rows or "it gives no outputs"
            raise VerificationError(
                f"the patched model does not compute what the original did, nothing was saved. {found}{_way_out(plan)}"
            )


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a model gave on some inputs, with the inputs, to compare another with.

    With `inside`, the feature maps that its children gave come before its own outputs.
    """

    runs: tuple[tuple[Inputs, tuple[torch.Tensor, ...]], ...]
    inside: bool = False


def verify(original: nn.Module, patched: nn.Module, example_inputs: Any = None, *, sizes: Any = None) -> Report:
    """Run both models in eval mode on the same inputs and compare every output tensor.

    `sizes` is a list of heights and widths in pixels, `(h, w)` or ints; by default the smallest size the model takes and
    the next one. With `example_inputs` those are used, and a larger copy where the model takes it. Both models are left
    as found. A detection model may find nothing on them, which compares nothing: then the feature maps that the model's
    children give are compared too. Raises `InputError` where the original runs on none.
    """
    return compare(capture(original, example_inputs, sizes), patched)


def capture(model: nn.Module, example_inputs: Any = None, sizes: Any = None) -> Capture:
    """Run `model` and keep what it gives, for `compare`."""
    model = held(model)
    chosen = list(_chosen(model, example_inputs, sizes))
    for inside in (False, True):
        runs = tuple((inputs, _outputs(model, inputs, inside)) for inputs in chosen)
        if all(any(tensor.numel() for tensor in outputs) for _, outputs in runs):
            return Capture(runs, inside)
    raise InputError(f"{type(model).__name__} gives no tensors to compare")


def capture_from_runs(model: nn.Module, runs: Sequence[Observation]) -> Capture:
    """What `capture` gives, from runs in eval mode that were made already, where they have it."""
    if all(not run.fake and any(tensor.numel() for tensor in run.outputs) for run in runs):
        return Capture(tuple((run.inputs, tuple(run.outputs)) for run in runs))
    return capture(model, runs[0].inputs)


def compare(captured: Capture, patched: nn.Module) -> Report:
    """Run `patched` on the captured inputs and compare.

    A model may make more of the rounding of float32 than the promise allows: boxes decoded by exponentials, maps that a
    norm blows up. Where float32 outputs differ, the model and its original are compared in float64 too, and that tells.
    """
    patched = held(patched)
    report = _compared(captured, patched)
    if report.ok or any(row.problem for row in report.rows) or not is_patched(patched):
        return report
    with contextlib.suppress(Exception):  # a model that cannot be copied, or not run in float64, has only its float32
        original = copy.deepcopy(patched)
        undo(original)
        if _compared(captured, original).max_abs_diff == 0:  # else the patch is not all that was changed
            precise = _compared_in_float64(captured, original.double(), copy.deepcopy(patched).double())
            return precise if precise.ok else report
    return report


def _compared(captured: Capture, patched: nn.Module, note: str = "") -> Report:
    rows: list[Row] = []
    for inputs, expected in captured.runs:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs.tensors()) + note
        got = _outputs(patched, inputs, captured.inside)
        for index, old in enumerate(expected):
            new = got[index] if index < len(got) else None
            rows.append(_row(shapes, index, old, new))
        rows += [
            Row(shapes, index, tuple(got[index].shape), float("inf"), 0.0, 0.0, "the original has no such output")
            for index in range(len(expected), len(got))
        ]
    return Report(tuple(rows))


def _compared_in_float64(captured: Capture, original: nn.Module, patched: nn.Module) -> Report:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # models make tensors of their own
    try:
        inputs = [given.map(_wide) for given, _ in captured.runs]
        runs = tuple((given, _outputs(original, given, captured.inside)) for given in inputs)
        return _compared(Capture(runs, captured.inside), patched, " in float64")
    finally:
        torch.set_default_dtype(before)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _chosen(model: nn.Module, example_inputs: Any, sizes: Sequence[Any] | None) -> Iterator[Inputs]:
    if example_inputs is not None:
        if sizes is not None:
            raise InputError("give example_inputs or sizes, not both")
        first = as_inputs(example_inputs)
    elif sizes is not None:
        yield from (first_that_runs(model, _examples.candidates(model, size)).inputs for size in sizes)
        return
    else:
        first = first_that_runs(model, _examples.candidates(model)).inputs
    yield first
    second = _variations.enlarged(first)
    if [tensor.shape for tensor in second.tensors()] == [tensor.shape for tensor in first.tensors()]:
        return
    with contextlib.suppress(InputError):  # the model takes one size only
        yield first_that_runs(model, [_examples.Candidate(second)]).inputs


def _outputs(model: nn.Module, inputs: Inputs, inside: bool) -> tuple[torch.Tensor, ...]:
    maps: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        maps.extend(tensor.detach().clone() for tensor in tensors_in(output) if tensor.dim() == 4)

    # The hooks go with the rest of what `leaving_no_trace` puts back.
    with leaving_no_trace(model), torch.no_grad():
        if inside:
            for child in model.children():
                child.register_forward_hook(keep)
        # Copies, because a model may write to its inputs.
        own = inputs.copied()
        result = model(*own.args, **own.kwargs)
        return (*maps, *(tensor.detach().clone() for tensor in tensors_in(result)))


def _way_out(plan: Plan) -> str:
    """What the author of an upsampler can do about one that is not exact; upswap's own are."""
    if not is_exact(plan) or is_own(plan.options.upsampler):
        return ""
    return f". If {plan.options.upsampler} is not meant to: register_upsampler({plan.options.upsampler!r}, exact=False)"


def _row(shapes: str, index: int, old: torch.Tensor, new: torch.Tensor | None) -> Row:
    tolerance = TOLERANCE.get(old.dtype, 0.0)
    if new is None or new.shape != old.shape or new.dtype != old.dtype:
        got = "nothing" if new is None else f"{tuple(new.shape)} {new.dtype}"
        problem = f"expected {tuple(old.shape)} {old.dtype}, got {got}"
        return Row(shapes, index, tuple(old.shape), float("inf"), 0.0, tolerance, problem)
    wide_old, wide_new = old.to(torch.float64), new.to(torch.float64)
    finite = torch.isfinite(wide_old)
    if not torch.equal(finite, torch.isfinite(wide_new)):
        return Row(shapes, index, tuple(old.shape), float("inf"), 0.0, tolerance, "infinities or NaNs in other places")
    difference = (wide_new - wide_old)[finite].abs()
    scale = wide_old[finite].abs()
    return Row(
        shapes,
        index,
        tuple(old.shape),
        difference.max().item() if difference.numel() else 0.0,
        scale.max().item() if scale.numel() else 0.0,
        tolerance,
    )
