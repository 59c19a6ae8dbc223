"""The routes on the idioms that break naive rewriting, each a model of a few lines, checked like any other model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import interpolate as resize_as_imported

import invariants
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
    Comprehension: {"root:0": "source", "root:1": "source"},
    Filtered: {"root": "source"},  # which of the maps is resized at which run may change with the shapes
    Alias: {"root:0": "source", "root:1": "source"},
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
    invariants.check_step_0(original, patched, images)
    invariants.check_keys(original, patched)
    invariants.check_training(original, patched, images[1])
    invariants.check_learning(patched, images[1])
    invariants.check_repatch(patched)
    invariants.check_unpatch(original, patched, images[0])


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
    invariants.check_step_0(build(cls), patched, [torch.randn(2, 3, 16, 24)])


@pytest.mark.parametrize("cls", [Straight, Branch, Loop, Layer, Method], ids=lambda cls: cls.__name__)
def test_compiles_whole(cls: type[nn.Module]) -> None:
    torch._dynamo.reset()
    original = build(cls)
    patched = upswap.patch(copy.deepcopy(original))
    compiled = torch.compile(patched, fullgraph=True, backend="eager", dynamic=True)
    for side in (16, 24):
        x = torch.randn(2, 3, side, side)
        invariants.assert_close([compiled(x)], [original(x)], 1e-5)


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
        invariants.assert_close([patched(x, skip=skip)], [original(x, skip)], 1e-5)
    original, patched = build(Closure), upswap.patch(build(Closure))
    for flip in (True, False):
        invariants.assert_close([patched(x, flip=flip)], [original(x, flip=flip)], 1e-5)
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


def test_another_mode_or_other_channels_at_run_time_run_the_original_and_say_so() -> None:
    class Moody(Base):
        mode = "nearest"

        def forward(self, image, again=False):
            x = self.low(self.high(image))
            if again:
                x = torch.cat([x, x], 1)
            return self.last(F.interpolate(x, scale_factor=2, mode=self.mode)[:, :8])

    original, model = build(Moody), upswap.patch(build(Moody))
    x = torch.randn(1, 3, 16, 16)
    with pytest.warns(upswap.UpswapWarning, match=r"site root.*\(N, 8, H, W\).*\(1, 16, 8, 8\).*the original ran"):
        assert torch.equal(model(x, again=True), original(x, again=True))
    original.mode = model.mode = "bilinear"
    with pytest.warns(upswap.UpswapWarning, match=r"site root.*mode='nearest'.*mode='bilinear'.*the original ran"):
        assert torch.equal(model(x), original(x))


def test_a_size_below_the_input_runs_the_original_resize() -> None:
    class To(Base):
        def forward(self, image, size=None):
            size = size or [2 * side for side in image.shape[2:]]
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
        invariants.assert_close([patched(x, n)], [original(x, n)], 1e-5)


def helper(x):
    return F.interpolate(x, scale_factor=2)


class Handed(Base):
    """A function that Python's own functions call."""

    def forward(self, image):
        return self.last(next(map(helper, [self.low(self.high(image))])))


class NoSource(Base):
    def __init__(self):
        super().__init__()
        self.up = eval("lambda x: F.interpolate(x, scale_factor=2)", globals())

    def forward(self, image):
        return self.last(self.up(self.low(self.high(image))))


class Hidden(Base):
    """A module in a plain list, which no state dict knows."""

    def __init__(self):
        super().__init__()
        self.hidden = [Plain()]

    def forward(self, image):
        return self.last(self.hidden[0](self.low(self.high(image))))


class Plain(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Property(Base):
    @property
    def larger(self):
        return F.interpolate(self.deep, scale_factor=2)

    def forward(self, image):
        self.deep = self.low(self.high(image))
        return self.last(self.larger)


class Runs(nn.Sequential):
    """A container that runs its children: an upsampler put into it would be run too."""

    def forward(self, x):
        return F.interpolate(super().forward(x), scale_factor=2)


class RunsFirst(Runs):
    def forward(self, x):
        *rest, last = self
        return last(F.interpolate(rest[0](x), scale_factor=2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Handed, "not called in a way that can be rewritten"),
        (NoSource, "source of NoSource.__init__.<locals>.<lambda>|source of <lambda>"),
        (Hidden, "no method of a module of the model"),
        (Property, "something else than a call"),
        (lambda: RunsFirst(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), "runs whatever is put into it"),
    ],
)
def test_what_no_route_can_take_is_kept_with_its_reason(model, reason: str) -> None:
    model = build(model)
    before = list(model.state_dict())
    (site,) = upswap.inspect(model).sites
    assert (site.kind, site.swap) == ("feature", False)
    assert re.search(reason, site.reason)
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
    with pytest.raises(upswap.PlanError, match=r"cannot be the name of a module|not in its owner"):
        upswap.patch(model, plan=hostile)
    assert type(model) is cls
    assert "_upswap_plan" not in model.__dict__


