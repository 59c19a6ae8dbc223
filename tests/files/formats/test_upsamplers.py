"""Upsamplers alone in a file: small, onto a host or an original, all or nothing; and what every command makes of it."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from tiny_host import Tiny, image, tiny
from upswap import DySample, OptionError, PlanError, SaveError, SourceError
from upswap.apps.cli import run
from upswap.files.checkpoint import read_header, says_how_it_is_built
from upswap.files.formats import safetensors as portable

SPEC = "python:tiny_host:tiny"


def trained(host: nn.Module | None = None, **options: Any) -> nn.Module:
    """Patched, with upsamplers that are no longer what they were; the host's weights stay."""
    model = upswap.patch(tiny() if host is None else host, image(), **options)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `trained()`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return upswap.save(trained(), "x.safetensors", only="upsamplers", source=SPEC)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a refusal may not change: classes, names, values, modes, what is trained."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "modes": [module.training for module in model.modules()],
        "grad": [parameter.requires_grad for parameter in model.parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    now, values = state_of(model), before["values"]
    assert list(now["values"]) == list(values)
    assert all(torch.equal(now["values"][name], values[name]) for name in values)
    assert {**now, "values": 0} == {**before, "values": 0}


def test_it_holds_the_upsamplers_and_the_plan(small: Path) -> None:
    tensors, header = portable.read(small)
    model = trained()
    assert tensors.keys() == model.state_dict().keys() - tiny().state_dict().keys()
    assert header["holds"] == "upsamplers"
    assert header["source"] == SPEC
    assert upswap.Plan.from_dict(header["plan"]) == upswap.plan_of(model)
    assert "holds" not in read_header(upswap.save(model, "whole.safetensors"))
    assert not says_how_it_is_built(small, ["tiny_host"])


def test_it_is_small_beside_its_host(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    model = upswap.patch(smp.Unet("resnet18", encoder_weights=None))
    path = upswap.save(model, tmp_path / "x.safetensors", only="upsamplers")
    assert path.stat().st_size < 400_000 < 50_000_000 < upswap.save(model, tmp_path / "y.safetensors").stat().st_size
    assert read_header(path)["source"].startswith("smp:unet?")


def test_onto_an_original_and_onto_a_patched_host(small: Path) -> None:
    expected = trained()(image())
    original = tiny()
    host = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    assert upswap.load(small, original) is original
    assert torch.equal(original(image()), expected)
    assert upswap.plan_of(original) == upswap.plan_of(trained())
    patched = upswap.patch(tiny(), image())
    assert upswap.load(small, patched) is patched
    assert torch.equal(patched(image()), expected)
    for model in (original, patched):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in host.items())
    # What was loaded onto is a patched model as any other.
    assert torch.equal(upswap.unpatch(original)(image()), tiny()(image()))


def test_another_host_keeps_its_own_weights_modes_and_types(small: Path) -> None:
    model = tiny().train().double()
    with torch.no_grad():
        model.stem.weight.add_(1)
    model.last.requires_grad_(False).eval()
    before = state_of(model)
    upswap.load(small, model)
    now = state_of(model)
    assert all(torch.equal(now["values"][name], tensor) for name, tensor in before["values"].items())
    assert model.training
    assert not model.last.training
    assert not model.last.weight.requires_grad
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_wrappers_are_seen_through(wrap: Any, small: Path) -> None:
    model = trained()
    upswap.save(wrap(model), "wrapped.safetensors", only="upsamplers", source=SPEC)
    assert Path("wrapped.safetensors").read_bytes() == small.read_bytes()
    inner = upswap.patch(tiny(), image())
    wrapped = wrap(inner)
    assert upswap.load(small, wrapped) is wrapped
    found = next(module for module in wrapped.modules() if isinstance(module, Tiny))
    assert torch.equal(found(image()), model(image()))
    if (
        wrap is not torch.optim.swa_utils.AveragedModel
    ):  # which copies the model, and can as well be made of a patched one
        with pytest.raises(OptionError, match="patch the model inside"):
            upswap.load(small, wrap(tiny()))


def test_only_for_what_can_hold_it(tmp_path: Path) -> None:
    model = trained()
    for name in ("x.pt", "folder"):
        with pytest.raises(SaveError, match=r"x\.safetensors|folder\.safetensors") as caught:
            upswap.save(model, tmp_path / name, only="upsamplers")
        call = re.search(r"upswap\.save\(.*\)$", str(caught.value))
        assert call is not None
        path = eval(call[0], {"upswap": upswap, "model": model})  # what it says to type works
        assert read_header(path)["holds"] == "upsamplers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "x.safetensors"]
    with pytest.raises(OptionError, match='it takes "upsamplers"'):
        upswap.save(model, tmp_path / "y.safetensors", only="host")
    with pytest.raises(PlanError, match="not patched"):
        upswap.save(tiny(), tmp_path / "y.safetensors", only="upsamplers")


def test_alone_it_says_what_it_needs(small: Path) -> None:
    with pytest.raises(
        SourceError, match=r"upsamplers of a patched Tiny alone.*upswap\.load\('x\.safetensors', model\)"
    ):
        upswap.load(small, trust="tiny_host")
    with pytest.raises(OptionError, match="nothing to choose"):
        upswap.load(small, tiny(), key="ema")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"groups": 2}, r"straight: groups is 4 in the file and 2 in the model"),
        ({"init": "paper"}, r"init is match in the file and paper in the model"),
        ({"exclude": "layer"}, r"layer: the model has none there"),
    ],
)
def test_a_host_that_was_patched_in_another_way(options: dict[str, Any], says: str, small: Path) -> None:
    model = trained(**options)
    before = state_of(model)
    with pytest.raises(PlanError, match=says) as caught:
        upswap.load(small, model)
    assert "upswap.unpatch(model)" in str(caught.value)
    assert_as_before(model, before)
    upswap.load(small, upswap.unpatch(model))
    assert torch.equal(model(image()), trained()(image()))


