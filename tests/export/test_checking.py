"""What counts as the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from deployed import IMAGES, patched
from upswap.export.checking import allowed, compared, first_images, image_count, inputs_to_check
from upswap.export.flat import Flat
from upswap.export.runtimes import Run
from upswap.probe.inputs.inputs import as_inputs


def flat(model: nn.Module) -> Flat:
    return Flat(model, as_inputs(IMAGES)).eval()


def test_three_sizes_where_sizes_are_open() -> None:
    found = inputs_to_check(flat(patched()), as_inputs(IMAGES), dynamic=True)
    assert len({tuple(row[0].shape) for row in found}) == 3
    assert {len(row[0]) for row in found} == {1, 2}
    found = inputs_to_check(flat(patched()), as_inputs(IMAGES), dynamic=False)
    assert [row[0].shape for row in found] == [IMAGES.shape] * 3
    assert not torch.equal(found[0][0], found[1][0])


def test_what_belongs_to_an_image_goes_with_it() -> None:
    inputs = as_inputs((IMAGES, torch.tensor([3, 4]), torch.zeros(5)))
    assert image_count(inputs) == 2
    assert [len(tensor) for tensor in first_images(inputs).tensors()] == [1, 1, 5]
    assert image_count(as_inputs(torch.zeros(2, 7))) is None

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale.view(-1, 1, 1, 1)

    inputs = as_inputs((IMAGES, torch.tensor([3, 4])))
    found = inputs_to_check(Flat(Scaled(), inputs), inputs, dynamic=True)
    assert {(len(x), len(scale)) for x, scale in found} == {(1, 1), (2, 2)}


def test_sizes_that_the_model_refuses_are_not_asked_for() -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 3, 6, 5)

    found = inputs_to_check(flat(One()), as_inputs(IMAGES), dynamic=True)
    assert [row[0].shape for row in found] == [IMAGES.shape] * 3


def test_differences() -> None:
    model = flat(nn.Identity())
    (same,) = compared(model, lambda tensors: [tensors[0].numpy()], [[IMAGES]], "float32")
    assert (same.error, same.problem, same.shapes) == (0, "", "2x3x6x5")
    largest = float(IMAGES.abs().max())
    (off,) = compared(model, lambda tensors: [(tensors[0] + largest / 100).numpy()], [[IMAGES]], "float32")
    assert abs(off.error - 0.01) < 1e-6
    (rms,) = compared(model, lambda tensors: [(tensors[0] + 0.5).numpy()], [[IMAGES]], "int8")
    assert abs(rms.error - 0.5 / float(IMAGES.std())) < 1e-5
    (nan,) = compared(model, lambda tensors: [(tensors[0] * float("nan")).numpy()], [[IMAGES]], "float32")
    assert not nan.error <= allowed("float32", None)


def test_a_channel_is_measured_by_its_own_largest_number() -> None:
    """Boxes in pixels and scores in one tensor, as detectors give them."""
    model = flat(nn.Identity())
    boxes, scores = 600 * torch.rand(1, 4, 99), torch.rand(1, 2, 99)
    x = torch.cat((boxes, scores), 1)

    def run(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        made = tensors[0].clone()
        made[:, -1] += 0.01
        return [made.numpy()]

    (row,) = compared(model, run, [[x]], "float32")
    assert not row.is_right("float32")
    assert row.error > 0.009 > 0.01 / float(x.max())


def test_what_is_masked_and_what_is_counted() -> None:
    x = IMAGES.clone()
    x[:, 0, 0] = -torch.inf
    model = flat(nn.Identity())
    (row,) = compared(model, lambda tensors: [tensors[0].numpy()], [[x]], "float32")
    assert (row.error, row.is_right("float32")) == (0, True)
    (row,) = compared(model, lambda tensors: [(tensors[0] + 0.1).numpy()], [[x]], "float32")
    assert not row.is_right("float32")
    (row,) = compared(model, lambda tensors: [IMAGES.numpy()], [[x]], "float32")
    assert not row.is_right("float32")

    class Classes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(1)

    other = torch.cat((IMAGES[:, 1:], IMAGES[:, :1]), 1).argmax(1)
    (row,) = compared(flat(Classes()), lambda tensors: [other.numpy()], [[IMAGES]], "float32")
    assert row.error == float((other != IMAGES.argmax(1)).double().mean()) > 0.5


class Steep(nn.Module):
    """Rounding comes out larger than it went in, as it does of many upsamplers with offsets of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (300 * (x.unsqueeze(-1) * self.mean).sum(-1)).sin()


def test_the_rounding_of_the_model_itself_is_no_fault_of_the_file() -> None:
    """A sum in another order is right, and a point that is read 0.01 pixels away is not."""
    model = flat(Steep())
    x = IMAGES + 3

    def reordered(tensors: Sequence[torch.Tensor], moved: float = 0.0) -> list[np.ndarray]:
        made: torch.Tensor = sum((tensors[0] + moved) * each for each in reversed(model.model.mean))
        return [(300 * made).sin().detach().numpy()]

    (row,) = compared(model, reordered, [[x]], "float32")
    assert row.error > 1e-4  # more than any limit that suits every model
    assert row.rounding is not None
    assert row.rounding > 1e-5
    assert row.is_right("float32")
    (row,) = compared(model, lambda tensors: reordered(tensors, 1e-4), [[x]], "float32")
    assert not row.is_right("float32")


def test_rounding_is_asked_for_where_it_is_needed() -> None:
    class Single(nn.Module):
        """It does not run in float64."""

        def __init__(self) -> None:
            super().__init__()
            self.kernel = [torch.eye(3)[..., None, None]]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.kernel[0])

    largest = float(IMAGES.abs().max())

    def off(by: float) -> Run:
        return lambda tensors: [(tensors[0] + by * largest).numpy()]

    (row,) = compared(flat(nn.Identity()), off(1e-6), [[IMAGES]], "float32")
    assert (row.rounding, row.is_right("float32")) == (None, True)
    (row,) = compared(flat(nn.Identity()), off(5e-5), [[IMAGES]], "float32")
    assert (row.rounding, row.is_right("float32")) == (0, False)
    (row,) = compared(flat(Single()), off(5e-5), [[IMAGES]], "float32")
    assert (row.rounding, row.is_right("float32")) == (None, True)
    (row,) = compared(flat(Single()), off(2e-4), [[IMAGES]], "float32")
    assert not row.is_right("float32")


def test_other_outputs_and_errors_are_problems() -> None:
    model = flat(nn.Identity())

    def fails(tensors: object) -> list[object]:
        raise RuntimeError("no kernel")

    for run, problem in (
        (lambda tensors: [], "gives 0 outputs, the model 1"),
        (lambda tensors: [tensors[0][:1].numpy()], "output 0 is (1, 3, 6, 5), the model's (2, 3, 6, 5)"),
        (fails, "RuntimeError: no kernel"),
    ):
        (row,) = compared(model, run, [[IMAGES]], "float32")
        assert problem in row.problem


def test_coarse_precisions_are_measured_by_the_unpatched_model() -> None:
    assert allowed("float32", None) == 1e-4
    assert allowed("float32", None, 0.0) == 2e-5
    assert allowed("float32", None, 1e-5) == 2e-4
    assert allowed("float32", None, 0.5) == 2e-3
    assert allowed("float32", None, float("nan")) == 2e-5
    assert allowed("half", None) == 0.02
    assert allowed("half", 0.05) == 0.2
    assert allowed("int8", 0.01) == 0.1
