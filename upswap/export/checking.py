"""Whether a file computes what the model does, in the runtime that it is for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..probe.inputs.inputs import Inputs
from ..probe.inputs.variations import enlarged
from .flat import Flat
from .runtimes import Run

#: In float32: a file this near the model is right, whatever the model is.
TOLERANCE = 2e-5

#: One further off is right where the model's own rounding, float32 against float64 in PyTorch, explains it: up to this many
#: times that. Of 8 models, patched with offsets of four pixels and not, it was 7e-7 to 4e-5, and right files in any runtime were
#: 1.1 to 6.2 times that away, farthest in ncnn.
_ROUNDINGS = 20

#: And no further than this, lest a model that amplifies rounding pass a wrong file. Points moved by 0.01 pixels, in one
#: upsampler of many, moved the output of those models by 0.004 to 0.04.
_FARTHEST = 2e-3

#: Where the model does not run in float64, so that its rounding is not known.
_UNKNOWN = 1e-4

#: A channel is measured by its own largest number: beside the coordinates of a detector's boxes its scores would not count. But
#: numbers that are small in the tensor as a whole are as coarse as the runtime's sigmoid is.
_SMALLEST_CHANNEL = 1e-3

#: Numbers in a channel, below which the tensor is taken as a whole.
_FEW = 64

#: In another precision, where the unpatched model is no worse; an error may be this many times the unpatched model's.
_COARSE = {"half": 0.02, "int8": 0.1}
_TIMES = 4


@dataclasses.dataclass(frozen=True)
class Checked:
    """One input that the file ran on."""

    shapes: str
    """Of the inputs: 2x3x64x96."""
    error: float
    """Largest difference over the largest output of the channel; of int8 the root mean square over the standard deviation."""
    problem: str = ""
    """What else is wrong: an output that is missing, or of another shape."""
    rounding: float | None = None
    """The same difference of the model in float32 and in float64, where it was needed to judge `error` and could be measured."""

    def is_right(self, form: str, unpatched: float | None = None) -> bool:
        """Whether the file may be written; `unpatched` is the error of the unpatched model in the same precision."""
        return not self.problem and self.error <= allowed(form, unpatched, self.rounding)


def inputs_to_check(flat: Flat, inputs: Inputs, *, dynamic: bool) -> list[list[Tensor]]:
    """Three inputs: of three sizes where sizes are open and the model takes them, else other values of the one size."""
    generator = torch.Generator().manual_seed(1)

    def other(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor

    found = [inputs.tensors()]
    wanted = [enlarged(inputs, height=False), enlarged(inputs)] if dynamic else []
    for larger in wanted:
        tensors = larger.tensors()
        if len(tensors) == len(found[0]) and _runs(flat, tensors):
            found.append(first_images(larger).tensors() if len(found) == 2 else tensors)
    while len(found) < 3:
        found.append([other(tensor) for tensor in found[0]])
    return [tensors for tensors in found if _runs(flat, tensors)]


def image_count(inputs: Inputs) -> int | None:
    """The size of the batch, None where there is none."""
    return next((len(tensor) for tensor in inputs.tensors() if tensor.dim() >= 4), None)


def first_images(inputs: Inputs) -> Inputs:
    """The inputs with one image, and what belongs to it: of every tensor that is as long as the batch, the first."""
    count = image_count(inputs)
    return inputs.map(lambda tensor: tensor[:1] if tensor.shape[:1] == (count,) else tensor)


def _runs(flat: Flat, tensors: Sequence[Tensor]) -> bool:
    with contextlib.suppress(Exception), torch.no_grad():
        flat(*tensors)
        return True
    return False


def compared(flat: Flat, run: Run, inputs: Sequence[Sequence[Tensor]], form: str) -> Iterator[Checked]:
    """The outputs of `run` against those of the model, on each of the inputs."""
    for tensors in inputs:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        with torch.no_grad():
            expected = flat(*(tensor.clone() for tensor in tensors))
        try:
            got = run(tensors)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises is the answer
            yield Checked(shapes, float("inf"), f"{type(error).__name__}: {error}")
            continue
        row = _compared(shapes, expected, got, form)
        if form == "float32" and not row.problem and row.error > TOLERANCE:
            row = dataclasses.replace(row, rounding=_rounding(flat, tensors, expected))
        yield row


def _compared(shapes: str, expected: Sequence[Tensor], got: Sequence[Any], form: str) -> Checked:
    if len(got) != len(expected):
        return Checked(shapes, float("inf"), f"it gives {len(got)} outputs, the model {len(expected)}")
    made = [torch.as_tensor(array) for array in got]
    for number, (old, new) in enumerate(zip(expected, made, strict=True)):
        if new.shape != old.shape:
            return Checked(
                shapes, float("inf"), f"output {number} is {tuple(new.shape)}, the model's {tuple(old.shape)}"
            )
    return Checked(shapes, _largest_error(expected, made, form))


def _largest_error(expected: Sequence[Tensor], got: Sequence[Tensor], form: str) -> float:
    errors = [_error(old, new, form) for old, new in zip(expected, got, strict=True)]
    # `max` would lose a difference that is no number.
    return max(errors, default=0.0) if all(error == error for error in errors) else float("nan")


def _error(old: Tensor, new: Tensor, form: str) -> float:
    if not old.numel():
        return 0.0
    if not old.is_floating_point():  # classes, masks: how many there are of others
        return float((old != new).double().mean())
    old, new = old.detach().double(), new.double()
    difference = torch.where(
        old == new, 0.0, new - old
    )  # of equal infinities, where something was masked, it is no number
    if form == "int8":
        return float(difference.square().mean().sqrt() / old.std().clamp(min=1e-12)) if old.numel() > 1 else 0.0
    sizes = _by_channel(torch.where(old.isfinite(), old, 0.0))
    return float((_by_channel(difference) / sizes.clamp(min=max(1e-12, _SMALLEST_CHANNEL * float(sizes.max())))).max())


def _by_channel(x: Tensor) -> Tensor:
    """The largest of each channel, or of all where a channel has few numbers."""
    by_channel = x.dim() >= 3 and x.numel() >= _FEW * x.shape[1]
    return (x.transpose(0, 1).flatten(1) if by_channel else x.reshape(1, -1)).abs().amax(1)


def _rounding(flat: Flat, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """How far the model in float32 is from itself in float64; None where it does not run in float64."""
    with contextlib.suppress(Exception), torch.no_grad():
        exact = copy.deepcopy(flat).double()
        wide = exact(*(tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in tensors))
        return _largest_error(wide, expected, "float32")
    return None


def allowed(form: str, unpatched: float | None, rounding: float | None = None) -> float:
    """The largest error that a file may have.

    Args:
        form: "float32", "half" or "int8".
        unpatched: the error of the unpatched model in the same precision.
        rounding: of "float32", the model's own.
    """
    if form == "float32":
        return max(TOLERANCE, _UNKNOWN if rounding is None else min(_ROUNDINGS * rounding, _FARTHEST))
    return max(_COARSE[form], _TIMES * (unpatched or 0.0))
