"""A model for an exporter of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import upswap
from deployed import IMAGES, far, patched, sizes
from upswap.export.exportable import upsampler_paths
from upswap.nn.dysample import DySample
from upswap.nn.sampling.samplers import GRIDSAMPLE


def test_a_copy_in_eval_mode_that_computes_the_same() -> None:
    patched().train()
    made = upswap.exportable(patched(), "rknn")
    assert patched().training
    patched().eval()
    assert not made.training
    chosen = [module.sampler for module in made.modules() if isinstance(module, DySample)]
    assert set(chosen) == {("gather", True, 1)}
    assert all(module.sampler == GRIDSAMPLE for module in patched().modules() if isinstance(module, DySample))
    for x in sizes():
        assert far(made(x), patched()(x)) < 1e-5


def test_what_it_is_wrapped_in_stays() -> None:
    class Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    made = upswap.exportable(Holder(patched()), sampler="window", calibration=[IMAGES * 0.01])
    assert type(made) is Holder
    found = [module for module in made.modules() if isinstance(module, DySample)]
    assert {module.sampler[0] for module in found} == {"window"}
    assert sorted(upsampler_paths(made.model)) == sorted(upswap.upsamplers(patched()))


# torch announces the end of what is tested, and warns of every size that a trace asks for
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:Converting a tensor:torch.jit.TracerWarning",
)
def test_it_scripts_traces_and_saves(tmp_path) -> None:
    made = upswap.exportable(patched(), "litert")
    traced = torch.jit.trace(made, IMAGES)
    for x in sizes():
        assert far(traced(x), patched()(x)) < 1e-5
    upsampler = next(module for module in made.modules() if isinstance(module, DySample))
    x = torch.randn(2, upsampler.in_channels, 5, 4)
    assert far(torch.jit.script(upsampler)(x), upsampler(x)) < 1e-5


def test_a_saved_one_still_reads_so(tmp_path) -> None:
    import segmentation_models_pytorch as smp

    made = upswap.exportable(upswap.patch(smp.FPN("resnet18", encoder_weights=None).eval()), "rknn")
    loaded = upswap.load(upswap.save(made, tmp_path / "model.pt"))
    assert {module.sampler[0] for module in loaded.modules() if isinstance(module, DySample)} == {"gather"}
    assert torch.equal(loaded(torch.ones(1, 3, 64, 64)), made(torch.ones(1, 3, 64, 64)))
