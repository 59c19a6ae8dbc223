"""Guided upsamplers in models: each gets the feature that its output is fused with, by each way, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import upswap
from upswap import FilterError, OptionError, PlanError, UpswapWarning
from upswap.plan.plan import Plan
from upswap.plan.table import as_text

GUIDED = ("fade", "fade-lite", "sapa-b", "freqfusion")
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """What is done at one level of a decoder."""

    def __init__(self, channels: int = 8, guide: int = 8) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.inside = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sequential(nn.Upsample(scale_factor=2.0)))
        self.lateral = nn.Conv2d(guide, channels, 1)
        self.out = nn.LazyConv2d(8, 3, padding=1)


class Added(Block):
    """The guide is computed after the resize, and the two are added."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        up = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
        return self.out(up + self.lateral(skip))


class AddedInPlace(Block):
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        levels = [self.lateral(skip), x]
        levels[1] = F.interpolate(levels[1], size=skip.shape[-2:])
        levels[1] += levels[0]
        return self.out(levels[1])


class Concatenated(Block):
    """Several maps, resized by one line in a loop, in one concatenation."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        maps = [self.lateral(skip)]
        for level in (x, F.avg_pool2d(x, 2)):
            maps.append(  # noqa: PERF401
                F.interpolate(level, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            )
        return self.out(torch.cat(maps[::-1], dim=1))


class Named(Block):
    """In a branch, as U-Nets have it."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        size = (2 * x.shape[-2], 2 * x.shape[-1]) if skip is None else skip.shape[-2:]
        x = F.interpolate(x, size)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.out(x)


class Helped(Block):
    """In another method, with the guide in a dict."""

    def enlarged(self, x: torch.Tensor, maps: dict[str, Any]) -> torch.Tensor:
        return self.out(F.interpolate(x, scale_factor=2.0, mode="bilinear")) + maps["fine"][1]

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.enlarged(x, {"fine": (0, skip)})


class LayerFusedLater(Block):
    """By a layer, with a guide that is computed later: the layer's call becomes a site of the code that makes it."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.out(torch.cat((x, self.lateral(skip)), dim=1))


class FromAbove(Block):
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat((self.up(x), skip), dim=1))


class FromFurtherAbove(Block):
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.out(self.inside(x) + skip)


class Upper(nn.Module):
    """A resize and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Middle(nn.Module):
    """A module that calls another, and does something before."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = Upper()

    def forward(self, x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        x = x * times
        return self.upper(x).relu()


class Relayed(Block):
    """Handed on by a module that is no `nn.Sequential`, to one whose own code resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = Middle()

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat((self.middle(x, times=0.5), skip), dim=1))


class Sourced(Block):
    """What is fused is computed later: the guide is what it is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = Upper()

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.upper(x)
        return self.out(x + self.lateral(skip))


def enlarged(x: torch.Tensor, size: Any, mode: str = "bilinear") -> torch.Tensor:
    """As mmsegmentation's `resize`."""
    return F.interpolate(x, size, mode=mode)


class ByHelper(Block):
    """Resized by a function, and fused in the code that calls it."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        maps = [self.lateral(skip), x]
        for index in range(1, 0, -1):
            maps[index - 1] = maps[index - 1] + enlarged(maps[index], maps[index - 1].shape[2:])
        return self.out(maps[0])


WAYS = {
    Added: "fusion",
    AddedInPlace: "fusion",
    Concatenated: "fusion",
    LayerFusedLater: "fusion",
    ByHelper: "fusion",
    Named: "local",
    Helped: "local",
    FromAbove: "handed",
    FromFurtherAbove: "handed",
    Relayed: "handed",
    Sourced: "handed",
}


#: One block for each way. What is made of the others is slow.
FIRST = (Concatenated, Named, Relayed)
BLOCK = pytest.mark.parametrize(
    "block", [pytest.param(block, marks=() if block in FIRST else pytest.mark.slow) for block in WAYS]
)
#: Each block with one upsampler, and each upsampler with one block; the rest is slow.
BLOCK_AND_UPSAMPLER = pytest.mark.parametrize(
    ("block", "upsampler"),
    [
        pytest.param(block, upsampler, marks=() if upsampler == "fade" or block is Relayed else pytest.mark.slow)
        for block in WAYS
        for upsampler in GUIDED
    ],
)


class Net(nn.Module):
    """Two levels of features, and one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 3, padding=1)
        self.coarse = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.block = block

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        return self.block(self.coarse(fine).relu(), fine)


def net(block: type[Block]) -> Net:
    torch.manual_seed(0)
    made = Net(block()).eval()
    made(IMAGE)  # for the lazy layer
    return made


