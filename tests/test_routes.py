"""The routes on the idioms that break naive rewriting, each a model of a few lines, checked like any other model."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import interpolate as resize_as_imported

import checks
import upswap


class Base(nn.Module):
    """Convolutions at two sizes; `fuse` joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Conv2d(3, 8, 3, padding=1)
        self.low = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 2, 1)


class Straight(Base):
    def forward(self, image):
        high = self.high(image)
        low = self.low(high)
        return self.last(high + F.interpolate(low, size=high.shape[-2:], mode="bilinear", align_corners=True))


class Keyword(Base):
    def forward(self, image):
        high = self.high(image)
        low = self.low(high)
        height, width = high.shape[2:]
        return self.last(high + F.interpolate(input=low, mode="bilinear", size=[height, width]))


class Branch(Base):
    def forward(self, image, skip=True):
        high = self.high(image)
        x = F.interpolate(self.low(high), scale_factor=2)
        if skip:
            x = x + high
        return self.last(x)


class Training(Base):
    def forward(self, image):
        high = self.high(image)
        x = F.interpolate(self.low(high), scale_factor=2)
        x = F.dropout(x, 0.5, self.training)
        return self.last(x)


class Loop(Base):
    """One line, four ratios: 4, 2, 1 and 0.5."""

    def forward(self, image):
        x = self.high(image)
        maps = [
            F.max_pool2d(x, 4),
            F.max_pool2d(x, 2),
            x,
            F.interpolate(image, scale_factor=2)[:, :1].repeat(1, 8, 1, 1),
        ]
        maps[3] = self.high(F.interpolate(image, scale_factor=2.0))
        total = 0
        for m in maps:
            total = total + F.interpolate(m, size=x.shape[-2:], mode="bilinear")
        return self.last(total)


class Comprehension(Base):
    def forward(self, image):
        x = self.high(image)
        maps = [F.interpolate(m, size=x.shape[-2:], mode="nearest") for m in (F.max_pool2d(x, 4), F.max_pool2d(x, 2))]
        return self.last(sum(maps))


class Filtered(Base):
    def forward(self, image):
        x = self.high(image)
        maps = [F.max_pool2d(x, 4), F.max_pool2d(x, 2), x]
        maps = [F.interpolate(m, size=x.shape[-2:], mode="nearest") for m in maps if m.shape != x.shape]
        return self.last(sum(maps))


class Alias(Base):
    def forward(self, image):
        up = F.interpolate
        return self.last(up(self.low(self.high(image)), scale_factor=2)) + self.last(
            resize_as_imported(self.low(self.high(image)), None, 2.0, "nearest")
        )


