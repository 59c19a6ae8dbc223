"""FADE against its authors' module and against its formula, written out in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import upswap
from golden import differences, kernel_case
from slow_sums import nearest, sums
from upswap.nn import FADE

CASES: dict[str, dict[str, Any]] = {"fade": {}, "fade_lite": {"lite": True}, "fade_nogate": {"gating": False}}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_authors_module_computes(name: str) -> None:
    case = kernel_case(name)
    module = FADE(16, init="paper", **CASES[name])
    module.load_state_dict(case.state)
    assert module.state_dict().keys() == case.state.keys()
    x, guide = case.inputs["de"].requires_grad_(), case.inputs["en"].requires_grad_()
    found = differences(module, case, [module(x, guide=guide)], {"de": x, "en": guide})
    assert max(found.values()) < 2e-5, found


@torch.no_grad()
def defined(module: FADE, de: Tensor, en: Tensor) -> Tensor:
    generator, size = module.ker_generator, (en.shape[2], en.shape[3])
    encoder, groups = generator["content_encoder"], module.embedding_dim if module.lite else 1

    def logits(x: Tensor, compressor: Any) -> Tensor:
        return F.conv2d(F.conv2d(x, compressor.weight, compressor.bias), encoder.weight, encoder.bias, 1, 1, 1, groups)

    kernels = logits(en, generator["compressor_en"]) + nearest(logits(de, generator["compressor_de"]), size)
    up = sums(de, kernels.softmax(dim=1))
    if not module.gating:
        return up
    gate = nearest(F.conv2d(de, *module.gate_generator["conv"].parameters()).sigmoid(), size)
    return gate * en + (1 - gate) * up


@pytest.mark.parametrize("options", CASES.values(), ids=str)
@pytest.mark.parametrize("size", [(8, 10), (7, 9), (4, 15), (9, 11)], ids=str)
def test_it_is_its_formula(options: dict[str, Any], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = FADE(3, init="paper", up_kernel_size=3, **options).double()
    x, guide = noise(2, 3, 4, 5), noise(2, 3, *size, seed=2)
    assert (module(x, guide=guide) - defined(module, x, guide)).abs().max() < 1e-10


def test_a_guide_of_other_channels_has_no_gate() -> None:
    module = FADE(3, 5, init="paper", gating=False).double()
    x, guide = noise(1, 3, 4, 5), noise(1, 5, 8, 9, seed=2)
    assert (module(x, guide=guide) - defined(module, x, guide)).abs().max() < 1e-10
    with pytest.raises(upswap.OptionError, match=r"the guide has 5, the map 3\. Give gating=False"):
        FADE(3, 5)


def test_the_authors_other_form_loads() -> None:
    """Its names and shapes; its kernels are one tensor with a bias apart."""
    module = FADE(8, gating=False, init="paper")
    state = module.state_dict()
    other = {
        "kernel_generator.conv1_en.weight": state["ker_generator.compressor_en.weight"],
        "kernel_generator.conv1_en.bias": state["ker_generator.compressor_en.bias"],
        "kernel_generator.conv1_de.weight": state["ker_generator.compressor_de.weight"],
        "kernel_generator.conv2_kernels": state["ker_generator.content_encoder.weight"],
        "kernel_generator.conv2_bias": state["ker_generator.content_encoder.bias"],
    }
    for twin in (FADE(8, gating=False, init="paper"), FADE(8, gating=False)):
        twin.load_state_dict(other)
        x, guide = noise(1, 8, 3, 4).float(), noise(1, 8, 6, 8).float()
        assert torch.allclose(twin(x, guide=guide), module(x, guide=guide), atol=1e-5)


def test_parameters_are_as_many_as_counted() -> None:
    counts = [sum(p.numel() for p in FADE(256, init="paper", **options).parameters()) for options in CASES.values()]
    assert [counts[0], counts[2]] == [47514, 47257]