def patched(block: type[Block], upsampler: str = "fade", **options: Any) -> tuple[Net, Net]:
    """The model, and a copy with guided upsamplers."""
    original = net(block)
    model = upswap.patch(copy.deepcopy(original), IMAGE, upsampler=upsampler, **options)
    return original, model


def moved(model: nn.Module) -> nn.Module:
    """The model with other values in its upsamplers, so that they do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UpswapWarning)
        yield


# ---- at step 0, and after


@BLOCK_AND_UPSAMPLER
def test_nothing_changes_at_step_0(block: type[Block], upsampler: str) -> None:
    original, model = patched(block, upsampler)
    assert {site.guide and site.guide.way for site in upswap.plan_of(model).swapped} == {WAYS[block]}
    for size in ((2, 3, 32, 32), (1, 3, 48, 36)):
        image = torch.randn(size)
        for training in (False, True):
            results = []
            for each in (original, model):
                each.train(training).zero_grad()
                x = image.clone().requires_grad_()
                with silent():
                    out = each(x)
                out.square().mean().backward()
                results.append([out, x.grad, *(p.grad for n, p in each.named_parameters() if "upsample" not in n)])
            for expected, got in zip(*results, strict=True):
                assert (expected is None and got is None) or torch.equal(expected, got)


@BLOCK_AND_UPSAMPLER
def test_the_gain_learns_at_once_and_the_rest_after_a_step(block: type[Block], upsampler: str) -> None:
    original, model = patched(block, upsampler)
    upsamplers = upswap.upsamplers(model)
    assert len(upsamplers) == (2 if block is Concatenated else 1)
    optimizer = torch.optim.SGD(upswap.parameters(model), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(IMAGE).square().mean().backward()
        for module in upsamplers.values():
            assert module.gain.grad.abs().sum() > 0
            others = [p for n, p in module.named_parameters() if not n.startswith("gain") and p.grad is not None]
            assert any(p.grad.abs().sum() > 0 for p in others if p.grad is not None) == (step == 1)
        optimizer.step()
    assert not torch.equal(original(IMAGE), model(IMAGE))


@BLOCK
def test_the_guide_is_what_it_is_fused_with(block: type[Block]) -> None:
    """The upsampler's own output, and the very guide, by hand."""
    original, model = patched(block)
    moved(model)
    seen: list[Any] = []
    for module in upswap.upsamplers(model).values():
        module.register_forward_hook(lambda m, args, kwargs, out: seen.append((kwargs["guide"], out)), with_kwargs=True)
    with torch.no_grad():
        model(IMAGE)
        fine = original.fine(IMAGE)
        expected = original.block.lateral(fine) if WAYS[block] == "fusion" else fine
    for guide, out in seen:
        assert torch.equal(guide, expected)
        assert out.shape[-2:] == guide.shape[-2:]


# ---- the model stays a model


@BLOCK
def test_copies_pickles_and_the_way_back(block: type[Block]) -> None:
    original, model = patched(block)
    moved(model)
    expected = model(IMAGE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGE), expected)
        assert upswap.plan_of(other) == upswap.plan_of(model)
        assert torch.equal(upswap.unpatch(other)(IMAGE), original(IMAGE))
        assert [type(module) for module in other.modules()] == [type(module) for module in original.modules()]
        assert other.state_dict().keys() == original.state_dict().keys()
    assert isinstance(model.block, block)


@BLOCK
def test_files(block: type[Block], tmp_path: Path) -> None:
    _, model = patched(block)
    moved(model)
    expected = model(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UpswapWarning)  # of a class in this file
        upswap.save(model, tmp_path / "net.pt")
        upswap.save(model, tmp_path / "net.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    trust = [__name__.partition(".")[0]]
    assert torch.equal(upswap.load(tmp_path / "net.pt", trust=trust)(IMAGE), expected)
    assert torch.equal(upswap.load(tmp_path / "net.safetensors", net(block))(IMAGE), expected)
    again = patched(block)[1]
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(IMAGE), expected)


@BLOCK
def test_a_plan_is_carried_out_on_another(block: type[Block]) -> None:
    _, model = patched(block)
    plan = Plan.from_json(upswap.plan_of(model).to_json())
    other = upswap.patch(net(block), plan=plan)
    other.load_state_dict(moved(model).state_dict())
    assert torch.equal(other(IMAGE), model(IMAGE))


