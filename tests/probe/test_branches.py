"""Models whose values choose what runs: heads like the one that ran, lines not reached, and loading on any branch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invariants
import upswap


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, channels, 3, padding=1), nn.Conv2d(channels, 1, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(F.interpolate(x, scale_factor=2, mode="bilinear") + self.up(x))


class Heads(nn.Module):
    """A depth model with a head for each kind of picture, one of which its own judgement picks."""

    names = ("indoor", "outdoor", "wide")

    def __init__(self, looks: bool = True) -> None:
        super().__init__()
        self.looks, self.stem, self.judge = looks, nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 3)
        self.heads = nn.ModuleDict({"indoor": Head(8), "outdoor": Head(8), "wide": Head(9)})

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        number = self.judge(x.mean((2, 3))).sum(0).argmax().item() if self.looks else 0
        result: torch.Tensor = self.heads[self.names[int(number)]](x)
        return result


class Branch(nn.Module):
    """Two resizes, one of which the values pick."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.stem, self.last, self.most = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 1, 1), most

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        if x.mean() > self.most:
            return self.last(F.interpolate(x, scale_factor=2, mode="bilinear"))
        return self.last(F.interpolate(x, scale_factor=2))


def heads(number: int, looks: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Heads(looks)
    with torch.no_grad():
        model.judge.bias.copy_(torch.eye(3)[number] * 1000)
    return model.eval()


def give_weights(patched: nn.Module, original: nn.Module) -> None:
    """Those of the original; what it lacks are the upsamplers', and nothing else."""
    missing, unexpected = patched.load_state_dict(original.state_dict(), strict=False)
    inside = tuple(f"{path}." for path in upswap.upsamplers(patched))
    assert not unexpected
    assert missing
    assert all(key.startswith(inside) for key in missing)


TRUST = [__name__.partition(".")[0]]


def test_a_head_like_the_one_that_ran_is_swapped() -> None:
    plan = upswap.inspect(heads(0))
    assert invariants.decisions(plan) == {
        "heads.indoor": "feature => graph",
        "heads.indoor.up": "feature => module",
        "heads.outdoor": "feature => graph",
        "heads.outdoor.up": "feature => module",
    }
    site = plan.site("heads.outdoor")
    assert (site.seen_in, site.calls, site.channels) == ("nowhere", 0, 8)
    assert site.notes == ("not run on the example, where the values choose: as heads.indoor, which is like it",)
    assert plan.site("heads.indoor").seen_in == "eval"
    (hint,) = plan.hints
    assert hint.endswith("pass example_inputs that lead there to have their resizes listed: heads.wide")


def test_only_where_the_values_choose() -> None:
    plan = upswap.inspect(heads(0, looks=False))
    assert [site.name for site in plan.sites] == ["heads.indoor", "heads.indoor.up"]
    assert not plan.hints


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_head_computes_what_it_did_and_learns(number: int) -> None:
    original, patched = heads(number), upswap.patch(heads(0))
    give_weights(patched, original)
    for size in ((32, 32), (48, 64)):
        image = torch.randn(2, 3, *size)
        invariants.assert_close([patched(image)], [original(image)], 1e-5)
    patched(torch.randn(1, 3, 32, 32)).square().mean().backward()
    moved = {path for path, m in upswap.upsamplers(patched).items() if any(p.grad is not None for p in m.parameters())}
    name = Heads.names[number]
    assert moved == ({f"heads.{name}.upsample", f"heads.{name}.up"} if number < 2 else set())


# This file is no package that upswap knows; loading below trusts it.
@pytest.mark.filterwarnings("ignore:the file is written, and upswap.load will refuse it without trust")
@pytest.mark.parametrize("form", ["model.pt", "model.safetensors", "model"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_loading_does_not_depend_on_the_branch_a_run_takes(number: int, form: str, tmp_path: Path) -> None:
    patched = upswap.patch(heads(0))
    give_weights(patched, heads(number))
    upswap.save(patched, tmp_path / form)
    given = None if form.endswith(".pt") else heads(number)
    loaded = upswap.load(tmp_path / form, given, trust=TRUST).eval()
    image = torch.randn(1, 3, 32, 48)
    invariants.assert_equal([loaded(image)], [patched(image)])
    assert upswap.plan_of(loaded) == upswap.plan_of(patched)


class Losses(nn.Module):
    """A segmenter whose losses alone run the head beside, and never the one that is left over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.decode_head, self.auxiliary_head, self.left_over = (
            nn.Conv2d(3, 8, 3, 2, 1),
            *map(Head, (8, 9, 9)),
        )

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        return self.decode_head(x) + self.auxiliary_head(x)

    def forward(self, image: torch.Tensor, mode: str = "tensor") -> torch.Tensor:
        result: torch.Tensor = self.loss(image) if mode == "loss" else self.decode_head(self.stem(image))
        return result


def test_a_head_that_other_arguments_run_is_told_and_found_with_them() -> None:
    plan = upswap.inspect(Losses())
    assert [site.name for site in plan.sites] == ["decode_head", "decode_head.up"]
    (hint,) = plan.hints
    assert hint.startswith("arguments choose what runs, and these did not")
    assert hint.endswith("to have their resizes listed: auxiliary_head")
    plan = upswap.inspect(Losses(), ((torch.randn(1, 3, 32, 32),), {"mode": "loss"}))
    assert [site.owner for site in plan.swapped] == [
        f"{name}_head{up}" for name in ("decode", "auxiliary") for up in ("", ".up")
    ]
    assert not plan.hints


class Rope(nn.Module):
    """Asked for what it has, never run; a setting of it has the name of a resize."""

    rescale_coords = 2.0

    def embedding(self, shape: torch.Size) -> torch.Tensor:
        return torch.arange(shape[-1]) * self.rescale_coords

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x.shape)


class LeftOver(Branch):
    """It has a layer that its code never names, and one that it looks up."""

    def __init__(self) -> None:
        super().__init__(1000)
        self.upsample = nn.Upsample(scale_factor=2)
        self.up_wide = nn.Upsample(scale_factor=2)


class LooksUp(LeftOver):
    def forward(self, image: torch.Tensor, which: str = "") -> torch.Tensor:
        result: torch.Tensor = super().forward(image)
        return getattr(self, f"up_{which}")(result) if which else result


def test_a_layer_that_no_code_names_is_no_hint() -> None:
    (hint,) = upswap.inspect(LeftOver()).hints
    assert "line " in hint
    assert "upsample" not in hint
    (hint,) = upswap.inspect(LooksUp()).hints
    assert hint.endswith("listed: upsample; up_wide")


class Positions(Branch):
    def __init__(self) -> None:
        super().__init__(1000)
        self.rope = Rope()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(F.interpolate(self.stem(image), scale_factor=2)) + self.rope.embedding(image.shape)


def test_a_name_that_only_sounds_like_a_resize_is_no_hint() -> None:
    assert not upswap.inspect(Positions()).hints


def test_lines_that_were_not_reached_are_told() -> None:
    low, high = upswap.inspect(Branch(1000)), upswap.inspect(Branch(-1000))
    assert [site.mode for site in (*low.swapped, *high.swapped)] == ["nearest", "bilinear"]
    (hint,) = low.hints
    assert "line " in hint and hint.endswith("of Branch.forward, F.interpolate(x, scale_factor=2, mode='bilinear')")  # noqa: PT018


def test_a_plan_is_carried_out_on_a_model_that_takes_the_other_branch() -> None:
    plan = upswap.inspect(Branch(1000))
    torch.manual_seed(0)
    model = Branch(-1000)
    patched = upswap.patch(copy.deepcopy(model), plan=plan)
    image = torch.randn(1, 3, 32, 32)
    invariants.assert_equal([patched(image)], [model(image)])
    patched.most = model.most = 1000
    invariants.assert_close([patched(image)], [model(image)], 1e-5)
