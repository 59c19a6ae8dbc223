"""The operators' definitions in plain PyTorch, which benchmarks compare with."""

from __future__ import annotations

import pytest
import torch

from upswap.apps.bench.contenders import CONTENDERS, Settings


@pytest.mark.parametrize("name", ["carafe", "lda_aqu", "fade", "sapa-b", "freqfusion"])
def test_an_operator_computes_what_its_definition_does(name: str) -> None:
    """Outputs and all gradients, in float64: what is timed side by side is the same."""
    contender, reference = (
        next(each for each in CONTENDERS if each.name == wanted) for wanted in (name, f"reference-{name}")
    )
    ours, theirs = (each.make(Settings(64)).double() for each in (contender, reference))
    with torch.no_grad():  # away from the start, where kernels are all but uniform and offsets 0
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.add_(torch.randn_like(mine) * 0.2)
            other.copy_(mine)
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64, requires_grad=True)
    guide = torch.randn(2, 64, 12, 10, dtype=torch.float64, requires_grad=True)
    wanted, upstream = [x, guide] if contender.guided else [x], torch.randn(2, 64, 12, 10, dtype=torch.float64)
    given = {"guide": guide} if contender.guided else {}
    results = []
    for module in (ours, theirs):
        out = module(x, **given)
        used = [*wanted, *(each for key, each in module.named_parameters() if not key.endswith("gain_hp"))]
        results.append([out, *torch.autograd.grad(out, used, upstream, allow_unused=True)])
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1e-3)
    assert results[0][1].abs().max() > 0
