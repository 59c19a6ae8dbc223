"""The plan of a patched model stands in what its host keeps with the weights, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import segmentation_models_pytorch as smp
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from upswap import UpswapWarning
from upswap.architectures import host_config


def segformer() -> nn.Module:
    config = SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    return SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("make", [segformer, lambda: smp.FPN("resnet18", encoder_weights=None)], ids=["hf", "smp"])
def test_kept_and_dropped(make) -> None:
    model = make()
    assert host_config.kept_by(model) is None
    host_config.keep(model, "one")
    assert host_config.kept_by(copy.deepcopy(model)) == "one"
    with pytest.warns(UpswapWarning, match="had the plan of another patch"):
        host_config.keep(model, "two")
    host_config.drop(model, "one")  # is another's
    assert host_config.kept_by(model) == "two"
    host_config.drop(model, "two")
    assert host_config.kept_by(model) is None


def test_other_models_keep_nothing() -> None:
    model = nn.Conv2d(1, 1, 1)
    before = dict(vars(model))
    host_config.keep(model, "one")
    host_config.drop(model, "one")
    assert vars(model) == before
    assert not host_config.came_without(model)