def test_a_site_that_the_file_lacks(tmp_path: Path) -> None:
    path = upswap.save(trained(exclude="layer"), tmp_path / "x.safetensors", only="upsamplers")
    with pytest.raises(PlanError, match="layer: the file has none for it"):
        upswap.load(path, trained())


class Other(nn.Module):
    """A host of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.up(self.stem(x)))


def damaged(path: Path, **changes: Any) -> Path:
    """The file with other tensors, by their names without what is before the last dot but one."""
    tensors, header = portable.read(path)
    for name, change in changes.items():
        where = next(key for key in tensors if key.endswith(name.replace("__", ".")))
        tensors[where] = change(tensors[where])
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    return path


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"offset__weight": lambda t: t[:, :1].clone()}, SourceError, r"offset\.weight is"),
        ({"init_pos": lambda t: t + 1}, SourceError, "init_pos"),
    ],
)
@pytest.mark.parametrize("patched", [True, False])
def test_a_refusal_leaves_the_model_as_it_was(
    patched: bool, change: dict[str, Any], error: type[Exception], says: str, small: Path
) -> None:
    damaged(small, **change)
    model = trained(groups=4) if patched else tiny()
    before = state_of(model)
    with pytest.raises(error, match=says):
        upswap.load(small, model)
    assert_as_before(model, before)
    assert upswap.is_patched(model) == patched


@pytest.mark.parametrize("patched", [True, False])
def test_ctrl_c_leaves_the_model_as_it_was(patched: bool, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(groups=4) if patched else tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = state_of(model)
    load, loads = DySample.load_state_dict, itertools.count()

    def interrupted(self: nn.Module, *args: Any) -> Any:
        result = load(self, *args)
        # The copies take theirs first, then those of the model, which by then has half of them.
        if next(loads) == len(upswap.plan_of(model).swapped) + 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(DySample, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upswap.load(small, model)
    assert_as_before(model, before)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(small: Path) -> None:
    for model, says in (
        (Other(), "made for"),
        (nn.ModuleDict({"net": tiny(), "head": nn.Identity()}), r"the tiny_host\.Tiny at net in this model"),
    ):
        before = state_of(model)
        with pytest.raises(PlanError, match=says):
            upswap.load(small, model)
        assert_as_before(model, before)
    tensors, header = portable.read(small)
    for plan in (None, {"schema": 2}, 3, {**header["plan"], "sites": []}):
        portable.write(tensors, {portable.HEADER_KEY: json.dumps({**header, "plan": plan})}, small)
        model = tiny()
        with pytest.raises(PlanError):
            upswap.load(small, model)
        assert_as_before(model, state_of(tiny()))


def test_what_this_version_does_not_know_is_not_read_as_a_whole_model(small: Path) -> None:
    tensors, header = portable.read(small)
    portable.write(tensors, {portable.HEADER_KEY: json.dumps({**header, "holds": "the half"})}, small)
    with pytest.raises(SourceError, match="update upswap"):
        upswap.load(small, tiny())


def test_a_shared_block_has_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = Other()
            self.last = nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.last(self.two(self.one.stem(x)[:, :3]))

    torch.manual_seed(0)
    original = Twice().eval()
    model = trained(copy.deepcopy(original))
    path = upswap.save(model, tmp_path / "x.safetensors", only="upsamplers")
    assert read_header(path)["shared"]
    assert torch.equal(upswap.load(path, original)(image()), model(image()))


# ---- commands


def test_convert_onto_the_host(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["convert", "--weights", "x.safetensors", "--input-size", "6x5", "--trust", "tiny_host"]
    assert run([*line, SPEC, "-o", "out.safetensors"]) == 0
    assert "10 tensors of 4 upsamplers" in capsys.readouterr().out
    expected = trained()(image())
    assert torch.equal(upswap.load("out.safetensors", trust="tiny_host")(image()), expected)
    # Onto a patched file, and with an option that it was not patched with.
    upswap.save(upswap.patch(tiny(), image()), "patched.safetensors", source=SPEC)
    assert run([*line, "patched.safetensors", "-o", "again.safetensors"]) == 0
    assert torch.equal(upswap.load("again.safetensors", tiny())(image()), expected)
    assert run([*line, SPEC, "--groups", "2", "-o", "other.pt"]) == 2
    said = capsys.readouterr().err
    assert "groups is not given there, not 2. Leave the options out" in said
    assert "revert" not in said
    assert not Path("other.pt").exists()


def test_convert_follows_a_plan_that_no_option_was_given_for(small: Path) -> None:
    upswap.save(trained(groups=2, exclude="layer"), small, only="upsamplers", force=True)
    done = upswap.convert(SPEC, "out.safetensors", weights=small, example_inputs=image(), trust="tiny_host")
    assert torch.equal(done.model(image()), trained(groups=2, exclude="layer")(image()))


def test_other_commands(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "x.safetensors", "--trust", "tiny_host"]) == 1
    assert "upswap convert SOURCE --weights x.safetensors" in capsys.readouterr().err
    assert run(["inspect", "x.safetensors"]) == 0
    assert "Tiny: 4 to swap" in capsys.readouterr().out
    assert run(["inspect", "x.safetensors", "--groups", "2"]) == 2
    assert "groups is not given there, not 2" in capsys.readouterr().err
    assert run(["inspect", SPEC, "--weights", "x.safetensors", "--input-size", "6x5", "--trust", "tiny_host"]) == 0
    assert "weights: left out 10 tensors of 4 upsamplers" in capsys.readouterr().err
    assert run(["revert", "x.safetensors"]) == 1
    assert "there is no host in it" in capsys.readouterr().err


def test_verify_takes_it_onto_the_original(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["verify", SPEC, "x.safetensors", "--input-size", "6x5", "--trust", "tiny_host"]
    assert run(line) == 1
    assert "straight.upsample" in capsys.readouterr().err
    upswap.save(upswap.patch(tiny(), image()), small, only="upsamplers", force=True)
    assert run(line) == 0
