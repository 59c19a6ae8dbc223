"""Each sampler computes what grid_sample does, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upswap import DySample, OptionError
from upswap.nn.sampling.samplers import GRIDSAMPLE, Sampler, far_from_nearest

SAMPLERS = [Sampler("gather", True), Sampler("gather"), Sampler("window", reach=12)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"dyscope": True},
    {"style": "pl"},
    {"scale": (2, 3)},
    {"scale": 1.5},
    {"mode": "nearest"},
    {"mode": "area"},
    {"mode": "nearest-exact", "groups": 1},
    {"mode": "bicubic"},
    {"mode": "bicubic", "align_corners": True, "groups": 2},
    {"mode": "bilinear", "align_corners": True},
]


def made(**options: Any) -> DySample:
    torch.manual_seed(0)
    module = DySample(24, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def run(module: nn.Module, x: Tensor, **target: Any) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = module(x, **target)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_outputs_and_gradients(options: dict[str, Any], sampler: Sampler) -> None:
    module = made(**options).double()
    for size, target in (((10, 12), {}), ((7, 13), {"size": (17, 31)}), ((1, 5), {}), ((5, 4), {"scale_factor": 2.3})):
        x = torch.randn(2, 24, *size, dtype=torch.float64)
        module.sampler = GRIDSAMPLE
        expected = run(module, x, **target)
        module.sampler = sampler
        for got, wanted in zip(run(module, x, **target), expected, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-9 * wanted.detach().abs().max().item())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_dtypes_and_layouts_stay(sampler: Sampler) -> None:
    module = made()
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 24, 6, 8).to(dtype).contiguous(memory_format=layout)
            module.sampler = GRIDSAMPLE
            expected = module(x)
            module.sampler = sampler
            got = module(x)
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=layout)
            assert torch.allclose(got.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_a_window_from_a_file_cannot_be_of_any_width() -> None:
    module = made()
    module.sampler = ("window", False, 10**9)
    with pytest.raises(OptionError, match="16 at most"):
        module(torch.ones(1, 24, 4, 4))


def test_a_window_stops_at_its_reach() -> None:
    """A point further out is read at the end of the window, and not between no pixels at all."""
    module = made()
    with torch.no_grad():
        module.offset.weight.zero_()
        module.offset.bias.fill_(100.0)  # 25 pixels
    x = torch.ones(1, 24, 8, 8)
    module.sampler = Sampler("window", reach=2)
    assert torch.allclose(module(x), torch.ones(1, 24, 16, 16))


# torch announces the end of what is tested, and warns of every size that a trace asks for
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:Converting a tensor:torch.jit.TracerWarning",
)
def test_no_tensor_has_more_than_four_dimensions() -> None:
    for options in ({"scale": (2, 3)}, {"dyscope": True, "mode": "bicubic"}):
        for sampler in SAMPLERS:
            module = made(**options).eval()
            module.sampler = sampler._replace(reach=1)
            graph = torch.jit.trace(module, torch.randn(2, 24, 6, 8)).inlined_graph
            ranks = [len(sizes) for node in graph.nodes() for value in node.outputs() if (sizes := _sizes(value))]
            assert max(ranks) == 4, (options, sampler)


def _sizes(value: Any) -> list[int] | None:
    return value.type().sizes() if value.type().kind() == "TensorType" else None


def test_points_are_where_a_call_reads() -> None:
    module = made(mode="nearest", groups=2)
    x = torch.randn(2, 24, 5, 6)
    rows, columns = module.points(x, size=(11, 13))
    assert rows.shape == columns.shape == (2, 2, 11, 13)
    grid = torch.stack(((2 * columns + 1) / 6 - 1, (2 * rows + 1) / 5 - 1), dim=-1).flatten(0, 1)
    read = nn.functional.grid_sample(x.view(4, 12, 5, 6), grid, padding_mode="border", align_corners=False)
    assert torch.allclose(read.view(2, 24, 11, 13), module(x, size=(11, 13)), atol=1e-5)
    with pytest.raises(OptionError, match="smaller than the input"):
        module.points(x, size=(3, 3))


def test_far_from_nearest() -> None:
    rows = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 4)
    away = far_from_nearest(rows, 3, 2)
    assert away[0, 0, :, 0].tolist() == [0, 1, 1, 2, 2, 3]  # of 3 rows made 6, nearest reads 0 0 1 1 2 2
