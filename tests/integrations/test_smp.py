"""What SMP writes of a patched model is the patched model again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from models import IMAGES, assert_same, patched, unet
from pages import run_page


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(upswap.param_groups(model, 0.01), momentum=0.9)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_what_save_pretrained_wrote_comes_back(tmp_path: Path) -> None:
    model = train(patched(unet()))
    model.save_pretrained(tmp_path / "a")
    again = upswap.load(tmp_path / "a")
    assert_same(again, model)
    assert upswap.plan_of(again) == upswap.plan_of(model)
    assert_same(upswap.load(tmp_path / "a", unet()), model)
    with pytest.warns(upswap.UpswapWarning, match="is patched already"):
        assert_same(upswap.convert(f"hf:{tmp_path / 'a'}", tmp_path / "b.safetensors").model, model)
    assert_same(upswap.load(tmp_path / "b.safetensors"), model)
    # A second fine-tuning, kept in the same way.
    train(again).save_pretrained(tmp_path / "c")
    assert_same(upswap.load(tmp_path / "c"), again)
    assert_same(upswap.load(tmp_path / "a"), model)
    exported = torch.export.export(again, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), again(IMAGES))


# What is said of the FPN, to which the plan does not belong; the refusal is what is tested.
@pytest.mark.filterwarnings("ignore:.*has the plan of a Unet")
def test_a_model_that_is_passed_is_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the configuration describes is not built beside it, which may be of any size."""
    model = train(patched(unet()))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("upswap.files.formats.host_architecture.build", Mock(side_effect=AssertionError))
    mine = unet()
    assert upswap.load(tmp_path, mine) is mine
    assert_same(mine, model)
    assert upswap.plan_of(mine) == upswap.plan_of(model)
    assert not mine.training
    other = smp.FPN("resnet18", encoder_weights=None).eval()
    names = list(other.state_dict())
    with pytest.raises(upswap.UpswapError):
        upswap.load(tmp_path, other)
    assert not upswap.is_patched(other)
    assert list(other.state_dict()) == names


def test_smp_itself_is_loud_unless_it_is_told_not_to_be(tmp_path: Path) -> None:
    model = patched(unet())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decoder.blocks.0.upsample.init_pos"):
        smp.from_pretrained(str(tmp_path))
    # Asked not to be, it drops them: its own limit. A patch of what it gives says it.
    dropped = smp.from_pretrained(str(tmp_path), strict=False)
    with pytest.warns(upswap.UpswapWarning, match="was loaded without its upsamplers"):
        upswap.patch(dropped)


def test_a_folder_without_the_plan(tmp_path: Path) -> None:
    """One that an older upswap's model was in."""
    model = patched(unet())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["_upswap_plan"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(upswap.SourceError, match=r"upswap convert hf:.* --weights"):
        upswap.convert(f"hf:{tmp_path}", tmp_path / "b.pt")
    assert_same(upswap.convert(f"hf:{tmp_path}", tmp_path / "b.pt", weights=tmp_path).model, model)
    assert_same(upswap.load(tmp_path / "model.safetensors", upswap.patch(unet())), model)


def test_a_folder_of_upswaps_own(tmp_path: Path) -> None:
    model = patched(unet())
    upswap.save(model, tmp_path / "own")
    assert "_upswap_plan" not in json.loads((tmp_path / "own" / "config.json").read_text())
    assert_same(upswap.load(tmp_path / "own"), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not upswap.is_patched(smp.from_pretrained(str(tmp_path / "own")))


def test_unpatching_takes_the_plan_out(tmp_path: Path) -> None:
    model = upswap.unpatch(patched(unet()))
    assert model._hub_mixin_config == unet()._hub_mixin_config
    model.save_pretrained(tmp_path)
    assert_same(smp.from_pretrained(str(tmp_path)).eval(), model)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/smp.md", {"train": train})
    assert_same(names["again"], names["model"])
    assert not upswap.is_patched(names["original"])
    assert_same(upswap.load("theirs"), names["again"])
