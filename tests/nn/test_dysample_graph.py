"""What an exporter of one's own sees of a DySample: operations that every converter has, in four dimensions at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from releases import skip_where_export_ties_sizes
from upswap import DySample

OPTIONS = [
    {},
    {"style": "pl"},
    {"dyscope": True},
    {"scale": (2, 3)},
    {"scale": 1.5},
    {"mode": "nearest"},
    {"mode": "bicubic", "align_corners": True},
    {"mode": "area"},
    {"init": "paper", "mode": "nearest-exact"},
]


def randomised(options: dict[str, Any]) -> DySample:
    torch.manual_seed(0)
    module = DySample(24, **options).eval()
    state = {
        name: torch.randn_like(value) if name != "init_pos" else value for name, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_exported_graph_has_four_dimensions_at_most(options: dict[str, Any], dynamic: bool) -> None:
    if dynamic:
        skip_where_export_ties_sizes(options.get("scale"))
    module = randomised(options)
    x = torch.randn(2, 24, 6, 8)
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    shapes = ({2: height, 3: width},) if dynamic else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    made = [node.meta.get("val") for node in program.graph.nodes]
    assert max(value.dim() for value in made if isinstance(value, torch.Tensor)) == 4
    for size in ((6, 8), (9, 5)) if dynamic else ((6, 8),):
        x = torch.randn(2, 24, *size)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_plain_functions_compute_the_same(options: dict[str, Any]) -> None:
    module = randomised(options)
    x = torch.randn(3, 24, 7, 5)
    for how in ({}, {"size": (13, 11)}, {"scale_factor": 1.7}):
        mapped = torch.func.vmap(lambda one, how=how: module(one, **how))(x.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(mapped, module(x, **how), rtol=1e-5, atol=1e-5)


def test_offsets_of_zero_stay_the_original_resize() -> None:
    module = DySample(24).eval()
    x = torch.randn(2, 24, 6, 8)
    graph = make_fx(torch.export.export(module, (x,)).module())(x)
    expected = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(graph(x), expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning"
)  # as users call it
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trace_with_its_own_check_serves_other_sizes(options: dict[str, Any]) -> None:
    module = randomised(options)
    traced = torch.jit.trace(module, torch.randn(1, 24, 6, 8))
    for size in ((6, 8), (9, 5), (1, 1)):
        x = torch.randn(2, 24, *size)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-5, atol=1e-5)
