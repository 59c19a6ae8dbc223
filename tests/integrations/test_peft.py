"""Adapters on patched models: the upsamplers train with them, and are in their files."""

from __future__ import annotations

import collections
import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import upswap
from pages import run_page
from upswap import OptionError, UpswapWarning
from upswap.integrations import peft as integration
from upswap.nn import watch

# PEFT 0.21 asks models of transformers for what 5.24 has another name for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def segformer() -> Any:
    settings = {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4,
        "decoder_hidden_size": 16, "num_labels": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**settings)).eval()


def layers() -> nn.Sequential:
    """The module route."""
    torch.manual_seed(0)
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    parts = {"stem": nn.Conv2d(3, 8, 3, padding=1), "up": up, "head": nn.Conv2d(8, 2, 1)}
    return nn.Sequential(collections.OrderedDict(parts)).eval()


MODELS = {"segformer": (segformer, ["q_proj", "v_proj"]), "layers": (layers, ["head"])}


def adapted(name: str, model: nn.Module) -> Any:
    config = peft.LoraConfig(r=2, target_modules=MODELS[name][1])
    return peft.get_peft_model(model, integration.with_upsamplers(model, config))


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(IMAGES)
    return getattr(out, "logits", out)


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are in no adapter
    for _ in range(steps):
        out = model(IMAGES)
        optimizer.zero_grad()
        (getattr(out, "logits", out) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_has_the_upsamplers(name: str, tmp_path: Path) -> None:
    base = upswap.patch(MODELS[name][0]())
    original = run(base)
    model = adapted(name, base)
    assert torch.equal(run(model), original)
    wrapped = {path for path, module in model.named_modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)}
    assert wrapped == set(upswap.upsamplers(model))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UpswapWarning)
        optimizer = train(model)
    trained = run(model)
    found = upswap.status(model, optimizer)
    assert found.ok, str(found)
    assert {row.state for row in found.rows} == {"trained"}
    with upswap.disabled(model):
        assert not torch.allclose(run(model), trained, atol=1e-5)
    assert torch.equal(run(model), trained)
    with model.disable_adapter():
        assert torch.equal(run(model), original)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(upswap.patch(MODELS[name][0]()), tmp_path)
    assert torch.equal(run(again), trained)
    assert [row.state for row in upswap.status(again).rows] == [row.state for row in found.rows]

    merged = again.merge_and_unload()
    torch.testing.assert_close(run(merged), trained, atol=1e-5, rtol=1e-4)
    assert all(isinstance(module, upswap.DySample) for module in upswap.upsamplers(merged).values())
    upswap.save(merged, tmp_path / "merged.safetensors")
    back = upswap.load(tmp_path / "merged.safetensors", MODELS[name][0]())
    torch.testing.assert_close(run(back), run(merged), atol=0, rtol=0)
    upswap.unpatch(merged)
    assert not upswap.is_patched(merged)


def test_without_it_training_says_that_they_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 3)
    model = peft.get_peft_model(
        upswap.patch(segformer()), peft.LoraConfig(r=2, target_modules=["q_proj", "linear_fuse", "proj"])
    )
    assert not upswap.status(model).ok
    with pytest.warns(UpswapWarning, match="was frozen over 3 forwards in training, while what feeds it is trained"):
        train(model)


def test_a_disabled_adapter_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is the upsampler before the adapter, which PEFT keeps frozen; gradients of images may be asked for."""
    monkeypatch.setattr(watch, "PATIENCE", 3)
    model = adapted("segformer", upswap.patch(segformer()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UpswapWarning)
        for _ in range(4):
            train(model, 1)
            with model.disable_adapter():
                model(IMAGES.clone().requires_grad_()).logits.sum().backward()


def test_an_adapter_file_on_a_base_that_is_not_patched(tmp_path: Path) -> None:
    """PEFT's own limit: it passes over what it does not find. The base has to be patched, of which it has no word."""
    model = adapted("segformer", upswap.patch(segformer()))
    model.save_pretrained(tmp_path)
    found = peft.PeftModel.from_pretrained(segformer(), tmp_path)
    with pytest.raises(upswap.PlanError, match="is not patched"):
        upswap.status(found)


def test_the_configuration_is_a_copy() -> None:
    model = upswap.patch(segformer())
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["decode_head.classifier"])
    before = copy.deepcopy(config.to_dict())
    made = integration.with_upsamplers(model, config)
    assert config.to_dict() == before
    assert made.modules_to_save == ["decode_head.classifier", *upswap.upsamplers(model)]
    assert integration.with_upsamplers(model, made).modules_to_save == made.modules_to_save


class RunsItsChildren(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(super().forward(x), scale_factor=2)


def test_an_upsampler_that_peft_cannot_replace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), RunsItsChildren(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1))
    upswap.patch(model)
    with pytest.raises(OptionError, match=r"would not run the copy.*exclude=\['1'\]"):
        integration.with_upsamplers(model, peft.LoraConfig(target_modules=["0"]))


def test_paths_that_end_alike() -> None:
    up = nn.Upsample(scale_factor=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), up, nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)))
    upswap.patch(model)
    with pytest.raises(OptionError, match=r"PEFT would take 2\.1 for the upsampler at 1"):
        integration.with_upsamplers(model, peft.LoraConfig(target_modules=["0"]))


def test_a_method_without_modules_to_save() -> None:
    with pytest.raises(OptionError, match="no modules_to_save"):
        integration.with_upsamplers(upswap.patch(layers()), object())


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("integrations/peft.md", {"make_model": segformer})
    assert upswap.is_patched(upswap.load(tmp_path / "merged.safetensors", segformer()))
