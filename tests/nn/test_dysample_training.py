"""Gradients: right, deterministic, and one for every parameter from the first step on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upswap.nn.dysample import DySample

VARIANTS = [("lp", False), ("lp", True), ("pl", False), ("pl", True)]
RESIZES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    {"mode": "area"},
    {"mode": "bilinear"},
    {"mode": "bilinear", "align_corners": True},
    {"mode": "bicubic"},
    {"mode": "bicubic", "align_corners": True},
]


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("init", ["match", "paper"])
@pytest.mark.parametrize("resize", RESIZES, ids=str)
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_one_step_moves_every_parameter(
    style: str, dyscope: bool, resize: dict[str, Any], init: str, optimiser: type[torch.optim.Optimizer]
) -> None:
    """Every entry of every parameter, so no output of a convolution starts dead."""
    torch.manual_seed(0)
    module = DySample(8, 2, style=style, dyscope=dyscope, init=init, **resize)
    before = copy.deepcopy(dict(module.named_parameters()))
    x = torch.randn(2, 8, 6, 7)
    steps = optimiser(module.parameters(), lr=1e-3)
    out = module(x)
    (out - torch.randn_like(out)).square().mean().backward()
    steps.step()
    for name, parameter in module.named_parameters():
        assert (parameter != before[name]).all(), name


def test_scope_learns_as_fast_as_with_the_papers_initialisation() -> None:
    """The first step only wakes it; after a few, its weights have the size they have from random offsets."""
    sizes = {}
    for init in ("match", "paper"):
        torch.manual_seed(0)
        module = DySample(8, 2, dyscope=True, init=init)
        steps = torch.optim.Adam(module.parameters(), lr=1e-3)
        x, target = torch.randn(2, 8, 6, 7), torch.randn(2, 8, 12, 14)
        for _ in range(20):
            steps.zero_grad()
            (module(x) - target).square().mean().backward()
            steps.step()
        sizes[init] = module.scope.weight.abs().mean().item()
    assert sizes["match"] > sizes["paper"] / 2


@pytest.mark.parametrize("how", [{}, {"size": (5, 7)}, {"scale_factor": 1.5}], ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_gradcheck(style: str, dyscope: bool, mode: str, how: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = DySample(8, 2, style=style, groups=2, dyscope=dyscope, mode=mode, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            # Offsets of a few tenths of a pixel. Random positions keep away from kinks by far more than gradcheck's
            # step of 1e-6.
            parameter.normal_(std=0.2)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), how)

    x = torch.randn(1, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *module.parameters()), eps=1e-6, atol=1e-6)


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_algorithms")
@pytest.mark.parametrize("how", [{}, {"size": (13, 15)}], ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_deterministic_algorithms(style: str, dyscope: bool, mode: str, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = DySample(16, 2, style=style, dyscope=dyscope, mode=mode)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(2, 16, 6, 7)
    runs = []
    for _ in range(2):
        source = x.clone().requires_grad_()
        out = module(source, **how)
        module.zero_grad()
        out.square().sum().backward()
        runs.append([out, source.grad, *(parameter.grad for parameter in module.parameters())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_hosts_later_initialisation_can_be_undone() -> None:
    def xavier(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    module = DySample(8, 2, dyscope=True, mode="nearest")
    x = torch.randn(1, 8, 4, 5)
    fresh = module(x)
    module.apply(xavier)
    assert not torch.allclose(module(x), fresh, atol=1e-3)
    module.reset_parameters()
    assert torch.equal(module(x), fresh)
