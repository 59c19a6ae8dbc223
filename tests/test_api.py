"""The public functions on a model of a few lines; the real architectures are in libraries/."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invariants
import upswap


class Decoder(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))


class Net(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=4)
        self.blocks = nn.Sequential(Decoder(channels), Decoder(channels))
        self.head = nn.Conv2d(channels, 2, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.head(self.blocks(self.stem(x))))


def build(channels: int = 8) -> Net:
    torch.manual_seed(0)
    return Net(channels).eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_patch_in_place_and_on_a_copy() -> None:
    model = build()
    copied = upswap.patch(model, inplace=False)
    assert copied is not model
    assert list(model.state_dict()) == list(build().state_dict())
    assert upswap.patch(model) is model
    assert list(model.state_dict()) == list(copied.state_dict())
    assert list(upswap.upsamplers(model)) == ["blocks.0.upsample", "blocks.1.upsample"]
    assert len(list(upswap.parameters(model))) == 4


def test_kinds_opens_others() -> None:
    model = upswap.patch(build(), kinds=("feature", "logits"))
    assert [site.name for site in upswap.plan_of(model).swapped] == ["blocks.0", "blocks.1", "up"]
    assert isinstance(model.up, upswap.DySample)
    invariants.check_step_0(build(), model, [X])
    only = upswap.inspect(build(), kinds="logits")
    assert [site.name for site in only.swapped] == ["up"]


def test_include_and_exclude() -> None:
    assert [s.name for s in upswap.inspect(build(), include="blocks.*").swapped] == ["blocks.0", "blocks.1"]
    plan = upswap.inspect(build(), exclude=["blocks.1"])
    assert [s.name for s in plan.swapped] == ["blocks.0"]
    assert plan.site("blocks.1").reason == "excluded by 'blocks.1'"
    assert upswap.inspect(build(), include=["*.0"]).site("blocks.1").reason == "not included"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_near_names(option: str) -> None:
    with pytest.raises(
        upswap.FilterError, match=rf"{option} pattern 'block\.0' matches none of the 3 sites.*blocks\.0"
    ):
        upswap.patch(build(), **{option: "block.0"})


def test_excluding_everything_is_nothing_to_swap() -> None:
    with pytest.raises(upswap.NothingToSwapError, match="excluded by"):
        upswap.patch(build(), exclude="*")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"style": "ld"}, upswap.OptionError),
        ({"groups": -1}, upswap.OptionError),
        ({"init": "zero"}, upswap.OptionError),
        ({"kinds": "features"}, upswap.OptionError),
        ({"upsampler": "nope"}, upswap.OptionError),
        ({"example_inputs": torch.randn(1, 5, 8, 8)}, upswap.InputError),
    ],
)
def test_a_bad_option_leaves_the_model_as_it_was(options: dict[str, object], error: type[Exception]) -> None:
    model = build()
    with pytest.raises(error):
        upswap.patch(model, **options)  # type: ignore[arg-type]
    assert list(model.state_dict()) == list(build().state_dict())
    assert set(model.__dict__) == set(build().__dict__)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_optimizer_that_takes_no_more_leaves_the_model_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(optimizer, "add_param_group", Mock(side_effect=error))
    with pytest.raises(error):
        upswap.patch(model, optimizer=optimizer)
    assert not upswap.is_patched(model)
    assert list(model.state_dict()) == list(build().state_dict())


def test_groups_that_do_not_divide_are_reported_or_refused() -> None:
    plan = upswap.inspect(build(6))
    assert plan.site("blocks.0").settings["groups"] == 3
    assert "groups 3" in plan.site("blocks.0").why
    with pytest.raises(upswap.OptionError, match=r"blocks\.0: 4 groups do not divide 6 channels"):
        upswap.patch(build(6), groups=4, strict=True)
    plan = upswap.inspect(build(6), style="pl")
    assert plan.site("blocks.0").settings["style"] == "lp"
    assert "not divisible by 4" in plan.site("blocks.0").why
    with pytest.raises(upswap.OptionError, match="use style 'lp'"):
        upswap.patch(build(6), style="pl", strict=True)


def test_the_paper_initialisation_is_close_and_not_equal() -> None:
    model = upswap.patch(build(), init="paper")
    difference = upswap.verify(build(), model).max_rel_diff
    assert 1e-7 < difference < 1e-2


def test_cascade_chains_unshared_steps() -> None:
    class By4(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.interpolate(self.stem(x), scale_factor=4, mode="nearest"))

    torch.manual_seed(0)
    original = By4().eval()
    patched = upswap.patch(copy.deepcopy(original), cascade=True)
    (module,) = upswap.upsamplers(patched).values()
    assert [type(step).__name__ for step in module] == ["DySample", "DySample"]
    assert module[0].offset.weight is not module[1].offset.weight
    invariants.check_step_0(original, patched, [X])  # a chain of nearest x2 is a nearest x4
    invariants.check_learning(patched, X)


def test_freezing() -> None:
    model = upswap.freeze_host(upswap.patch(build()))
    assert [p.requires_grad for p in upswap.parameters(model)] == [True] * 4
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_what_is_not_patched_says_so() -> None:
    for function in (upswap.unpatch, upswap.plan_of, upswap.freeze_host):
        with pytest.raises(upswap.PlanError, match=r"not patched.*upswap\.patch"):
            function(build())


def test_unpatch_keeps_trained_host_weights() -> None:
    model = upswap.patch(build())
    with torch.no_grad():
        model.head.weight.fill_(2.0)
    upswap.unpatch(model)
    assert torch.equal(model.head.weight, torch.full_like(model.head.weight, 2.0))
    assert not hasattr(model.blocks[0], "upsample")
    upswap.patch(model)
    assert list(upswap.upsamplers(model)) == ["blocks.0.upsample", "blocks.1.upsample"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Conv2d(3, 3, 1)), "TorchScript"),
        (lambda: torch.compile(build(), backend="eager"), "_orig_mod"),
        (lambda: torch.nn.DataParallel(build()), r"model\.module"),
        (lambda: build().state_dict(), "expected a torch.nn.Module, got a OrderedDict"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_cannot_be_patched_names_the_way_out(make, message: str) -> None:
    with pytest.raises(upswap.OptionError, match=message):
        upswap.patch(make())


def test_a_plan_for_another_model_is_refused() -> None:
    plan = upswap.inspect(build())
    with pytest.raises(upswap.PlanError, match=r"made for .*Net"):
        upswap.patch(Decoder(), plan=plan)

    class Shorter(Net):
        pass

    Shorter.__qualname__, Shorter.__module__ = Net.__qualname__, Net.__module__
    other = Shorter()
    other.blocks = nn.Sequential(Decoder())
    with pytest.raises(upswap.PlanError, match=r"blocks\.1: the model has no module 'blocks\.1'"):
        upswap.patch(other, plan=plan)
    assert "_upswap_plan" not in other.__dict__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_upsamplers_follow_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    original = build().to(dtype)
    patched = upswap.patch(copy.deepcopy(original))
    assert {p.dtype for p in upswap.parameters(patched)} == {dtype}
    assert upswap.verify(original, patched).ok
    assert patched(X.to(dtype)).dtype == dtype


def test_a_model_on_the_meta_device_is_patched_before_it_is_materialised() -> None:
    with torch.device("meta"):
        empty = Net()
    upswap.patch(empty, torch.empty(1, 3, 64, 64, device="meta"))
    assert all(p.is_meta for p in upswap.parameters(empty))
    real = upswap.patch(build())
    empty.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(empty.eval()(X), real(X))


def test_channels_last_stays() -> None:
    original = build().to(memory_format=torch.channels_last)
    patched = upswap.patch(copy.deepcopy(original))
    x = X.to(memory_format=torch.channels_last)
    out = patched(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    invariants.assert_close([out], [original(x)], 1e-5)


def test_a_registered_upsampler_is_used() -> None:
    from upswap.nn.registry import _FACTORIES

    class Deconvolution(nn.Module):
        def __init__(self, channels: int, scale: int) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(channels, channels, scale, scale)

        def forward(self, x, size=None, scale_factor=None):
            return self.up(x)

    @upswap.register_upsampler("deconvolution")
    def deconvolution(site: upswap.Site, options: object) -> nn.Module:
        return Deconvolution(site.channels, int(site.scale[0]))

    try:
        with pytest.raises(upswap.OptionError, match="registered already"):
            upswap.register_upsampler("deconvolution")(deconvolution)
        model = upswap.patch(build(), upsampler="deconvolution")
        assert isinstance(model.blocks[0].upsample, Deconvolution)
        assert model(X).shape == build()(X).shape
        assert type(upswap.unpatch(model).blocks[0]) is Decoder
    finally:
        del _FACTORIES["deconvolution"]
