from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from upswap.nn.sampling.positions import (
    MODES,
    Mapping,
    compute_dtype,
    initial_positions,
    known_equal,
    nearest_kernel,
    normalised,
    positions,
    repeated_positions,
    scaled_size,
    shuffle,
    unshuffle,
)


def sample(
    x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, kernel: str = "bilinear"
) -> torch.Tensor:
    horizontal = normalised(columns + offsets[:, 0], x.shape[3])
    vertical = normalised(rows.unsqueeze(1) + offsets[:, 1], x.shape[2])
    grid = torch.stack((horizontal, vertical), dim=-1).flatten(0, 1)
    by_group = x.view(grid.shape[0], -1, *x.shape[2:])
    out = F.grid_sample(by_group, grid, mode=kernel, padding_mode="border", align_corners=False)
    return out.view(*x.shape[:2], *offsets.shape[-2:])


def read_positions(mode: str, source: int, target: int, scale_factor: float | None, dtype: torch.dtype) -> torch.Tensor:
    """The positions torch reads along the width: what a resize makes of the ramp 0, 1, 2, ..."""
    ramp = torch.arange(source, dtype=dtype).view(1, 1, 1, source)
    if scale_factor is None:
        return F.interpolate(ramp, size=(1, target), mode=mode).flatten()
    return F.interpolate(ramp, scale_factor=(1.0, scale_factor), mode=mode).flatten()


def test_half_pixel_positions_of_a_doubling() -> None:
    p = positions(Mapping("bilinear"), 3, 6, dtype=torch.float64)
    assert p.tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]  # the first one is not clamped: an offset comes before


def test_corner_aligned_positions_end_at_the_corners() -> None:
    mapping = Mapping("bilinear", align_corners=True)
    assert positions(mapping, 3, 5, dtype=torch.float64).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert positions(mapping, 3, 1, dtype=torch.float64).tolist() == [0.0]
    assert positions(mapping, 1, 4, dtype=torch.float64).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_area_positions_lie_between_two_pixels_where_the_window_covers_both() -> None:
    assert positions(Mapping("area"), 2, 3, dtype=torch.float64).tolist() == [0.0, 0.5, 1.0]


def test_scale_factor_and_size_read_different_positions() -> None:
    """9 * 1.27 = 11.43: the caller's factor and the ratio of the sizes differ, and torch follows what it was given."""
    by_size = positions(Mapping("bilinear"), 9, 11, dtype=torch.float64)
    by_factor = positions(Mapping("bilinear"), 9, 11, 1.27, dtype=torch.float64)
    assert by_size[-1].item() == pytest.approx(10.5 * 9 / 11 - 0.5)
    assert by_factor[-1].item() == pytest.approx(10.5 / 1.27 - 0.5)


@settings(deadline=None, max_examples=150)
@given(
    mode=st.sampled_from(["nearest", "nearest-exact", "area"]),
    source=st.integers(1, 400),
    growth=st.floats(1.0, 4.0),
    give_factor=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_neighbours_are_torchs_to_the_pixel(
    mode: str, source: int, growth: float, give_factor: bool, dtype: torch.dtype
) -> None:
    target = int(source * growth)
    factor = growth if give_factor else None
    kernel = nearest_kernel(torch.empty(1, 1, 1, source, dtype=dtype), (1, target))
    ours = positions(Mapping(mode), source, target, factor, dtype=dtype, kernel=kernel)
    assert torch.equal(ours, read_positions(mode, source, target, factor, dtype))


@pytest.mark.parametrize("source", [9, 47, 70, 198])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("nominal", [1, 2])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_factors_that_rounding_to_whole_pixels_removes(
    mode: str, nominal: int, channels_last: bool, source: int
) -> None:
    """At a factor of 2 + 0.9 / n, torch's kernels disagree on what to read; ours follows the one that runs."""
    factor = nominal + 0.9 / source
    target = int(source * factor)
    assert target == nominal * source
    x = torch.arange(source, dtype=torch.float32).view(1, 1, 1, source).expand(1, 4, 2, source)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    expected = F.interpolate(x, scale_factor=(1.0, factor), mode=mode)[0, 0, 0]
    kernel = nearest_kernel(x, (2, target))
    ours = positions(Mapping(mode), source, target, factor, dtype=torch.float32, kernel=kernel)
    assert torch.allclose(ours.clamp(0, source - 1), expected, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    align_corners=st.booleans(),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    extra=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    seed=st.integers(0, 2**31),
)
def test_the_bicubic_kernel_is_the_resizes_at_the_border_too(
    align_corners: bool, height: int, width: int, extra: tuple[int, int], seed: int
) -> None:
    x = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = (height + extra[0], width + extra[1])
    mapping = Mapping("bicubic", align_corners)
    rows = positions(mapping, height, target[0], dtype=x.dtype)
    columns = positions(mapping, width, target[1], dtype=x.dtype)
    ours = sample(x, torch.zeros(1, 2, 1, *target, dtype=x.dtype), rows, columns, mapping.kernel)
    expected = F.interpolate(x, target, mode="bicubic", align_corners=align_corners)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_offsets_are_pixels_horizontal_first_and_per_group() -> None:
    ramp = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 4, 5)
    x = torch.cat((ramp, 10 * torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 5)), dim=1).contiguous()
    offset = torch.zeros(1, 2, 2, 1, 1)
    offset[0, 0, 0] = 1.5  # group 0 moves right
    offset[0, 1, 1] = -0.5  # group 1 moves up
    out = sample(x, offset, torch.tensor([2.0]), torch.tensor([1.0]))
    assert torch.allclose(out.flatten(), torch.tensor([2.5, 15.0]), atol=1e-5)