@pytest.mark.parametrize(
    "block",
    [
        Concatenated,
        Relayed,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (Added, Named, ByHelper, FromFurtherAbove)),
    ],
)
def test_it_compiles_whole_and_is_exported(block: type[Block]) -> None:
    _, model = patched(block)
    moved(model)
    with torch.no_grad():
        expected = model(IMAGE)
        torch._dynamo.reset()
        whole = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        assert torch.allclose(whole(IMAGE), expected, atol=1e-5)
        with silent():
            exported = torch.export.export(model, (IMAGE,), strict=False)
        assert torch.allclose(exported.module()(IMAGE), expected, atol=1e-5)


@pytest.mark.parametrize("block", [Added, FromAbove, FromFurtherAbove, Named])
def test_a_graph_of_it_has_the_guide(block: type[Block]) -> None:
    _, model = patched(block, "sapa-b")
    moved(model)
    with silent():
        traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(IMAGE), model(IMAGE))


@BLOCK
def test_two_threads(block: type[Block]) -> None:
    _, model = patched(block)
    moved(model)
    images = [torch.randn(1, 3, 32 + 8 * number, 32) for number in range(2)]
    expected = [model(image) for image in images]
    got: list[list[torch.Tensor]] = [[], []]

    def run(number: int) -> None:
        for _ in range(20):
            got[number].append(model(images[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(got[number]) == 20
        assert all(torch.equal(out, expected[number]) for out in got[number])


@pytest.mark.parametrize("reentrant", [False, True])
@BLOCK
def test_a_block_that_is_checkpointed(block: type[Block], reentrant: bool) -> None:
    """All of a block, resize and fusion in it: the same output and gradients."""
    _, model = patched(block)
    moved(model)
    results = []
    for inside in (None, checkpoint):
        model.zero_grad()
        x = IMAGE.clone().requires_grad_()
        fine = model.fine(x)
        coarse = model.coarse(fine).relu()
        out = (
            model.block(coarse, fine)
            if inside is None
            else checkpoint(model.block, coarse, fine, use_reentrant=reentrant)
        )
        out.square().mean().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in model.parameters())])
    for expected, got in zip(*results, strict=True):
        assert (expected is None and got is None) or torch.allclose(expected, got, atol=1e-6)


# ---- where the guide is not the one that was planned


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (None, "its guide is not there"),
        (torch.randn(1, 8, 17, 16), "its guide has the size"),
        (torch.randn(1, 9, 16, 16), r"its guide has to be \(1, 8, h, w\)"),
        (torch.randn(2, 8, 16, 16), r"its guide has to be \(1, 8, h, w\)"),
        (torch.randn(1, 8, 16, 16, dtype=torch.float64), "its guide is torch.float64"),
        (torch.randn(1, 8, 16, 16, device="meta"), "its guide is on meta"),
    ],
)
def test_another_guide_leaves_the_resize_as_it_was(guide: Any, says: str) -> None:
    class Given(Block):
        def forward(self, x: torch.Tensor, skip: torch.Tensor, other: Any = ()) -> torch.Tensor:
            held = skip if other == () else other
            y = self.lateral(F.interpolate(x, scale_factor=2.0))
            return y + held if other == () else y

    x, skip = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 16, 16)

    class Both(Net):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            fine = self.fine(image)
            return self.block(self.coarse(fine), fine)

    original = Both(Given().eval())
    original.block.out = nn.Identity()
    model = moved(upswap.patch(copy.deepcopy(original), IMAGE, upsampler="fade"))
    assert upswap.plan_of(model).swapped[0].guide is not None
    with silent():
        assert not torch.equal(model.block(x, skip), original.block(x, skip))
    with pytest.warns(UpswapWarning, match=f"site block: {says}.*the original ran"):
        out = model.block(x, skip, guide)
    assert torch.equal(out, original.block(x, skip, guide))


def test_a_guide_that_is_the_source_of_what_is_added_is_not_added() -> None:
    _, model = patched(Sourced, "freqfusion")
    (site,) = upswap.plan_of(model).swapped
    assert site.guide is not None
    assert site.guide.source
    assert site.settings["additive"] is False
    assert "with what the fused one is computed from" in site.why


def test_what_is_written_to_before_it_is_fused() -> None:
    class Writes(Block):
        written = False

        def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
            up = F.interpolate(x, scale_factor=2.0)
            if self.written:
                x.zero_()
            return self.out(up + skip)

    original, model = patched(Writes)
    moved(model)
    original.block.written = model.block.written = True
    with torch.no_grad(), pytest.warns(UpswapWarning, match="written to before it was fused; the original ran"):
        assert torch.equal(model(IMAGE), original(IMAGE))


