"""What counts as the same."""

from __future__ import annotations

import torch
from torch import nn

from deployed import IMAGES, patched
from upswap.export.checking import allowed, compared, first_images, image_count, inputs_to_check
from upswap.export.flat import Flat
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
    assert allowed("half", None) == 0.02
    assert allowed("half", 0.05) == 0.2
    assert allowed("int8", 0.01) == 0.1
