"""A state dict given to a model: patched alike, patched otherwise, not patched; a refusal leaves it as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from tiny_host import image, tiny
from upswap import InputError, OptionError, SourceError


def trained(host: nn.Module | None = None, **options: Any) -> nn.Module:
    """Patched, and no longer what it was."""
    model = upswap.patch(tiny() if host is None else host, image(), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def behind(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def state_of(model: nn.Module) -> tuple[Any, ...]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return [type(module) for module in model.modules()], values


def assert_as_before(model: nn.Module, before: tuple[Any, ...]) -> None:
    classes, values = state_of(model)
    assert classes == before[0]
    assert list(values) == list(before[1])
    assert all(torch.equal(values[name], before[1][name]) for name in values)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"groups": 2},
    "pl": {"style": "pl", "groups": 1},
    "dyscope": {"dyscope": True},
    "paper": {"init": "paper"},
    "carafe": {"upsampler": "carafe", "up_kernel": 3, "compressed_channels": 8},
    "fewer": {"exclude": ["layer", "branch:1"]},
    "single sites": {"overrides": {"branch:0": {"groups": 1}, "layer": {"dyscope": True}}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_original_is_patched_as_the_shapes_say(name: str, tmp_path: Path) -> None:
    model = trained(**OPTIONS[name])
    original = tiny()
    assert upswap.load(model.state_dict(), original) is original
    assert torch.equal(original(image()), model(image()))
    larger = torch.randn(1, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(original(larger), model(larger))
    assert list(upswap.upsamplers(original)) == list(upswap.upsamplers(model))
    # The same of a file.
    torch.save(behind("module.", model.state_dict()), tmp_path / "best.pth")
    assert torch.equal(upswap.load(tmp_path / "best.pth", tiny())(image()), model(image()))


FORMS: dict[str, Any] = {
    "as it is": lambda m: m.state_dict(),
    "data parallel": lambda m: behind("module.", m.state_dict()),
    "lightning, compiled": lambda m: behind("model._orig_mod.", m.state_dict()),
    "a loop": lambda m: {
        "epoch": 3,
        "state_dict": m.state_dict(),
        "optimizer": torch.optim.AdamW(m.parameters()).state_dict(),
    },
    "a model": lambda m: {"model": m, "ema": None},
    "a step among them": lambda m: {**m.state_dict(), "step": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patched", [True, False])
def test_in_every_form_that_a_loop_keeps(form: str, patched: bool) -> None:
    model = trained()
    target = upswap.patch(tiny(), image()) if patched else tiny()
    assert upswap.load(FORMS[form](model), target) is target
    assert torch.equal(target(image()), model(image()))


def test_key_chooses(tmp_path: Path) -> None:
    model = trained()
    checkpoint = {"model": trained(groups=2).state_dict(), "ema": model.state_dict()}
    with pytest.raises(SourceError, match=r"the state dict holds several weights(\n|.)*In Python: key="):
        upswap.load(checkpoint, tiny())
    assert torch.equal(upswap.load(checkpoint, tiny(), key="ema")(image()), model(image()))


def test_a_wrapped_model() -> None:
    model = trained()
    wrapped = nn.DataParallel(upswap.patch(tiny(), image()))
    assert upswap.load(model.state_dict(), wrapped) is wrapped
    assert torch.equal(wrapped.module(image()), model(image()))
    host = nn.DataParallel(tiny())
    assert torch.equal(upswap.load(tiny().state_dict(), host).module(image()), tiny()(image()))
    with pytest.raises(OptionError, match="patch the model inside"):
        upswap.load(model.state_dict(), host)


def test_the_hosts_weights_alone(tmp_path: Path) -> None:
    host = tiny()
    nn.init.ones_(host.stem.weight)
    model = trained()
    before = state_of(model)
    torch.save(host.state_dict(), tmp_path / "host.pth")
    for source in (host.state_dict(), behind("module.", host.state_dict()), tmp_path / "host.pth"):
        with pytest.raises(SourceError, match="has no upsamplers") as caught:
            upswap.load(source, model)
        assert_as_before(model, before)
    # The way out: what it says to type, in the order it says.
    state_dict, path = host.state_dict(), tmp_path / "upsamplers.safetensors"
    said = str(caught.value)
    upsamplers = {name: module.state_dict() for name, module in upswap.upsamplers(model).items()}
    upswap.save(model, path, only="upsamplers")
    call = re.search(r"upswap\.load\(.*?upswap\.unpatch\(model\)\)", said)
    assert call is not None
    assert eval(call[0], {"upswap": upswap, "model": model}) is model
    assert torch.equal(model(image()), host(image()))
    upswap.patch(model)
    upswap.load(path, model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state_dict.items())
    for name, module in upswap.upsamplers(model).items():
        assert all(torch.equal(tensor, upsamplers[name][key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here"),
    [({"groups": 2}, {}), ({}, {"groups": 2}), ({}, {"exclude": "layer"}), ({"exclude": "layer"}, {})],
)
def test_a_model_that_was_patched_in_another_way(there: dict[str, Any], here: dict[str, Any]) -> None:
    source, model = trained(**there), trained(**here)
    state_dict = source.state_dict()
    before = state_of(model)
    with pytest.raises(SourceError, match="patched in another way than this one") as caught:
        upswap.load(state_dict, model)
    assert_as_before(model, before)
    call = re.search(r"upswap\.load\(.*?upswap\.unpatch\(model\)\)", str(caught.value))
    assert call is not None
    eval(call[0], {"upswap": upswap, "model": model, "state_dict": state_dict})
    assert torch.equal(model(image()), source(image()))


class Between(nn.Module):
    """A nearest resize of a ratio that is no whole number: nothing in its upsampler's tensors says which base grid they have."""

    def __init__(self, mode: str = "nearest") -> None:
        super().__init__()
        self.stem, self.last, self.mode = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), mode

    def forward(self, x):
        return self.last(F.interpolate(self.stem(x), scale_factor=1.5, mode=self.mode))


