"""The source positions of every mode: against `F.interpolate`, and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental import symbolic_shapes

from upswap.nn.sampling import positions as module
from upswap.nn.sampling.positions import (
    Mapping,
    NearestKernel,
    Scheme,
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

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1), (1, 3), (2, 3), (3, 6), (3, 7), (5, 5), (4, 10), (7, 8)]
SMALLER = [(6, 3), (7, 3), (5, 1)]
FACTORS = [(3, 2.0), (4, 2.5), (3, 1.7), (5, 2.01), (6, 1.0), (5, 1.1), (4, 3.0)]


def read(mapping, source, target=None, factor=None, dtype=torch.float64):
    """What torch makes of the ramp 0, 1, 2, ...: the position it reads at, clamped to the border."""
    ramp = torch.arange(source, dtype=dtype).view(1, 1, 1, source)
    size = None if target is None else (1, target)
    return mapping.resize(ramp, size, None if factor is None else (1.0, factor)).flatten()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "target"), SIZES + SMALLER)
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_to_a_size(source, target, align_corners, dtype) -> None:
    mapping = Mapping("bilinear", align_corners)
    found = positions(mapping, source, target, dtype=dtype)
    assert found.dtype == dtype
    close(found.clamp(0, source - 1), read(mapping, source, target, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "factor"), FACTORS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_by_a_factor(source, factor, align_corners, dtype) -> None:
    mapping = Mapping("bilinear", align_corners)
    target = int(source * factor)
    found = positions(mapping, source, target, factor, dtype=dtype)
    close(found.clamp(0, source - 1), read(mapping, source, factor=factor, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(("source", "target"), SIZES + SMALLER)
def test_nearest_to_a_size(source, target, mode, dtype) -> None:
    mapping = Mapping(mode)
    kernel = nearest_kernel(torch.zeros(1, 1, 1, source, dtype=dtype), (1, target))
    found = positions(mapping, source, target, dtype=dtype, kernel=kernel)
    assert found.dtype == dtype
    assert found.tolist() == read(mapping, source, target, dtype=dtype).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize(("source", "factor"), [*FACTORS, (80, 2.01), (120, 1.7)])
def test_nearest_by_a_factor(source, factor, mode, dtype) -> None:
    mapping = Mapping(mode)
    target = int(source * factor)
    kernel = nearest_kernel(torch.zeros(1, 1, 1, source, dtype=dtype), (1, target))
    found = positions(mapping, source, target, factor, dtype=dtype, kernel=kernel)
    assert found.tolist() == read(mapping, source, factor=factor, dtype=dtype).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_area(source, target, dtype) -> None:
    found = positions(Mapping("area"), source, target, dtype=dtype)
    assert found.dtype == dtype
    close(found, read(Mapping("area"), source, target, dtype=dtype))


@pytest.mark.parametrize(("align_corners", "factor"), [(False, None), (True, None), (False, 2.5), (False, 2.2)])
def test_bicubic_read_with_its_own_kernel(align_corners, factor) -> None:
    mapping = Mapping("bicubic", align_corners)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).sin().mul(7).frac().view(1, 1, 4, 5)
    size = (8, 11) if factor is None else (int(4 * factor), int(5 * factor))
    rows, columns = (
        normalised(positions(mapping, n, m, factor, dtype=torch.float64), n) for n, m in zip((4, 5), size, strict=True)
    )
    grid = torch.stack((columns.expand(size), rows.unsqueeze(1).expand(size)), -1).unsqueeze(0)
    found = F.grid_sample(x, grid, mode=mapping.kernel, padding_mode="border", align_corners=False)
    close(found, mapping.resize(x, size if factor is None else None, factor))


BY_HAND = {
    ("bilinear", False, 2, 4, None): [-0.25, 0.25, 0.75, 1.25],
    ("bilinear", False, 2, 5, 2.5): [-0.3, 0.1, 0.5, 0.9, 1.3],
    ("bilinear", False, 2, 5, None): [-0.3, 0.1, 0.5, 0.9, 1.3],
    ("bilinear", False, 3, 5, 2.0): [-0.25, 0.25, 0.75, 1.25, 1.75],
    ("bilinear", False, 4, 2, None): [0.5, 2.5],
    ("bilinear", False, 3, 3, 1.25): [0.0, 1.0, 2.0],  # torch copies, whatever the factor
    ("bilinear", False, 3, 3, 1.0): [0.0, 1.0, 2.0],
    ("bilinear", False, 4, 5, 1.25): [-0.1, 0.7, 1.5, 2.3, 3.1],
    ("bilinear", True, 3, 5, None): [0.0, 0.5, 1.0, 1.5, 2.0],
    ("bilinear", True, 3, 5, 1.7): [0.0, 0.5, 1.0, 1.5, 2.0],
    ("bilinear", True, 3, 1, None): [0.0],
    ("bilinear", True, 2, 2, None): [0.0, 1.0],
    ("bicubic", False, 2, 4, None): [-0.25, 0.25, 0.75, 1.25],
    ("bicubic", False, 3, 3, 1.25): [-0.1, 0.7, 1.5],  # no copy: bicubic keeps the factor
    ("bicubic", True, 3, 5, None): [0.0, 0.5, 1.0, 1.5, 2.0],
    ("nearest", False, 2, 5, None): [0.0, 0.0, 0.0, 1.0, 1.0],
    ("nearest", False, 2, 4, 2.0): [0.0, 0.0, 1.0, 1.0],
    ("nearest", False, 3, 4, 1.5): [0.0, 0.0, 1.0, 2.0],
    ("nearest", False, 2, 5, 1.25): [0.0, 0.0, 1.0, 1.0, 1.0],  # never beyond the last
    ("nearest-exact", False, 2, 5, None): [0.0, 0.0, 1.0, 1.0, 1.0],
    ("nearest-exact", False, 3, 4, 1.5): [0.0, 1.0, 1.0, 2.0],
    ("area", False, 2, 3, None): [0.0, 0.5, 1.0],
    ("area", False, 3, 4, None): [0.0, 0.5, 1.5, 2.0],
    ("area", False, 3, 4, 1.5): [0.0, 0.5, 1.5, 2.0],
    ("area", False, 2, 4, None): [0.0, 0.0, 1.0, 1.0],
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_numbers_by_hand(case) -> None:
    mode, align_corners, source, target, factor = case
    found = positions(Mapping(mode, align_corners), source, target, factor, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(BY_HAND[case], dtype=torch.float64))


def test_a_decomposed_bilinear_resize_keeps_a_factor_that_rounding_removed() -> None:
    found = positions(Mapping("bilinear"), 3, 3, 1.25, dtype=torch.float64, decomposed=True)
    torch.testing.assert_close(found, torch.tensor([-0.1, 0.7, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_copies_of_nearest_pay_no_heed_to_the_factor(mode) -> None:
    def found(source, target, factor, copies):
        kernel = NearestKernel(torch.float32, copies)
        return positions(Mapping(mode), source, target, factor, dtype=torch.float64, kernel=kernel).tolist()

    formula = {"nearest": [0, 0, 0, 1, 1, 2, 2, 3], "nearest-exact": [0, 0, 1, 1, 2, 2, 3, 3]}[mode]
    assert found(4, 8, 2.01, ()) == formula
    assert found(4, 8, 2.01, (1,)) == formula
    even = [0, 0, 1, 1, 2, 2, 3, 3]
    assert found(4, 8, 2.01, (1, 2)) == (even if mode == "nearest" else formula)
    assert found(4, 8, None, (1, 2)) == even
    once = {"nearest": [0, 0, 1], "nearest-exact": [0, 1, 1]}[mode]
    assert found(3, 3, 1.3, ()) == once
    assert found(3, 3, 1.3, (1, 2)) == ([0, 1, 2] if mode == "nearest" else once)


def test_nearest_is_worked_out_in_the_dtype_of_its_kernel() -> None:
    def at_69(kernel):  # 69 / 2.3, a last bit below 30 in single precision
        return positions(Mapping("nearest"), 100, 230, 2.3, dtype=torch.float64, kernel=kernel)[69].item()

    assert at_69(NearestKernel(torch.float32)) == 29
    assert at_69(NearestKernel(torch.float64)) == 30
    assert at_69(None) == 29


def test_positions_are_made_on_the_device_asked_for() -> None:
    for mode in ("bilinear", "nearest", "area"):
        assert positions(Mapping(mode), 2, 4, dtype=torch.float32, device=torch.device("meta")).device.type == "meta"


def test_the_kernel_torch_takes_for_nearest() -> None:
    direct = NearestKernel(torch.float32, (1, 2))
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.zeros(1, 4, 2, 2, dtype=dtype)
        assert nearest_kernel(x, (64, 64)) == direct
        assert nearest_kernel(x, (64, 65)) == NearestKernel(compute_dtype(dtype), ())
        assert nearest_kernel(x.contiguous(memory_format=torch.channels_last), (64, 65)) == direct
        thin = torch.zeros(1, 3, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
        assert nearest_kernel(thin, (64, 65)) == NearestKernel(compute_dtype(dtype), ())
        assert nearest_kernel(x, (64, 65), decomposed=True) == NearestKernel(torch.float32, ())
        assert nearest_kernel(x.to("meta"), (64, 65)) == NearestKernel(torch.float32, (1,))
        assert nearest_kernel(x.to("meta"), (2, 2), decomposed=True) == NearestKernel(torch.float32, ())


def test_a_mapping_in_words_and_its_kernel() -> None:
    assert Mapping("bicubic").kernel == "bicubic"
    assert {Mapping(mode).kernel for mode in module.MODES if mode != "bicubic"} == {"bilinear"}
    assert Mapping("bilinear", True).describe() == "bilinear, align_corners=True"
    assert Mapping("area").describe() == "area"
    assert not Mapping("bilinear").align_corners
    assert module.MODES == ("nearest", "nearest-exact", "area", "bilinear", "bicubic")


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_is_interpolate(mode, align_corners) -> None:
    x = torch.linspace(-1, 1, 12).view(1, 1, 3, 4)
    given = align_corners if mode in ("bilinear", "bicubic") else None  # the others take none
    for size, factor in [((5, 9), None), (None, (2.0, 1.5))]:
        expected = F.interpolate(x, size, factor, mode, given)
        assert torch.equal(Mapping(mode, align_corners).resize(x, size, factor), expected)


def test_the_constant_part_of_the_scope() -> None:
    assert Scheme(4, (2, 2), False, Mapping("bilinear")).gain() == 0.25
    assert Scheme(4, (2, 2), True, Mapping("bilinear")).gain() == 0.5
    assert not Scheme(4, (2, 2), True, Mapping("bilinear")).decomposed


def test_positions_are_computed_in_single_precision_or_double() -> None:
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)} == {torch.float32}


@pytest.mark.parametrize(
    ("size", "factor"),
    [((3, 5), (2.0, 2.0)), ((3, 5), (1.7, 2.5)), ((3, 5), (2, 1.1)), ((7, 4), (0.5, 1.0)), ((10, 3), (1.1, 1.9))],
)
def test_the_size_a_factor_gives(size, factor) -> None:
    height, width = scaled_size(size, factor)
    assert (height, width) == tuple(F.interpolate(torch.zeros(1, 1, *size), scale_factor=factor).shape[2:])
    assert all(type(number) is int for number in (height, width))


def test_the_size_a_factor_gives_by_hand() -> None:
    assert scaled_size((3, 5), (2.0, 1.7)) == (6, 8)
    assert scaled_size((10**17 + 1, 1), (3.0, 2.99)) == (3 * 10**17 + 3, 2)  # exact: no float in between
    with pytest.raises(ValueError, match="zip"):
        scaled_size((3, 5), (2.0,))


@pytest.mark.parametrize("compiling", [False, True])
def test_known_equal_of_numbers(compiling, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(symbolic_shapes, "statically_known_true", lambda equal: asked.append(equal) or equal)
    assert known_equal((2, 3), (2, 3)) is True
    assert known_equal((2, 3), (2, 4)) is False
    assert known_equal((1, 3), (2, 3)) is False
    # only a compiler's sizes may be symbols
    assert asked == ([True, True, True, False, False] if compiling else [])


def test_known_equal_takes_sizes_of_two_axes(monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="zip"):
        known_equal((2, 3), (2,))


def test_known_equal_of_nothing_in_a_trace(monkeypatch) -> None:
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert known_equal((2, 3), (2, 3)) is False


def test_initial_positions_by_hand() -> None:
    found = initial_positions(Mapping("bilinear"), (2, 4), 1)
    assert found.dtype == torch.float64
    assert found.shape == (1, 16, 1, 1)
    columns, rows = [-0.375, -0.125, 0.125, 0.375], [-0.25] * 4 + [0.25] * 4
    assert found.flatten().tolist() == columns * 2 + rows


def test_initial_positions_of_groups_repeat_within_an_axis() -> None:
    columns, rows = [-0.25, 0.25] * 2, [-0.25] * 2 + [0.25] * 2
    assert initial_positions(Mapping("bilinear"), (2, 2), 3).flatten().tolist() == columns * 3 + rows * 3


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "area"])
def test_initial_positions_of_the_nearest_family_are_zero(mode) -> None:
    found = initial_positions(Mapping(mode), (2, 3), 2)
    assert (found.shape, found.dtype) == ((1, 24, 1, 1), torch.float64)
    assert not found.any()


@pytest.mark.parametrize("mode", ["bilinear", "area"])
def test_initial_positions_are_on_the_cpu_whatever_the_default_device(mode) -> None:
    with torch.device("meta"):
        assert initial_positions(Mapping(mode), (2, 2), 1).device.type == "cpu"


def test_there_are_no_initial_positions_that_are_not_the_same_everywhere() -> None:
    assert initial_positions(Mapping("bicubic"), (2, 2), 1) is None
    assert initial_positions(Mapping("bilinear", True), (2, 2), 1) is None


def test_repeated_positions() -> None:
    sub_pixels = torch.tensor([-0.25, 0.25], dtype=torch.float64)
    found = repeated_positions(sub_pixels, 3)
    assert found.dtype == torch.float64
    assert found.tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]
    assert repeated_positions(sub_pixels.to("meta"), 3).device.type == "meta"


@pytest.mark.parametrize(("fast", "plain"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("scale", [(2, 2), (3, 3), (2, 3), (1, 2)])
def test_shuffle_puts_every_number_in_its_place(scale, fast, plain, monkeypatch) -> None:
    monkeypatch.setattr(module, "_shuffles_fast", lambda field: fast)
    monkeypatch.setattr(module, "plain_functions_wanted", lambda: plain)
    vertical, horizontal = scale
    batch, maps, height, width = 2, 3, 2, 4
    field = torch.arange(batch * maps * vertical * horizontal * height * width)
    field = field.view(batch, maps * vertical * horizontal, height, width)
    out = shuffle(field, scale)
    assert out.shape == (batch, maps, height * vertical, width * horizontal)
    for b, n, y, x in [(0, 0, 0, 0), (1, 2, 3 % (2 * vertical), 5), (0, 1, vertical, horizontal), (1, 0, 1, 3)]:
        channel = n * vertical * horizontal + (y % vertical) * horizontal + x % horizontal
        assert out[b, n, y, x] == field[b, channel, y // vertical, x // horizontal]
    if vertical == horizontal:
        assert torch.equal(out, F.pixel_shuffle(field, vertical))
    assert torch.equal(unshuffle(out, scale), field)


def test_torch_s_own_shuffle_is_taken_only_where_it_is_faster(monkeypatch) -> None:
    def fast(*shape, **kwargs):
        return module._shuffles_fast(torch.zeros(shape).contiguous(**kwargs))

    assert fast(1, 8, 32, 32)
    assert not fast(1, 8, 32, 33)
    assert fast(1, 8, 32, 33, memory_format=torch.channels_last)
    assert not fast(0, 8, 32, 32)
    assert fast(1, 1, 1, 1)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 4, 64, 64)])
def test_shuffle_calls_torch_s_own_where_it_is_taken(shape, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(module.F, "pixel_shuffle", lambda field, factor: calls.append(factor) or field)
    shuffle(torch.zeros(shape), (2, 2))
    shuffle(torch.zeros(shape), (1, 2))
    assert calls == ([2] if shape[2] == 2 else [])


def test_normalised_positions() -> None:
    # the centres of 4 pixels, and the border
    p = torch.tensor([-0.5, 0.0, 1.5, 3.0, 3.5], dtype=torch.float64)
    assert normalised(p, 4).tolist() == [-1.0, -0.75, 0.0, 0.75, 1.0]
