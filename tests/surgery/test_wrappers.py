"""What holds a model is told from a model by what it lacks: a forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import IMAGES, patched, unet
from upswap.surgery.wrappers import held


class Pipeline(nn.Module):
    """Called with the path of an image, as a YOLO of ultralytics is; knows the attributes of its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, path: str) -> Any:
        raise AssertionError(path)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)


def test_a_model_is_found_in_what_holds_it() -> None:
    model = unet()
    assert held(model) is model
    assert held(Pipeline(model)) is model
    assert held(Pipeline(Pipeline(model))) is model
    two = nn.ModuleList([unet(), unet()])
    assert held(two) is two
    own = Pipeline(model)
    own.forward = lambda x: x  # one that runs itself
    assert held(own) is own


def test_the_holder_is_patched_as_the_model_is(tmp_path: Any) -> None:
    original, pipeline = unet(), Pipeline(unet())
    assert upswap.inspect(pipeline) == upswap.inspect(original)
    copied = upswap.patch(pipeline, inplace=False)
    assert isinstance(copied, Pipeline)
    assert not upswap.is_patched(pipeline)
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    assert upswap.patch(pipeline, plan=upswap.plan_of(copied), optimizer=optimizer) is pipeline
    assert upswap.status(pipeline, optimizer, copy.deepcopy(pipeline)).ok
    assert upswap.plan_of(pipeline).model_class == upswap.plan_of(patched(unet())).model_class
    assert upswap.verify(original, pipeline).ok
    upswap.save(pipeline, tmp_path / "model.pt")
    assert torch.equal(upswap.load(tmp_path / "model.pt").eval()(IMAGES), pipeline.model.eval()(IMAGES))
    with pytest.warns(upswap.UpswapWarning, match="this Unet is patched already"):
        upswap.patch(pipeline)
    upswap.unpatch(pipeline)
    assert pipeline.state_dict().keys() == Pipeline(original).state_dict().keys()
