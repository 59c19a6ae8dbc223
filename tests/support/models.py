"""Models whose files the tests look at."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap

IMAGES = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def unet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, **{"classes": 2, **options}).eval()


def patched(model: nn.Module) -> nn.Module:
    """Patched, and with offsets large enough that a lost or misplaced upsampler shows in the output."""
    upswap.patch(model)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    assert list(got.state_dict()) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[key], tensor, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(got.eval()(IMAGES), expected.eval()(IMAGES), rtol=0, atol=0)
