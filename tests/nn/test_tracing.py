"""Upsamplers are nodes of an FX graph, whoever traces; a trace by torch.jit holds with its own check."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn import functional as F

import upswap
from upswap.nn import CARAFE, ByChannels, Cascade, DySample


class Net(nn.Module):
    """A layer, a straight line of calls and a loop that the number of levels decides: all can be traced by FX."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up, self.block, self.last = nn.Upsample(scale_factor=2), Block(), nn.Conv2d(8, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        high = self.high(image)
        x = self.low(high)
        for _ in range(1):
            x = self.block(x) + self.up(x)
        return self.last(high + x + F.interpolate(self.low(high), size=high.shape[-2:], mode="bilinear"))


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2)


def patched_net() -> nn.Module:
    torch.manual_seed(0)
    model = upswap.patch(Net())
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    "module",
    [DySample(8), CARAFE(8), Cascade([DySample(8), DySample(8)]), ByChannels({8: DySample(8)})],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize(
    "call",
    [
        lambda up, x: up(x),
        lambda up, x: up(x, (20, 24)),
        lambda up, x: up(x, size=(2 * x.shape[2], 24)),
        lambda up, x: up(x=x, scale_factor=2.0),
    ],
)
def test_an_upsampler_is_one_node(module: nn.Module, call: Any) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = copy.deepcopy(module)

        def forward(self, x: torch.Tensor) -> Any:
            return call(self.up, x)

    model = Holder()
    graph = fx.symbolic_trace(model)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["up"]
    x = torch.randn(1, 8, 10, 12)
    assert torch.equal(graph(x), model(x))


def test_a_patched_model_can_be_traced_by_fx() -> None:
    model = patched_net()
    graph = fx.symbolic_trace(model)
    nodes = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert set(upswap.upsamplers(model)) <= nodes
    for size in ((16, 16), (24, 32)):
        image = torch.randn(2, 3, *size)
        assert torch.equal(graph(image), model(image))
    graph(torch.randn(1, 3, 16, 16)).sum().backward()
    for path in upswap.upsamplers(model):
        assert all(parameter.grad is not None for parameter in graph.get_submodule(path).parameters())


# torch.ao says that it moves, and that observers have seen little.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_patched_model_can_be_prepared_for_quantised_training() -> None:
    model = patched_net()
    image = torch.randn(2, 3, 16, 16)
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), get_default_qat_qconfig_mapping("fbgemm"), (image,))
    prepared(image).sum().backward()
    kept = {path: module for path, module in prepared.named_modules() if isinstance(module, DySample)}
    assert set(upswap.upsamplers(model)) <= set(kept)
    assert all(module.offset.weight.grad is not None for module in kept.values())


# Shapes are compared while tracing, as torch's own layers do, and torch.jit is on its way out.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_patched_model_can_be_traced_by_torch_jit(gradients: bool, training: bool) -> None:
    model = patched_net().train(training)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, torch.randn(1, 3, 16, 16))
        for size in ((16, 16), (24, 32)):
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(traced(image), model(image), rtol=1e-5, atol=1e-5)
