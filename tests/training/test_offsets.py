"""`offsets` measures in pixels how far points are moved, and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upswap
from upswap.nn import DySample


class Net(nn.Module):
    """One resize, by 2 or by a ratio that is no whole number."""

    def __init__(self, ratio: float = 2.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.ratio = ratio
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(nn.functional.interpolate(x, scale_factor=self.ratio, mode="bilinear").relu())


def patched(ratio: float = 2.0, **options: Any) -> tuple[nn.Module, DySample]:
    torch.manual_seed(0)
    model = upswap.patch(Net(ratio), torch.randn(1, 3, 16, 24), **options)
    (upsampler,) = upswap.upsamplers(model).values()
    return model, upsampler


X = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_at_step_0_no_point_is_moved() -> None:
    model, _ = patched()
    (row,) = upswap.offsets(model, X).rows
    assert (row.path, row.mean, row.p95, row.by_content) == ("upsample", 0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"style": "pl"}, {"dyscope": True}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("ratio", [2.0, 1.6])
def test_a_constant_offset_does_not_depend_on_the_map(ratio: float, options: dict[str, Any]) -> None:
    model, upsampler = patched(ratio, **options)
    with torch.no_grad():
        upsampler.offset.bias.view(2, -1).copy_(torch.tensor([[0.3], [0.4]]))
        if upsampler.scope is not None:
            upsampler.scope.weight.zero_()
    (row,) = upswap.offsets(model, {"x": X}).rows
    assert row.mean == pytest.approx(0.25 * 0.5, abs=1e-5)
    assert row.p95 == pytest.approx(0.25 * 0.5, abs=1e-5)
    assert row.by_content == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("ratio", [2.0, 1.6])
def test_lengths_are_those_of_the_points_that_are_read(ratio: float) -> None:
    model, upsampler = patched(ratio)
    unmoved = copy.deepcopy(upsampler)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.normal_(std=0.3)
        model.eval()
        x = model.stem(X)
        there, here = (each.points(x, None, ratio) for each in (upsampler, unmoved))
    lengths = torch.hypot(*(a - b for a, b in zip(there, here, strict=True)))
    (row,) = upswap.offsets(model.train(), X).rows
    assert row.mean == pytest.approx(float(lengths.mean()), rel=1e-4)
    assert row.p95 == pytest.approx(float(lengths.quantile(0.95)), rel=1e-2)
    assert row.by_content > 0
    if ratio == 2:  # the mean of each sub-pixel of each group is no part of it, and so no bias
        with torch.no_grad():
            upsampler.offset.bias.zero_()
        assert upswap.offsets(model, X).rows[0].by_content == pytest.approx(row.by_content, rel=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model, upsampler = patched()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    upswap.offsets(model, X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not upsampler._forward_pre_hooks


def test_rows_of_models_with_several_kinds() -> None:
    model, _ = patched(upsampler="carafe")
    assert upswap.offsets(model, X).rows == ()
    model = upswap.patch(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=4), nn.Conv2d(8, 8, 1)), cascade=True
    )
    found = upswap.offsets(model, X)
    assert [row.path for row in found.rows] == ["1.0", "1.1"]
    assert str(found).splitlines()[0].split() == ["upsampler", "mean", "95", "%", "by", "content"]
    with pytest.raises(upswap.PlanError, match="not patched"):
        upswap.offsets(Net(), X)
