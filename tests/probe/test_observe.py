"""What each resize call is for, on models of a few lines, one for each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upswap
from upswap.errors import InputError
from upswap.probe.inputs.infer import candidates
from upswap.probe.observe import first_that_runs, needs_fake, observe
from upswap.probe.survey import survey


class Net(nn.Module):
    """A convolution before and after what is tested."""

    def __init__(self, body: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)
        self.position = nn.Parameter(torch.zeros(1, 4, 5, 5))
        self.scale = nn.Parameter(torch.ones(1))
        self.gain = nn.Parameter(torch.ones(3))
        self.body = body

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(self, image, self.first(image))


def double(x: torch.Tensor, mode: str = "nearest") -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 2)


def written(x: torch.Tensor) -> torch.Tensor:
    batch = x.new_zeros(x.shape)
    for image, place in zip(x, batch, strict=True):
        place[:, : x.shape[2]].copy_(image)
    return batch


def compared(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + net.last((x > 0).float().repeat(1, 2, 1, 1))


@torch.no_grad()
def without_gradients(x: torch.Tensor) -> torch.Tensor:
    return double(x).mean((2, 3), keepdim=True) + double(x)[..., ::2, ::2].sum(1, keepdim=True)


BODIES: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "feature": ("feature", lambda net, image, x: net.last(double(x))),
    "feature through views and arithmetic": ("feature", lambda net, image, x: net.last(double(x).relu() + 1)),
    "feature before a matmul": ("feature", lambda net, image, x: double(x).flatten(2) @ double(x).flatten(2).mT),
    "feature that is gated later": ("feature", lambda net, image, x: net.last(torch.relu(double(x)) * 2)),
    "logits": ("logits", lambda net, image, x: double(net.last(x)).sigmoid()),
    "logits rescaled by value": ("logits", lambda net, image, x: double(net.last(x)) * net.scale + 1),
    "image": ("image", lambda net, image, x: net.last(x) + net.last(net.first(double(image) / 255))[..., ::2, ::2]),
    "parameter": ("parameter", lambda net, image, x: net.last(x + F.interpolate(net.position, size=x.shape[-2:]))),
    "context of one point": (
        "context",
        lambda net, image, x: net.last(F.interpolate(x.mean((2, 3), keepdim=True), size=x.shape[-2:])),
    ),
    "context of a pooled grid": (
        "context",
        lambda net, image, x: net.last(F.interpolate(F.adaptive_avg_pool2d(x, 3), size=x.shape[-2:])),
    ),
    "mask that is integer": (
        "mask",
        lambda net, image, x: net.last(x) * F.interpolate((x > 0).float(), size=x.shape[-2:])[:, :1],
    ),
    "mask that is compared": ("mask", lambda net, image, x: net.last(x) * (double(halve(x)) > 0)[:, :1]),
    "gate": ("gate", lambda net, image, x: net.last(x * double(halve(x)))),
    "gate by sigmoid": ("gate", lambda net, image, x: net.last(x * double(halve(x)).sigmoid())),
    "identity": ("identity", lambda net, image, x: net.last(F.interpolate(x, size=x.shape[-2:]))),
    "downsample": ("downsample", lambda net, image, x: net.last(F.interpolate(x, scale_factor=0.5))),
    "sequence": ("sequence", lambda net, image, x: F.interpolate(x.flatten(2), scale_factor=2) * net.scale),
    "volume": ("volume", lambda net, image, x: net.last(F.interpolate(x[:, :, None], scale_factor=(1, 2, 2))[:, :, 0])),
    "gate that is made smaller": (
        "gate",
        lambda net, image, x: net.last(halve(x) * F.interpolate(x, scale_factor=0.5)),
    ),
    "feature written into a view": ("feature", lambda net, image, x: net.last(double(written(x)))),
    "logits with a comparison after them": (
        "logits",
        lambda net, image, x: compared(net, double(net.last(x))),
    ),
    "image after a norm": (
        "image",
        lambda net, image, x: net.first(double(F.batch_norm(image, torch.zeros(3), torch.ones(3), net.gain, net.gain))),
    ),
    "post-processing": ("other", lambda net, image, x: net.last(x + without_gradients(x))),
    "checkpointed": (
        "feature",
        lambda net, image, x: net.last(torch.utils.checkpoint.checkpoint(double, x, use_reentrant=True)),
    ),
    "parameter of three dimensions": (
        "parameter",
        lambda net, image, x: net.last(x) + F.interpolate(net.position.flatten(2), size=9).mean(),
    ),
    "unused": ("other", lambda net, image, x: (double(x), net.last(x))[1]),
    "bicubic with antialias": (
        "other",
        lambda net, image, x: net.last(F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_kind(name: str) -> None:
    kind, body = BODIES[name]
    sites = survey(Net(body)).sites
    assert {site.kind for site in sites} == {kind}, [site.reason for site in sites]
    assert all(site.reason for site in sites)


@pytest.mark.parametrize("fake", [False, True])
def test_a_real_and_a_fake_run_see_the_same(fake: bool) -> None:
    model = Net(BODIES["feature"][1])
    inputs = next(candidates(model)).inputs
    (call,) = observe(model, inputs, fake=fake).calls
    assert (call.owner, call.kind, call.in_shape, call.out_shape) == ("", "feature", (1, 4, 64, 64), (1, 4, 128, 128))
    assert call.dtype == torch.float32
    assert call.arguments["scale_factor"] == 2.0


def test_large_inputs_and_missing_weights_are_probed_without_computing() -> None:
    model = Net(BODIES["feature"][1])
    assert not needs_fake(model, next(candidates(model)).inputs)
    large = torch.zeros(8, 3, 4096, 4096, device="meta")
    plan = upswap.inspect(model.to("meta"), large)
    assert plan.sites[0].in_shape == (8, 4, 4096, 4096)
    assert plan.sites[0].fixed_ratio is True


def test_objects_a_model_is_given_and_changes_are_as_they_were() -> None:
    class Session:
        def __init__(self) -> None:
            self.frames: list[torch.Tensor] = []

    class Remembers(Net):
        def forward(self, image: torch.Tensor, session: Session) -> torch.Tensor:  # type: ignore[override]
            if session.frames:
                return session.frames[0]
            session.frames.append(super().forward(image))
            return session.frames[0]

    model, session = Remembers(BODIES["feature"][1]), Session()
    for _ in range(2):
        plan = upswap.inspect(model, (torch.randn(1, 3, 16, 16), session))
        assert [site.kind for site in plan.sites] == ["feature"]
    assert session.frames == []


def test_ratio_that_follows_the_input() -> None:
    fixed = survey(Net(lambda net, image, x: net.last(F.interpolate(halve(x), size=x.shape[-2:])))).sites[0]
    assert (fixed.fixed_ratio, fixed.scale, fixed.sized_by) == (True, (2.0, 2.0), "size")
    follows = survey(
        Net(lambda net, image, x: net.last(F.interpolate(x, size=(x.shape[2] + 8, 2 * x.shape[3] - 8))))
    ).sites[0]
    assert (follows.fixed_ratio, follows.kind) == (False, "feature")


def test_a_target_of_one_size_is_context() -> None:
    (site,) = survey(Net(lambda net, image, x: net.last(F.interpolate(x, size=(200, 300))))).sites
    assert (site.fixed_ratio, site.kind) == (False, "context")
    assert "its target is 200x300 at every input size" in site.reason


def test_names_number_the_calls_of_one_owner() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(double(self.conv(x))) + self.conv(double(self.conv(x), "nearest-exact"))

    model = nn.Module()
    model.conv = nn.Conv2d(3, 3, 1)
    model.inner = Two()
    model.forward = lambda x: model.inner(model.conv(x))  # type: ignore[method-assign]
    assert [site.name for site in survey(model).sites] == ["inner:0", "inner:1"]
    assert [site.name for site in survey(Two()).sites] == ["root:0", "root:1"]


def test_a_model_that_runs_on_nothing_says_what_was_tried() -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not today")

    with pytest.raises(upswap.InputError, match=r"(?s)pass example_inputs.*1x3x64x64: ValueError: not today"):
        upswap.inspect(Never())


def test_smallest_size_that_the_model_takes() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if min(x.shape[-2:]) < 128:
                raise ValueError("too small")
            return self.conv(double(self.conv(x)))

    model = Deep()
    assert first_that_runs(model, candidates(model)).inputs.args[0].shape == (1, 3, 128, 128)


class Picky(nn.Module):
    """Fails as the test has it."""

    def __init__(self, fail: Any) -> None:
        super().__init__()
        self.conv, self.fail = nn.Conv2d(3, 3, 1), fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fail(x)
        return self.conv(double(self.conv(x)))


def test_guessing_stops_where_the_size_is_not_what_is_wrong() -> None:
    wrong = nn.Conv2d(7, 3, 1)
    for wrong_thing, sides in ((lambda x: x.pop(), (64, 32)), (wrong, (64, 32, 128)), (lambda x: {}["key"], (64, 32))):
        seen: list[torch.Size] = []

        def fail(x: torch.Tensor, what: Any = wrong_thing, seen: list[torch.Size] = seen) -> None:
            seen.append(x.shape)
            what(x)

        model = Picky(fail)
        with pytest.raises(InputError, match="ran on none"):
            first_that_runs(model, candidates(model))
        # Of each guess at the channels.
        assert seen == [(1, channels, side, side) for channels in (3, 1) for side in sides]


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
def test_a_model_that_refuses_small_images_is_given_larger_ones(kind: type[Exception]) -> None:
    def fail(x: torch.Tensor) -> None:
        if x.shape[-1] < 384:
            raise kind("too small")

    model = Picky(fail)
    assert first_that_runs(model, candidates(model)).inputs.args[0].shape == (1, 3, 384, 384)


def test_a_size_that_the_model_names_is_tried_all_the_same() -> None:
    def fail(x: torch.Tensor) -> None:
        if x.shape[-1] != 250:
            raise RuntimeError(f"got {x.shape[-1]}")

    model = Picky(fail)
    model.image_size = 250
    assert first_that_runs(model, candidates(model)).inputs.args[0].shape == (1, 3, 250, 250)


def test_a_stem_that_is_given_coordinates_too() -> None:
    class Stem(nn.Module):
        def __init__(self, more: int) -> None:
            super().__init__()
            self.more, self.conv = more, nn.Conv2d(3 + more, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(double(torch.cat([x, x[:, : self.more] * 0], 1)))

    for more in (2, 3):
        model = Stem(more)
        assert first_that_runs(model, candidates(model)).inputs.args[0].shape == (1, 3, 64, 64)


class Looks(nn.Module):
    """Adds what its forward makes on the CPU, and looks at a value if the test wants it to."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.first, self.last, self.looks = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), looks
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(image)) + torch.zeros(1, device="cpu")
        if self.looks and x.max().item() > 1e6:
            return x
        return self.last(double(x))


def test_a_model_on_the_meta_device_whose_forward_makes_tensors_on_the_cpu() -> None:
    with torch.device("meta"):
        model = Looks(looks=False)
    patched = upswap.patch(model)
    assert patched is model
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert [site.kind for site in upswap.plan_of(model).swapped] == ["feature"]
    weights = upswap.patch(Looks(looks=False))
    model.to_empty(device="cpu").load_state_dict(weights.state_dict())
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(image), weights(image))


def test_a_model_on_the_meta_device_that_looks_at_values_is_told_the_way_out() -> None:
    with torch.device("meta"):
        model = Looks(looks=True)
    with pytest.raises(InputError, match="looks at values") as caught:
        upswap.patch(model)
    assert "upswap.patch(model, plan=upswap.inspect(copy_with_weights))" in str(caught.value)
    copy_with_weights = Looks(looks=True)
    assert len(upswap.upsamplers(upswap.patch(model, plan=upswap.inspect(copy_with_weights)))) == 1
