"""The compiled code of `native.c` against torch's functions and float64, and where it is not to be used."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import upswap
from upswap.nn.dysample import DySample
from upswap.nn.sampling import compile_native, native, sampler
from upswap.nn.sampling.positions import Scheme

LAYOUTS = [torch.contiguous_format, torch.channels_last]
CALLS: list[dict[str, Any]] = [{}, {"size": (37, 41)}, {"scale_factor": (2.0, 2.5)}]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The installed code, or else what a compiler makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("UPSWAP_NATIVE", raising=False)
        if native.library() is None:
            if compile_native.is_x86() and "AVX" not in torch.backends.cpu.get_cpu_capability():
                pytest.skip("this processor has no AVX2")
            if compile_native.compiler() is None or sys.platform == "win32":
                pytest.skip("there is no C compiler for it here")
            binary = tmp_path_factory.mktemp("native") / "_native.so"
            assert compile_native.compile_native(binary) is None
            patch.setattr(compile_native, "BINARY", binary)
            native.library.cache_clear()
        assert native.library() is not None
        yield
    native.library.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions, as they are called."""
    calls: list[str] = []
    run = native._run

    def noted(function: Any, *rest: Any) -> None:
        calls.append(function.__name__)
        run(function, *rest)

    monkeypatch.setattr(native, "_run", noted)
    return calls


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


BOTH = ["upswap_forward", "upswap_backward"]


def trained(channels: int = 64, groups: int = 4, **options: Any) -> DySample:
    """A module whose offsets reach a pixel or two, and beyond the border."""
    torch.manual_seed(0)
    module = DySample(channels, options.pop("scale", 2), groups=groups, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2.4 / channels**0.5)
    return module


def gradients(module: DySample, x: Tensor, how: dict[str, Any]) -> tuple[Tensor, ...]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x, **how)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])


