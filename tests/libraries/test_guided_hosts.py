"""Guided upsamplers in the hosts of the papers, and all that is done with a model: train, save, load, compile, export, undo."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from invariants import assert_equal, check_guides, outputs
from upswap import UpswapWarning

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=(32, 32, 16, 16, 8))


def torchvision_fpn() -> nn.Module:
    from torchvision.models import detection

    return detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        decoder_hidden_size=16,
        num_attention_heads=[1, 1, 2, 2],
        num_labels=2,
    )
    return SegformerForSemanticSegmentation(config)


def yolov8n() -> nn.Module:
    from ultralytics import YOLO

    return YOLO("yolov8n.yaml").model


def hrnet() -> nn.Module:
    import timm

    return timm.create_model("hrnet_w18_small", pretrained=False, features_only=True)


#: For each host the ways its guides come by, and how many sites have none.
HOSTS: dict[Callable[[], nn.Module], tuple[dict[str, int], int]] = {
    smp_unet: ({"local": 4}, 1),
    torchvision_fpn: ({"fusion": 3}, 0),
    segformer: ({"fusion": 3}, 0),
    yolov8n: ({"handed": 2}, 0),
    hrnet: ({"handed": 10}, 0),
}

UPSAMPLERS = ("fade", "sapa-b", "freqfusion")


def of_hosts(fast: tuple[Callable[[], nn.Module], ...]) -> pytest.MarkDecorator:
    """Every host with every upsampler; all but some with FADE are slow."""
    return pytest.mark.parametrize(
        ("host", "upsampler"),
        [
            pytest.param(host, upsampler, marks=() if host in fast and upsampler == "fade" else pytest.mark.slow)
            for host in HOSTS
            for upsampler in UPSAMPLERS
        ],
    )


def patched(host: Callable[[], nn.Module], upsampler: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = host().eval()
    return original, upswap.patch(copy.deepcopy(original), IMAGE[:1], upsampler=upsampler, unguided="carafe")


def floats(model: nn.Module, image: torch.Tensor = IMAGE) -> list[torch.Tensor]:
    return [tensor for tensor in outputs(model, image) if tensor.is_floating_point()]


def trained(model: nn.Module, steps: int = 10) -> nn.Module:
    """The model after some steps of training."""
    model.train()
    optimizer = torch.optim.SGD(upswap.param_groups(model, lr=1e-3, upsampler_lr=0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([tensor.square().mean() for tensor in floats(model)]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@of_hosts(fast=(smp_unet, segformer))
def test_patched_trained_saved_loaded_and_undone(host: Callable[[], nn.Module], upsampler: str, tmp_path: Path) -> None:
    original, model = patched(host, upsampler)
    plan = upswap.plan_of(model)
    ways, without = HOSTS[host]
    found = [site.guide.way for site in plan.swapped if site.guide]
    assert {way: found.count(way) for way in found} == ways
    assert sum(site.guide is None for site in plan.swapped) == without
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UpswapWarning)
        for image in (IMAGE, torch.randn(1, 3, 96, 64)):
            assert_equal(floats(model, image), floats(original, image))
        if upsampler != "freqfusion":  # which changes the guide
            assert check_guides(model, [IMAGE, torch.randn(1, 3, 96, 64)]) == 2 * len(found)

    trained(model)
    assert all(module.gain.abs().sum() > 0 for module in upswap.upsamplers(model).values())
    with torch.no_grad():
        expected = floats(model)
        assert_equal(floats(copy.deepcopy(model)), expected)
        _save_and_load(host, model, expected, tmp_path)
    upswap.unpatch(model)
    original.load_state_dict(model.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    with torch.no_grad():
        assert_equal(floats(model), floats(original))


@of_hosts(fast=())
def test_trained_compiled_and_exported(host: Callable[[], nn.Module], upsampler: str, tmp_path: Path) -> None:
    _, model = patched(host, upsampler)
    trained(model, steps=2)
    with torch.no_grad():
        expected = floats(model)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(floats(compiled), expected, strict=True))
    upswap.export_onnx(model, tmp_path / "model.onnx", IMAGE, dynamic=False)  # it compares the file with the model
    assert (tmp_path / "model.onnx").stat().st_size


def _save_and_load(host: Callable[[], nn.Module], model: nn.Module, expected: list[torch.Tensor], folder: Path) -> None:
    """In three forms: a whole module where the library's can be pickled, weights with a plan, a state dict."""
    upswap.save(model, folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "state.pt")
    plan = upswap.plan_of(model)
    loaded: list[Any] = [upswap.load(folder / "model.safetensors", host().eval())]
    again = upswap.patch(host().eval(), plan=plan)
    again.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    loaded.append(again)
    if host is not segformer:  # which keeps hooks of a local function once it ran, patched or not
        upswap.save(model, folder / "model.pt")
        loaded.append(upswap.load(folder / "model.pt"))
    for each in loaded:
        assert_equal(floats(each.eval()), expected)
