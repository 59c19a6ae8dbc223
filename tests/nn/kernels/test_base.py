"""What upsamplers with predicted kernels share: the resize at step 0, state dicts without a gain, torch's tools around them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upswap
from upswap.nn import CARAFE, LDAAQU

#: Each, by its options, for 16 channels.
MAKERS: dict[str, Callable[..., Any]] = {"carafe": CARAFE, "lda_aqu": LDAAQU}
MODES = [("nearest", False), ("nearest-exact", False), ("area", False), ("bilinear", False), ("bicubic", True)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return module


def calls() -> list[tuple[Any, Any]]:
    return [(None, None), (None, 2.0), (None, (3, 1.5)), ((9, 13), None), ((12, 17), None), ((4, 9), None)]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_step_0_is_the_original_resize(name: str, mode: str, align_corners: bool, dtype: torch.dtype) -> None:
    module = MAKERS[name](16, 2, mode=mode, align_corners=align_corners).to(dtype)
    x = noise(2, 16, 5, 7).to(dtype)
    x[0, 0, 0, 0], x[1, 3, 2, 2] = torch.inf, torch.nan
    for size, factor in calls():
        for given in (x, x.to(memory_format=torch.channels_last)):
            own = size is None and factor is None
            align = align_corners if mode in ("bilinear", "bicubic") else None
            expected = F.interpolate(given, size, 2 if own else factor, mode, align)
            for train in (False, True):
                got = module.train(train)(given, size, factor)
                assert got.dtype == dtype
                assert torch.equal(got.nan_to_num(3), expected.nan_to_num(3))
                assert torch.equal(got.isnan(), expected.isnan())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(module(given, size, factor).nan_to_num(3), expected.nan_to_num(3))


@pytest.mark.parametrize("name", MAKERS)
def test_the_gain_learns_first_and_then_all(name: str) -> None:
    module = MAKERS[name](16, 2, mode="bilinear")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        module(noise(2, 16, 6, 7)).square().mean().backward()
        moving = {name for name, parameter in module.named_parameters() if parameter.grad.any()}
        if step == 0:
            assert moving == {"gain"}
            assert module.gain.grad.abs().min() > 0
        optimizer.step()
    assert {name for name, _ in module.named_parameters()} == moving


@pytest.mark.parametrize("name", MAKERS)
def test_state_dicts_without_a_gain_are_of_the_published_operator(name: str) -> None:
    published, module = moved(MAKERS[name](16, 2, init="paper")), MAKERS[name](16, 2)
    state, x = published.state_dict(), noise(1, 16, 5, 6)
    assert module.state_dict().keys() - state.keys() == {"gain"}
    module.load_state_dict(state)
    assert module.gain.equal(torch.ones(16))
    assert torch.allclose(module(x), published(x), atol=1e-5)
    back = MAKERS[name](16, 2, init="paper")
    back.load_state_dict(module.state_dict())
    assert torch.equal(back(x), published(x))
    with pytest.raises(RuntimeError, match="gain: this checkpoint was trained from the original resize on"):
        back.load_state_dict(MAKERS[name](16, 2).state_dict())


@pytest.mark.parametrize("name", MAKERS)
def test_a_load_that_has_nothing_of_it_leaves_the_gain(name: str) -> None:
    model = nn.ModuleDict({"host": nn.Linear(2, 2), "up": MAKERS[name](16, 2)})
    model.load_state_dict({"host.weight": torch.ones(2, 2), "host.bias": torch.ones(2)}, strict=False)
    assert not model["up"].gain.any()


@pytest.mark.parametrize("name", MAKERS)
def test_copies_compute_the_same(name: str) -> None:
    for init in ("match", "paper"):
        module, x = moved(MAKERS[name](16, 2, init=init)), noise(1, 16, 5, 6)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x, (9, 9)), module(x, (9, 9)))
            assert repr(twin) == repr(module)


@pytest.mark.slow  # compilation
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_compiled_traced_and_exported_it_is_the_same(name: str) -> None:
    module, x, other = moved(MAKERS[name](16, 2)).eval(), noise(2, 16, 6, 7), noise(3, 16, 9, 11, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = {0: torch.export.Dim("b"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(module, (x,), dynamic_shapes=(sizes, *[None] * 2)[:1]).module()
    traced = torch.jit.trace(module, x)
    for each in (x, other):
        expected = module(each)
        for twin in (compiled, program, traced):
            assert torch.allclose(twin(each), expected, atol=1e-5), twin
    assert torch.allclose(compiled(x, (11, 13)), module(x, (11, 13)), atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_what_it_computes(name: str) -> None:
    module = moved(MAKERS[name](16, 2, mode="bilinear")).double()
    names = [name for name, _ in module.named_parameters()]
    x = noise(1, 16, 3, 2).double().requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, (5, 4)))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_it_trains(name: str, dtype: torch.dtype) -> None:
    module, before = moved(MAKERS[name](16, 2)), nn.Conv2d(3, 16, 1)
    with torch.autocast("cpu", dtype=dtype):
        out = module(before(noise(1, 3, 4, 6)))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for parameter in (*before.parameters(), *module.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_patched_with_it_is_the_original(name: str) -> None:
    host = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(16, 4, 3)).eval()
    model = upswap.patch(copy.deepcopy(host), noise(1, 3, 9, 9), upsampler=name)
    report = upswap.verify(host, model, noise(1, 3, 9, 9))
    assert report.max_abs_diff == 0
    report.check(upswap.plan_of(model))
