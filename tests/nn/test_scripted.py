"""A scripted DySample computes what the module does: every mode, style and way of calling it."""

from __future__ import annotations

import inspect
import io
from typing import Any

import pytest
import torch
from torch import nn

from upswap import DySample

# torch says that scripting is deprecated, at each use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

MODES = [("nearest", False), ("nearest-exact", False), ("area", False), ("bilinear", False), ("bilinear", True),
         ("bicubic", False), ("bicubic", True)]  # fmt: skip
FORMS: list[tuple[Any, ...]] = [("lp", False, 2, "match"), ("pl", True, (2, 1), "match"), ("lp", True, 2.5, "paper")]
CALLS: list[dict[str, Any]] = [
    {}, {"size": [10, 14]}, {"size": [17, 9]}, {"scale_factor": 2.0}, {"scale_factor": [1.7, 2.01]},
    {"scale_factor": [1.01, 1.01]}, {"size": [1, 1]}, {"scale_factor": 0.7},
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "align_corners", "dtype"),
    [
        *((*mode, torch.float32) for mode in MODES),
        *(pytest.param(*mode, torch.float64, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_a_scripted_module_is_the_module(mode: Any, align_corners: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for style, dyscope, scale, init in FORMS:
        module = DySample(8, scale, style, 2, dyscope, mode=mode, align_corners=align_corners, init=init, dtype=dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
        scripted = torch.jit.script(module)
        for shape in ((5, 7), (40, 90)):
            plain = torch.randn(2, 8, *shape, dtype=dtype)
            for x in (plain, plain.contiguous(memory_format=torch.channels_last)):
                for call in CALLS:
                    expected, got = module(x, **call), scripted(x, **call)
                    assert got.dtype == dtype
                    assert got.stride() == expected.stride()
                    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), (style, shape, call)


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_into_a_scripted_module(
    style: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As little as into the module: half-precision offsets are off by whole pixels on wide maps."""
    # A scripted module rounds as torch's functions do, on wide maps by more than the compiled code and this tolerance.
    monkeypatch.setenv("UPSWAP_NATIVE", "0")
    torch.manual_seed(0)
    module = DySample(8, 2, style, 2, dyscope=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 8, 6, 300).to(dtype)
    scripted = torch.jit.script(module)
    wanted = list(module.parameters())
    for compiled in (scripted, torch.jit.freeze(torch.jit.script(module.eval()))):
        for call in ({}, {"size": [9, 611]}, {"size": [3, 150]}) * 2:  # TorchScript optimises what has run
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, got = module(x, **call), compiled(x, **call)
            assert got.dtype == expected.dtype
            assert (got - expected).abs().max() <= (2e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = module(x).float().square().mean(), scripted(x).float().square().mean()
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("call", [{}, {"size": [15, 21]}, {"scale_factor": 3.0}, {"size": [14, 21]}])
def test_a_scripted_module_reads_where_the_positions_it_loaded_say(call: dict[str, Any]) -> None:
    """Released checkpoints hold positions rounded to float32, and the module reads at them in float64."""
    torch.manual_seed(0)
    module = DySample(8, 3, init="paper", dtype=torch.float64)
    exact = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    module.load_state_dict({**exact, "init_pos": exact["init_pos"].float()})
    expected = module(x, **call)
    assert (torch.jit.script(module)(x, **call) - expected).abs().max() <= 1e-12
    module.load_state_dict(exact)
    # The check has teeth: rounded positions show, but at a size of its own, which only formulas know.
    assert torch.equal(module(x, **call), expected) == (call == {"size": [14, 21]})


def test_a_scripted_module_refuses_integers() -> None:
    with pytest.raises(torch.jit.Error, match="another shape or dtype"):
        torch.jit.script(DySample(8, 2))(torch.zeros(1, 8, 4, 4, dtype=torch.int64))


def test_gradients_of_a_scripted_module() -> None:
    torch.manual_seed(0)
    module = DySample(8, 2, dyscope=True).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x).square().sum(), wanted)
    got = torch.autograd.grad(torch.jit.script(module)(x).square().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_is_saved_needs_no_upswap() -> None:
    """The code of the archive names torch's own operators alone."""
    scripted = torch.jit.script(DySample(8, 2))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(torch.jit.load(file)(x), scripted(x))
    assert "upswap::" not in str(scripted.inlined_graph)


def test_signatures_stay() -> None:
    parameters = inspect.signature(DySample.forward).parameters
    assert list(parameters) == ["self", "x", "size", "scale_factor"]
    assert parameters["size"].annotation == "int | Sequence[int] | None"
