"""The state dict of a patched model that was trained: recognised by its keys, and given back to the model patched alike."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from tiny_host import image, tiny
from upswap import SourceError
from upswap.apps.cli import run
from upswap.apps.cli.convert import convert as command

SPEC = "python:tiny_host:tiny"


def trained(**options: Any) -> nn.Module:
    """Patched, and no longer what it was."""
    torch.manual_seed(1)
    model = upswap.patch(tiny(), image(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"groups": 2},
    "pl": {"style": "pl", "groups": 1},
    "dyscope": {"dyscope": True},
    "paper": {"init": "paper"},
    "carafe": {"upsampler": "carafe", "up_kernel": 3, "compressed_channels": 8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_options_give_the_trained_model_back(name: str, here: Path) -> None:
    model = trained(**OPTIONS[name])
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, "best.pth")
    done = upswap.convert(
        SPEC, "out.safetensors", weights="best.pth", example_inputs=image(), trust="tiny_host", **OPTIONS[name]
    )
    count = len(model.state_dict())
    assert done.taken is not None
    assert f"state_dict of 'model', prefix 'module.' removed, {count} tensors" in done.taken
    assert re.search(r"\d+ of them of 4 upsamplers$", done.taken)
    assert done.taken in str(done)
    expected = model(image())
    assert torch.equal(done.model(image()), expected)
    assert torch.equal(upswap.load("out.safetensors", trust="tiny_host")(image()), expected)
    # In Python, into a model that is patched alike.
    again = upswap.patch(tiny(), image(), **OPTIONS[name])
    assert torch.equal(upswap.load("best.pth", again)(image()), expected)


def given(line: str) -> list[str]:
    """The options that a message says to give, as a shell would read them."""
    options = re.search(r"Give (.*?)(?: \(in Python: (.*)\))?$", line)
    assert options is not None, line
    return shlex.split(options[1])


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("default", ["--groups", "2"], "Give --groups 4 (in Python: groups=4)"),
        ("groups", [], "Give --groups 2 (in Python: groups=2)"),
        ("pl", [], "Give --style pl --groups 1 (in Python: style='pl', groups=1)"),
        ("dyscope", [], "Give --dyscope (in Python: dyscope=True)"),
        ("paper", [], "Give --init paper (in Python: init='paper')"),
        ("carafe", [], "Give --upsampler carafe --set up_kernel=3 --set compressed_channels=8"),
        ("default", ["--upsampler", "carafe"], "Give --upsampler dysample (in Python: upsampler='dysample')"),
    ],
)
def test_other_options_name_those_to_give(
    name: str, asked: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(**OPTIONS[name])
    torch.save(model.state_dict(), "best.pth")
    line = ["convert", SPEC, "--weights", "best.pth", "--input-size", "6x5", "-o", "out.pt", "--trust", "tiny_host"]
    assert run([*line, *asked]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "best.pth" in said
    assert not Path("out.pt").exists()
    # Pasted in place of what was asked, or beside it.
    context = command.make_context("convert", [*line[1:], *asked, *given(said.strip().splitlines()[-1])])
    assert context.params["weights"] == "best.pth"
    assert run([*line, *asked, *given(said.strip().splitlines()[-1])]) == 0
    assert torch.equal(upswap.load("out.pt", trust="tiny_host")(image()), model(image()))


def test_options_of_single_sites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(overrides={"branch:0": {"groups": 1}, "layer": {"dyscope": True}})
    torch.save(model.state_dict(), "best.pth")
    line = ["convert", SPEC, "--weights", "best.pth", "--input-size", "6x5", "-o", "out.pt", "--trust", "tiny_host"]
    assert run(line) == 1
    told = [text for text in capsys.readouterr().err.splitlines() if "Give" in text]
    assert told == ["Give --override branch:0 groups=1", "Give --override layer dyscope=True"]
    assert run([*line, *given(told[0]), *given(told[1])]) == 0
    assert torch.equal(upswap.load("out.pt", trust="tiny_host")(image()), model(image()))


def test_other_sites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained(exclude="layer").state_dict(), "fewer.pth")
    line = ["convert", SPEC, "--input-size", "6x5", "-o", "out.pt", "--trust", "tiny_host"]
    assert run([*line, "--weights", "fewer.pth"]) == 1
    assert 'no upsampler at layer. Give --exclude layer (in Python: exclude=["layer"])' in capsys.readouterr().err
    assert run([*line, "--weights", "fewer.pth", "--exclude", "layer"]) == 0
    torch.save(trained().state_dict(), "all.pth")
    assert run([*line, "--weights", "all.pth", "--exclude", "branch:1", "--force"]) == 1
    assert "it has an upsampler at branch:1, which is kept: excluded by 'branch:1'" in capsys.readouterr().err


class TwoKinds(nn.Module):
    """A feature and logits are made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.interpolate(self.stem(x), scale_factor=2.0, mode="bilinear")
        return F.interpolate(self.last(x.relu()), scale_factor=2.0, mode="bilinear")


def test_another_kind_is_named(here: Path) -> None:
    kinds = ("feature", "logits")
    torch.save(TwoKinds(), "net.pt")
    torch.save(upswap.patch(TwoKinds(), kinds=kinds).state_dict(), "both.pth")
    trust = __name__.partition(".")[0]
    with pytest.raises(SourceError, match=r"which is logits\. Give --kind feature --kind logits \(in Python: kinds="):
        upswap.convert("net.pt", weights="both.pth", trust=trust)
    upswap.convert("net.pt", weights="both.pth", trust=trust, kinds=kinds, dry_run=True)


def test_tensors_of_something_else_are_no_upsampler(here: Path) -> None:
    state = trained().state_dict()
    torch.save({**state, "aux.weight": torch.ones(1)}, "w.pth")
    with pytest.raises(SourceError, match=r"unexpected: aux\.weight"):
        upswap.convert(SPEC, weights="w.pth", example_inputs=image(), trust="tiny_host")


def test_where_the_upsamplers_have_no_use_they_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained().state_dict(), "best.pth")
    assert run(["inspect", SPEC, "--weights", "best.pth", "--input-size", "6x5"]) == 0
    out, err = capsys.readouterr()
    assert "4 to swap" in out
    assert re.search(r"note: weights: state_dict, \d+ tensors, left out \d+ tensors of 4 upsamplers", err)
