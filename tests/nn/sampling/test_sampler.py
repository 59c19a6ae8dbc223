"""One sampling operation, computed in several ways that have to agree, and what it keeps for the backward pass."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from upswap.nn import CARAFE
from upswap.nn.dysample import DySample
from upswap.nn.sampling import memory_format as layout
from upswap.nn.sampling import positions as sampling
from upswap.nn.sampling import sampler
from upswap.nn.sampling.cpu_gather import gather, prefers
from upswap.nn.sampling.positions import Mapping, Reading, Scheme


@pytest.fixture(autouse=True)
def _without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `test_native.py` tests."""
    monkeypatch.setenv("UPSWAP_NATIVE", "0")


VARIANTS = [("lp", False), ("lp", True), ("pl", False), ("pl", True)]
CALLS: list[dict[str, Any]] = [{}, {"size": (37, 41)}, {"scale_factor": (2.0, 2.5)}]


def trained(style: str, dyscope: bool, channels: int = 64, **options: Any) -> DySample:
    """A module whose offsets reach a pixel or two, and beyond the border."""
    torch.manual_seed(0)
    module = DySample(channels, 2, style=style, dyscope=dyscope, groups=4, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def gradients(module: nn.Module, x: Tensor, how: dict[str, Any]) -> tuple[Tensor, ...]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x, **how)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])


def operator(x: Tensor, field: Tensor, reading: Reading) -> Tensor:
    """`sampler.upsample` as compiled code has it."""
    how = reading.size, reading.factors, *sampler._flat(reading.scheme)
    out: Tensor = sampler._operator(x, field, reading.init_pos, *how)
    return out