class Setting(Base):
    mode = "bilinear"

    def forward(self, image):
        high = self.high(image)
        return self.last(high + F.interpolate(self.low(high), size=high.shape[2:], mode=self.mode))


class NoneCompared(Base):
    def pick(self, x, plain):
        return self.last(x) if plain else self.last(-x)

    def forward(self, image, skip=None):
        return self.pick(F.interpolate(self.low(self.high(image)), scale_factor=2), skip is not None)


class GradDecides(Base):
    def forward(self, image):
        return self.last(F.interpolate(self.low(self.high(image)), scale_factor=2)) * float(torch.is_grad_enabled())


class DropoutByName(Base):
    def forward(self, image):
        x = F.interpolate(self.low(self.high(image)), scale_factor=2)
        return self.last(F.dropout(x, 0.5, getattr(self, "training")))  # noqa: B009


class HelperDecides(Base):
    def run(self, x):
        if self.training:
            return self.last(x)
        return self.last(-x)

    def forward(self, image):
        return self.run(F.interpolate(self.low(self.high(image)), scale_factor=2))


class HelperFreezes(Base):
    @torch.no_grad()
    def encode(self, image):
        return self.low(self.high(image))

    def forward(self, image):
        return self.last(F.interpolate(self.encode(image), scale_factor=2))


GAIN = {"gain": 1.0}


class Global(Base):
    def forward(self, image):
        return self.last(F.interpolate(self.low(self.high(image)), scale_factor=2)) * GAIN["gain"]


class PrivateSetting(Base):
    def __init__(self):
        super().__init__()
        self.__k = 0.5

    def forward(self, image):
        return self.last(F.interpolate(self.low(self.high(image)), scale_factor=2)) * self.__k


class Growing(Base):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList([nn.Conv2d(8, 8, 1)])

    def forward(self, image):
        x = F.interpolate(self.low(self.high(image)), scale_factor=2)
        for module in self.more:
            x = module(x)
        return self.last(x)


class Random(Base):
    def forward(self, image):
        x = F.interpolate(self.low(self.high(image)), scale_factor=2)
        return self.last(x + torch.rand(1))


class MethodTwice(Base):
    """The method of a feature pyramid: one expression, called for every level."""

    def up(self, x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="nearest") + like

    def forward(self, image):
        high = self.high(image)
        middle = self.low(high)
        deep = self.low(middle)
        return self.last(self.up(self.up(deep, middle), high))


class Partial(Base):
    def forward(self, image, on=True):
        high = self.high(image)
        up = functools.partial(F.interpolate, size=high.shape[-2:], mode="bilinear")
        return self.last(up(self.low(high))) if on else high


class OldNames(Base):
    def forward(self, image, on=True):
        x = self.low(self.high(image))
        return self.last(F.upsample_bilinear(x, scale_factor=2)) if on else x


@pytest.mark.parametrize(
    "cls",
    [
        Setting,
        NoneCompared,
        GradDecides,
        DropoutByName,
        HelperDecides,
        HelperFreezes,
        Global,
        PrivateSetting,
        Growing,
        Random,
        MethodTwice,
        Partial,
        OldNames,
    ],
    ids=lambda cls: cls.__name__,
)
@pytest.mark.filterwarnings("ignore:`nn.functional.upsample")
def test_what_a_trace_would_fix_goes_to_source(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    original = build(cls)
    patched = upswap.patch(copy.deepcopy(original))
    assert {site.route for site in upswap.plan_of(patched).swapped} == {"source"}
    for training in (False, True):
        original.train(training)
        patched.train(training)
        for image in (torch.randn(1, 3, 16, 24), torch.randn(2, 3, 32, 32)):
            for context in (torch.no_grad(), torch.enable_grad()):
                with context:
                    torch.manual_seed(0)
                    expected = original(image)
                    torch.manual_seed(0)
                    got = patched(image)
                assert (got - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3)
                assert got.requires_grad == expected.requires_grad
    invariants.check_learning(patched, torch.randn(2, 3, 16, 24))
    if cls is Global:
        monkeypatch.setitem(GAIN, "gain", 3.0)
        invariants.assert_close([patched(image)], [original(image)], 1e-5)
    if cls is Growing:
        extra = nn.Conv2d(8, 8, 1)
        original.more.append(extra)
        patched.more.append(extra)
        invariants.assert_close([patched(image)], [original(image)], 1e-5)
    if cls is HelperFreezes:
        patched.zero_grad()
        patched(image).sum().backward()
        assert patched.low.weight.grad is None
    if cls is Setting:
        patched.mode = original.mode = "nearest"
        with pytest.warns(upswap.UpswapWarning, match=r"site root.*mode='bilinear'.*mode='nearest'"):
            assert torch.equal(patched(image), original(image))


def test_calls_that_one_upsampler_cannot_stand_for_are_kept() -> None:
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x, mode):
            return self.conv(F.interpolate(x, scale_factor=2, mode=mode))

    class Two(Base):
        def __init__(self):
            super().__init__()
            self.block = Modes()

        def forward(self, image):
            x = self.block(F.max_pool2d(self.high(image), 4), "nearest")
            return self.last(self.block(x, "bilinear"))

    (site,) = upswap.inspect(build(Two)).sites
    assert not site.swap
    assert "several modes" in site.reason