def test_the_border_goes_on_outside() -> None:
    x = torch.arange(4.0, dtype=torch.float64).view(1, 1, 1, 4)
    offset = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float64)
    offset[0, 0, 0] = torch.tensor([-9.0, 9.0])
    row, columns = torch.zeros(1, dtype=torch.float64), torch.tensor([-0.25, 3.25], dtype=torch.float64)
    assert torch.allclose(sample(x, offset, row, columns).flatten(), torch.tensor([0.0, 3.0], dtype=torch.float64))


def test_an_offset_acts_before_the_border_clamps() -> None:
    """p = -0.25 and d = 0.5 read 0.25; clamping p before adding d would read 0.5."""
    x = torch.arange(4.0, dtype=torch.float64).view(1, 1, 1, 4)
    offset = torch.zeros(1, 2, 1, 1, 1, dtype=torch.float64)
    offset[0, 0, 0] = 0.5
    out = sample(x, offset, torch.zeros(1, dtype=x.dtype), torch.tensor([-0.25], dtype=x.dtype))
    assert out.item() == pytest.approx(0.25)


def test_shuffle_is_pixel_shuffle_and_takes_two_factors() -> None:
    field = torch.randn(2, 12, 5, 6)
    assert torch.equal(shuffle(field, (2, 2)), F.pixel_shuffle(field, 2))
    assert torch.equal(unshuffle(shuffle(field, (3, 2)), (3, 2)), field)
    tall = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(tall, (3, 2))[0, 0].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_initial_positions_in_the_authors_order() -> None:
    half_pixel = initial_positions(Mapping("bilinear"), (2, 2), groups=2)
    assert half_pixel is not None
    columns, rows = [-0.25, 0.25, -0.25, 0.25], [-0.25, -0.25, 0.25, 0.25]
    assert half_pixel.flatten().tolist() == columns * 2 + rows * 2
    anisotropic = initial_positions(Mapping("bilinear"), (2, 1), groups=1)
    assert anisotropic is not None
    assert anisotropic.flatten().tolist() == [0.0, 0.0, -0.25, 0.25]
    for mode in ("nearest", "nearest-exact", "area"):
        zeros = initial_positions(Mapping(mode), (2, 3), groups=4)
        assert zeros is not None
        assert zeros.shape == (1, 48, 1, 1)
        assert not zeros.any()
    assert initial_positions(Mapping("bicubic"), (2, 2), groups=1) is None
    assert initial_positions(Mapping("bilinear", align_corners=True), (2, 2), groups=1) is None


def test_repeated_positions() -> None:
    sub_pixels = torch.tensor([-0.25, 0.25])
    assert repeated_positions(sub_pixels, 3).tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]


def test_other_devices_have_kernels_of_their_own() -> None:
    x = torch.empty(1, 4, 9, 9, dtype=torch.float64, device="meta")
    assert nearest_kernel(x, (18, 18)) == (torch.float32, (1,))
    assert nearest_kernel(torch.empty(1, 4, 9, 9), (18, 18)) == (torch.float32, (1, 2))


def test_sizes_and_precision() -> None:
    assert scaled_size((7, 9), (2.0, 1.5)) == (14, 13)
    assert known_equal((4, 6), (4, 6))
    assert not known_equal((4, 6), (4, 7))
    assert compute_dtype(torch.bfloat16) is torch.float32
    assert compute_dtype(torch.float64) is torch.float64


def test_every_mode_names_a_kernel() -> None:
    assert {mode: Mapping(mode).kernel for mode in MODES if mode != "bicubic"} == {
        mode: "bilinear" for mode in MODES if mode != "bicubic"
    }
    assert Mapping("bicubic").kernel == "bicubic"
    assert Mapping("bicubic", True).describe() == "bicubic, align_corners=True"
