"""Step 0: a fresh `init="match"` module computes what `F.interpolate` computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upswap.nn.dysample import DySample

MODES = [
    ("nearest", False),
    ("nearest-exact", False),
    ("area", False),
    ("bilinear", False),
    ("bilinear", True),
    ("bicubic", False),
    ("bicubic", True),
]
DTYPES = [torch.float32, torch.float64]


def interpolate(x: Tensor, mode: str, align_corners: bool, **how: Any) -> Tensor:
    return F.interpolate(x, mode=mode, align_corners=align_corners if mode in ("bilinear", "bicubic") else None, **how)


def assert_matches(module: DySample, x: Tensor, got: Tensor, **how: Any) -> None:
    """Within max(1e-5, 3e-7 * width) of max|x| in float32, 1e-12 in float64; width: the longer side of the input."""
    expected = interpolate(x, module.mode, module.align_corners, **how)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    bound = 1e-12 if x.dtype == torch.float64 else max(1e-5, 3e-7 * max(x.shape[2:]))
    error = ((got - expected).abs().max() / x.abs().max()).item()
    assert error <= bound, f"{error:.3g} > {bound:.3g}"


def random_input(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8, (3, 2), 1.5, (1, 2)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(7, 12), (1, 9), (9, 1), (1, 1)])
def test_own_scale(height: int, width: int, scale: Any, mode: str, align_corners: bool, dtype: torch.dtype) -> None:
    module = DySample(6, scale, mode=mode, align_corners=align_corners, dtype=dtype)
    x = random_input(2, 6, height, width, dtype=dtype)
    assert_matches(module, x, module(x), scale_factor=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize(
    ("source", "target"),
    [((65, 65), (129, 129)), ((31, 23), (61, 45)), ((1, 17), (1, 33)), ((5, 1), (13, 1)), ((8, 8), (8, 20))],
)
def test_sizes(
    source: tuple[int, int], target: tuple[int, int], mode: str, align_corners: bool, dtype: torch.dtype
) -> None:
    module = DySample(4, 2, mode=mode, align_corners=align_corners, dyscope=True, dtype=dtype)
    x = random_input(1, 4, *source, dtype=dtype)
    assert_matches(module, x, module(x, size=target), size=target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("width", [256, 1023, 1100])
def test_wide_maps(width: int, mode: str, align_corners: bool, dtype: torch.dtype) -> None:
    module = DySample(4, 2, mode=mode, align_corners=align_corners, dtype=dtype)
    x = random_input(1, 4, 6, width, dtype=dtype)
    assert_matches(module, x, module(x), scale_factor=2)
    assert_matches(module, x, module(x, size=(11, 2 * width - 1)), size=(11, 2 * width - 1))
    tall = x.transpose(2, 3).contiguous()
    assert_matches(module, tall, module(tall, scale_factor=1.5), scale_factor=1.5)


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
def test_a_module_cast_to_float64_matches_in_float64(mode: str, align_corners: bool) -> None:
    """At x3 the sub-pixel positions are not exact in float32; a cast must not keep what float32 made of them."""
    module = DySample(4, 3, mode=mode, align_corners=align_corners).half().double()
    x = random_input(1, 4, 7, 9, dtype=torch.float64)
    assert_matches(module, x, module(x), scale_factor=3)
    reloaded = DySample(4, 3, mode=mode, align_corners=align_corners, dtype=torch.float64)
    reloaded.load_state_dict(module.state_dict())
    assert torch.equal(reloaded(x), module(x))


factors = st.one_of(
    st.sampled_from([1, 2, 3, 4, 8, 1.5, 2.0, 4 / 3, 2.5]), st.floats(1.0, 4.0, allow_nan=False, allow_infinity=False)
)


@settings(deadline=None, max_examples=250)
@given(
    resize=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 34), st.integers(1, 34)),
    scale=st.one_of(factors, st.tuples(factors, factors)),
    how=st.sampled_from(["own", "scale_factor", "size"]),
    style=st.sampled_from(["lp", "pl"]),
    dyscope=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_resize(
    resize: tuple[str, bool],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    scale: Any,
    how: str,
    style: str,
    dyscope: bool,
    channels_last: bool,
    seed: int,
) -> None:
    mode, align_corners = resize
    batch, channels, height, width = shape
    vertical, horizontal = scale if isinstance(scale, tuple) else (scale, scale)
    arguments: dict[str, Any] = {"scale_factor": scale}
    if how == "size":
        arguments = {"size": (int(height * vertical), int(width * horizontal))}
    own_scale = scale if how == "own" else 2
    if style == "pl":
        channels *= 4 if how != "own" else -(-vertical // 1) * -(-horizontal // 1)
        channels = int(channels)
    module = DySample(
        channels,
        own_scale,
        style=style,
        mode=mode,
        align_corners=align_corners,
        dyscope=dyscope,
        dtype=dtype,
    )
    x = random_input(batch, channels, height, width, dtype=dtype, seed=seed)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    got = module(x) if how == "own" else module(x, **arguments)
    assert_matches(module, x, got, **arguments)


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("init", ["match", "paper"])
@pytest.mark.parametrize(
    "how", [{"scale_factor": 0.5}, {"scale_factor": (2.0, 0.5)}, {"size": 5}, {"size": (20, 7)}], ids=str
)
def test_a_downsample_is_the_original_resize(how: dict[str, Any], init: str, mode: str, align_corners: bool) -> None:
    module = DySample(4, 2, mode=mode, align_corners=align_corners, init=init)
    with torch.no_grad():
        module.offset.bias.fill_(1.0)
    x = random_input(1, 4, 8, 9, dtype=torch.float32)
    assert torch.equal(module(x, **how), interpolate(x, mode, align_corners, **how))


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
def test_the_papers_base_grid_is_half_pixel_bilinear(mode: str, align_corners: bool) -> None:
    module = DySample(4, 2, mode=mode, align_corners=align_corners, init="paper")
    assert 0.0008 < DySample(64, 2, init="paper").offset.weight.std().item() < 0.0012
    with torch.no_grad():
        module.offset.weight.zero_()
    x = random_input(1, 4, 8, 9, dtype=torch.float32)
    assert torch.allclose(module(x), F.interpolate(x, scale_factor=2, mode="bilinear"), atol=1e-5)


@pytest.mark.parametrize("style", ["lp", "pl"])
def test_resized_offsets_keep_their_length_in_input_pixels(style: str) -> None:
    """A constant offset of one pixel shifts the resize by one pixel at any target size."""
    module = DySample(4, 2, style=style, groups=1, dtype=torch.float64)
    with torch.no_grad():
        module.offset.bias.view(2, -1)[0] = 4.0  # times the static scope of 0.25
    x = random_input(1, 4, 9, 11, dtype=torch.float64)
    moved = torch.cat((x[..., 1:], x[..., -1:]), dim=-1)
    for how in ({"size": (13, 17)}, {"size": (18, 22)}, {"scale_factor": 1.7}):
        got, expected = module(x, **how), interpolate(moved, "bilinear", False, **how)
        inner = got.shape[-1] * 3 // 4  # past it, the border goes on differently
        first = 2  # and the first columns of `expected` read its clamped left border
        assert torch.allclose(got[..., first:inner], expected[..., first:inner], atol=1e-12)
