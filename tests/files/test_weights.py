"""Weights in files among other things: what is read of them, what is refused, and what it is said that they are."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from tiny_host import image, tiny
from upswap import SourceError
from upswap.files.open_source import open_source
from upswap.files.weights import weights_for

SPEC = "python:tiny_host:tiny"


@pytest.fixture
def trained() -> nn.Module:
    """A model with other weights than a new one has."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return model


def test_load_puts_weights_into_a_model(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(
        {"model": tiny().state_dict(), "ema": torch.optim.swa_utils.AveragedModel(trained).state_dict()},
        tmp_path / "last.pth",
    )
    with pytest.raises(SourceError, match="--key ema"):
        upswap.load(tmp_path / "last.pth", tiny())
    assert torch.equal(upswap.load(tmp_path / "last.pth", tiny(), key="ema")(image()), trained(image()))


def test_what_no_loop_should_need_does_not_stand_in_the_way(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, schedules and logs of classes that no file may name: the weights are read, and nothing of those is made."""

    class Settings(dict):  # as easydict's and addict's
        pass

    class Log:
        def __setstate__(self, state: Any) -> None:
            pytest.fail("code of a class in the file ran")

    class Rows(list):
        pass

    class Marked(torch.Tensor):  # as fastai's
        pass

    for cls in (Settings, Log, Rows, Marked):
        cls.__module__, cls.__qualname__ = "tiny_host", cls.__name__
        monkeypatch.setattr(f"tiny_host.{cls.__name__}", cls, raising=False)
    log = Log()
    log.rows = [1.0]
    frozen = Settings(lr=1)
    frozen.immutable = True  # as yacs's
    rows = Rows([1.0, {"lr": 2}])
    marked = [torch.zeros(2).as_subclass(Marked), nn.Parameter(torch.zeros(2)).as_subclass(Marked)]
    marked[0].shown = "as an image"
    rest = {"frozen": frozen, "rows": rows, "marked": marked, "noise": [bytearray(b"ab\xff"), bytearray()]}
    rest |= {"cfg": Settings(lr=1), "log": log, "args": argparse.Namespace(lr=1), "kind": Log, "path": Path("a")}
    torch.save({"model": trained.state_dict(), **rest}, tmp_path / "w.pt")
    source = open_source(SPEC, weights=tmp_path / "w.pt")
    assert torch.equal(source.model(image()), trained(image()))
    # What is taken may hold none of it.
    odd = nn.Conv2d(1, 1, 1)
    odd.cfg = Settings(lr=1)
    torch.save({"model": odd, **rest}, tmp_path / "odd.pt")
    with pytest.raises(upswap.UntrustedFileError, match=r"tiny_host\.Settings: not in a package") as caught:
        upswap.load(tmp_path / "odd.pt")
    assert "tiny_host.Log" not in str(caught.value)
    for value, says in ((rows, "Rows"), (marked, "Marked"), (frozen, "Settings"), (rest["noise"], "bytearray")):
        odd.cfg = value
        torch.save({"model": odd, **rest}, tmp_path / "odd.pt")
        with pytest.raises(upswap.UntrustedFileError, match=says):
            upswap.load(tmp_path / "odd.pt")
    torch.save({"model": nn.Conv2d(1, 1, 1), **rest}, tmp_path / "even.pt")
    assert isinstance(upswap.load(tmp_path / "even.pt"), nn.Conv2d)


def test_models_inside_a_checkpoint(trained: nn.Module, tmp_path: Path) -> None:
    """As ultralytics writes them: a model and its average, or None in place of either."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3))
    ema = copy.deepcopy(net).half()
    nn.init.zeros_(ema[0].weight)
    path = tmp_path / "best.pt"
    torch.save({"epoch": -1, "model": net, "ema": None, "criterion": nn.CrossEntropyLoss()}, path)
    opened = open_source(str(path))
    assert opened.said == "source: model of 'model', 4 tensors"
    assert type(upswap.load(path)) is nn.Sequential
    torch.save({"model": net, "ema": ema}, path)
    with pytest.raises(SourceError, match=r"several models(\n|.)*--key model +4 tensors\n +--key ema"):
        upswap.load(path)
    assert not upswap.load(path, key="ema")[0].weight.any()
    with pytest.raises(SourceError, match=r"no model under 'best'; it has 'model', 'ema'"):
        upswap.load(path, key="best")
    # Its weights go into a model, in the model's own dtype.
    weights = weights_for(copy.deepcopy(net), path, key="ema")
    assert weights.taken == "model of 'ema', 4 tensors"
    # A model of a class that is not admitted says what would admit it.
    torch.save({"model": trained, "epoch": 3}, path)
    with pytest.raises(upswap.UntrustedFileError, match="--trust tiny_host"):
        upswap.load(path)
    assert torch.equal(upswap.load(path, trust="tiny_host")(image()), trained(image()))
    with pytest.raises(upswap.UntrustedFileError, match="--trust tiny_host"):
        open_source(SPEC, weights=path)
    assert open_source(SPEC, weights=path, trust="tiny_host").weights is not None


def test_a_file_with_weights_alone_says_how_to_name_the_model(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"state_dict": trained.state_dict(), "epoch": 3}, path)
    with pytest.raises(SourceError) as caught:
        upswap.load(path)
    said = str(caught.value)
    assert "is a state dict under 'state_dict' (8 tensors, the first is 'stem.weight'): weights without a model" in said
    assert f"upswap convert SOURCE --weights {path}" in said
    assert "convert smp:unet" not in said
    assert "revert" not in said
    torch.save(upswap.patch(trained, image()).state_dict(), path)
    with pytest.raises(SourceError, match=r"upsamplers at straight\.upsample(.|\n)*upswap revert"):
        upswap.load(path)


@pytest.mark.timeout(120)
def test_an_upsampler_is_no_larger_than_its_memory(tmp_path: Path) -> None:
    """An expanded tensor takes no room in a file, and options are counted up to its sides."""
    state = upswap.patch(tiny(), image()).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("layer.")}
    state["layer.offset.weight"] = torch.zeros(1).expand(2**40, 4, 1, 1)
    state["layer.offset.bias"] = torch.zeros(1).expand(2**40)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"layer\.offset\.weight.*memory for less"):
        upswap.load(tmp_path / "w.pt", tiny())
    with pytest.raises(SourceError, match="memory for less"):
        upswap.convert(SPEC, weights=tmp_path / "w.pt", trust="tiny_host", dry_run=True)