def both(
    module: DySample, x: Tensor, how: dict[str, Any], patch: pytest.MonkeyPatch
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Output and gradients of the compiled code, and of torch's functions."""
    ours = gradients(module, x, how)
    with patch.context() as without:
        without.setenv("UPSWAP_NATIVE", "0")
        return ours, gradients(module, x, how)


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max(), index


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("how", CALLS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dyscope": True},
        {"style": "pl"},
        {"style": "pl", "dyscope": True, "groups": 8},
        {"align_corners": True},
        {"mode": "nearest"},
        {"mode": "nearest-exact", "dyscope": True},
        {"mode": "area"},
        {"scale": (3, 1)},
        {"scale": 1, "dyscope": True},
        {"scale": 1.5},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_torch_and_of_float64(
    options: dict[str, Any],
    how: dict[str, Any],
    layout: torch.memory_format,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = trained(**options)
    x = torch.randn(2, 64, 17, 15).contiguous(memory_format=layout)
    ours, theirs = both(module, x, how, monkeypatch)
    assert taken == BOTH
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[1].is_contiguous(memory_format=layout)
    exact = gradients(copy.deepcopy(module).double(), x.double(), how)
    assert taken == BOTH
    assert_close(ours, theirs, 2e-4)
    assert_close(tuple(tensor.double() for tensor in ours), exact, 2e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 2, 2), 1),  # the smallest
        ((3, 12, 5, 7), 4),  # groups of 3 channels, fewer than a vector has
        ((2, 20, 9, 41), 1),  # 20 channels are no whole number of vectors, 82 columns more than are turned at a time
        ((1, 64, 3, 33), 4),  # groups of 16
        ((1, 48, 6, 5), 6),
    ],
    ids=str,
)
def test_all_shapes(
    shape: tuple[int, ...], groups: int, layout: torch.memory_format, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained(shape[1], groups)
    x = torch.randn(shape).contiguous(memory_format=layout)
    ours, theirs = both(module, x, {}, monkeypatch)
    assert taken == BOTH
    assert_close(ours, theirs, 2e-5)
    ours, theirs = both(module, x, {"size": (2 * shape[2] + 1, 3 * shape[3])}, monkeypatch)
    assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_outputs_too_large_for_a_cache(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained(32)
    x = torch.randn(1, 32, 256, 256).contiguous(memory_format=layout)
    with torch.no_grad():
        out = module(x)
        assert out.nbytes == 2**25
        monkeypatch.setenv("UPSWAP_NATIVE", "0")
        expected = module(x)
    # Wide maps: torch's normalised coordinates are off by some 1e-5 pixels.
    assert (out - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_offsets_of_0_give_the_nearest_pixel_bit_for_bit(mode: str, layout: torch.memory_format) -> None:
    module = DySample(32, 2, mode=mode)  # type: ignore[arg-type]
    x = torch.randn(1, 32, 33, 40).contiguous(memory_format=layout)
    for how in ({"scale_factor": 2.0}, {"size": (70, 133)}):
        assert torch.equal(module(x, **how), torch.nn.functional.interpolate(x, mode=mode, **how))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_maps(
    dtype: torch.dtype, layout: torch.memory_format, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained()
    x = torch.randn(2, 64, 9, 11).to(dtype).contiguous(memory_format=layout)
    ours, theirs = both(module, x, {}, monkeypatch)
    assert taken == BOTH
    assert ours[0].dtype == ours[1].dtype == dtype
    assert_close(ours, theirs, 2**-7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_crops_and_gradients_of_any_strides(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained()
    whole = torch.randn(2, 64, 14, 15).contiguous(memory_format=layout)

    def results() -> tuple[Tensor, ...]:
        x = whole.clone().requires_grad_()
        out = module(x[..., 1:-2, 2:-1])
        # The gradient of the first sum is one number, expanded.
        return out.detach(), *torch.autograd.grad(
            out.sum() + out.mT.flatten(2).square().sum(), [x, module.offset.weight]
        )

    ours = results()
    monkeypatch.setenv("UPSWAP_NATIVE", "0")
    assert_close(ours, results(), 2e-5)


def test_a_map_that_needs_no_gradient(taken: list[str]) -> None:
    module, x = trained(), torch.randn(1, 64, 8, 9)
    expected = gradients(module, x, {})[2:]
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * weights).sum(), list(module.parameters()))
    assert taken == BOTH * 2
    assert_close(got, expected, 0)


def read(x: Tensor, offsets: Tensor) -> Tensor:
    """Of one group, at the positions of a bilinear resize to twice the size."""
    scheme = Scheme(1, (1, 1), False, DySample(x.shape[1], 2).base)
    rows, columns = ((torch.arange(2 * n) + 0.5) / 2 - 0.5 for n in x.shape[2:])
    return native.forward(x, offsets / scheme.gain(), (rows, columns), (2 * x.shape[2], 2 * x.shape[3]), scheme)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_infinite_offsets_read_the_border_and_no_number_gives_none(layout: torch.memory_format) -> None:
    x = torch.randn(1, 8, 6, 7).contiguous(memory_format=layout)
    offsets = torch.zeros(1, 2, 12, 14)
    offsets[0, :, 3, 4] = math.inf
    offsets[0, :, 3, 5] = -math.inf
    offsets[0, 0, 5, 6] = 1e30
    offsets[0, 0, 7, 7] = math.nan
    offsets[0, 1, 8, 8] = math.nan
    out, plain = read(x, offsets), read(x, torch.zeros_like(offsets))
    assert torch.equal(out[..., 3, 4], x[..., -1, -1])
    assert torch.equal(out[..., 3, 5], x[..., 0, 0])
    assert torch.allclose(out[..., 5, 6], 0.75 * x[..., 2, -1] + 0.25 * x[..., 3, -1])
    assert out[..., 7, 7].isnan().all()
    assert out[..., 8, 8].isnan().all()
    for row, column in ((3, 4), (3, 5), (5, 6), (7, 7), (8, 8)):
        out[..., row, column] = plain[..., row, column]
    assert torch.equal(out, plain)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_infinity_beside_the_last_row_or_column_stays_where_it_is(layout: torch.memory_format) -> None:
    x = torch.randn(1, 8, 9, 10)
    x[0, 3, 5, 8] = x[0, 2, 7, 4] = math.inf
    out = read(x.contiguous(memory_format=layout), torch.zeros(1, 2, 18, 20))
    expected = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    assert torch.equal(out.isfinite()[..., 18:], expected.isfinite()[..., 18:])
    assert torch.equal(out.isfinite()[..., 17:, :], expected.isfinite()[..., 17:, :])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_every_number_of_threads_gives_the_same_each_time(groups: int, layout: torch.memory_format) -> None:
    """Of one image, with fewer threads than groups, as many, and so many that groups are divided."""
    module = trained(64, groups)
    x = torch.randn(1, 64, 33, 32).contiguous(memory_format=layout)
    torch.set_num_threads(1)
    alone = gradients(module, x, {})
    for number in (2, 3, 8, 50):
        torch.set_num_threads(number)
        got = gradients(module, x, {})
        for one, other in zip(got, gradients(module, x, {}), strict=True):
            assert torch.equal(one, other)
        assert_close(got, alone, 1e-5)


def test_slices_are_whole_groups_or_parts_of_one() -> None:
    for channels, groups, threads, expected in (
        *((64, 4, 1, 1), (64, 4, 2, 2), (64, 4, 3, 4), (64, 4, 5, 8), (64, 4, 99, 8)),
        *((64, 1, 3, 4), (24, 6, 4, 6), (24, 6, 7, 6), (20, 1, 2, 2), (7, 7, 3, 7)),
    ):
        assert native._slices(1, channels, groups, threads) == expected
        assert native._slices(threads, channels, groups, threads) == 1


def test_compiled_code_and_autocast_take_it_too(taken: list[str]) -> None:
    module, x = trained(), torch.randn(1, 64, 8, 9)
    with torch.no_grad():
        out = module(x)
        field, reading = module._field(x), module._reading(x, (16, 18), None)
        assert torch.equal(sampler._operator(x, field, None, reading.size, None, *sampler._flat(reading.scheme)), out)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), out)
    assert taken == BOTH[:1] * 3


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_second_derivatives_raise(taken: list[str]) -> None:
    module, x = trained(), torch.randn(1, 64, 8, 9, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    assert taken == BOTH
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_it_does_not_compute(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Hearing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    module, x = trained(), torch.randn(2, 64, 8, 9)
    with torch.device("cpu"):
        expected = module(x)
    assert taken == BOTH[:1]
    assert torch.allclose(module.double()(x.double()), expected.double(), atol=1e-4)
    module.float()
    for mode in (Seeing(), Hearing()):
        with mode:
            assert torch.allclose(module(x), expected, atol=1e-4)
    monkeypatch.setenv("UPSWAP_NATIVE", "0")
    assert torch.allclose(module(x), expected, atol=1e-4)
    monkeypatch.delenv("UPSWAP_NATIVE")
    assert module(x[:0]).shape == (0, 64, 16, 18)
    assert module(x[..., :1]).shape == (2, 64, 16, 2)
    assert module(x[..., :1, :]).shape == (2, 64, 2, 18)
    trained(mode="bicubic")(x)
    torch.func.vmap(module)(x.unsqueeze(1))
    assert taken == BOTH[:1]
    traced = torch.jit.trace(module, x)  # which checks itself against the module as it runs
    assert torch.allclose(traced(x[:1]), expected[:1], atol=1e-4)


def test_code_of_another_text_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "native.c"
    other.write_text("/* another text */")
    monkeypatch.setattr(compile_native, "SOURCE", other)
    native.library.cache_clear()
    assert native.library() is None
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None


def test_a_probe_sees_through_an_upsampler_of_the_hosts_own() -> None:
    """What comes of it is still a learned feature of the input."""

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.last = nn.Conv2d(3, 64, 3, 2, 1), trained(), nn.Conv2d(64, 2, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = F.interpolate(self.up(self.stem(image)), scale_factor=2.0, mode="bilinear")
            return self.last(x)

    (site,) = upswap.inspect(Host().eval(), torch.randn(1, 3, 32, 32)).swapped
    assert site.kind == "feature"
