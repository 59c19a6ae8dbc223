"""Options given for a model that is patched already: they are those it has, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from upswap.apps.cli import run


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 3, padding=1)
    torch.save(nn.Sequential(*layers), "net.pt")
    upswap.convert("net.pt", "patched.pt", groups=4)
    return "patched.pt"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"style": "pl"}, "style is lp there, not pl"),
        ({"groups": 2}, "groups is 4 there, not 2"),
        ({"dyscope": True}, "dyscope is False there, not True"),
        ({"upsampler": "carafe"}, "upsampler is dysample there, not carafe"),
        ({"kinds": ["feature", "logits"]}, "kinds is feature there, not feature, logits"),
        ({"exclude": "1"}, "exclude is not given there, not 1"),
        ({"overrides": {"1": {"groups": 2}}}, "overrides is not given there, not 1 {'groups': 2}"),
    ],
)
def test_other_options_are_an_error(options: dict[str, Any], says: str, patched: str) -> None:
    with pytest.raises(upswap.OptionError) as caught:
        upswap.convert(patched, "again.pt", **options)
    assert says in str(caught.value)
    assert "upswap revert patched.pt" in str(caught.value)
    assert not Path("again.pt").exists()


@pytest.mark.parametrize("options", [{}, {"style": "lp"}, {"groups": 4}, {"kinds": "feature"}, {"exclude": ()}])
def test_the_same_options_are_none(options: dict[str, Any], patched: str) -> None:
    with pytest.warns(upswap.UpswapWarning, match="patched already"):
        assert upswap.convert(patched, "again.pt", **options).report.max_abs_diff == 0


def test_every_command_that_plans_says_so(patched: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("convert", "inspect", "bench"):
        assert run([command, patched, "--style", "pl"]) == 2, command
        assert "style is lp there, not pl" in capsys.readouterr().err
    assert run(["convert", patched, "-o", "again.pt"]) == 0
    assert run(["inspect", patched]) == 0