def test_a_result_that_a_hook_replaces_is_told_of() -> None:
    original, model = patched(LayerFusedLater)
    moved(model)
    for each in (original, model):
        each.block.up.register_forward_hook(lambda layer, args, out: out * 2)
    with torch.no_grad(), pytest.warns(UpswapWarning, match="did not come to where it is fused.*the original ran"):
        assert torch.equal(model(IMAGE), original(IMAGE))


@BLOCK
def test_it_cannot_be_scripted(block: type[Block]) -> None:
    """TorchScript gets a text that it refuses, so that the original resize is never scripted in silence."""
    _, model = patched(block)
    for site in upswap.plan_of(model).swapped:
        text = inspect.getsource(type(model.get_submodule(site.owner)).forward.__wrapped__)
        assert "upswap_cannot_script('an upsampler that takes a guide cannot be scripted" in text


def test_a_layer_that_is_called_without_its_guide() -> None:
    """As checkpoints of whole sequences and profilers call what is in them."""
    original, model = patched(FromFurtherAbove)
    moved(model)
    x = torch.randn(1, 8, 16, 16)
    with pytest.warns(UpswapWarning, match="its guide is not there; the original ran"):
        out = checkpoint_sequential(model.block.inside, 2, x, use_reentrant=False)
    assert torch.equal(out, original.block.inside(x))


def test_a_child_that_was_put_in_the_place_of_one_that_takes_a_guide() -> None:
    original, model = patched(FromFurtherAbove)
    moved(model)
    original.block.inside = model.block.inside = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2))
    assert torch.equal(model(IMAGE), original(IMAGE))


# ---- sites without a guide