class Method(Base):
    def up(self, x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bicubic", align_corners=False)

    def forward(self, image):
        high = self.high(image)
        return self.last(self.up(self.low(high), high))


class Private(Base):
    """Private names and `super()` need the class around the function."""

    def __init__(self):
        super().__init__()
        self.__factor = 2

    def __twice(self, x):
        return x * self.__factor

    def extra_repr(self):
        return super().extra_repr() + "private"

    def forward(self, image):
        super().extra_repr()
        if image.shape[0] > 100:
            return image
        return self.last(self.__twice(F.interpolate(self.low(self.high(image)), scale_factor=self.__factor)))


def make_closure():
    offset = 0.5

    class Closure(Base):
        def forward(self, image, *, flip: bool = False):
            """With a docstring."""
            x = F.interpolate(self.low(self.high(image)), scale_factor=(2.0, 2.0))
            return self.last(x.flip(-1) if flip else x + offset)

    return Closure


Closure = make_closure()


class Lists(Base):
    def forward(self, image):
        x = self.high(image)
        return self.fuse([x, self.low(x)])

    def fuse(self, features):
        features[1] = F.interpolate(features[1], size=features[0].shape[-2:])
        return self.last(features[0] + features[1])


class Odd(Base):
    """Ratios that only the size decides."""

    def forward(self, image):
        x = self.high(image)
        return self.last(F.interpolate(x, size=(x.shape[2] * 3 // 2 + 1, x.shape[3] * 2 + 1), mode="bilinear"))


class Recompute(Base):
    def forward(self, image):
        x = self.high(image)
        return self.last(F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True))


class NotRecompute(Base):
    def forward(self, image):
        return self.last(F.interpolate(self.high(image), scale_factor=(1.7, 2.3), mode="bilinear"))


class TwoCalls(Base):
    """The same block at two places: one upsampler for both."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, image):
        x = self.high(image)
        return self.last(self.block(self.block(F.max_pool2d(x, 4))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Buffered(Base):
    """The owner reads a buffer and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 8, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(1, 8, 1, 1))

    def forward(self, image):
        x = self.low(self.high(image))
        return self.last(F.interpolate(x, scale_factor=2) * self.weight + self.shift)


class Layer(Base):
    def __init__(self):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.nested = nn.Sequential(nn.Conv2d(8, 8, 1), nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(8, 8, 1))

    def forward(self, image):
        return self.last(self.nested(self.up(F.max_pool2d(self.high(image), 4))))


class Checkpointed(Base):
    def forward(self, image):
        return self.last(torch.utils.checkpoint.checkpoint(self.segment, self.high(image), use_reentrant=False))

    def segment(self, x):
        return F.interpolate(self.low(x), scale_factor=2)


#: Each model, the names of its swapped sites and their routes.
MODELS = {
    Straight: {"root": "graph"},
    Keyword: {"root": "graph"},
    Branch: {"root": "source"},
    Training: {"root": "source"},
    Loop: {"root:2": "source", "root:3": "source"},
    Comprehension: {"root:0": "graph", "root:1": "graph"},
    Filtered: {"root:0": "source", "root:1": "source"},
    Alias: {"root:0": "graph", "root:1": "graph"},
    Method: {"root": "source"},
    Private: {"root": "source"},
    Closure: {"root": "source"},
    Lists: {"root": "source"},
    Odd: {"root": "graph"},
    Recompute: {"root": "source"},
    NotRecompute: {"root": "graph"},
    TwoCalls: {"block": "graph"},
    Buffered: {"root": "graph"},
    Layer: {"up": "module", "nested.1": "module"},
    Checkpointed: {"root": "source"},
}


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_idiom(cls: type[nn.Module]) -> None:
    original = build(cls)
    patched = copy.deepcopy(original)
    assert upswap.patch(patched) is patched
    assert isinstance(patched, cls)
    assert {site.name: site.route for site in upswap.plan_of(patched).swapped} == MODELS[cls]
    images = [torch.randn(1, 3, 16, 24), torch.randn(3, 3, 32, 32), torch.randn(2, 3, 20, 12)]
    checks.check_step_0(original, patched, images)
    checks.check_keys(original, patched)
    checks.check_training(original, patched, images[1])
    checks.check_learning(patched, images[1])
    checks.check_unpatch(original, patched, images[0])
    checks.check_repatch(patched)


@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls is not Closure], ids=lambda cls: cls.__name__)
def test_copies_and_pickles_are_patched_too(cls: type[nn.Module]) -> None:
    patched = upswap.patch(build(cls))
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        for parameter in upswap.parameters(patched):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = patched(x)
        assert not torch.allclose(expected, build(cls)(x), atol=1e-3), "the upsamplers are not in use"
        for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
            assert torch.equal(again(x), expected)
            assert upswap.plan_of(again) == upswap.plan_of(patched)
            assert type(upswap.unpatch(again)) is cls


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_a_plan_is_replayed_without_a_probe(cls: type[nn.Module]) -> None:
    plan = upswap.Plan.from_json(upswap.inspect(build(cls)).to_json())
    patched = upswap.patch(build(cls), plan=plan)
    assert upswap.plan_of(patched) == plan
    checks.check_step_0(build(cls), patched, [torch.randn(2, 3, 16, 24)])


