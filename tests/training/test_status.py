"""`status` names every upsampler that is not trained, or not kept, and is content with one that is."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import unet


def net() -> nn.Module:
    """Two upsamplers."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 3),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 32, 3),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 2, 1),
    )
    return upswap.patch(nn.Sequential(*layers), torch.randn(1, 3, 16, 16))


def trained(model: nn.Module) -> nn.Module:
    upswap.patch(model)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(0.3)
    return model


def test_a_fresh_model_is_ok() -> None:
    model = net()
    found = upswap.status(model, torch.optim.SGD(model.parameters(), lr=0.1), copy.deepcopy(model))
    assert found.ok
    assert [(row.path, row.state, row.trainable, row.in_optimizer, row.in_ema) for row in found.rows] == [
        ("1", "as initialised", True, True, True),
        ("3", "as initialised", True, True, True),
    ]
    assert repr(found) == "<Status: 2 upsamplers, ok>"
    assert upswap.status(model).rows[0].in_optimizer is None


def test_training_is_told_from_a_hosts_initialisation() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        assert [row.state for row in upswap.status(model).rows] == ["trained", "trained"]
    with torch.no_grad():
        nn.init.normal_(upswap.upsamplers(model)["3"].offset.weight, std=0.02)
    # After training its own weights cannot be told from those of an initialisation by what they are.
    assert upswap.status(model).ok


def test_a_hosts_initialisation_before_training() -> None:
    model = net()
    with torch.no_grad():
        nn.init.normal_(model[3].offset.weight, std=0.02)
    found = upswap.status(model)
    assert [row.state for row in found.rows] == ["as initialised", "lost"]
    assert not found.ok
    text = " ".join(str(found).split())
    assert "3: has an offset.weight of independent random numbers (standard deviation 0.02" in text
    assert "reset_parameters() of each of upswap.upsamplers(model)" in text
    for module in upswap.upsamplers(model).values():
        module.reset_parameters()
    assert upswap.status(model).ok


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda m: [p.requires_grad_(False) for p in upswap.parameters(m)],
            r"is frozen: for p in upswap\.parameters\(model\)",
        ),
        (lambda m: m[1].offset.weight.data.fill_(float("inf")), "values in offset.weight that are no numbers"),
        (lambda m: m[1].init_pos.fill_(9.0), "another init_pos"),
    ],
    ids=["frozen", "inf", "init_pos"],
)
def test_problems(spoil: Callable[[Any], Any], problem: str) -> None:
    model = net()
    spoil(model)
    found = upswap.status(model)
    assert not found.ok
    assert re.search(problem, "; ".join(found.rows[0].problems))


def test_a_model_that_is_frozen_as_a_whole_has_no_problem() -> None:
    """As those that are loaded to be run."""
    model = net().requires_grad_(False)
    assert upswap.status(model).ok
    assert re.search(r"as initialised +no ", str(upswap.status(model)))
    model[0].requires_grad_(True)
    assert re.search(r"as initialised +NO ", str(upswap.status(model)))


def test_an_optimiser_made_before_the_patch() -> None:
    model = unet()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(model)
    found = upswap.status(model, before)
    assert {row.in_optimizer for row in found.rows} == {False}
    (advice,) = {problem for row in found.rows for problem in row.problems}
    # What it tells people to do works when pasted.
    exec(advice.partition(": ")[2].partition(", or make")[0], {"optimizer": before, "model": model, "upswap": upswap})
    assert str(found).endswith(f"and {len(found.rows) - 2} more: {advice}")
    assert upswap.status(model, before).ok
    assert upswap.status(model, [torch.optim.SGD(model.encoder.parameters(), lr=1.0), before]).ok


class Ema:
    """As EMAs of trainers are: an object with the averaged model in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model)
        self.updates = 0


@pytest.mark.parametrize(
    "average",
    [
        torch.optim.swa_utils.AveragedModel,
        Ema,
        lambda model: model.state_dict(),
        lambda model: types.SimpleNamespace(shadow={f"module.{k}": v for k, v in model.state_dict().items()}),
    ],
    ids=["AveragedModel", "object", "state dict", "shadow"],
)
def test_averaged_weights(average: Callable[[nn.Module], Any]) -> None:
    model = unet()
    early = average(model)
    trained(model)
    assert {row.in_ema for row in upswap.status(model, ema=early).rows} == {False}
    assert not upswap.status(model, ema=early).ok
    assert upswap.status(model, ema=average(model)).ok
    trainer = nn.ModuleDict({"net": model})
    assert upswap.status(trainer, ema=average(model)).ok


def test_an_average_of_one_of_several_is_none_of_the_others() -> None:
    both = nn.ModuleDict({"one": net(), "two": net()})
    state = {key: value for key, value in both.state_dict().items() if key.startswith("one.")}
    found = upswap.status(both, ema=state)
    assert [row.in_ema for row in found.rows] == [True, True, False, False]


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_what_was_trained_out_of_sight_is_not_lost(make: Any, style: str) -> None:
    """Gradients of noise leave weights like noise, in compiled code, in eval mode and in averages."""
    model = upswap.patch(
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.Upsample(scale_factor=2), nn.Conv2d(64, 4, 1)).eval(),
        torch.randn(1, 3, 16, 16),
        style=style,
    )
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = make(upswap.parameters(model), lr=1.0 if make is torch.optim.SGD else 0.01)
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 8, 8)) - torch.randn(2, 4, 12, 12)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        assert upswap.status(model).ok
    optimizer.zero_grad()
    assert upswap.status(model).ok
    assert upswap.status(average).ok


def test_weights_of_the_host_alone_explain_no_upsampler() -> None:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    host = {key: value for key, value in model.state_dict().items() if "offset" not in key}
    model.load_state_dict(host, strict=False)
    assert {row.state for row in upswap.status(model).rows} == {"lost"}


def test_what_has_no_averaged_weights() -> None:
    with pytest.raises(upswap.OptionError, match="ema: a SimpleNamespace has neither"):
        upswap.status(net(), ema=types.SimpleNamespace(decay=0.9))
    with pytest.raises(upswap.PlanError, match="not patched"):
        upswap.status(nn.Conv2d(1, 1, 1))


def test_other_kinds_and_devices() -> None:
    assert {row.state for row in upswap.status(upswap.patch(unet(), upsampler="carafe")).rows} == {"as initialised"}
    model = upswap.patch(unet())
    (name, _), *_ = upswap.upsamplers(model).items()
    model.set_submodule(name, nn.Upsample(scale_factor=2))  # no upsampler of upswap's
    assert "unknown" in {row.state for row in upswap.status(model).rows}
    assert {row.state for row in upswap.status(upswap.patch(unet(), cascade=True)).rows} == {"as initialised"}
    with torch.device("meta"):
        model = unet()
    assert {row.state for row in upswap.status(upswap.patch(model)).rows} == {"no values"}


def test_a_notebooks_table_escapes_names() -> None:
    model = net()
    assert upswap.status(model)._repr_html_().count("<tr>") == 3
