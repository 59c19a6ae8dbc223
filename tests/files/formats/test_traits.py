"""What a file keeps of a model beside its weights, in every form and with the model given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import generated
import upswap
from upswap import SourceError
from upswap.files.formats import safetensors as portable
from upswap.files.safety import allowed_names

RECIPE: dict[str, Any] = {
    "blocks": (("up", "call", "bilinear", 2), ("layer", "layer", "nearest", 2)),
    "buffers": ("unsaved",),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed_names, "PACKAGES", (*allowed_names.PACKAGES, "generated"))


def host() -> nn.Module:
    return generated.build(**RECIPE)


def loaded(model: nn.Module, name: str, folder: Path, into: nn.Module) -> nn.Module:
    path = upswap.save(model, folder / name)
    return upswap.load(path) if path.suffix == ".pt" else upswap.load(path, into)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_each_module_comes_back_in_its_own_mode(name: str, training: bool, tmp_path: Path) -> None:
    """As people train with frozen norms; whatever mode the model is in that the weights are loaded into."""
    model = upswap.patch(host()).train(training)
    model.up.norm.train(not training)
    model.up.upsample.train(not training)
    modes = {path: module.training for path, module in model.named_modules()}
    for given in (True, False):
        again = loaded(model, f"{given}-{name}", tmp_path, host().train(given))
        assert {path: module.training for path, module in again.named_modules()} == modes


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_what_is_frozen_stays_frozen(name: str, tmp_path: Path) -> None:
    model = upswap.freeze_host(upswap.patch(host()))
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    for trained in (True, False):
        again = loaded(model, f"{trained}-{name}", tmp_path, host().requires_grad_(trained))
        assert {key for key, parameter in again.named_parameters() if not parameter.requires_grad} == frozen
    assert 0 < len(frozen) < len(list(again.parameters()))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder"])
def test_the_layout_and_the_types_of_unsaved_buffers(name: str, tmp_path: Path) -> None:
    model = upswap.patch(host().to(memory_format=torch.channels_last)).bfloat16()
    again = loaded(model, name, tmp_path, host())
    assert again.stem.weight.stride() == model.stem.weight.stride()
    assert again.offset.dtype == torch.bfloat16
    image = generated.image(torch.bfloat16)
    assert torch.equal(again.eval()(image), model.eval()(image))


def test_a_description_of_before_has_the_mode_of_the_whole_model(tmp_path: Path) -> None:
    path = upswap.save(upswap.patch(host()).eval(), tmp_path / "model.safetensors")
    rewrite(path, other_mode=None, frozen=None, channels_last=None, unsaved=None)
    again = upswap.load(path, host().train().requires_grad_(False))
    assert not any(module.training for module in again.modules())
    assert not again.stem.weight.requires_grad


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("other_mode", 7),
        ("frozen", [["stem"]]),
        ("channels_last", {"stem": 1}),
        ("unsaved", ["offset"]),
        ("unsaved", {"a": 1}),
    ],
)
def test_a_damaged_description_says_so(entry: str, value: Any, tmp_path: Path) -> None:
    path = upswap.save(upswap.patch(host()), tmp_path / "model.safetensors")
    rewrite(path, **{entry: value})
    with pytest.raises(SourceError, match=entry):
        upswap.load(path, host())


@pytest.mark.parametrize("dtype", ["int64", "Tensor", "no_such", "float8_e4m3fn", ""])
def test_a_made_up_type_does_no_harm(dtype: str, tmp_path: Path) -> None:
    path = upswap.save(host(), tmp_path / "model.safetensors")
    rewrite(path, unsaved={"offset": dtype, "nothing.like.it": "float16"})
    assert upswap.load(path, host()).offset.is_floating_point()


def rewrite(path: Path, **entries: Any) -> None:
    """Other entries in the description of a file; None takes one out."""
    tensors, header = portable.read(path)
    changed = {key: value for key, value in {**header, **entries}.items() if value is not None}
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(changed)}, path)