def test_antialias_is_kept() -> None:
    class Antialias(Base):
        def forward(self, image):
            x = self.high(image)
            return self.last(F.interpolate(x, scale_factor=2, mode="bilinear", antialias=True))

    (site,) = upswap.inspect(build(Antialias)).sites
    assert (site.kind, site.swap) == ("other", False)


def test_a_forward_set_on_the_instance_is_kept() -> None:
    model = build(Straight)
    inner = model.forward
    model.forward = lambda *args: inner(*args)
    (site,) = upswap.inspect(model).sites
    assert not site.swap
    assert "set on the instance" in site.reason


def test_a_register_of_subclasses_does_not_hear_of_the_rewriting() -> None:
    heard = []

    class Registered(Straight):
        def __init_subclass__(cls, *, required: int) -> None:
            heard.append(cls)

    model = upswap.patch(build(Registered))
    assert heard == []
    assert isinstance(model, Registered)
    assert issubclass(type(model), Registered)
    assert type(upswap.unpatch(model)) is Registered


def test_a_model_with_a_patched_part_is_refused_until_that_is_undone() -> None:
    class Outer(Base):
        def __init__(self):
            super().__init__()
            self.inner = Straight()

        def forward(self, image):
            return self.inner(image) + self.last(F.interpolate(self.low(self.high(image)), scale_factor=2))

    model = build(Outer)
    upswap.patch(model.inner)
    with pytest.raises(upswap.OptionError, match="submodule inner is patched already"):
        upswap.patch(model)
    upswap.unpatch(model.inner)
    assert list(upswap.upsamplers(upswap.patch(model))) == ["inner.upsample", "upsample"]


def test_an_upsampler_of_ones_own_is_not_looked_into() -> None:
    class Own(Base):
        def __init__(self):
            super().__init__()
            self.mine = upswap.DySample(8, 2)

        def forward(self, image):
            high = self.high(image)
            x = self.mine(self.low(high), size=(high.shape[2] + 1, high.shape[3] + 1))
            return self.last(F.interpolate(x, scale_factor=2))

    assert [site.name for site in upswap.inspect(build(Own)).sites] == ["root"]


def test_unpatch_of_a_class_that_was_changed_since_says_so_and_changes_nothing() -> None:
    model = upswap.patch(build(Buffered))
    torch.nn.utils.parametrize.register_parametrization(model, "weight", nn.Softplus())
    with pytest.raises(upswap.PlanError, match="was changed after the patch"):
        upswap.unpatch(model)
    assert list(upswap.upsamplers(model)) == ["upsample"]
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch.nn.utils.parametrize.remove_parametrizations(model, "weight")
    assert type(upswap.unpatch(model)) is Buffered


def test_hooks_with_keywords_of_a_replaced_layer_are_carried_over() -> None:
    model = build(Layer)
    seen = []
    model.up.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    upswap.patch(model)
    seen.clear()
    model(torch.randn(1, 3, 16, 16))
    assert seen == [{}]
    assert model.up.scale_factor == 2


def test_a_class_with_a_memory_layout_of_its_own_is_an_error_and_the_model_is_as_it_was() -> None:
    class Slots(Straight):
        __slots__ = ("extra",)

    model = build(Slots)
    with pytest.raises(upswap.RewriteError, match=r"memory layout of its own.*exclude root"):
        upswap.patch(model)
    assert type(model) is Slots
    assert list(model.state_dict()) == list(build(Slots).state_dict())
