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


def followed(line: list[str], said: str) -> list[str]:
    """A command line after what a message says to give, in place of what, or to leave out."""
    advice = said.strip().splitlines()[-1]
    found = re.fullmatch(r"(Give|Leave out) (.*?)(?: in place of (.*?))? \(in Python: .*\)", advice)
    assert found is not None, advice
    left = shlex.split(found[2] if found[1] == "Leave out" else found[3] or "")
    at = next((at for at in range(len(line) + 1) if line[at : at + len(left)] == left), None)
    assert at is not None, f"{left} is not in {line}"
    return [*line[:at], *line[at + len(left) :], *(shlex.split(found[2]) if found[1] == "Give" else [])]


def followed_in_python(options: dict[str, Any], said: str) -> dict[str, Any]:
    """The same for keyword arguments."""
    advice = said.strip().splitlines()[-1]
    found = re.fullmatch(r"(Give|Leave out) .* \(in Python: (.*?)(?: in place of (.*))?\)", advice)
    assert found is not None, advice
    first, second = (eval(f"dict({text})") for text in (found[2], found[3] or ""))
    given, left = (first, second) if found[1] == "Give" else ({}, first)
    assert left.items() <= options.items()
    return {**{name: value for name, value in options.items() if name not in left}, **given}


class Several(nn.Module):
    """Two features by one layer, the second of a number of channels that 4 does not divide; a gate and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.up, self.gate, self.last = (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x):
        x = self.up(self.mid(self.up(self.stem(x).relu())).relu())
        x = x * F.interpolate(self.gate(F.max_pool2d(x, 2)), scale_factor=2.0).sigmoid()
        return F.interpolate(self.last(x), scale_factor=2.0, mode="bilinear")


Case = tuple[str, dict[str, Any], list[str], dict[str, Any], str]

ALL = ["feature", "gate", "logits"]

# The host, what it was trained with, what is asked for on the command line and in Python, and what is said.
ADVICE: list[Case] = [
    ("Tiny", {}, ["--groups", "2"], {"groups": 2}, "Leave out --groups 2 (in Python: groups=2)"),
    ("Tiny", {}, ["--dyscope"], {"dyscope": True}, "Leave out --dyscope (in Python: dyscope=True)"),
    ("Tiny", {"groups": 2}, [], {}, "Give --groups 2 (in Python: groups=2)"),
    ("Tiny", {"groups": 2}, ["--dyscope"], {"dyscope": True}, "Give --groups 2 in place of --dyscope (in Python: "),
    ("Tiny", {"style": "pl", "groups": 1}, [], {}, "Give --style pl --groups 1 (in Python: style='pl', groups=1)"),
    ("Tiny", {"dyscope": True}, [], {}, "Give --dyscope (in Python: dyscope=True)"),
    ("Tiny", {"init": "paper"}, [], {}, "Give --init paper (in Python: init='paper')"),
    (
        "Tiny",
        {"upsampler": "carafe", "up_kernel": 3, "compressed_channels": 8},
        ["--groups", "2"],
        {"groups": 2},
        "Give --upsampler carafe --set up_kernel=3 --set compressed_channels=8 in place of --groups 2",
    ),
    (
        "Tiny",
        {},
        ["--upsampler", "carafe", "--set", "up_kernel=3"],
        {"upsampler": "carafe", "up_kernel": 3},
        "Leave out --upsampler carafe --set up_kernel=3 (in Python: upsampler='carafe', up_kernel=3)",
    ),
    (
        "Tiny",
        {"overrides": {"branch:0": {"groups": 1}, "layer": {"dyscope": True}}},
        [],
        {},
        "Give --override branch:0 groups=1 --override layer dyscope=True (in Python: overrides=",
    ),
    (
        "Tiny",
        {},
        ["--override", "layer", "dyscope=True"],
        {"overrides": {"layer": {"dyscope": True}}},
        "Leave out --override layer dyscope=True",
    ),
    (
        "Tiny",
        {"overrides": {"layer": {"groups": 1}}},
        ["--override", "layer", "dyscope=True"],
        {"overrides": {"layer": {"dyscope": True}}},
        "Give --override layer groups=1 in place of --override layer dyscope=True",
    ),
    (
        "Tiny",
        {"upsampler": "carafe"},
        ["--override", "layer", "groups=1"],
        {"overrides": {"layer": {"groups": 1}}},
        "Give --upsampler carafe in place of --override layer groups=1",
    ),
    (
        "Tiny",
        {"exclude": "layer"},
        [],
        {},
        "no upsampler at layer\nGive --exclude layer (in Python: exclude=['layer'])",
    ),
    (
        "Tiny",
        {},
        ["--exclude", "branch:*"],
        {"exclude": ["branch:*"]},
        "at branch:1, which is kept: excluded by 'branch:*'\nLeave out --exclude 'branch:*'",
    ),
    (
        "Tiny",
        {"exclude": "layer"},
        ["--exclude", "branch:*"],
        {"exclude": ["branch:*"]},
        "Give --exclude layer in place of --exclude 'branch:*'",
    ),
    (
        "Tiny",
        {},
        ["--include", "branch:*"],
        {"include": ["branch:*"]},
        "Give --include 'branch:*' --include straight --include layer in place of --include 'branch:*'",
    ),
    ("Several", {"share_layers": True}, [], {}, "Give --share-layers (in Python: share_layers=True)"),
    (
        "Several",
        {},
        ["--share-layers"],
        {"share_layers": True},
        "Leave out --share-layers (in Python: share_layers=True)",
    ),
    (
        "Several",
        {"kinds": ALL},
        [],
        {},
        "Give --kind feature --kind gate --kind logits (in Python: kinds=['feature', 'gate', 'logits'])",
    ),
    (
        "Several",
        {"kinds": ALL, "style": "pl"},
        ["--kind", "feature", "--groups", "1"],
        {"kinds": ["feature"], "groups": 1},
        "",
    ),
]


@pytest.mark.parametrize(("host", "options", "line", "keywords", "says"), ADVICE)
def test_what_is_said_to_give_makes_it_fit(
    host: str,
    options: dict[str, Any],
    line: list[str],
    keywords: dict[str, Any],
    says: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the command line and in Python, and what is still to be said in the next message."""
    model, inputs = (Several().eval(), torch.randn(1, 3, 32, 32)) if host == "Several" else (tiny(), image())
    torch.save(model, "net.pt")
    trust = type(model).__module__.partition(".")[0]
    upswap.patch(model, inputs, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    torch.save(model.state_dict(), "best.pth")
    size = "x".join(map(str, inputs.shape[2:]))
    command = ["convert", "net.pt", "--weights", "best.pth", "--input-size", size, "-o", "out.pt", "--trust", trust]
    assert run([*command, *line]) == 1
    said = capsys.readouterr().err
    assert "best.pth holds the weights of a patched" in said or "init_pos" in said
    assert says in said
    assert not Path("out.pt").exists()
    for _ in range(3):
        line = followed(line, said)
        if run([*command, *line]) == 0:
            break
        said = capsys.readouterr().err
    assert torch.equal(upswap.load("out.pt", trust=trust)(inputs), model(inputs))
    loading: Any = {"weights": "best.pth", "example_inputs": inputs, "trust": [trust], "dry_run": True}
    for _ in range(3):
        try:
            done = upswap.convert("net.pt", **loading, **keywords)
        except SourceError as error:
            keywords = followed_in_python(keywords, str(error))
    assert torch.equal(done.model(inputs), model(inputs))


def test_an_upsampler_of_no_options(here: Path) -> None:
    state = trained().state_dict()
    torch.save(
        {name: value[:, :3] if "layer.offset.weight" in name else value for name, value in state.items()}, "w.pth"
    )
    with pytest.raises(SourceError, match=r"other tensors at layer\nNo options of the patch make the same upsamplers"):
        upswap.convert(SPEC, weights="w.pth", example_inputs=image(), trust="tiny_host")


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