@pytest.mark.parametrize("cls", [Straight, Branch, Loop, Layer, Method], ids=lambda cls: cls.__name__)
def test_compiles_whole(cls: type[nn.Module]) -> None:
    torch._dynamo.reset()
    original = build(cls)
    patched = upswap.patch(copy.deepcopy(original))
    compiled = torch.compile(patched, fullgraph=True, backend="eager", dynamic=True)
    for side in (16, 24):
        x = torch.randn(2, 3, side, side)
        checks.assert_close([compiled(x)], [original(x)], 1e-5)


@pytest.mark.parametrize("cls", [Straight, Branch, Loop, Layer], ids=lambda cls: cls.__name__)
def test_hooks_children_and_attributes_stay(cls: type[nn.Module]) -> None:
    model = build(cls)
    model.note = {"kept": True}
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    children = dict(model.named_modules())
    upswap.patch(model)
    model(torch.randn(1, 3, 16, 16))
    assert len(seen) == 1 + 2, "two probes and one call"
    assert model.note == {"kept": True}
    assert type(model).__name__ == cls.__name__
    kept = {path: m for path, m in children.items() if not isinstance(m, nn.Upsample)}
    assert all(model.get_submodule(path) is m for path, m in kept.items())


def test_arguments_decide_at_run_time() -> None:
    original = build(Branch)
    patched = upswap.patch(copy.deepcopy(original))
    x = torch.randn(1, 3, 16, 16)
    for skip in (True, False):
        checks.assert_close([patched(x, skip=skip)], [original(x, skip)], 1e-5)
    original, patched = build(Closure), upswap.patch(build(Closure))
    for flip in (True, False):
        checks.assert_close([patched(x, flip=flip)], [original(x, flip=flip)], 1e-5)
    assert patched.forward.__doc__ == "With a docstring."


def test_foreign_attributes_and_hooks_of_a_replaced_layer_are_carried_over() -> None:
    model = build(Layer)
    model.up.f, model.up.i, model.up.type = -1, 7, "Upsample"
    seen = []
    model.up.register_forward_hook(lambda *_: seen.append(1))
    upswap.patch(model)
    assert isinstance(model.up, upswap.DySample)
    assert (model.up.f, model.up.i, model.up.type) == (-1, 7, "Upsample")
    seen.clear()
    model(torch.randn(1, 3, 16, 16))
    assert seen == [1]


def test_another_mode_or_other_channels_at_run_time_is_an_error_that_names_the_site() -> None:
    class Moody(Base):
        mode = "nearest"

        def forward(self, image, again=False):
            x = self.low(self.high(image))
            if again:
                x = torch.cat([x, x], 1)
            return F.interpolate(x, scale_factor=2, mode=self.mode) * self.last.weight.sum() @ torch.ones(1)

    class Fine(Moody):
        def forward(self, image, again=False):
            x = self.low(self.high(image))
            if again:
                x = torch.cat([x, x], 1)
            return self.last(F.interpolate(x, scale_factor=2, mode=self.mode)[:, :8])

    model = upswap.patch(build(Fine))
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(upswap.ShapeError, match=r"site root.*\(N, 8, H, W\).*\(1, 16, 8, 8\)"):
        model(x, again=True)
    model.mode = "bilinear"
    with pytest.raises(upswap.ShapeError, match=r"site root.*mode='nearest'.*mode='bilinear'"):
        model(x)


def test_a_size_below_the_input_runs_the_original_resize() -> None:
    class To(Base):
        def forward(self, image, size=(32, 32)):
            return self.last(F.interpolate(self.high(image), size=size, mode="bilinear"))

    original = build(To)
    patched = upswap.patch(copy.deepcopy(original), torch.randn(1, 3, 16, 16))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for parameter in upswap.parameters(patched):
            parameter.normal_()
    assert torch.equal(patched(x, (7, 9)), original(x, (7, 9)))
    assert not torch.allclose(patched(x), original(x), atol=1e-2)


