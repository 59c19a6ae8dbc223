"""`upswap verify` and `upswap revert`, and the forms of sources and targets that `convert` takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

import upswap
from models import IMAGES, assert_same, patched, unet
from upswap.apps.cli import run
from upswap.probe.inputs.inputs import as_inputs
from upswap.surgery.checking.first_difference import first_difference

Captured = pytest.CaptureFixture[str]
FORMS = ("unet.upswap.pt", "unet.upswap.safetensors", "unet-upswap")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`unet.pt` in the current folder, and a terminal that is wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    torch.save(unet(), tmp_path / "unet.pt")
    return tmp_path


# ---- verify


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_verify_says_that_a_converted_model_is_the_same(form: str, folder: Path, capsys: Captured) -> None:
    assert run(["convert", "unet.pt", "-o", form]) == 0
    capsys.readouterr()
    assert run(["verify", "unet.pt", form, "--input-size", "64", "--input-size", "96x33"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"1x3x64x64 +0 +1x2x64x64 .*equal", out)
    assert re.search(r"1x3x96x33 +0 +1x2x96x33 .*equal", out)
    assert run(["verify", "unet.pt", form, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["difference"] is None
    assert 0 <= told["max_rel_diff"] <= 1e-5
    assert len(told["rows"]) == 2


def test_verify_names_the_upsampler_after_which_outputs_differ(folder: Path, capsys: Captured) -> None:
    model = upswap.patch(torch.load("unet.pt", weights_only=False))
    upswap.upsamplers(model)["decoder.blocks.2.upsample"].offset.bias.data.add_(0.4)
    upswap.save(model, "moved.pt")
    assert run(["verify", "unet.pt", "moved.pt"]) == 1
    out, err = capsys.readouterr()
    assert "differs" in out
    assert (
        "the first layer that differs is decoder.blocks.2.attention1.attention (Identity), just after the upsampler"
        in err
    )
    assert "just after the upsampler decoder.blocks.2.upsample\n" in err
    assert "weights" not in err
    assert run(["verify", "unet.pt", "moved.pt", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["difference"]["after"]) == (False, "decoder.blocks.2.upsample")


def test_verify_names_the_layer_and_the_weights_of_a_trained_model(folder: Path, capsys: Captured) -> None:
    model = upswap.patch(torch.load("unet.pt", weights_only=False))
    model.encoder.layer2[0].conv1.weight.data.mul_(1.5)
    upswap.save(model, "trained.safetensors")
    assert run(["verify", "unet.pt", "trained.safetensors"]) == 1
    err = capsys.readouterr().err
    assert "the first layer that differs is encoder.layer2.0.conv1 (Conv2d)." in err
    assert "encoder.layer2.0.conv1.weight)" in err
    # A spec makes other random weights each time.
    assert run(["verify", "smp:unet?encoder_name=resnet18&classes=2", "trained.safetensors"]) == 1
    assert "encoder.conv1 (Conv2d)" in capsys.readouterr().err


def test_verify_with_models_of_other_shapes(folder: Path, capsys: Captured) -> None:
    upswap.save(upswap.patch(smp.Unet("resnet18", encoder_weights=None, classes=5)), "five.pt")
    assert run(["verify", "unet.pt", "five.pt"]) == 1
    out, err = capsys.readouterr()
    assert "expected (1, 2, 64, 64)" in out
    assert "encoder.conv1" in err
    assert run(["verify", "unet.pt", "missing.pt"]) == 1
    assert "no file missing.pt" in capsys.readouterr().err


def test_a_file_that_does_not_say_how_it_is_built_takes_the_original(folder: Path, capsys: Captured) -> None:
    model = smp.Unet("resnet18", encoder_weights=None, activation=torch.nn.Sigmoid).eval()
    torch.save(model, "callable.pt")
    assert run(["convert", "callable.pt", "-o", "callable.safetensors"]) == 0
    assert 'upswap.load("callable.safetensors", Unet(...))' in capsys.readouterr().out
    assert run(["verify", "callable.pt", "callable.safetensors"]) == 0
    assert run(["revert", "callable.safetensors"]) == 1
    assert "does not say how its model is built" in capsys.readouterr().err
    assert run(["revert", "callable.safetensors", "--original", "callable.pt", "-o", "back.pt"]) == 0
    assert_same(upswap.load("back.pt"), model)


def test_no_difference_where_there_is_none() -> None:
    model = patched(unet())
    found = first_difference(model, model, as_inputs(IMAGES), 1e-5)
    assert (found.layer, found.after, found.weights) == (None, None, ())
    assert "no layer" in str(found)
    assert not any(module._forward_hooks for module in model.modules())


# ---- revert


@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_revert_gives_the_original_back_with_its_trained_weights(form: str, folder: Path, capsys: Captured) -> None:
    model = patched(torch.load("unet.pt", weights_only=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)  # as if it were trained
    upswap.save(model, form)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(["revert", form]) == 0
    out = capsys.readouterr().out
    target = form.replace("upswap", "reverted") if "." in form else f"{form}-reverted"
    assert f"saved {target}" in out
    assert "5 upsamplers taken out" in out
    reverted = upswap.load(target)
    assert type(reverted) is smp.Unet
    assert_same(reverted, upswap.unpatch(model))
    assert {path: path.read_bytes() for path in before} == before
    assert run(["revert", form]) == 1
    assert "exists" in capsys.readouterr().err
    assert run(["revert", form, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["saved"], told["upsamplers_removed"]) == (target, 5)
    assert run(["revert", target]) == 1
    assert "not patched: there is nothing to take out" in capsys.readouterr().err


def test_revert_never_writes_over_its_source(folder: Path, capsys: Captured) -> None:
    path = upswap.save(patched(unet()), "model.pt")
    before = path.read_bytes()
    assert run(["revert", "model.pt", "-o", "./model.pt", "--force"]) == 1
    assert "source itself" in capsys.readouterr().err
    assert path.read_bytes() == before


# ---- sources and targets of convert


def test_a_folder_of_smp_goes_to_a_folder(folder: Path, capsys: Captured) -> None:
    model = unet()
    model.save_pretrained("mine")
    assert run(["convert", "hf:mine"]) == 0
    out = capsys.readouterr().out
    assert out.endswith('model = upswap.load("mine-upswap")\n')
    assert run(["verify", "hf:mine", "mine-upswap"]) == 0
    assert_same(smp.from_pretrained("mine-upswap"), model)
    assert run(["convert", "hf:mine", "-o", "mine", "--force"]) == 1
    assert "source itself" in capsys.readouterr().err


def test_a_factory_of_ones_own_is_trusted_by_name(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("nets_of_cli.py").write_text(
        "import segmentation_models_pytorch as smp\n"
        "def make(classes=1):\n    return smp.Unet('resnet18', encoder_weights=None, classes=classes)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    assert run(["convert", "python:nets_of_cli:make?classes=3", "-o", "own.safetensors"]) == 0
    assert 'upswap.load("own.safetensors", trust=["nets_of_cli"])' in capsys.readouterr().out
    with pytest.raises(upswap.UntrustedFileError, match="--trust nets_of_cli"):
        upswap.load("own.safetensors")
    assert upswap.load("own.safetensors", trust=["nets_of_cli"])(IMAGES).shape[1] == 3
