"""Models as users have them: of other types, on the meta device, parametrised, hooked, compiled, wrapped, scripted, exported."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import invariants
import upswap


class Block(nn.Module):
    """Its forward has a branch, so that it takes the source route."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x, skip=None):
        x = F.interpolate(self.conv(x) * self.gain, scale_factor=2.0, mode="bilinear")
        return x if skip is None else x + skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = Block()
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, image):
        return self.last(self.up(self.block(F.max_pool2d(self.stem(image), 2))))


SITES = ["block", "up"]


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def image(batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 48)


def test_the_net_itself() -> None:
    original, patched = build(), upswap.patch(build())
    assert [site.name for site in upswap.plan_of(patched).swapped] == SITES
    invariants.check_step_0(original, patched, [image()])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format) -> None:
    original = build().to(dtype).to(memory_format=memory_format)
    patched = upswap.patch(copy.deepcopy(original))
    assert {p.dtype for p in upswap.parameters(patched)} == {dtype}
    x = image().to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        out, expected = patched(x), original(x)
    invariants.assert_close([out], [expected], tolerance)
    assert out.stride() == expected.stride()
    invariants.check_learning(patched, x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_patched_without_gradients_can_be_trained(mode: Any) -> None:
    frozen = build().requires_grad_(False)
    for model in (build(), frozen):
        with mode():
            upswap.patch(model)
        assert {parameter.requires_grad for parameter in upswap.parameters(model)} == {True}
        invariants.check_learning(model, image())


@pytest.mark.parametrize("given", [False, True])
def test_patched_on_the_meta_device_then_materialised(given: bool) -> None:
    with torch.device("meta"):
        model = Net()
    upswap.patch(model.eval(), image().to("meta") if given else None)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    reference = upswap.patch(build())
    model.load_state_dict(reference.state_dict(), strict=True)
    invariants.check_step_0(build(), model, [image()])
    assert type(upswap.unpatch(model)) is Net


def test_upsamplers_lie_and_compute_where_most_weights_around_them_do() -> None:
    model = build()
    model.stem.double()  # the first of the model, and the first of the block, are like nothing else
    model.block.gain = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))
    plan = upswap.inspect(build())
    upswap.patch(model, plan=plan, verify=False)
    assert {name: {p.dtype for p in m.parameters()} for name, m in upswap.upsamplers(model).items()} == {
        "block.upsample": {torch.float32},
        "up": {torch.float32},
    }

    with torch.device("meta"):
        empty = build()
    empty.stem.weight = nn.Parameter(torch.ones(8, 3, 3, 3))
    empty.block.gain = nn.Parameter(torch.ones(8, 1, 1))
    upswap.patch(empty, plan=plan, verify=False)
    assert all(p.is_meta for p in upswap.parameters(empty))


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def test_parametrised_children() -> None:
    original = build()
    parametrizations.weight_norm(original.block.conv)
    parametrize.register_parametrization(original.last, "weight", Doubled())
    patched = upswap.patch(copy.deepcopy(original))
    assert list(upswap.upsamplers(patched)) == ["block.upsample", "up"]
    invariants.check_step_0(original, patched, [image()])
    invariants.check_learning(patched, image())
    invariants.check_unpatch(original, patched, image())


def test_a_parametrised_owner() -> None:
    """Parametrisation gives a module a class of its own; the rewritten class is made from that."""
    original = build()
    parametrize.register_parametrization(original.block, "gain", Doubled())
    assert type(original.block).__name__ == "ParametrizedBlock"
    patched = upswap.patch(copy.deepcopy(original))
    assert [site.name for site in upswap.plan_of(patched).swapped] == SITES
    invariants.check_step_0(original, patched, [image()])
    invariants.check_learning(patched, image())
    invariants.check_unpatch(original, patched, image())


def test_hooks_see_what_they_saw() -> None:
    def record(model: nn.Module) -> list[object]:
        seen: list[object] = []
        model.block.register_forward_pre_hook(lambda m, args: seen.append(args[0].sum().item()))
        model.block.register_forward_hook(lambda m, args, out: out * 0.5)
        model.up.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
        model.block.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
        return seen

    original, patched = build(), build()
    before, after = record(original), record(patched)
    upswap.patch(patched)
    after.clear()
    invariants.assert_close([patched(image())], [original(image())], 1e-5)
    patched(image()).sum().backward()
    original(image()).sum().backward()
    assert after == before


@torch.no_grad()
def test_a_part_that_is_compiled() -> None:
    torch._dynamo.reset()
    original, model = build(), build()
    model.block = torch.compile(model.block, backend="eager")
    model(image())  # compiled before the patch, and again after it
    upswap.patch(model)
    assert list(upswap.upsamplers(model)) == ["block._orig_mod.upsample", "up"]
    invariants.assert_close([model(image())], [original(image())], 1e-5)
    model.block._orig_mod.upsample.offset.bias.add_(0.3)
    assert (model(image()) - original(image())).abs().max() > 1e-3
    upswap.unpatch(model)
    assert torch.equal(model(image()), original(image()))


