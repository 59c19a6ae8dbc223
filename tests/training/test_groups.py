"""Groups for an optimiser, and upsamplers found through what a model is wrapped in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import upswap
from models import patched, unet


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1)
    )


class Lit(nn.Module):
    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)


def test_groups() -> None:
    model = upswap.patch(small())
    host, no_decay, added = upswap.param_groups(model, lr=1e-3, upsampler_lr=1e-2, weight_decay=0.1)
    assert [group["name"] for group in (host, no_decay, added)] == ["host", "host_no_decay", "upsamplers"]
    assert [group["lr"] for group in (host, no_decay, added)] == [1e-3, 1e-3, 1e-2]
    assert [group["weight_decay"] for group in (host, no_decay, added)] == [0.1, 0.0, 0.0]
    assert [p.ndim for p in host["params"]] == [4, 4]
    assert [p.ndim for p in no_decay["params"]] == [1, 1, 1, 1]
    assert list(map(id, added["params"])) == list(map(id, upswap.parameters(model)))


def test_the_optimisers_own_weight_decay_stays_in_force() -> None:
    optimizer = torch.optim.AdamW(upswap.param_groups(upswap.patch(small()), lr=1e-3), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.0]


def test_rates_of_the_upsamplers() -> None:
    model = upswap.patch(small())
    assert upswap.param_groups(model, 1e-3)[-1]["lr"] == 1e-3
    group = upswap.param_groups(model, 1e-3, upsampler_lr_mult=10, upsampler_weight_decay=0.5)[-1]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-2), 0.5)
    with pytest.raises(upswap.OptionError, match="not both"):
        upswap.param_groups(model, 1e-3, 1e-2, upsampler_lr_mult=10)


def test_what_is_frozen_is_in_no_group() -> None:
    model = upswap.freeze_host(upswap.patch(small()))
    (group,) = upswap.param_groups(model, lr=1e-3)
    assert group["name"] == "upsamplers"


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        Lit,
    ],
    ids=["DataParallel", "AveragedModel", "compile", "trainer"],
)
def test_wrappers_are_seen_through(wrap: type[nn.Module]) -> None:
    model = patched(unet())
    wrapper = wrap(model)
    names = list(upswap.upsamplers(model))
    found = upswap.upsamplers(wrapper)
    assert [name.endswith(f".{own}") for name, own in zip(found, names, strict=True)] == [True] * len(names)
    assert all(wrapper.get_submodule(path) is module for path, module in found.items())
    assert upswap.plan_of(wrapper) == upswap.plan_of(model)
    assert upswap.is_patched(wrapper)
    assert len(upswap.param_groups(wrapper, lr=1.0)[-1]["params"]) == len(list(upswap.parameters(model)))


def test_several_patched_models() -> None:
    both = Lit(upswap.patch(small()), upswap.patch(small()))
    assert list(upswap.upsamplers(both)) == ["nets.0.2", "nets.1.2"]
    with pytest.raises(upswap.PlanError, match=r"several patched models in it: nets\.0, nets\.1"):
        upswap.plan_of(both)


def test_what_was_sharded_is_not_patched() -> None:
    class FSDPModule:
        __module__ = "torch.distributed.fsdp"

    model = small()
    model[0].__class__ = type("FSDPConv2d", (FSDPModule, nn.Conv2d), {})
    with pytest.raises(upswap.OptionError, match="0 is sharded by fully_shard"):
        upswap.patch(model)


def test_one_script_for_a_model_that_is_not_patched() -> None:
    model = small()
    assert upswap.upsamplers(model) == {}
    assert list(upswap.parameters(model)) == []
    groups = upswap.param_groups(model, lr=0.1, upsampler_lr_mult=10)
    assert [(group["name"], group["lr"]) for group in groups] == [("host", 0.1), ("host_no_decay", 0.1)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in (lambda: upswap.freeze_host(model), lambda: upswap.add_to_optimizer(model, optimizer)):
        with pytest.raises(upswap.PlanError, match=r"not patched; upswap\.patch\(model\) does that"):
            wrong()
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- an optimiser that exists ---------------------------------------------------------------------------------------------


def test_an_optimiser_gets_what_the_patch_added() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    upswap.patch(model, optimizer=optimizer)
    _, added = optimizer.param_groups
    assert (added["lr"], added["weight_decay"]) == (0.1, 0.0)
    assert list(map(id, added["params"])) == list(map(id, upswap.parameters(model)))
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not any(module.is_as_initialised() for module in upswap.upsamplers(model).values())


def test_an_optimiser_of_a_patched_model_gets_what_it_lacks_once() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    upswap.patch(model)
    for _ in range(2):
        with pytest.warns(upswap.UpswapWarning, match="patched already"):
            upswap.patch(model, optimizer=optimizer)
        assert len(optimizer.param_groups) == 2


def test_a_scheduler_that_exists_is_not_left_behind() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(upswap.OptionError, match=r"then make the scheduler"):
        upswap.patch(model, optimizer=optimizer)
    assert not upswap.is_patched(model)
    with pytest.raises(upswap.OptionError, match="a copy"):
        upswap.patch(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), inplace=False)


def test_named_parameters_stay_named() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.named_parameters())
    upswap.patch(model, optimizer=optimizer)
    assert optimizer.param_groups[-1]["param_names"] == ["2.offset.weight", "2.offset.bias"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS takes one group"),
        (lambda model: torch.optim.SGD(small().parameters(), lr=1.0), "none of the parameters of this Sequential"),
    ],
    ids=["LBFGS", "another model"],
)
def test_an_optimiser_that_cannot_take_them_is_told_before_the_patch(make: Any, message: str) -> None:
    model = small()
    with pytest.raises(upswap.OptionError, match=message):
        upswap.patch(model, optimizer=make(model))
    assert not upswap.is_patched(model)


def test_an_optimiser_that_refuses_leaves_the_model_as_it_was() -> None:
    class Refusing(torch.optim.SGD):
        def add_param_group(self, group: Any) -> None:
            if self.param_groups:
                raise ValueError("one group only")
            super().add_param_group(group)

    model = small()
    with pytest.raises(ValueError, match="one group only"):
        upswap.patch(model, optimizer=Refusing(model.parameters(), lr=1.0))
    assert not upswap.is_patched(model)


def test_a_container_of_patched_models_gives_an_optimiser_what_it_lacks() -> None:
    both = Lit(upswap.patch(small()), upswap.patch(small()))
    optimizer = torch.optim.SGD(both.nets[0].parameters(), lr=1.0)
    assert upswap.add_to_optimizer(both, optimizer) == 2
    assert upswap.add_to_optimizer(both, optimizer) == 0
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert upswap.add_to_optimizer(both, optimizer) == 0
    assert upswap.status(both, optimizer).ok


def test_upsamplers_of_several_are_reset_as_one() -> None:
    model = upswap.patch(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.Upsample(scale_factor=4), nn.Conv2d(32, 2, 1)), cascade=True
    )
    for parameter in upswap.parameters(model):
        parameter.data.fill_(1.0)
    for module in upswap.upsamplers(model).values():
        module.reset_parameters()
    assert {row.state for row in upswap.status(model).rows} == {"as initialised"}
