from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from upswap.probe.preserve import leaving_no_trace


class Restless(nn.Module):
    """Changes everything about itself that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3)
        self.register_buffer("cache", None)
        self.register_buffer("count", torch.zeros(()))
        self.seen: dict[str, int] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x
        self.note = "new"
        self.count += 1
        self.seen["runs"] = 1
        self.register_forward_hook(lambda *_: None)
        random.random()
        return self.frozen(self.norm(x)) + torch.rand(())


def snapshot(model: Restless) -> tuple[object, ...]:
    values = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    return (
        {k: v.tolist() for k, v in values.items()},
        flags,
        sorted(model.__dict__),
        dict(model.seen),
        len(model._forward_hooks),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_trace(fails: bool) -> None:
    model = Restless().train()
    model.frozen.eval()
    random.seed(0)
    torch.manual_seed(0)
    before, states = snapshot(model), (random.getstate(), torch.get_rng_state())
    try:
        with leaving_no_trace(model, training=True), torch.no_grad():
            model(torch.randn(2, 3, 4, 4))
            assert snapshot(model) != before
            if fails:
                raise KeyError("a model that fails")
    except KeyError:
        pass
    assert snapshot(model) == before
    assert model.cache is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_buffers_stay_the_same_objects() -> None:
    model = nn.BatchNorm2d(3).train()
    mean = model.running_mean
    with leaving_no_trace(model, training=True):
        model(torch.randn(2, 3, 4, 4))
    assert model.running_mean is mean
    assert mean is not None
    assert torch.equal(mean, torch.zeros(3))


def test_inside_flags_are_as_asked() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout())
    with leaving_no_trace(model):
        assert not any(module.training for module in model.modules())
    with leaving_no_trace(model, training=None):
        assert all(module.training for module in model.modules())