def test_more_runs_of_a_line_than_the_plan_knows_run_the_original() -> None:
    class Many(Base):
        def forward(self, image, n=2):
            x = self.high(image)
            return self.last(sum(F.interpolate(F.max_pool2d(x, 2), scale_factor=2) for _ in range(n)))

    original = build(Many)
    patched = upswap.patch(copy.deepcopy(original))
    assert len(upswap.upsamplers(patched)) == 2
    x = torch.randn(1, 3, 16, 16)
    for n in (1, 2, 5):
        checks.assert_close([patched(x, n)], [original(x, n)], 1e-5)


class Helper(Base):
    def forward(self, image):
        return self.last(helper(self.low(self.high(image))))


def helper(x):
    return F.interpolate(x, scale_factor=2)


class Inherited(Straight):
    def forward(self, image):
        return super().forward(image) + 1


class Runs(nn.Sequential):
    """A container that runs its children: an upsampler put into it would be run too."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return F.interpolate(x, scale_factor=2.0)


class Decorated(Base):
    @torch.autocast("cpu", enabled=False)
    def forward(self, image):
        return self.last(F.interpolate(self.low(self.high(image)), scale_factor=2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Helper, "helper"),
        (Inherited, "super"),
        (lambda: nn.Sequential(Runs(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 2, 1)), "runs whatever is put into it"),
        (Decorated, "decorated"),
    ],
)
def test_what_no_route_can_take_is_kept_with_its_reason(model, reason: str) -> None:
    model = build(model)
    before = list(model.state_dict())
    (site,) = upswap.inspect(model).sites
    assert (site.kind, site.swap) == ("feature", False)
    assert reason in site.reason
    with pytest.raises(upswap.NothingToSwapError, match=reason):
        upswap.patch(model)
    with pytest.raises(upswap.RewriteError, match=reason):
        upswap.patch(model, strict=True)
    assert list(model.state_dict()) == before


def test_an_attribute_named_upsample_is_not_overwritten() -> None:
    class Named(Straight):
        upsample = True

    model = upswap.patch(build(Named))
    assert model.upsample is True
    assert list(upswap.upsamplers(model)) == ["upsample_0"]


@pytest.mark.parametrize("cls", [Straight, Branch])
@pytest.mark.parametrize("name", ['x"); __import__("os").system("true") #', "a.b", "", "__class__", "for"])
def test_a_plan_cannot_smuggle_code_in_a_name(cls: type[nn.Module], name: str) -> None:
    plan = upswap.inspect(build(cls))
    hostile = plan.replace_sites(dataclasses.replace(site, module=name) for site in plan.sites)
    model = build(cls)
    with pytest.raises(upswap.PlanError, match="cannot be the name of a module"):
        upswap.patch(model, plan=hostile)
    assert type(model) is cls
    assert "_upswap_plan" not in model.__dict__


class Setting(Base):
    """A graph fixes the mode that it read from an attribute."""

    mode = "nearest"

    def forward(self, image):
        high = self.high(image)
        return self.last(high + F.interpolate(self.low(high), size=high.shape[2:], mode=self.mode))


class ChildSetting(Base):
    def forward(self, image):
        x = F.interpolate(self.low(self.high(image)), scale_factor=self.low.stride[0])
        return self.last(x)


def test_a_setting_that_was_changed_after_the_patch_is_an_error() -> None:
    model = build(Setting)
    model.mode = "bilinear"
    upswap.patch(model)
    assert upswap.plan_of(model).sites[0].route == "graph"
    x = torch.randn(1, 3, 16, 16)
    model(x)
    for again in (model, copy.deepcopy(model)):
        again.mode = "nearest"
        with pytest.raises(upswap.RewriteError, match=r"Setting\.mode was 'bilinear'.*is 'nearest' now"):
            again(x)
    assert upswap.unpatch(model)(x).shape == (1, 2, 16, 16)
    assert upswap.inspect(build(ChildSetting)).sites[0].route == "source"
