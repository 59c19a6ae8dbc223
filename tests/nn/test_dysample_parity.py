"""Against the authors' released module: its outputs and gradients, its state dicts, its older ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from golden import golden_cases, golden_tensors, relative_error
from upswap.apps.bench.reference import ReferenceDySample
from upswap.nn.dysample import DySample

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def randomise(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Large offsets: several pixels, far over the border at some points."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)


def test_the_golden_file_has_all_its_cases() -> None:
    assert len(golden_cases()) == 24


@pytest.mark.parametrize("case", golden_cases())
def test_golden(case: dict[str, Any]) -> None:
    tensors = golden_tensors(case["name"])
    module = DySample(
        case["in_channels"],
        case["scale"],
        style=case["style"],
        groups=case["groups"],
        dyscope=case["dyscope"],
        strict=True,
        dtype=getattr(torch, case["dtype"]),
    )
    module.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    x = tensors["input"].requires_grad_()
    out = module(x)
    out.backward(tensors["grad_output"])

    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert gradients.keys() == {k.removeprefix("grad.") for k in tensors if k.startswith("grad.")}
    errors = {"output": relative_error(out, tensors["output"]), "input": relative_error(x.grad, tensors["grad_input"])}
    errors |= {name: relative_error(gradient, tensors[f"grad.{name}"]) for name, gradient in gradients.items()}
    assert max(errors.values()) < TOLERANCE[case["dtype"]], errors


VARIANTS = [
    pytest.param(style, dyscope, scale, groups, id=f"{style}{'+' if dyscope else ''}-x{scale}-g{groups}")
    for style in ("lp", "pl")
    for dyscope in (False, True)
    for scale, groups in ((2, 4), (3, 6), (4, 1))
]


@pytest.mark.parametrize(("style", "dyscope", "scale", "groups"), VARIANTS)
def test_state_dicts_go_both_ways(style: str, dyscope: bool, scale: int, groups: int) -> None:
    channels = 144
    reference = ReferenceDySample(channels, scale, style, groups, dyscope)
    ours = DySample(channels, scale, style=style, groups=groups, dyscope=dyscope)
    x = torch.randn(2, channels, 5, 6)

    randomise(reference, std=0.05)
    ours.load_state_dict(reference.state_dict())
    assert relative_error(ours(x), reference(x)) < 1e-5

    randomise(ours, seed=1, std=0.05)
    reference.load_state_dict(ours.state_dict())
    assert relative_error(ours(x), reference(x)) < 1e-5
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


def test_a_reference_given_the_state_of_a_nearest_module_computes_the_same() -> None:
    ours = DySample(16, 2, mode="nearest")
    randomise(ours)
    reference = ReferenceDySample(16, 2, "lp", 4, dyscope=False)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 5, 6)
    assert relative_error(ours(x), reference(x)) < 1e-5


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_the_older_scope_bias_loads(style: str, assign: bool) -> None:
    old = ReferenceDySample(16, 2, style, 4, dyscope=True, scope_bias=True)
    randomise(old)
    host = nn.Sequential(nn.Identity(), DySample(16, 2, style=style, groups=4, dyscope=True))
    host.load_state_dict({f"1.{key}": value.clone() for key, value in old.state_dict().items()}, assign=assign)
    x = torch.randn(2, 16, 5, 6)
    assert relative_error(host(x), old(x)) < 1e-5
    # From then on the bias is a parameter like the others: trained, saved, loaded.
    assert host[1].scope.bias in set(host.parameters())
    again = DySample(16, 2, style=style, groups=4, dyscope=True)
    again.load_state_dict(host[1].state_dict())
    assert torch.equal(again(x), host(x))
    host[1].reset_parameters()
    assert not host[1].scope.bias.any()


def test_a_frozen_scope_gets_a_frozen_bias() -> None:
    module = DySample(16, 2, dyscope=True).requires_grad_(False)
    module.load_state_dict(ReferenceDySample(16, 2, "lp", 4, dyscope=True, scope_bias=True).state_dict())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_host_checkpoint_leaves_exactly_the_upsampler_keys_missing() -> None:
    host = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3))
    checkpoint = host.state_dict()
    host[1] = DySample(16, 2, mode="nearest", dyscope=True)
    result = host.load_state_dict(checkpoint, strict=False)
    assert set(result.missing_keys) == {"1.offset.weight", "1.offset.bias", "1.scope.weight", "1.init_pos"}
    assert result.unexpected_keys == []


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("build", "what"),
    [
        pytest.param(lambda: DySample(16, 2, mode="nearest"), "positions differ by 0.25 pixels", id="base grid"),
        pytest.param(lambda: DySample(16, 2, groups=1), "its shape is", id="groups"),
        pytest.param(lambda: DySample(16, 4, groups=1), "positions differ", id="scale and groups of equal shape"),
    ],
)
def test_offsets_made_for_another_grid_are_refused(build: Any, what: str, strict: bool) -> None:
    released = ReferenceDySample(16, 2, "lp", 4, dyscope=False).state_dict()
    with pytest.raises(RuntimeError, match="this checkpoint was made for another base grid, scale or groups") as error:
        build().load_state_dict(released, strict=strict)
    assert what in str(error.value)
    assert "init='paper'" in str(error.value)


def test_transposed_factors_are_refused() -> None:
    with pytest.raises(RuntimeError, match="another base grid"):
        DySample(16, (2, 3)).load_state_dict(DySample(16, (3, 2)).state_dict())


@pytest.mark.parametrize("options", [{"mode": "bicubic"}, {"align_corners": True}, {"scale": 1.5}])
def test_grids_the_reference_cannot_express_have_no_init_pos(options: dict[str, Any]) -> None:
    module = DySample(16, **options)
    assert set(module.state_dict()) == {"offset.weight", "offset.bias"}
    with pytest.raises(RuntimeError, match="init_pos"):
        module.load_state_dict(ReferenceDySample(16, 2, "lp", 4, dyscope=False).state_dict())


def test_the_papers_initialisation_takes_released_checkpoints_whatever_it_replaces() -> None:
    reference = ReferenceDySample(16, 2, "lp", 4, dyscope=False)
    randomise(reference)
    x = torch.randn(1, 16, 4, 5)
    for options in ({"mode": "nearest"}, {"mode": "bicubic"}, {"mode": "bilinear", "align_corners": True}):
        module = DySample(16, 2, init="paper", **options)
        module.load_state_dict(reference.state_dict())
        assert relative_error(module(x), reference(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_stored_in_half_precision_fits(dtype: torch.dtype) -> None:
    reference = ReferenceDySample(12, 3, "lp", 4, dyscope=True).to(dtype)
    DySample(12, 3, dyscope=True).load_state_dict(reference.state_dict())


def test_a_module_made_on_the_meta_device_takes_a_state_dict() -> None:
    with torch.device("meta"):
        module = DySample(16, 2, dyscope=True)
    assert module.offset.weight.is_meta
    assert module.init_pos.is_meta
    reference = ReferenceDySample(16, 2, "lp", 4, dyscope=True)
    module.load_state_dict(reference.state_dict(), assign=True)
    x = torch.randn(1, 16, 4, 5)
    assert relative_error(module(x), reference(x)) < 1e-5