@pytest.mark.parametrize("how", CALLS, ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "nearest-exact", "bicubic"])
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_every_way_gives_the_same_output_and_gradients(
    style: str, dyscope: bool, mode: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous and channels_last in eager mode, and the operator of compiled code, against plain torch functions."""
    module = trained(style, dyscope, mode=mode)
    x = torch.randn(2, 64, 17, 19)
    ways = {
        "contiguous": gradients(module, x, how),
        "channels_last": gradients(module, x.contiguous(memory_format=torch.channels_last), how),
    }
    assert ways["channels_last"][0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("upswap.nn.dysample.upsample", operator)
    ways["operator"] = gradients(module, x, how)
    monkeypatch.setattr("upswap.nn.dysample.upsample", partial(sampler._forward, plain=True))
    expected = gradients(module, x, how)
    for name, got in ways.items():
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            scale = other.abs().max()
            assert (one - other).abs().max() <= 2e-4 * scale, (name, index)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
@pytest.mark.parametrize(("channels", "width", "parts"), [(96, 40, (1, 2)), (128, 90, (2, 4)), (160, 90, (2, 5))])
def test_groups_read_in_parts_are_the_groups(
    channels: int,
    width: int,
    parts: tuple[int, int],
    style: str,
    dyscope: bool,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = trained(style, dyscope, channels, mode=mode)
    x = torch.randn(2, channels, 9, width)
    scheme = Scheme(4, (2, 2), dyscope, module.base)
    assert (sampler._parts(x, scheme, sampler._ROW_READ), sampler._parts(x, scheme, sampler._ROW_WRITTEN)) == parts
    in_parts = gradients(module, x, {})
    monkeypatch.setattr(sampler, "_FEWEST", channels)
    whole = gradients(module, x, {})
    assert torch.equal(in_parts[0], whole[0])
    for one, other in zip(in_parts, whole, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("channels", "wanted", "parts"),
    [(64, 17, 4), (80, 17, 5), (67, 8, 1), (151, 8, 1), (76, 8, 4), (12, 8, 1), (1, 8, 1)],
)
def test_parts_are_equal_and_about_as_large_as_wanted(channels: int, wanted: int, parts: int) -> None:
    assert sampler._divided(channels, wanted) == parts


def test_parts_are_never_so_small_that_their_points_outweigh_them() -> None:
    for channels in range(1, 300):
        for wanted in (8, 11, 32, 2048):
            parts = sampler._divided(channels, wanted)
            assert channels % parts == 0
            assert parts == 1 or channels // parts >= 8, (channels, wanted)


@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_large_channels_last_maps_have_the_gradients_of_small_ones(
    style: str, dyscope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained(style, dyscope, 40)
    x = torch.randn(2, 40, 32, 16).contiguous(memory_format=torch.channels_last)
    expected = gradients(module, x, {})
    monkeypatch.setattr(layout, "_LARGE", 0)
    got = gradients(module, x, {})
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_symbolic_trace_holds_at_other_sizes() -> None:
    module = trained("lp", True)
    with torch.no_grad():
        traced = make_fx(lambda x: module(x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            torch.randn(2, 64, 12, 40)
        )
        x = torch.randn(3, 64, 9, 70)
        assert (traced(x) - module(x)).abs().max() <= 1e-4


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dyscope", [False, True])
def test_second_derivatives_raise(dyscope: bool, dtype: torch.dtype, given: torch.memory_format) -> None:
    """Of a sum too, whose gradient is a constant: left out, they would be a penalty that does nothing."""
    module = trained("lp", dyscope)
    x = torch.randn(2, 64, 6, 5, dtype=dtype).contiguous(memory_format=given).requires_grad_()
    for wanted in (x, module.offset.weight):
        (grad,) = torch.autograd.grad(module(x).sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (grad.square().sum() + x.sum()).backward()
    frozen = x.detach()
    (grad,) = torch.autograd.grad(module(frozen).sum(), module.offset.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (grad.square().sum() + module.offset.weight.sum()).backward()


@pytest.mark.parametrize("how", CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gathering_reads_what_grid_sample_reads(dtype: torch.dtype, how: dict[str, Any]) -> None:
    module = trained("lp", True)
    x = torch.randn(2, 64, 33, 18, dtype=dtype)
    with torch.no_grad():
        expected = module(x, **how)
        x = x.contiguous(memory_format=torch.channels_last)
        assert prefers(x, Scheme(4, (2, 2), True, Mapping("bilinear")))
        got = module(x, **how)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_gathering_stays_inside_at_the_last_pixel_and_far_outside() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3).repeat(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    offsets = torch.tensor([[99.0, 0.0, -99.0], [99.0, 0.0, -99.0]]).view(1, 2, 1, 1, 3)
    out = gather(x, offsets, torch.tensor([1.0]), torch.tensor([2.0, 2.0, 2.0]), 1.0)
    assert out[0, :, 0].tolist() == [[5.0, 5.0, 0.0]] * 4


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_gathering_from_a_line_and_at_no_number(size: tuple[int, int]) -> None:
    """A map one pixel wide has no neighbours to the right; an offset that is NaN reads nothing outside, and gives NaN."""
    x = torch.arange(1.0 + size[0] * size[1])[1:].view(1, 1, *size).contiguous(memory_format=torch.channels_last)
    offsets = torch.tensor([[[-0.25, 0.0], [0.5, 9.0]], [[-9.0, 0.25], [0.5, 0.0]]]).view(1, 2, 1, 2, 2)
    base = torch.tensor([0.0, 1.0])
    grid = torch.stack((base + offsets[0, 0, 0], base.view(2, 1) + offsets[0, 1, 0]), dim=-1)
    grid = (2 * grid + 1) / torch.tensor([size[1], size[0]]) - 1
    expected = F.grid_sample(x.contiguous(), grid.unsqueeze(0), padding_mode="border", align_corners=False)
    assert torch.allclose(gather(x, offsets, base, base, 1.0), expected)
    offsets[..., 1, 1] = math.nan
    out = gather(x, offsets, base, base, 1.0)
    assert out[..., 1, 1].isnan().all()
    assert torch.allclose(out[..., 0, :], expected[..., 0, :])


@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_no_more_is_kept_than_the_raw_outputs_of_the_convolutions(
    style: str, dyscope: bool, dtype: torch.dtype, layout: torch.memory_format, cropped: bool
) -> None:
    module = trained(style, dyscope)
    whole = torch.randn(2, 64, 36, 36, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    x = whole[..., 2:-2, 2:-2] if cropped else whole[..., :32, :32].contiguous(memory_format=layout)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    field = 4 * 2 * (2 * 4 * 4) * 32 * 32 * (2 if dyscope else 1)  # bytes of (B, axes * groups * cells, H, W)
    assert kept.pop(x.untyped_storage().data_ptr()) == x.untyped_storage().nbytes()
    # The weights as they are multiplied or joined are kept too, 16 KiB at most.
    # pl shuffles before it convolves, for which a crop has to be laid out anew.
    shuffled = x.nbytes if cropped and style == "pl" else 0
    assert sum(kept.values()) <= field + shuffled + 2**15


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_operator_is_registered_in_full() -> None:
    """Schema, fake and autograd kernels, and what torch.compile does to it, by torch's own checks."""
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    field = torch.randn(2, 32, 5, 6, requires_grad=True)
    for scheme, size, factors in [
        (Scheme(2, (2, 2), True, Mapping("bilinear"), True), (10, 12), (2.0, 2.0)),
        (Scheme(4, (2, 2), False, Mapping("nearest"), True), (11, 13), None),
    ]:
        arguments = (x, field, None, size, factors, *sampler._flat(scheme))
        torch.library.opcheck(torch.ops.upswap.upsample.default, arguments)
        last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        torch.library.opcheck(torch.ops.upswap.upsample.default, (last, *arguments[1:]))


def test_compiled_code_sees_one_operator_and_export_none() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    module = trained("lp", True).eval()
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        assert torch.allclose(torch.compile(module, backend=backend, fullgraph=True)(x), module(x), atol=1e-5)
    assert seen.count("upswap.upsample.default") == 1
    assert not any("grid_sampler" in name or "arange" in name for name in seen)
    program = torch.export.export(module, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("grid_sampler" in name for name in targets)
    assert not any("upswap" in name for name in targets)


@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_inductor_trains_what_eager_mode_does(style: str, dyscope: bool) -> None:
    """It lays convolutions' maps out as channels_last of its own accord, and checks what operators return."""
    module = trained(style, dyscope)
    x = torch.randn(2, 64, 12, 12)
    for one, other in zip(gradients(torch.compile(module), x, {}), gradients(module, x, {}), strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max()


@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_inductor_trains_at_dynamic_sizes(style: str, dyscope: bool) -> None:
    """It orders the strides of what is kept for the backward pass, and of some maps it cannot where they are symbols."""
    torch._dynamo.reset()
    module = trained(style, dyscope)
    compiled = torch.compile(module, dynamic=True)
    for size in ((12, 13), (9, 20)):
        x = torch.randn(2, 64, *size)
        for one, other in zip(gradients(compiled, x, {}), gradients(module, x, {}), strict=True):
            assert (one - other).abs().max() <= 2e-4 * other.abs().max()


def test_positions_kept_in_one_mode_serve_in_another() -> None:
    """First in inference mode and under fake tensors: what is kept of that must not reach training."""
    module = trained("lp", False)
    x = torch.randn(1, 64, 21, 23)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(x)
    with torch.inference_mode():
        module(x)
    out = module(x)
    out.sum().backward()
    assert module.offset.weight.grad is not None
    assert type(out) is Tensor
    assert not out.is_inference()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_a_trace_serves_at_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of the size it was traced at must not become constants of it, nor what is traced be kept."""
    monkeypatch.setattr(sampler, "_KEPT", {})
    module = trained("lp", True).eval()
    x, other = torch.randn(1, 64, 8, 9), torch.randn(1, 64, 13, 7)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        # The check runs the module too, whose own sizes may be kept.
        assert not any(isinstance(part, Tensor) for key in sampler._KEPT for part in key)
        assert torch.allclose(traced(x), module(x), atol=1e-5)
        assert torch.allclose(traced(other), module(other), atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_next_layer_may_work_in_place(frozen: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    module = trained("lp", True).requires_grad_(not frozen)
    x = torch.randn(2, 64, 32, 32, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    out = module(x)
    expected = torch.autograd.grad(out.relu().square().sum(), x)[0]
    out = module(x)
    assert out.is_contiguous(memory_format=layout)
    out.relu_()
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], expected)


def half_map(layout: torch.memory_format) -> Tensor:
    return torch.randn(2, 64, 20, 18).bfloat16().contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_gradients_of_a_half_map_are_those_of_float64(style: str, dyscope: bool, layout: torch.memory_format) -> None:
    module = trained(style, dyscope)
    x = half_map(layout)
    # What is left is bfloat16's rounding of the output and of the gradients that come in.
    got = gradients(module, x, {})
    expected = gradients(module.double(), x.double(), {})
    for name, one, other in zip(["out", "x", *dict(module.named_parameters())], got, expected, strict=True):
        assert (one - other).abs().max() <= 0.03 * other.abs().max(), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_pass_under_autocast_is_the_one_without(dtype: torch.dtype, layout: torch.memory_format) -> None:
    module = trained("lp", True)
    x = half_map(layout).to(dtype)
    expected = gradients(module, x, {})
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(module, x, {})
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_slice_of_a_map_is_read_as_its_own_layout_is(mode: str) -> None:
    """Every other channel of a channels_last map: neither layout, and in half precision widened to float32."""
    module = DySample(64, 2, mode=mode)
    x = torch.randn(2, 128, 60, 60).bfloat16().contiguous(memory_format=torch.channels_last)[:, ::2]
    expected = F.interpolate(x, scale_factor=2.01, mode=mode)
    with torch.no_grad():
        got = module(x, scale_factor=2.01)
    trains = module(x, scale_factor=2.01)
    assert got.stride() == trains.stride()
    for out in (got, trains):
        assert (out - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("style", "dyscope"), VARIANTS)
def test_no_images_at_all(style: str, dyscope: bool, layout: torch.memory_format) -> None:
    module = trained(style, dyscope)
    for given in (module, CARAFE(64, 2)):
        x = torch.empty(0, 64, 5, 6).contiguous(memory_format=layout).requires_grad_()
        out = given(x)
        assert out.shape == (0, 64, 10, 12)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_an_infinity_beside_the_last_column_stays_where_it_is() -> None:
    module = DySample(64, 2)
    x = torch.randn(1, 64, 33, 32)
    x[0, 3, 5, 30] = math.inf
    offsets = torch.zeros(1, 2, 4, 66, 64)
    rows, columns = (sampling.positions(module.base, n, 2 * n, dtype=torch.float32) for n in (33, 32))
    got = gather(x.contiguous(memory_format=torch.channels_last), offsets, rows, columns, 1.0)
    assert torch.equal(got.isfinite()[..., 62:], F.interpolate(x, scale_factor=2, mode="bilinear").isfinite()[..., 62:])


@pytest.mark.skipif(
    torch.__version__ < (2, 15),
    reason=f"grid_sampler_2d has a forward-mode derivative from torch 2.15 on; this is {torch.__version__}",
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's own, of its forward mode
def test_forward_mode() -> None:
    module = trained("lp", True, channels=8).double().requires_grad_(False)
    x, direction = torch.randn(2, 2, 8, 6, 7, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        out = module(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    step = 1e-6
    expected = (module(x + step * direction) - module(x - step * direction)) / (2 * step)
    assert tangent is not None
    assert (tangent - expected).abs().median() <= 1e-6  # a point on a pixel's border has two slopes


def test_positions_changed_in_place_before_the_backward_pass_are_noticed() -> None:
    module = trained("lp", True).double()
    out = module(torch.randn(1, 64, 8, 8, dtype=torch.float64, requires_grad=True))
    module.init_pos.add_(0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_map_changed_in_place_before_the_backward_pass_is_noticed() -> None:
    module = trained("lp", False)
    x = torch.randn(1, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True) * 1
    out = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason=f"vmap of a gradient fails in F.grid_sample itself before torch 2.12; this is {torch.__version__}",
)
def test_transforms_of_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_KEPT", {})
    module = trained("lp", True, channels=8)
    parameters = dict(module.named_parameters())
    x = torch.randn(3, 2, 8, 6, 7)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert not sampler._KEPT
    for index, one in enumerate(x):
        expected = torch.autograd.grad(module(one).square().mean(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            assert torch.allclose(each[name][index], gradient, rtol=1e-3, atol=1e-6)
