"""Whether a file computes what the model does, in the runtime that it is for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..probe.inputs.inputs import Inputs
from ..probe.inputs.variations import enlarged
from .flat import Flat
from .runtimes import Run

#: Of the largest output, in float32.
TOLERANCE = 1e-4

#: In another precision, where the unpatched model is no worse; an error may be this many times the unpatched model's.
_COARSE = {"half": 0.02, "int8": 0.1}
_TIMES = 4


@dataclasses.dataclass(frozen=True)
class Checked:
    """One input that the file ran on."""

    shapes: str
    """Of the inputs: 2x3x64x96."""
    error: float
    """Largest difference over the largest output; of int8 the root mean square over the standard deviation."""
    problem: str = ""
    """What else is wrong: an output that is missing, or of another shape."""


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
        yield _compared(shapes, expected, got, form)


def _compared(shapes: str, expected: Sequence[Tensor], got: Sequence[Any], form: str) -> Checked:
    if len(got) != len(expected):
        return Checked(shapes, float("inf"), f"it gives {len(got)} outputs, the model {len(expected)}")
    errors = []
    for number, (old, array) in enumerate(zip(expected, got, strict=True)):
        new = torch.as_tensor(array)
        if new.shape != old.shape:
            return Checked(
                shapes, float("inf"), f"output {number} is {tuple(new.shape)}, the model's {tuple(old.shape)}"
            )
        errors.append(_error(old.detach().double(), new.double(), form))
    return Checked(shapes, max(errors, default=0.0))


def _error(old: Tensor, new: Tensor, form: str) -> float:
    if not old.numel():
        return 0.0
    difference = new - old
    if form == "int8":
        return float(difference.square().mean().sqrt() / old.std().clamp(min=1e-12)) if old.numel() > 1 else 0.0
    return float(difference.abs().max() / old.abs().max().clamp(min=1e-12))


def allowed(form: str, unpatched: float | None) -> float:
    """The largest error that a file may have; `unpatched` is that of the unpatched model in the same precision."""
    if form == "float32":
        return TOLERANCE
    return max(_COARSE[form], _TIMES * (unpatched or 0.0))
