"""Whether a spec builds the model it is kept for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import generated
import upswap
from upswap.architectures.libraries import build
from upswap.architectures.spec import Spec, parse
from upswap.files.checkpoint import spec_in
from upswap.files.open_source import open_source
from upswap.files.provenance import same_modules

RECIPE: dict[str, Any] = {
    "blocks": (("up", "call", "nearest", 2), ("other", "call", "nearest", 3)),
    "buffers": ("unsaved",),
}
SPEC = Spec("python", "generated:build", RECIPE)


def made() -> nn.Module:
    return generated.build(**RECIPE)


@pytest.mark.parametrize("patched", [False, True])
def test_what_tells_a_model_from_what_is_built(patched: bool) -> None:
    def changed(change: Any) -> nn.Module:
        model = made()
        if patched:
            upswap.patch(model)
        change(model)
        return model

    def tie(model: nn.Module) -> None:
        model.up.conv.weight = model.other.conv.weight

    for change in (
        lambda m: None,
        lambda m: m.half(),
        lambda m: m.train(),
        lambda m: setattr(m, "epoch", 3),
        lambda m: setattr(m, "order", tuple(m.order)),
        lambda m: nn.init.zeros_(m.stem.weight),
    ):
        assert same_modules(changed(change), made())
    for change in (
        tie,
        lambda m: setattr(m.up, "scale", 4),
        lambda m: m.offset.add_(1),
        lambda m: setattr(m.up.norm, "eps", 0.1),
        lambda m: setattr(m, "last", nn.Conv2d(8, 3, 1)),
        lambda m: setattr(m, "more", nn.Identity()),
    ):
        assert not same_modules(changed(change), made())


@pytest.mark.parametrize(
    "source",
    [SPEC, "python:generated:build?blocks=(('up','call','nearest',3),)", "python:generated:no", "timm:hf-hub:some/one"],
)
def test_a_spec_that_does_not_build_the_model_is_left_out(source: Any, tmp_path: Path) -> None:
    model = made()
    model.up.scale = 4
    with pytest.warns(upswap.UpswapWarning, match="does not say how its model is built"):
        path = upswap.save(model, tmp_path / "model.safetensors", source=str(source))
    assert spec_in(path) is None
    given = copy.deepcopy(model)
    assert upswap.load(path, given) is given


def test_options_that_fetch_weights_are_not_kept(tmp_path: Path) -> None:
    torch.save(build(parse("timm:resnet10t")).state_dict(), tmp_path / "weights.pth")
    source = f"timm:resnet10t?checkpoint_path={tmp_path / 'weights.pth'}"
    model = open_source(source).model
    path = upswap.save(model, tmp_path / "model.safetensors", source=source)
    assert spec_in(path) == "timm:resnet10t"
    assert torch.equal(upswap.load(path).fc.weight, model.fc.weight)
