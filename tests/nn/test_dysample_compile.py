"""torch.compile and torch.export with dynamic sizes, and nothing copied from the host in a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from releases import skip_where_export_ties_sizes
from upswap.nn.dysample import DySample

MODULES: dict[str, dict[str, Any]] = {
    "lp": {},
    "pl, dynamic scope": {"style": "pl", "dyscope": True},
    "x1.5": {"scale": 1.5},
    "nearest (3, 2)": {"scale": (3, 2), "mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
    "area x1.5": {"scale": 1.5, "mode": "area"},
    "corners": {"align_corners": True},
    "bicubic": {"mode": "bicubic"},
}
# Batch, height, width. Batch 1 and maps of one row are graphs of their own: torch.compile treats 0 and 1 as constants.
SIZES = [(2, 7, 9), (3, 12, 8), (2, 16, 16), (5, 33, 21), (2, 9, 7)]


def build(name: str) -> DySample:
    """A module with offsets that are not 0, so that its convolutions count."""
    torch.manual_seed(0)
    module = DySample(24, **MODULES[name])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def assert_equal_but_for_rounding(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value: in eager mode offsets come of a matrix product, whose sums round otherwise."""
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def arguments(how: str, step: int, height: int, width: int) -> dict[str, Any]:
    """A target per step: exact multiples of the input and odd sizes in turn, as two images of a data set have them."""
    if how == "own":
        return {}
    if how == "scale_factor":
        return {"scale_factor": 2}
    odd = step % 2
    return {"size": (2 * height - odd, 2 * width + odd)}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "size") for name in MODULES),
        *((name, "own") for name in ("lp", "pl, dynamic scope", "x1.5", "area x1.5")),
        ("lp", "scale_factor"),
    ],
)
def test_new_sizes_do_not_recompile(name: str, how: str) -> None:
    module = build(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for step, (batch, height, width) in enumerate(SIZES):
        x = torch.randn(batch, 24, height, width)
        given = arguments(how, step, height, width)
        assert_equal_but_for_rounding(compiled(x, **given), module(x, **given))
    assert counter.frame_count == 1


def test_batch_one_is_one_graph_for_all_sizes() -> None:
    module = build("lp")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for _, height, width in SIZES:
        x = torch.randn(1, 24, height, width)
        assert_equal_but_for_rounding(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["own", "size"])
def test_training_graphs_do_not_recompile(how: str) -> None:
    module = build("pl, dynamic scope")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    weight = module.offset.weight
    for step, (batch, height, width) in enumerate(SIZES):
        x = torch.randn(batch, 24, height, width)
        given = arguments(how, step, height, width)
        (expected,) = torch.autograd.grad(module(x, **given).square().mean(), weight)
        (got,) = torch.autograd.grad(compiled(x, **given).square().mean(), weight)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_inductor_reads_the_same_neighbours() -> None:
    """Floors of float32 products: one of these ratios computed in float64 is a whole pixel off."""
    module = DySample(1, 2, mode="nearest")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for source, target in [(126, 489), (28, 92), (184, 596), (300, 900), (41, 2009)]:
            ramp = torch.arange(float(source)).view(1, 1, 1, source).expand(1, 1, 3, source).contiguous()
            expected = F.interpolate(ramp, (7, target), mode="nearest")
            assert (compiled(ramp, size=(7, target)) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, False) for name in MODULES), ("lp", True), ("pl, dynamic scope", True), ("x1.5", True)],
)
def test_export_with_dynamic_sizes(name: str, strict: bool) -> None:
    skip_where_export_ties_sizes(MODULES[name].get("scale"))
    module = build(name).eval()
    batch, height, width = Dim("batch"), Dim("height", max=4096), Dim("width", max=4096)
    program = export(
        module, (torch.randn(2, 24, 7, 9),), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=strict
    )
    x = torch.randn(3, 24, 20, 13)
    assert_equal_but_for_rounding(program.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_size_from_another_tensor(strict: bool) -> None:
    class Fuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upsample = build("lp")

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.upsample(x, size=skip.shape[-2:])

    model = Fuse().eval()
    program = export(
        model,
        (torch.randn(2, 24, 7, 9), torch.randn(2, 1, 15, 17)),
        dynamic_shapes=({2: Dim("h"), 3: Dim("w")}, {2: Dim("skip_h"), 3: Dim("skip_w")}),
        strict=strict,
    )
    for target in ((40, 26), (41, 39)):
        inputs = torch.randn(2, 24, 20, 13), torch.randn(2, 1, *target)
        # What exporters see adds offsets in pixels and then scales, eager code the other way round.
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


class OnlyOn(TorchDispatchMode):
    """Fails on every operator that makes or takes a tensor of another device: that is a copy from the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                assert leaf.device.type == self.device, f"{func} with a tensor on {leaf.device}"
        self.seen += 1
        return out


@pytest.mark.parametrize("how", ["own", "size", "scale_factor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_copied_from_the_host(name: str, dtype: torch.dtype, how: str) -> None:
    """On the meta device every tensor built from Python numbers and moved over would show up as one on the CPU."""
    module = build(name).to("meta", dtype)
    x = torch.empty(2, 24, 5, 6, dtype=dtype, device="meta")
    with OnlyOn("meta") as mode:
        out = module(x, **arguments(how, 1, 5, 6))
    assert out.dtype == dtype
    assert mode.seen > 10


def test_the_check_for_host_copies_sees_them() -> None:
    x = torch.empty(2, device="meta")
    with pytest.raises(AssertionError, match="with a tensor on cpu"), OnlyOn("meta"):
        torch.tensor([1.0, 2.0]).to(x)
