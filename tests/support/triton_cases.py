"""What the Triton kernels compute, in triton's interpreter: `nn/sampling/test_triton.py` runs these in a process of their own.

The interpreter takes some 40 ms for a program of a kernel. So shapes are small, and `BLOCKS` replaces the blocks that would
be chosen for them on a GPU, which make many small programs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden import golden_cases, golden_tensors, relative_error
from triton_reference import CUDA, HALVES, MAPPINGS, STRIDES, error, make, reference
from upswap import DySample
from upswap.nn.sampling import memory_format as layout
from upswap.nn.sampling import positions as sampling
from upswap.nn.sampling import triton_kernels
from upswap.nn.sampling import triton_launch as triton_sampler
from upswap.nn.sampling.positions import Mapping, NearestKernel, Scheme

# Wider and higher than the outputs, or not; more channels than a group has, or fewer.
BLOCKS = tuple(triton_sampler._Blocks(*blocks) for blocks in ((64, 16, 4), (128, 8, 8), (64, 32, 16), (512, 32, 4)))


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """With another value in the module, and nothing kept that it worked out with either."""
    triton_sampler._arguments.cache_clear()
    with mock.patch.object(triton_sampler, name, value):
        yield
    triton_sampler._arguments.cache_clear()


def in_blocks(blocks: Any = BLOCKS[-1]) -> Any:
    return replaced("_blocks", lambda *_: blocks)


def check(
    x: Tensor, field: Tensor, grad: Tensor, scheme: Scheme, factors: Any = None, *, deterministic: bool = False
) -> None:
    """Output and gradients against the reference."""
    assert triton_sampler.supports(x, field, scheme, factors)
    leaves = x.clone().requires_grad_(), field.clone().requires_grad_()
    expected = reference(*leaves, scheme, factors)
    of_x, of_field = torch.autograd.grad(expected, leaves, grad.double())

    out = triton_sampler.forward(x, field, scheme, factors)
    assert out.dtype == x.dtype
    assert layout.is_channels_last(out) == layout.is_channels_last(x) or out[0, 0].numel() == 1
    limit, field_limit = (2 * torch.finfo(t.dtype).eps if t.dtype in HALVES else 2e-5 for t in (x, field))
    assert error(out, expected) < limit
    got_x, got_field = triton_sampler.backward(
        grad, x, field, scheme, factors, deterministic=deterministic, needs=(True, True)
    )
    assert got_x is not None
    assert got_field is not None
    assert (got_x.dtype, got_field.dtype) == (x.dtype, field.dtype)
    # As the operator's fake tensors have them: the strides of x's layout, and those of field where they leave no gaps.
    assert got_x.stride() == torch.empty(x.shape).contiguous(memory_format=layout.format_of(x)).stride()
    assert got_field.stride() == torch.empty_like(field).stride()
    assert error(got_x, of_x) < limit
    assert error(got_field, of_field) < field_limit


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert triton.knobs.runtime.interpret, "run by nn/sampling/test_triton.py, with TRITON_INTERPRET=1"


# -- the base grid ----------------------------------------------------------------------------------------------------------


@triton.jit
def _positions_kernel(out, step, centre, source, target, NEAREST: tl.constexpr, SIZE: tl.constexpr, base: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, base(index, step, centre, source, NEAREST), mask=index < target)


@settings(deadline=None, max_examples=150)
@given(
    mapping=st.sampled_from(MAPPINGS),
    source=st.integers(1, 3000),
    factor=st.sampled_from([1.0, 1.001, 1.2, 1.5, 1.99, 2.0, 2.01, 2.3, 3.0, 7.7, 8.0]) | st.floats(1.0, 9.0),
    sized=st.booleans(),
    decomposed=st.booleans(),
)
def test_positions_are_those_of_the_plain_path_to_the_last_bit(
    mapping: Mapping, source: int, factor: float, sized: bool, decomposed: bool
) -> None:
    target = math.floor(source * factor)
    given_factor = None if sized else factor
    scheme = Scheme(1, (1, 1), False, mapping, decomposed)
    step, centre = triton_sampler._axis(scheme, source, target, given_factor)
    got = torch.full((target,), math.nan)
    size = triton.next_power_of_2(target)
    nearest = mapping.mode != "bilinear"
    _positions_kernel[(1,)](got, step, centre, source, target, nearest, size, triton_kernels._base)
    kernel = NearestKernel(torch.float32) if decomposed else CUDA
    expected = sampling.positions(
        mapping, source, target, given_factor, dtype=torch.float32, kernel=kernel, decomposed=decomposed
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(("size", "factor"), [((17, 26), None), (None, 3), (None, (1.7, 2.6))])
def test_an_empty_field_is_the_nearest_resize_bit_for_bit(
    mode: Any, size: Any, factor: Any, channels_last: bool
) -> None:
    scheme = Scheme(2, (1, 1), True, Mapping(mode))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 6, 7, 10).contiguous(memory_format=layout)
    expected = F.interpolate(x, size, factor, mode)
    field = torch.zeros(2, 8, *expected.shape[2:])
    factors = None if factor is None else (factor, factor) if isinstance(factor, int) else factor
    with in_blocks():
        assert torch.equal(triton_sampler.forward(x, field, scheme, factors), expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_an_empty_field_is_the_bilinear_resize(align_corners: bool) -> None:
    x = torch.randn(1, 4, 9, 33)
    expected = F.interpolate(x, (23, 70), mode="bilinear", align_corners=align_corners)
    scheme = Scheme(1, (1, 1), False, Mapping("bilinear", align_corners))
    with in_blocks():
        got = triton_sampler.forward(x, torch.zeros(1, 2, 23, 70), scheme, None)
    assert error(got, expected.double()) < 1e-5


# -- against torch's sampler ------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    batch, groups = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)]))
    per_group = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 33]))
    factors = draw(st.sampled_from([None, (2.0, 3.0), (1.7, 2.01)]))
    cells = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    # About 300 points in all images and groups together.
    side = max(1, math.isqrt(300 // (batch * groups * cells[0] * cells[1])))
    height, width = draw(st.integers(1, min(side, 9))), draw(st.integers(1, min(side, 9)))
    field_size = None
    if draw(st.booleans()):
        cells, field_size = (1, 1), (draw(st.integers(1, 15)), draw(st.integers(1, 300 // (15 * batch * groups))))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALVES]))
    scheme = Scheme(groups, cells, draw(st.booleans()), draw(st.sampled_from(MAPPINGS)))
    return {
        "shape": (batch, groups * per_group, height, width),
        "scheme": scheme,
        "field_size": field_size,
        "factors": factors,
        "spread": draw(st.sampled_from([3.0, 40.0])),
        "channels_last": draw(st.booleans()),
        "dtype": dtype,
        "field_dtype": draw(st.sampled_from([torch.float32, dtype])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(deadline=None, max_examples=25)
@given(call=calls(), blocks=st.sampled_from(BLOCKS), deterministic=st.booleans())
def test_output_and_gradients(call: dict[str, Any], blocks: Any, deterministic: bool) -> None:
    x, field, grad = make(**call)
    with in_blocks(blocks):
        check(x, field, grad, call["scheme"], call["factors"], deterministic=deterministic)


@pytest.mark.parametrize("few", [0, 10**9], ids=["large blocks", "small blocks"])
@pytest.mark.parametrize("per_group", [5, 16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_blocks_chosen_for_a_gpu(few: int, per_group: int, channels_last: bool) -> None:
    scheme = Scheme(2, (2, 2), True, Mapping("bilinear"))
    with replaced("_FEW_PROGRAMS", few):
        check(*make((1, 2 * per_group, 4, 6), scheme, channels_last=channels_last), scheme, deterministic=True)


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("which", ["x", "field", "grad"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_do_not_matter(which: str, how: str, channels_last: bool) -> None:
    scheme = Scheme(1, (2, 1), False, Mapping("bilinear"))
    tensors = dict(zip(("x", "field", "grad"), make((2, 4, 3, 4), scheme, channels_last=channels_last), strict=True))
    tensors[which] = STRIDES[how](tensors[which])
    with in_blocks():
        check(**tensors, scheme=scheme)


def test_a_point_on_the_border_or_on_a_pixel_moves_as_in_torchs_sampler() -> None:
    """Of 5 pixels positions -1, 0, 1, 2, 4, 5 have exact grid coordinates, with the corners aligned."""
    position = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0])
    horizontal, vertical = torch.meshgrid(position, position, indexing="xy")
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    grad = torch.randn(1, 2, 9, 9)
    grid = (torch.stack((horizontal, vertical), -1) / 2 - 1).unsqueeze(0).requires_grad_()
    out = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    of_x, of_grid = torch.autograd.grad(out, (x, grid), grad)
    assert not of_grid[0, :, position == 4, 0].any()
    assert of_grid[0, 2:-2, position == 3, 0].all()

    # Positions of the base grid are 0, so that the offsets are the positions.
    scheme = Scheme(1, (1, 1), False, Mapping("nearest"))
    field = torch.stack((horizontal, vertical)).unsqueeze(0) * 4
    with replaced("_axis", lambda *_: (0.0, 0.0)):
        got = triton_sampler.forward(x.detach(), field, scheme, None)
        got_x, got_field = triton_sampler.backward(
            grad, x.detach(), field, scheme, None, deterministic=False, needs=(True, True)
        )
    assert got_field is not None
    assert error(got, out.double()) < 1e-6
    assert error(got_x, of_x.double()) < 1e-6
    # An offset of 4 is a pixel, which is half a unit of the grid.
    torch.testing.assert_close(got_field[0].permute(1, 2, 0), of_grid[0] / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_no_offset_leads_outside_of_x(value: float) -> None:
    scheme = Scheme(1, (1, 1), False, Mapping("bilinear"))
    field = torch.full((1, 2, 3, 4), value)
    x = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    out = triton_sampler.forward(x, field, scheme, None)
    assert set(out.unique().tolist()) <= set(x.unique().tolist())


# -- the backward pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_only_the_gradients_that_are_needed(channels_last: bool, deterministic: bool) -> None:
    scheme = Scheme(2, (2, 2), True, Mapping("bilinear"))
    x, field, grad = make((1, 6, 4, 4), scheme, channels_last=channels_last)

    def run(of_x: bool, of_field: bool) -> tuple[Tensor | None, Tensor | None]:
        with in_blocks():
            return triton_sampler.backward(
                grad, x, field, scheme, None, deterministic=deterministic, needs=(of_x, of_field)
            )

    both_x, both_field = run(True, True)
    assert run(False, False) == (None, None)
    only_x, nothing = run(True, False)
    assert nothing is None
    assert only_x is not None
    assert torch.equal(only_x, both_x)
    nothing, only_field = run(False, True)
    assert nothing is None
    assert only_field is not None
    assert torch.equal(only_field, both_field)


@pytest.mark.parametrize(
    ("channels_last", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float16)]
)
def test_deterministic_gradients_do_not_depend_on_the_order_of_points(channels_last: bool, dtype: torch.dtype) -> None:
    """Other blocks add in another order, which is what differs from run to run on a GPU."""
    scheme = Scheme(1, (3, 2), True, Mapping("bilinear"))
    x, field, grad = make((1, 4, 4, 9), scheme, channels_last=channels_last, dtype=dtype)
    results: dict[bool, list[Tensor]] = {False: [], True: []}
    for deterministic, found in results.items():
        for blocks in BLOCKS:
            with in_blocks(blocks):
                of_x, _ = triton_sampler.backward(
                    grad, x, field, scheme, None, deterministic=deterministic, needs=(True, False)
                )
            assert of_x is not None
            found.append(of_x)
    first, *others = results[True]
    assert all(torch.equal(first, other) for other in others)
    assert error(first, results[False][0].double()) < (2 * torch.finfo(dtype).eps if dtype in HALVES else 1e-6)
    if dtype == torch.float32:
        # Or the test would say nothing: the sum of floating-point numbers does depend on it.
        assert not all(torch.equal(results[False][0], other) for other in results[False])


@pytest.mark.parametrize("size", [1e-20, 1e-8, 1e20])
def test_deterministic_gradients_of_any_size(size: float) -> None:
    """Of groups a hundred million times apart in size, and of points that all read one pixel."""
    scheme = Scheme(2, (2, 2), False, Mapping("bilinear"))
    x, field, grad = make((1, 2, 4, 4), scheme)
    field[:, ::2] = 40.0
    grad = grad.abs() * size
    grad[:, 1] *= 1e-8
    leaves = x.clone().requires_grad_(), field
    (expected,) = torch.autograd.grad(reference(*leaves, scheme), leaves[0], grad.double())
    got, _ = triton_sampler.backward(grad, x, field, scheme, None, deterministic=True, needs=(True, False))
    assert got is not None
    for channel in range(2):
        assert error(got[:, channel] / size, expected[:, channel] / size) < 1e-6 * (1e-8 if channel else 1)


def test_a_gradient_of_zeros_is_zeros() -> None:
    scheme = Scheme(1, (2, 2), False, Mapping("bilinear"))
    x, field, grad = make((1, 2, 3, 3), scheme)
    for gradient in triton_sampler.backward(
        torch.zeros_like(grad), x, field, scheme, None, deterministic=True, needs=(True, True)
    ):
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gradient_that_is_not_finite_stays_so(deterministic: bool, value: float) -> None:
    scheme = Scheme(2, (1, 1), False, Mapping("bilinear"))
    x, field, grad = make((2, 4, 3, 4), scheme)
    grad[1, 2, 1, 1] = value
    got, _ = triton_sampler.backward(grad, x, field, scheme, None, deterministic=deterministic, needs=(True, False))
    assert got is not None
    assert not got[1, 2:].isfinite().all()
    assert got[0].isfinite().all()
    assert got[1, :2].isfinite().all()


# -- what is supported ------------------------------------------------------------------------------------------------------


def test_supports() -> None:
    scheme = Scheme(1, (2, 2), False, Mapping("bilinear"))
    x, field = torch.empty(1, 2, 4, 4, device="meta"), torch.empty(1, 8, 4, 4, device="meta")

    def supports(x: Tensor = x, field: Tensor = field, **changes: Any) -> bool:
        return triton_sampler.supports(x, field, scheme._replace(**changes), None)

    assert supports()
    assert all(supports(mapping=mapping) for mapping in MAPPINGS)
    assert not supports(mapping=Mapping("bicubic"))
    assert not supports(mapping=Mapping("area"))
    for dtype in HALVES:
        assert supports(x.to(dtype))
        assert supports(x.to(dtype), field.to(dtype))
        assert not supports(x, field.to(dtype))
    assert not supports(x.double(), field.double())
    assert not supports(x[:0], field[:0])
    assert not supports(x[:, :, :0], field[:, :, :0])
    # An image of 2^31 elements: in the output, in x by its strides alone, in the field; but not a batch of as many.
    wide = torch.empty(1, 8, 2**14, 2**13, device="meta")
    assert not supports(wide.new_empty(1, 4, 2**14, 2**13), wide)
    assert supports(wide.new_empty(1, 3, 2**14, 2**13), wide)
    assert not supports(torch.empty(1, 2, 4, 2**29 + 8, device="meta")[..., :: 2**27], field)
    assert not supports(x, wide.new_empty(1, 32, 2**14, 2**13), cells=(4, 4))
    assert supports(x.expand(2**30, -1, -1, -1)[: 2**20], field.expand(2**20, -1, -1, -1))
    assert not supports(x.new_empty(1, 2, 2, 2**24 + 1), x.new_empty(1, 2, 2, 2**24 + 1), cells=(1, 1))


# -- the authors' module ----------------------------------------------------------------------------------------------------


class Sampler(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, field: Tensor, scheme: Scheme) -> Tensor:
        ctx.save_for_backward(x, field)
        ctx.scheme = scheme
        return triton_sampler.forward(x, field, scheme, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[:2]
        return *triton_sampler.backward(
            grad, *ctx.saved_tensors, ctx.scheme, None, deterministic=True, needs=needs
        ), None


@pytest.mark.parametrize("case", [case for case in golden_cases() if case.values[0]["dtype"] == "float32"])
def test_golden(case: dict[str, Any]) -> None:
    tensors = golden_tensors(case["name"])
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    weights = {name: value.requires_grad_() for name, value in state.items() if name != "init_pos"}
    x, scale = tensors["input"].requires_grad_(), case["scale"]

    def convolve(name: str) -> Tensor:
        seen = F.pixel_shuffle(x, scale) if case["style"] == "pl" else x
        out = F.conv2d(seen, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return F.pixel_unshuffle(out, scale) if case["style"] == "pl" else out

    field = torch.cat([convolve(name) for name in ("offset", "scope") if f"{name}.weight" in weights], 1)
    scheme = Scheme(case["groups"], (scale, scale), case["dyscope"], Mapping("bilinear"))
    with in_blocks():
        out = Sampler.apply(x, field, scheme)
        out.backward(tensors["grad_output"])
    assert weights.keys() == {k.removeprefix("grad.") for k in tensors if k.startswith("grad.")}
    errors = {"output": relative_error(out, tensors["output"]), "input": relative_error(x.grad, tensors["grad_input"])}
    errors |= {name: relative_error(weight.grad, tensors[f"grad.{name}"]) for name, weight in weights.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("how", [{}, {"size": (7, 9)}, {"scale_factor": 2.5}], ids=str)
@pytest.mark.parametrize("options", [{}, {"dyscope": True}, {"style": "pl", "mode": "nearest"}], ids=str)
def test_a_module_runs_by_them_where_they_are_asked_for(
    options: dict[str, Any], how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = DySample(8, 2, groups=2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(1, 8, 3, 4, requires_grad=True)
    expected = outcome(module, x, how)
    monkeypatch.setenv("UPSWAP_TRITON", "1")
    with (
        mock.patch.object(triton_sampler, "forward", wraps=triton_sampler.forward) as forward,
        mock.patch.object(triton_sampler, "backward", wraps=triton_sampler.backward) as backward,
    ):
        got = outcome(module, x, how)
    assert forward.call_count == backward.call_count == 1
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def outcome(module: DySample, x: Tensor, how: dict[str, Any]) -> tuple[Tensor, ...]:
    out = module(x, **how)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])
