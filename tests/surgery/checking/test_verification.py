from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import upswap
from upswap.surgery.checking.verification import capture, compare


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.conv(x))
        return {"map": x, "mean": x.mean()}


def test_the_same_model_is_equal_at_two_sizes_and_left_as_it_was() -> None:
    model = Pair().train()
    state = copy.deepcopy(model.state_dict())
    report = upswap.verify(model, copy.deepcopy(model))
    assert report.ok
    assert report.max_abs_diff == 0
    assert len(report.rows) == 4
    assert len({row.inputs for row in report.rows}) == 2
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("amount", [1e-3, float("nan"), float("inf")])
def test_a_changed_weight_is_found(amount: float) -> None:
    model, other = Pair(), Pair()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.conv.weight[0, 0, 0, 0] += amount
    report = upswap.verify(model, other, sizes=[16, (20, 24)])
    assert not report.ok
    assert report.max_rel_diff > 1e-5
    assert next(row.inputs for row in report.rows if not row.ok) == "1x3x16x16"


def test_rounding_is_equal() -> None:
    model, other = Pair(), Pair()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.conv.weight *= 1 + 1e-7
    report = upswap.verify(model, other)
    assert report.ok
    assert 0 < report.max_rel_diff < 1e-5


def test_other_shapes_and_counts_are_found() -> None:
    class Fewer(Pair):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": super().forward(x)["map"][..., 1:]}

    model = Pair()
    other = Fewer()
    other.load_state_dict(model.state_dict())
    report = upswap.verify(model, other)
    assert not report.ok
    assert any("expected" in row.problem for row in report.rows)
    assert not upswap.verify(other, model).ok


def test_comparing_with_a_capture_needs_one_model_in_memory() -> None:
    model = Pair()
    captured = capture(model, torch.randn(2, 3, 16, 16))
    assert compare(captured, model).max_abs_diff == 0
    with torch.no_grad():
        model.conv.weight.zero_()
    assert not compare(captured, model).ok


def test_where_a_detector_finds_nothing_feature_maps_are_compared() -> None:
    class Finder(Pair):
        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": super().forward(x)["map"].new_zeros(0, 4)}]

    model, other = Finder(), Finder()
    other.load_state_dict(model.state_dict())
    report = upswap.verify(model, other)
    assert report.ok
    assert len(report.rows) == 6  # two maps and the boxes, at two sizes
    with torch.no_grad():
        other.norm.bias += 1
    assert not upswap.verify(model, other).ok
    assert not model.conv._forward_hooks


def test_lists_of_images_are_compared_at_two_sizes() -> None:
    class Listed(Pair):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [super(Listed, self).forward(image[None]) for image in images]

    model = Listed()
    report = upswap.verify(model, copy.deepcopy(model), ([torch.randn(3, 32, 32)],))
    assert report.ok
    assert len({row.inputs for row in report.rows}) == 2


def test_nothing_compared_is_not_ok() -> None:
    class Silent(Pair):
        def forward(self, x: torch.Tensor) -> None:
            return

    assert not upswap.Report(()).ok
    with pytest.raises(upswap.InputError, match="no tensors"):
        upswap.verify(Silent(), Silent())
    with pytest.raises(upswap.InputError, match="not both"):
        upswap.verify(Pair(), Pair(), torch.randn(1, 3, 8, 8), sizes=[8])


def test_a_model_that_blows_up_rounding_is_compared_in_float64() -> None:
    class Wild(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = nn.functional.interpolate(self.first(image), scale_factor=1.7, mode="bicubic")
            return (self.last(x) * 1e3).sin()

    torch.manual_seed(0)
    original = Wild().eval()
    patched = upswap.patch(copy.deepcopy(original))
    report = upswap.verify(original, patched)
    assert report.ok
    assert all("in float64" in row.inputs for row in report.rows)
    with torch.no_grad():
        next(upswap.parameters(patched)).add_(1e-4)
    report = upswap.verify(original, patched)
    assert not report.ok
    assert not any("in float64" in row.inputs for row in report.rows)
