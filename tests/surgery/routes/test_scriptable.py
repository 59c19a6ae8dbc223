"""`torch.jit.script` of a patched model runs the upsamplers, or says why it cannot; never the original resize in silence."""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap

# Shapes are compared while tracing, as torch's own layers do, and torch.jit is on its way out.
# torch says that both are deprecated, at each use, and that a trace keeps the sizes of its example.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def smp(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch

        return getattr(segmentation_models_pytorch, name)("resnet18", encoder_weights=None)

    return make


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 2, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear")


class Typed(Base):
    def forward(self, x, twice=True):  # type: ignore[no-untyped-def]
        # type: (torch.Tensor, bool) -> torch.Tensor
        """Two calls on one line, one of them over several."""
        y = self.a(x)
        if y.shape[0] > 100:
            y = y * 2
        y = F.interpolate(y, size=[x.shape[2] * 2, x.shape[3] * 2], mode="bilinear",  # größer
                          align_corners=False) + F.interpolate(y, scale_factor=2.0)  # fmt: skip
        return self.b(y) if twice else self.b(y) * 2


class Loops(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        for _ in range(2):
            y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        for _ in range(2):
            y = y + F.interpolate(y, size=(y.shape[2], y.shape[3]))
        return self.b(y)


class Layer(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.a(x))
        return self.b(self.up(y.relu()))


class Helped(Base):
    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.resized(self.a(x)))


def larger(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0)


class Function(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(larger(self.a(x)))


def doubled(
    # of any size
    x: torch.Tensor, mode: str = "nearest") -> torch.Tensor:  # fmt: skip
    return larger(larger(x)) + F.interpolate(x, scale_factor=4.0, mode=mode)


def plus_one(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """TorchScript looks through this one."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return function(*args, **kwargs) * 1

    return wrapper


class Deep(Base):
    """Resizes in the arguments of others, in methods that methods call, static ones, functions of functions, decorated ones."""

    @staticmethod
    def half(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=0.5)

    @staticmethod
    def twice(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(F.interpolate(x, scale_factor=2.0), scale_factor=2.0, mode="bilinear")

    def merge(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.resized(x) + y

    @plus_one
    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0)

    @plus_one
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = self.merge(self.merge(y, larger(y)), larger(larger(y)))
        for _ in range(2):
            z = z + self.half(y).mean()
        z = z + self.half(self.twice(y)).mean()
        return self.b(z + doubled(y, mode="bilinear"))


class HelpedInLoop(Helped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        for _ in range(2):
            y = self.resized(y)
        return self.b(y)


class Comprehension(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.cat([F.interpolate(y, scale_factor=2.0) for _ in range(2)])[: x.shape[0]])


def trained(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A patched model whose upsamplers have moved, what it gave before the patch, and what it gives now."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        before = model(X)
        upswap.patch(model, X)
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
        return model, before, model(X)


SCRIPTED = {
    **{name: smp(name) for name in ("Unet", "FPN", "UPerNet", "DeepLabV3Plus", "Segformer")},
    **{cls.__name__: cls for cls in (Typed, Loops, Layer, Helped, Function, Deep)},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("FPN", "UPerNet", "DeepLabV3Plus") else ())
        for name in SCRIPTED
    ],
)
def test_a_scripted_model_is_the_patched_one(name: str) -> None:
    torch.jit.script(SCRIPTED[name]())  # the original can be
    model, before, after = trained(SCRIPTED[name])
    parts = {path: id(module) for path, module in model.named_modules()}
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    with torch.no_grad():
        for made in (scripted, torch.jit.load(file)):
            got = made(X)
            torch.testing.assert_close(got, after, rtol=0, atol=2e-5 * after.abs().max().item())
        assert (got - before).abs().max() > 1e-3 * before.abs().max()
        assert torch.equal(model(X), after)
    assert {path: id(module) for path, module in model.named_modules()} == parts
    upswap.unpatch(model)


NOT_SCRIPTED = [(HelpedInLoop, "stands in a loop"), (Comprehension, "does not run once")]


@pytest.mark.parametrize(("cls", "says"), NOT_SCRIPTED)
def test_what_cannot_be_scripted_says_why(cls: type[Base], says: str) -> None:
    model, _, _ = trained(cls)
    with pytest.raises(RuntimeError, match=says):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X), rtol=1e-5, atol=1e-5)


def test_the_source_of_a_rewritten_forward_is_what_runs() -> None:
    model: Any = trained(Typed)[0]
    text = inspect.getsource(type(model).forward)
    assert "self.upsample_0(y, [x.shape[2] * 2, x.shape[3] * 2], None)" in text
    assert "# type: (torch.Tensor, bool) -> torch.Tensor" in text
    assert "größer" not in text, "a call's own lines are the call's"
    assert inspect.signature(model.forward) == inspect.signature(Typed().forward)