def test_compiled_in_place() -> None:
    torch._dynamo.reset()
    original, model = build(), build()
    model.compile(backend="eager", fullgraph=True)
    model(image())
    upswap.patch(model)
    assert list(upswap.upsamplers(model)) == ["block.upsample", "up"]
    invariants.assert_close([model(image())], [original(image())], 1e-5)
    with torch.no_grad():
        model.block.upsample.offset.bias.add_(0.3)
    assert (model(image()) - original(image())).abs().max() > 1e-3


class Plain(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0)


def test_a_scripted_part_is_left_alone_and_named() -> None:
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        model.block = torch.jit.script(Plain())
    plan = upswap.inspect(model)
    assert [site.name for site in plan.swapped] == ["up"]
    assert any("TorchScript" in hint and "block" in hint for hint in plan.hints)
    invariants.check_step_0(copy.deepcopy(model), upswap.patch(model), [image()])


def test_autocast_and_inference_mode() -> None:
    original, patched = build(), upswap.patch(build())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        invariants.assert_close([patched(image())], [original(image())], 5e-2)


def test_a_probe_under_inference_mode() -> None:
    """Patching inside `torch.inference_mode` is the user's mistake to make, and does not make other sites of the model."""
    model = build()
    with torch.inference_mode():
        plan = upswap.inspect(model)
    assert [site.name for site in plan.swapped] == SITES


def test_a_block_shared_by_two_parents() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = build(), build()
            self.second.block = self.first.block
            self.second.up = self.first.up

        def forward(self, x):
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    original = Two().eval()
    patched = upswap.patch(copy.deepcopy(original))
    # Each place that calls the layer without weights has its own.
    assert list(upswap.upsamplers(patched)) == ["first.block.upsample", "first.upsample", "second.upsample"]
    assert patched.second.block is patched.first.block
    assert patched.second.up is patched.first.up
    invariants.check_step_0(original, patched, [image()])
    invariants.check_keys(original, patched)
    invariants.check_learning(patched, image())
    invariants.check_unpatch(original, patched, image())
    assert patched.second.up is patched.first.up


class Kinds(nn.Module):
    """A gate, a context of a fixed ratio, logits and a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv3d(1, 1, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
        self.grid = nn.Conv2d(8, 8, 1)

    def forward(self, image):
        x = self.stem(image)
        x = x * torch.sigmoid(F.interpolate(self.gate(x), scale_factor=2))
        pooled = F.interpolate(self.grid(F.adaptive_avg_pool2d(x, 4)), size=(8, 8))
        x = x + pooled.mean((2, 3), keepdim=True)
        volume = F.interpolate(self.deep(x.unsqueeze(1)), scale_factor=2).mean(2)
        return F.interpolate(self.last(x), scale_factor=2, mode="bilinear") + volume[:, :1]


def test_kinds_opens_gates_and_logits_and_says_what_it_cannot() -> None:
    torch.manual_seed(0)
    original = Kinds().eval()
    every = ("feature", "logits", "gate", "context", "volume")
    plan = upswap.inspect(original, kinds=every)
    kinds = {site.kind: site for site in plan.sites}
    assert {kind for kind, site in kinds.items() if site.swap} >= {"gate", "logits"}
    assert not kinds["volume"].swap
    assert "not yet" in kinds["volume"].reason
    patched = upswap.patch(copy.deepcopy(original), kinds=every)
    invariants.check_step_0(original, patched, [torch.randn(2, 3, 16, 24)])
    invariants.check_learning(patched, torch.randn(2, 3, 16, 24))
    invariants.check_unpatch(original, patched, torch.randn(2, 3, 16, 24))


@pytest.mark.parametrize("name", ["forward", "conv", "gain", "_modules", "train"])
def test_a_plan_may_not_put_an_upsampler_in_the_place_of_something_else(name: str) -> None:
    """The model is left as it was: not even the first of two owners is changed."""
    model = nn.Sequential(build(), nn.Conv2d(2, 2, 1)).eval()
    plan = upswap.inspect(model, image())
    sites = [dataclasses.replace(site, module=f"{site.owner}.{name}") for site in plan.sites if site.name == "0.block"]
    with pytest.raises(upswap.PlanError, match=rf"site 0\.block: .*{name}"):
        upswap.patch(model, plan=plan.replace_sites(sites))
    assert type(model[0].block) is Block
    assert list(model.state_dict()) == [f"0.{key}" for key in build().state_dict()] + ["1.weight", "1.bias"]
