"""Methods that a model keeps as values run the upsamplers, as calls of the method do; where they cannot, the site is kept."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invariants
import upswap
from upswap.surgery.routes.kept_methods import kept_functions

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A head on an upsampled map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 2, 3, padding=1)
        self.keep()

    def keep(self) -> None:
        """Keep the method."""

    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        """The resize, by the kept method."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.resized(self.a(x)))


class Attribute(Net):
    def keep(self) -> None:
        self.resize = self._resize

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.resize(x)


class Table(Net):
    def keep(self) -> None:
        self.table: dict[str, list[Callable[..., Any]]] = {"up": [self._resize]}

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.table["up"][0](x)


class Up(nn.Module):
    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class OfAPart(Net):
    def keep(self) -> None:
        self.up = Up()
        self.resize = self.up._resize

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.resize(self.up(x))


SERVED = (Attribute, Table, OfAPart)


class InATuple(Net):
    def keep(self) -> None:
        self.table = (self._resize,)

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[0](x)


class OfTheClass(Net):
    TABLE: ClassVar[dict[str, Any]] = {"up": Net._resize}

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.TABLE["up"](self, x)


class InAPartial(Net):
    def keep(self) -> None:
        self.resize = functools.partial(self._resize)

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return self.resize(x)


NOT_SERVED = (InATuple, OfTheClass, InAPartial)


def trained(cls: type[Net]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A patched model whose upsampler has moved, what it gave before the patch, and what it gives now."""
    torch.manual_seed(0)
    model = cls().eval()
    with torch.no_grad():
        before = model(X)
        invariants.check_step_0(copy.deepcopy(model), upswap.patch(model, X), [X])
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
        return model, before, model(X)


@pytest.mark.parametrize("cls", SERVED)
def test_the_kept_method_runs_the_upsampler(cls: type[Net], tmp_path: Path) -> None:
    model, before, after = trained(cls)
    assert (after - before).abs().max() > 0.01
    invariants.check_learning(model, X)
    path = tmp_path / "model.pt"
    with pytest.warns(upswap.UpswapWarning, match="trust"):
        upswap.save(model, path)
    with torch.no_grad():
        for copied in (
            copy.deepcopy(model),
            upswap.load(path, trust=[__name__]),
            torch.load(path, weights_only=False),
        ):
            assert torch.equal(copied(X), after)
            assert torch.equal(upswap.unpatch(copied)(X), before)


@pytest.mark.parametrize("cls", SERVED)
def test_undoing_gives_the_method_back(cls: type[Net]) -> None:
    model, before, _ = trained(cls)
    upswap.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(X), before)
    kept = [value for value in vars(model).values() if callable(value)]
    assert all(method == getattr(method.__self__, "_resize") for method in kept)  # noqa: B009
    assert all(method.__func__ in (Net._resize, Up._resize) for method in kept)


@pytest.mark.parametrize("cls", NOT_SERVED)
def test_what_cannot_be_rebound_is_kept_and_said(cls: type[Net]) -> None:
    """A tuple cannot be changed, and what a class keeps is every model's."""
    (site,) = upswap.inspect(cls().eval(), X).sites
    assert not site.swap
    assert "not called in a way that can be rewritten" in site.reason


def test_a_method_that_only_has_the_name_stays() -> None:
    class Other(Attribute):
        def keep(self) -> None:
            super().keep()
            self.plain = super()._resize  # of the class before, which `_resize` hides

        def _resize(self, x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, scale_factor=2, mode="nearest")

    model = Other().eval()
    upswap.patch(model, X)
    assert model.plain.__func__ is Net._resize
    assert model.resize.__func__ is not Other._resize


def test_what_is_kept_is_found_in_containers_and_classes() -> None:
    names = kept_functions(nn.Sequential(InATuple(), OfTheClass(), InAPartial()))
    assert names == {"Net._resize"}
    assert kept_functions(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())) == set()
