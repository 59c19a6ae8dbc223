"""What the parts of one instance in a file may be called, and what is said of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet
from upswap import UntrustedFileError, UpswapWarning
from upswap.files.formats import safetensors as portable
from upswap.files.open_source import open_source

#: Names of parts, and whether a file may have them.
NAMES = {
    "conv": True, "0": True, "block1-0": True, "(0, 1)": True, "a b": True, "été": True,
    'a"': False, "a'": False, "a\nb": False, "a\r": False, "a\u2028": False, "a\\": False, "a{x}": False, "": False,
    "a.b": False, "__class__": False, "²": False, "a\x00": False, "a\x1b[2J": False, "a\n": False,
}  # fmt: skip


@pytest.mark.parametrize("place", ["_modules", "_parameters", "_buffers"])
@pytest.mark.parametrize("name", list(NAMES))
def test_names_of_parts(name: str, place: str, tmp_path: Path) -> None:
    """What load would refuse, save does not write without a warning."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    part = {"_modules": nn.ReLU(), "_parameters": nn.Parameter(torch.zeros(1)), "_buffers": torch.zeros(1)}[place]
    model[0].__dict__[place][name] = part
    if NAMES[name]:
        upswap.save(model, tmp_path / "model.pt")
        assert name in vars(upswap.load(tmp_path / "model.pt")[0])[place]
        return
    with pytest.warns(UpswapWarning, match="named"):
        upswap.save(model, tmp_path / "model.pt")
    with pytest.raises(UntrustedFileError, match="named") as caught:
        upswap.load(tmp_path / "model.pt")
    assert str(caught.value).isprintable()


def test_what_save_says_of_a_name_works(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = unet()
        model.decoder.add_module("a'b", nn.Identity())
        return model

    model = patched(build())
    with pytest.warns(UpswapWarning, match=r"safetensors, which upswap\.load\(path, model\) reads"):
        upswap.save(model, tmp_path / "model.pt")
    path = upswap.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(upswap.load(path, build())(IMAGES), model(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nyu", 'n"); exec("x'])
def test_a_configuration_may_not_name_parts_as_it_likes(name: str, tmp_path: Path) -> None:
    """ZoeDepth names its heads as its configuration does."""
    from zoos.transformers_zoo import CASES

    (case,) = (case for case in CASES if case.name == "zoedepth-nk")
    model: Any = case.build()
    old = model.config.bin_configurations[0]["name"]
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(json.dumps(old), json.dumps(name)))
    tensors, _ = portable.read(tmp_path / "model.safetensors")
    renamed = {key.replace(f".{old}.", f".{name}."): tensor for key, tensor in tensors.items()}
    portable.write(renamed, {"format": "pt"}, tmp_path / "model.safetensors")
    if name.isidentifier():
        assert open_source(f"hf:{tmp_path}").model
        return
    with pytest.raises(UntrustedFileError, match="named"):
        open_source(f"hf:{tmp_path}")
