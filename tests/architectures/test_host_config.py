"""The plan of a patched model stands in what its host keeps with the weights, and nowhere else."""

from __future__ import annotations

import contextlib
import copy
import json

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


@pytest.mark.parametrize("make", [segformer, lambda: smp.FPN("resnet18", encoder_weights=None)], ids=["hf", "smp"])
def test_the_plans_of_parts_of_one_configuration(make) -> None:
    model = make()
    one, other, again = (json.dumps({"model_class": name, "n": n}) for name, n in (("A", 1), ("B", 1), ("A", 2)))
    for plan in (one, other, one):
        host_config.keep(model, plan)
    assert host_config.plans_in(host_config.kept_by(model)) == [other, one]
    with pytest.warns(UpswapWarning, match="had the plan of another patch"):
        host_config.keep(model, again)
    assert host_config.plans_in(host_config.kept_by(model)) == [other, again]
    host_config.drop(model, other)
    assert host_config.kept_by(model) == again
    host_config.drop(model, again)
    assert host_config.kept_by(model) is None


@pytest.mark.parametrize("entry", ["[1]", "{", "[" * 100_000, "[]", '"x"', "3"])
def test_what_is_no_plan_is_one_that_does_not_fit(entry: str) -> None:
    assert host_config.plans_in(entry) == ([] if entry == "[]" else [entry])
    model = segformer()
    model.config.upswap_plan = entry
    with contextlib.nullcontext() if entry == "[]" else pytest.warns(UpswapWarning, match="another patch"):
        host_config.keep(model, "one")


def test_other_models_keep_nothing() -> None:
    model = nn.Conv2d(1, 1, 1)
    before = dict(vars(model))
    host_config.keep(model, "one")
    host_config.drop(model, "one")
    assert vars(model) == before
    assert not host_config.came_without(model)
