"""A projection has the keys of a 1x1 convolution, and is none for what looks for convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from upswap import DySample
from upswap.nn import Projection

X = torch.randn(2, 32, 6, 7, generator=torch.Generator().manual_seed(0))


def kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("init", [kaiming, reset])
@pytest.mark.parametrize("options", [{}, {"dyscope": True}, {"init": "paper"}, {"style": "pl"}], ids=str)
def test_initialisation_by_class_leaves_an_upsampler_alone(
    init: Callable[[nn.Module], None], options: dict[str, Any]
) -> None:
    module = DySample(32, **options)
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(0)
    module.apply(init)
    if options.get("init") == "paper" and init is reset:
        assert module.is_as_initialised()
    else:
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    module(X)


def test_a_projection_has_the_keys_of_a_convolution() -> None:
    projection, convolution = Projection(4, 6, bias=True), nn.Conv2d(4, 6, 1)
    projection.load_state_dict(convolution.state_dict())
    assert repr(projection) == "Projection(4, 6)"
    assert {k: v.shape for k, v in projection.state_dict().items()} == {
        k: v.shape for k, v in convolution.state_dict().items()
    }


def test_it_knows_whether_its_values_are_its_own() -> None:
    projection = DySample(32).offset
    assert not projection.was_changed()
    assert not projection.double().requires_grad_(False).was_changed()
    assert not copy.deepcopy(projection).was_changed()
    with torch.no_grad():
        projection.weight.add_(0)
    assert projection.was_changed()
    assert projection.float().was_changed()
    projection.load_state_dict(projection.state_dict())
    assert not projection.was_changed()
    projection.weight = nn.Parameter(projection.weight.detach())
    assert projection.was_changed()
