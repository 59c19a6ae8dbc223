"""The graph route puts no name of a model into source text, and does not trace what has names that others would."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import upswap
from upswap.surgery.routes import graph_route as route

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.last = nn.Conv2d(4, 2, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x, factor=2.0):
        x = F.interpolate(self.first(x) * self.gain, scale_factor=2.0)
        return self.last(F.pad(x, (0, 0, 0, 0))[:, :4].view(x.shape))


class NamesOfPython(nn.Module):
    """Arguments as FX would not call them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, input, slice=None):
        input = F.interpolate(self.conv(input), scale_factor=2.0, mode="bilinear")
        return torch.cat([input[:, 1:], input], dim=1)


def named_before(model: nn.Module, place: str, name: str) -> None:
    """Give the first thing in one of a module's dicts another name, which tracers find first."""
    held = vars(model)[place]
    vars(model)[place] = OrderedDict([(name, next(iter(held.values()))), *held.items()])


def test_a_straight_forward_takes_the_graph_route() -> None:
    """So that the refusals below are of names alone."""
    model = Straight().eval()
    expected = model(X)
    upswap.patch(model, X)
    assert [site.route for site in upswap.plan_of(model).swapped] == ["graph"]
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected, rtol=1e-5, atol=1e-6)
    assert type(model).forward.__defaults__ == (2.0,)


class Twice(nn.Module):
    """A resize of what a resize gave, directly and in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.interpolate(F.interpolate(self.first(x), scale_factor=2), scale_factor=1.5, mode="bilinear")
        return self.last(F.interpolate(x.double().float(), scale_factor=2))


def test_a_resize_of_what_a_resize_gave() -> None:
    original = Twice().eval()
    model = upswap.patch(copy.deepcopy(original), X)
    assert [site.route for site in upswap.plan_of(model).swapped] == ["graph"] * 3
    for x in (X, torch.randn(2, 3, 7, 9)):
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)


def test_arguments_keep_their_names() -> None:
    model = NamesOfPython().eval()
    expected = model(X)
    upswap.patch(model, X, kinds=("feature", "logits"))
    assert [site.route for site in upswap.plan_of(model).swapped] == ["graph"]
    torch.testing.assert_close(model(input=X, slice=None), expected, rtol=1e-5, atol=1e-6)


HOSTILE = (
    'training") or open("MARK", "w") or getattr(self, "first',
    'training")\n    open("MARK", "w")\n    getattr(self, "first',
    'training")\r    open("MARK", "w")\r    getattr(self, "first',
    'x\u2028open("MARK", "w")',
    "x'''\nopen('MARK', 'w')\n'''",
    "open('MARK', 'w')",
    "{open('MARK', 'w')}",
    "x\\",
    "layer-1",
    "a b",
)


@pytest.mark.parametrize("place", ["_modules", "_parameters"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_with_odd_names_is_patched_and_never_traced(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Straight().eval()
    named_before(model, place, name)
    expected = model(X)
    with monkeypatch.context() as patch:
        patch.setattr(route, "trace", lambda *_: pytest.fail("was traced"))
        upswap.patch(model, X)
    assert [site.route for site in upswap.plan_of(model).swapped] == ["source"]
    for made in (model, copy.deepcopy(model)):
        torch.testing.assert_close(made(X), expected, rtol=1e-5, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_graph_stays_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in a graph that was made without asking: what it becomes is made without text."""
    monkeypatch.chdir(tmp_path)
    owner = Straight()
    owner._modules[name] = nn.ReLU()
    graph = fx.Graph(owner)
    x = graph.placeholder("x")
    y = graph.call_module(name, (x,))
    graph.output(graph.call_function(torch.add, (y, graph.get_attr("gain"))))
    made = route._compile(graph, owner)
    torch.testing.assert_close(made(owner, X), X.relu() + 1)
    assert list(tmp_path.iterdir()) == []
