"""A Plan as text, as the command line prints it, and as a notebook shows it."""

from __future__ import annotations

import dataclasses

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from upswap.apps.cli import run

UNET = "smp:unet?encoder_name=resnet18&classes=2"


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 3, padding=1)
    ).eval()


def test_a_plan_prints_as_the_command_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for width in ("80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        assert run(["inspect", UNET]) == 0
        printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())
        plan = upswap.inspect(smp.Unet(encoder_name="resnet18", encoder_weights=None, classes=2))
        assert str(plan) == printed


def test_a_plans_repr_is_one_short_line() -> None:
    assert repr(upswap.inspect(sequential())) == "<Plan of Sequential: 1 to swap, 0 to keep>"


def test_a_plan_in_a_notebook_is_a_table_with_every_text_escaped() -> None:
    model = sequential()
    plan = upswap.inspect(model)
    hostile = plan.replace_sites([dataclasses.replace(plan.sites[0], reason="<script>x</script>")])
    shown = hostile._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;x&lt;/script&gt;" in shown
    assert shown.count("<tr>") == 2