@pytest.mark.filterwarnings("ignore:(Validating sparse|Sparse invariant)")  # torch says so
@pytest.mark.parametrize("kind", ["meta", "sparse_coo"])
def test_an_upsampler_has_values(kind: str, tmp_path: Path) -> None:
    """What is on the meta device, or sparse, has any size in a file of kilobytes, and an upsampler would be made of that size."""
    state = upswap.patch(tiny(), image()).state_dict()
    for name, tensor in state.items():
        if name.startswith("layer.offset."):
            state[name] = tensor.to("meta") if kind == "meta" else tensor.to_sparse()
    torch.save({"model": state, "ema": dict(state)}, tmp_path / "w.pt")
    for source in ({"model": state, "ema": dict(state)}, tmp_path / "w.pt"):
        for key in (None, "ema"):
            with pytest.raises(SourceError, match=rf"layer\.offset\.weight .*{kind}.*layer\.offset\.bias"):
                upswap.load(source, model := tiny(), key=key)
            assert not upswap.is_patched(model)


class Counting(nn.Module):
    """A layer with extra state that is no tensor."""

    def __init__(self, seen: int = 0) -> None:
        super().__init__()
        self.inner, self.seen = tiny(), seen

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(x)
        return made


class Writing(Counting):
    """One that writes its extra state, and does not read it."""

    set_extra_state = nn.Module.set_extra_state


@pytest.mark.parametrize("cls", [Counting, Writing])
def test_extra_state_stands_in_no_way(cls: type[Counting], tmp_path: Path) -> None:
    trained = cls(seen=5)
    torch.save({"model": {f"module.{name}": value for name, value in trained.state_dict().items()}}, tmp_path / "w.pt")
    for source in (trained.state_dict(), tmp_path / "w.pt"):
        model = cls()
        upswap.load(source, model)
        assert torch.equal(model(image()), trained(image()))
        assert model.seen == 0
    assert weights_for(cls(), trained.state_dict()).taken == "state_dict, 8 tensors, left out _extra_state"
    assert weights_for(cls(), tmp_path / "w.pt").taken.endswith("8 tensors, left out module._extra_state")
    with pytest.raises(SourceError, match=r"missing: inner\.stem\.bias$"):
        upswap.load({name: value for name, value in trained.state_dict().items() if name != "inner.stem.bias"}, cls())
    patched = upswap.patch(cls(seen=5), image())
    torch.save(patched.state_dict(), tmp_path / "patched.pt")
    model = cls()
    upswap.load(tmp_path / "patched.pt", model)
    assert upswap.is_patched(model)
    assert torch.equal(model(image()), patched(image()))


def test_a_hook_that_loses_a_tensor_is_told_of() -> None:
    """Also where extra state keeps torch from being strict."""
    model = Counting()
    model.register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("inner.stem.bias", None))
    with pytest.raises(SourceError, match=r"inner\.stem\.bias"):
        upswap.load(Counting().state_dict(), model)
