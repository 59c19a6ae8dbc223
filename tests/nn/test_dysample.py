"""What the module takes, refuses, and says about itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from upswap.errors import OptionError, ShapeError
from upswap.nn.dysample import DySample


@pytest.mark.parametrize(
    ("style", "dyscope", "parameters"),
    [("lp", False, 8224), ("pl", False, 1040), ("lp", True, 16416), ("pl", True, 2064)],
)
def test_the_papers_parameter_counts(style: str, dyscope: bool, parameters: int) -> None:
    """Table 9 of the paper: C = 256, x2, with the default groups."""
    module = DySample(256, 2, style=style, dyscope=dyscope)
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("channels", "style", "requested", "actual"),
    [
        (64, "lp", None, 4),
        (64, "pl", None, 8),
        (6, "lp", None, 3),
        (7, "lp", 4, 1),
        (2, "lp", None, 2),
        (1, "lp", 4, 1),
        (12, "pl", 8, 6),
        (64, "lp", 64, 64),
    ],
)
def test_groups(channels: int, style: str, requested: int | None, actual: int) -> None:
    module = DySample(channels, 2, style=style, groups=requested)
    assert module.groups == actual
    assert module.requested_groups == (requested or {"lp": 4, "pl": 8}[style])
    if actual != module.requested_groups:
        assert f"groups={actual} (asked for {module.requested_groups})" in repr(module)
        with pytest.raises(OptionError, match=f"does not divide in_channels={channels}; .* groups={actual}"):
            DySample(channels, 2, style=style, groups=requested, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "pp"}, "style='pp' is not one of lp, pl"),
        ({"init": "zero"}, "init='zero' is not one of match, paper"),
        ({"mode": "linear"}, "mode='linear' is not one of nearest, nearest-exact, area, bilinear, bicubic"),
        ({"mode": "nearest", "align_corners": True}, "align_corners=True has no meaning in mode 'nearest'"),
        ({"scale": 0.5}, "at least 1, got 0.5"),
        ({"scale": (2, 2, 2)}, r"got \(2, 2, 2\)"),
        ({"scale": "2"}, "got '2'"),
        ({"scale": None}, "got None"),
        ({"scale": True}, "got True"),
        ({"scale": float("nan")}, "got nan"),
        ({"scale": float("inf")}, "got inf"),
        ({"groups": 0}, "groups must be a positive int, got 0"),
        ({"groups": 2.0}, "groups must be a positive int, got 2.0"),
        ({"in_channels": 0}, "in_channels must be a positive int, got 0"),
        ({"style": "pl", "in_channels": 6}, "in_channels=6 is not a multiple of 4; use style='lp'"),
        ({"style": "pl", "in_channels": 8, "scale": (3, 2)}, "in_channels=8 is not a multiple of 6; use style='lp'"),
        ({"style": "pl", "in_channels": 8, "scale": 2.5}, "in_channels=8 is not a multiple of 9; use style='lp'"),
    ],
    ids=str,
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DySample(**{"in_channels": 16, **options})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 8, 4), r"expects an input of shape \(B, 16, H, W\), got \(1, 8, 4\)"),
        (torch.zeros(1, 8, 4, 4), r"expects an input of shape \(B, 16, H, W\), got \(1, 8, 4, 4\)"),
        (torch.zeros(1, 16, 4, 4, dtype=torch.uint8), r"floating-point input, got torch.uint8"),
    ],
    ids=str,
)
def test_refused_inputs(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        DySample(16, 2)(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": 8, "scale_factor": 2}, "not both"),
        ({"size": (8, 8, 8)}, r"size must be one number or \(vertical, horizontal\)"),
        ({"size": (8.5, 8)}, "size must be an int or a pair of ints, got 8.5"),
        ({"scale_factor": (2,)}, "scale_factor must be one number"),
    ],
    ids=str,
)
def test_refused_targets(how: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DySample(4, 2)(torch.zeros(1, 4, 4, 4), **how)


def test_a_replaced_projection_is_not_silently_ignored() -> None:
    module = DySample(4, 2)
    module.offset = nn.Sequential(module.offset)
    with pytest.raises(OptionError, match=r"DySample.offset was replaced by a Sequential"):
        module(torch.zeros(1, 4, 4, 4))


def test_targets() -> None:
    module = DySample(4, (3, 2))
    x = torch.zeros(2, 4, 5, 7)
    assert module.offset_scale == (3, 2)
    assert module(x).shape == (2, 4, 15, 14)
    assert module(x, size=20).shape == (2, 4, 20, 20)
    assert module(x, size=torch.Size([11, 13])).shape == (2, 4, 11, 13)
    assert module(x, size=[11, 13]).shape == (2, 4, 11, 13)
    assert module(x, None, 1.5).shape == (2, 4, 7, 10)
    assert module(x[:0]).shape == (0, 4, 15, 14)
    assert DySample(4, 1.5).offset_scale == (2, 2)
    assert DySample(4, 2.0).scale == (2, 2)


def test_repr() -> None:
    text = repr(DySample(64, 2, style="pl", dyscope=True, mode="bicubic", align_corners=True))
    assert "64, scale=2, style=pl, groups=8, dyscope=True, init=match, mode=bicubic, align_corners=True" in text
    assert "scale=(3, 2)" in repr(DySample(64, (3, 2)))


def test_copies_and_pickles() -> None:
    module = DySample(6, (3, 2), mode="nearest", dyscope=True)
    nn.init.normal_(module.offset.weight)
    x = torch.randn(1, 6, 4, 5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)


def test_building_one_draws_no_random_numbers() -> None:
    """A patched model sees the random numbers the original would have seen."""
    before = torch.get_rng_state()
    DySample(16, 2, dyscope=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_go_where_they_are_asked() -> None:
    module = DySample(16, 2, dyscope=True, dtype=torch.float64, device="meta")
    assert {(t.device.type, t.dtype) for t in module.state_dict().values()} == {("meta", torch.float64)}
    module = DySample(16, 2, dyscope=True)
    assert {(t.device.type, t.dtype) for t in module.state_dict().values()} == {("cpu", torch.float32)}


def test_fake_tensors() -> None:
    """A probe runs models without computing anything."""
    with FakeTensorMode():
        module = DySample(16, 2, dyscope=True)
        out = module(torch.empty(2, 16, 5, 6), size=(11, 13))
        assert out.shape == (2, 16, 11, 13)
        module.load_state_dict(module.state_dict())
    real = DySample(16, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert real(torch.empty(2, 16, 5, 6)).shape == (2, 16, 10, 12)