def test_where_two_ways_fit_it_is_left_to_the_user() -> None:
    original = Between()
    before = state_of(original)
    state_dict = trained(Between(), init="paper").state_dict()
    with pytest.raises(SourceError, match="cannot be patched alike") as caught:
        upswap.load(state_dict, original)
    assert_as_before(original, before)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[2:4] == ["upswap.patch(model)", "upswap.patch(model, init='paper')"]
    eval(lines[3], {"upswap": upswap, "model": original})
    assert upswap.load(state_dict, original) is original
    # Of a bilinear resize they are the same, so that it does not matter.
    model = trained(Between("bilinear"), init="paper")
    assert torch.equal(upswap.load(model.state_dict(), Between("bilinear"))(image()), model(image()))


class TwoKinds(nn.Module):
    """A feature and logits are made larger, and a layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 2, 1)
        self.middle, self.up = nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = self.middle(self.up(self.stem(x)).relu())
        x = self.middle(self.up(x).relu())
        return F.interpolate(self.last(x), scale_factor=2.0, mode="bilinear")


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("feature", "logits")},
        {"kinds": "logits"},
        {"share_layers": True},
        {"kinds": ("feature", "logits"), "share_layers": True},
    ],
)
def test_other_kinds_and_shared_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = trained(TwoKinds().eval(), **options)
    original = upswap.load(model.state_dict(), TwoKinds().eval())
    assert list(upswap.upsamplers(original)) == list(upswap.upsamplers(model))
    assert torch.equal(original(image()), model(image()))


def test_what_is_no_upsampler_and_what_is_at_no_site() -> None:
    state = trained().state_dict()
    for extra, says in (
        ({"aux.weight": torch.ones(1)}, r"unexpected: aux\.weight$"),
        (
            {f"stem.up.{name}": value for name, value in upswap.DySample(4).state_dict().items()},
            "where this patch has no site",
        ),
        (
            {"layer.offset.weight": torch.ones(6, 4, 1, 1), "layer.offset.bias": torch.ones(6)},
            "of no upsampler that is known",
        ),
    ):
        original = tiny()
        before = state_of(original)
        with pytest.raises(SourceError, match=says):
            upswap.load({**state, **extra}, original)
        assert_as_before(original, before)


def test_a_refusal_after_the_patch_leaves_the_original() -> None:
    class Strict(nn.Conv2d):
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            args[-1].append("not this one")

    original = tiny()
    original.last = Strict(4, 2, 1)
    before = state_of(original)
    with pytest.raises(SourceError, match="not this one"):
        upswap.load(trained().state_dict(), original)
    assert_as_before(original, before)
    assert not upswap.is_patched(original)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_after_the_patch_leaves_the_original(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dict = trained().state_dict()
    monkeypatch.setattr("upswap.files.adopt.assign", Mock(side_effect=error))
    original = tiny()
    before = state_of(original)
    with pytest.raises(error):
        upswap.load(state_dict, original)
    assert_as_before(original, before)


def test_a_model_that_needs_inputs_of_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x, depth, *, far):
            return self.last(F.interpolate(self.stem(x) * depth + far["a"], scale_factor=2.0))

    torch.manual_seed(0)
    inputs = ((image(), torch.ones(1)), {"far": {"a": torch.ones(1)}})
    model, original = upswap.patch(Two(), inputs), Two()
    with pytest.raises(InputError, match=r"upswap\.patch\(model, example_inputs\)") as caught:
        upswap.load(model.state_dict(), original)
    assert str(caught.value).endswith("upswap.load(state_dict, model)")
    upswap.load(model.state_dict(), upswap.patch(original, inputs))
    assert torch.equal(original(*inputs[0], **inputs[1]), model(*inputs[0], **inputs[1]))


def test_what_load_is_not_given_in_this_order() -> None:
    state = tiny().state_dict()
    with pytest.raises(OptionError, match=r"upswap\.load\(state_dict, model\)"):
        upswap.load(tiny(), state)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"upswap\.load\(state_dict, model\)"):
        upswap.load(state)
    with pytest.raises(SourceError, match="no tensors"):
        upswap.load({"epoch": 3}, tiny())