class Head(Named):
    """One resize with a guide, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(F.interpolate(super().forward(x, skip), scale_factor=2.0, mode="bilinear"))


@pytest.mark.parametrize("unguided", ["dysample", "carafe"])
def test_a_site_without_a_guide_gets_the_unguided_one(unguided: str) -> None:
    original, model = patched(Head, unguided=unguided)
    plan = upswap.plan_of(model)
    assert [(site.upsampler, site.guide is not None) for site in plan.swapped] == [(None, True), (unguided, False)]
    kinds = [type(module).__name__.lower() for module in upswap.upsamplers(model).values()]
    assert kinds == ["fade", unguided]
    assert torch.allclose(model(IMAGE), original(IMAGE), atol=1e-5)
    guided, bare = plan.swapped
    assert "guided by skip (8 channels)" in guided.why
    assert f"{unguided}, without a guide: its result is fused with no feature" in bare.why
    assert all(site.why in as_text(plan.sites, 400) for site in plan.swapped)
    assert Plan.from_json(plan.to_json()) == plan


def test_strict_asks_for_a_guide_everywhere() -> None:
    with pytest.raises(
        OptionError, match="block:1: fade takes a guide, and the site has none: its result is fused with no"
    ):
        patched(Head, strict=True)


def test_what_cannot_be_the_unguided_one() -> None:
    with pytest.raises(OptionError, match="unguided='sapa-b' takes a guide itself"):
        patched(Head, unguided="sapa-b")
    with pytest.raises(OptionError, match="no upsampler named 'nothing'"):
        patched(Head, unguided="nothing")


def test_an_override_for_sites_that_have_no_guide() -> None:
    with pytest.raises(FilterError, match="override 'block:1' is for sites that have no guide"):
        patched(Head, overrides={"block:1": {"gating": False}})
    _, model = patched(Head, overrides={"block:0": {"up_kernel_size": 3}})
    assert next(iter(upswap.upsamplers(model).values())).up_kernel_size == 3


def test_options_fit_the_guide() -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__(guide=8)
            self.wide = nn.Conv2d(8, 12, 1)

        def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
            skip = self.wide(skip)
            return self.out(torch.cat((F.interpolate(x, scale_factor=2.0), skip), dim=1))

    for upsampler, options in (("fade", {"gating": False}), ("freqfusion", {"additive": False})):
        site = upswap.plan_of(patched(Wide, upsampler)[1]).swapped[0]
        assert site.guide is not None
        assert site.guide.channels == 12
        assert options.items() <= site.settings.items()
    with pytest.raises(OptionError, match="the guide has 12 channels, and the map 8"):
        patched(Wide, strict=True)
    assert upswap.plan_of(patched(Added, "freqfusion")[1]).swapped[0].settings["additive"] is True


def test_a_guide_that_cannot_be_brought_to_its_site() -> None:
    """The module above has a forward of its own, which no class can change."""
    original = net(FromAbove)
    block = original.block
    block.forward = lambda x, skip: FromAbove.forward(block, x, skip)
    model = upswap.patch(original, IMAGE, upsampler="fade")
    (site,) = upswap.plan_of(model).swapped
    assert site.guide is None
    assert "its forward was set on the instance" in site.no_guide
    assert site.upsampler == "dysample"


def test_a_class_that_fuses_in_another_way_now() -> None:
    plan = upswap.plan_of(patched(Added)[1])
    site = plan.swapped[0]
    assert site.location is not None
    data = plan.to_dict()
    (changed,) = (entry for entry in data["sites"] if entry["swap"])
    for change, says in (
        ({"expression": "up - self.lateral(skip)"}, "no longer has the call"),
        ({"around": ["if skip"]}, "now stands in no loop or branch"),
    ):
        before = dict(changed["guide"]["fusing"])
        changed["guide"]["fusing"] |= change
        model = net(Added)
        with pytest.raises(PlanError, match=says):
            upswap.patch(model, plan=Plan.from_dict(data))
        assert not upswap.is_patched(model)
        changed["guide"]["fusing"] = before


@pytest.mark.parametrize("name", ["torch", "F", "unknown", "up"])
def test_a_plan_names_a_local_that_is_bound(name: str) -> None:
    data = upswap.plan_of(patched(Named)[1]).to_dict()
    (changed,) = (entry for entry in data["sites"] if entry["swap"])
    changed["guide"]["name"] = name
    with pytest.raises(PlanError, match=f"the name of a guide, {name}, is not bound in every case"):
        upswap.patch(net(Named), plan=Plan.from_dict(data))


# ---- what an upsampler does to its guide


def test_freqfusion_changes_the_guide_where_the_two_are_concatenated() -> None:
    original, model = patched(Concatenated, "freqfusion")
    moved(model)
    first, second = upswap.upsamplers(model).values()
    with torch.no_grad():
        fine = original.fine(IMAGE)
        x, guide = original.coarse(fine).relu(), original.block.lateral(fine)
        # In the order of the resizes, each with the guide as the one before left it.
        guide, up = first(x, guide.shape[-2:], guide=guide, both=True)
        guide, further = second(F.avg_pool2d(x, 2), guide.shape[-2:], guide=guide, both=True)
        expected = original.block.out(torch.cat([further, up, guide], dim=1))
        assert torch.allclose(model(IMAGE), expected, atol=1e-6)
    model(IMAGE).sum().backward()
    assert all(module.gain_hp.grad.abs().sum() > 0 for module in (first, second))


@pytest.mark.parametrize("block", [Added, FromFurtherAbove])
def test_freqfusion_adds_to_the_map_what_an_added_guide_gains(block: type[Block]) -> None:
    _, model = patched(block, "freqfusion")
    moved(model)(IMAGE).sum().backward()
    (module,) = upswap.upsamplers(model).values()
    assert module.additive
    assert module.gain_hp.grad.abs().sum() > 0


def test_freqfusion_has_no_gain_that_no_gradient_reaches() -> None:
    """The host concatenates where the guide cannot be changed. DistributedDataParallel refuses what no gradient reaches."""
    _, model = patched(Named, "freqfusion")
    assert [site.guide is not None and site.guide.way for site in upswap.plan_of(model).swapped] == ["local"]
    moved(model)(IMAGE).sum().backward()
    (module,) = upswap.upsamplers(model).values()
    assert module.gain_hp is None
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in module.named_parameters() if name.endswith("weight")
    )
    assert all(parameter.grad is not None for parameter in module.parameters())
    with pytest.raises(OptionError, match="made with sharpen=False"):
        module.both(torch.randn(1, 8, 4, 4), torch.randn(1, 8, 8, 8))


@pytest.mark.parametrize("upsampler", ["fade", "freqfusion"])
@BLOCK
def test_disabled_for_a_while(block: type[Block], upsampler: str) -> None:
    original, model = patched(block, upsampler)
    moved(model)
    expected = model(IMAGE)
    with upswap.disabled(model):
        assert torch.equal(model(IMAGE), original(IMAGE))
    assert torch.equal(model(IMAGE), expected)


def test_under_autocast_the_guide_may_have_another_type() -> None:
    class Normed(Block):
        def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
            up = F.interpolate(x.float(), scale_factor=2.0)
            return self.out(up + self.lateral(skip))

    original, model = patched(Normed)
    with torch.autocast("cpu", torch.bfloat16), silent():
        assert torch.equal(model(IMAGE), original(IMAGE))
        assert not torch.equal(moved(model)(IMAGE), original(IMAGE))
