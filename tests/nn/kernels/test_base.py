"""What upsamplers with predicted kernels share: the resize at step 0, state dicts without a gain, torch's tools around them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import upswap
from upswap.nn.kernels.base import GuidedUpsampler
from upswap.nn.watch import PATIENCE

#: By name: the upsampler, the channels of its guide, its options.
KINDS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "carafe": ("carafe", None, {"compressed_channels": 8}),
    "lda_aqu": ("lda_aqu", None, {}),
    "fade": ("fade", 16, {"embedding_dim": 8}),
    "fade-ungated": ("fade", 6, {"gating": False, "embedding_dim": 8}),
    "fade-lite": ("fade-lite", 16, {}),
    "sapa-b": ("sapa-b", 12, {}),
    "sapa-linear": ("sapa-b", 12, {"form": "linear"}),
    "freqfusion": ("freqfusion", 6, {}),
    "freqfusion-plain": (
        "freqfusion",
        16,
        {"resample": False, "padding": "reflect", "hamming": False, "additive": True},
    ),
}
GUIDED = [name for name, (_, guide_channels, _) in KINDS.items() if guide_channels]
RESIZES = [
    ("nearest", False, torch.float16),
    ("nearest-exact", False, torch.float32),
    ("area", False, torch.float64),
    ("bilinear", False, torch.float32),
    ("bicubic", True, torch.bfloat16),
]

every = pytest.mark.parametrize("name", KINDS)
guided = pytest.mark.parametrize("name", GUIDED)


def make(name: str, scale: Any = 2, **more: Any) -> Any:
    upsampler, guide_channels, options = KINDS[name]
    torch.manual_seed(0)
    return upswap.create_upsampler(upsampler, 16, guide_channels, scale, **options, **more)


def moved(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return module


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(name: str, x: Tensor, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The guide for `x`, where the module takes one: of the output's size."""
    channels = KINDS[name][1]
    height, width = size or (2 * x.shape[2], 2 * x.shape[3])
    return {} if channels is None else {"guide": noise(x.shape[0], channels, height, width, seed=3).to(x.dtype)}


def gains(module: Any) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith("gain")}


@every
@pytest.mark.parametrize(("mode", "align_corners", "dtype"), RESIZES, ids=str)
@torch.no_grad()
def test_step_0_is_the_original_resize(name: str, mode: str, align_corners: bool, dtype: torch.dtype) -> None:
    module = make(name, mode=mode, align_corners=align_corners).to(dtype)
    x = noise(2, 16, 3, 4).to(dtype)
    x[0, 0, 0, 0], x[1, 3, 2, 2] = torch.inf, torch.nan
    align = align_corners if mode in ("bilinear", "bicubic") else None
    for size, factor, guide_size in (
        (None, None, (6, 8)),
        (None, (3, 1.5), (9, 6)),
        ((5, 7), None, (5, 7)),
        ((13, 9), None, (6, 8)),
        ((2, 9), None, (6, 8)),
    ):
        for form in (torch.contiguous_format, torch.channels_last):
            one = x.to(memory_format=form)
            more = given(name, one, guide_size)
            for guide in more.values():
                guide[0, 0, 1, 1] = torch.inf
            expected = F.interpolate(one, size, 2 if size is factor is None else factor, mode, align)
            for train in (False, True):
                got = module.train(train)(one, size, factor, **more)
                assert got.dtype == dtype
                assert got.is_contiguous(memory_format=form)
                assert torch.equal(got.nan_to_num(3), expected.nan_to_num(3))
                assert torch.equal(got.isnan(), expected.isnan())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(module(one, size, factor, **more).nan_to_num(3), expected.nan_to_num(3))


@every
def test_the_gain_learns_first_and_then_all(name: str) -> None:
    module = make(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = noise(2, 16, 5, 4)
    moving: set[str] = set()
    for step in range(3):
        optimizer.zero_grad()
        out = module.both(x, **given(name, x)) if name.startswith("freq") else (module(x, **given(name, x)),)
        sum(each.square().mean() for each in out).backward()  # type: ignore[union-attr]
        moving = {name for name, parameter in module.named_parameters() if parameter.grad.any()}
        if step == 0:
            assert moving == gains(module)
            assert module.gain.grad.abs().min() > 0
        optimizer.step()
    assert {name for name, _ in module.named_parameters()} == moving


@every
def test_state_dicts_without_a_gain_are_of_the_published_operator(name: str) -> None:
    published, module, back = (moved(make(name, init="paper")), make(name), make(name, init="paper"))
    state, x = published.state_dict(), noise(1, 16, 5, 6)
    more = given(name, x)
    assert module.state_dict().keys() - state.keys() == gains(module)
    module.load_state_dict(state)
    assert all(parameter.eq(1).all() for key, parameter in module.named_parameters() if key in gains(module))
    assert torch.allclose(module(x, **more), published(x, **more), atol=1e-5)
    back.load_state_dict(module.state_dict())
    assert torch.equal(back(x, **more), published(x, **more))
    with pytest.raises(RuntimeError, match="gain: this checkpoint was trained from the original resize on"):
        back.load_state_dict(make(name).state_dict())


@every
def test_a_load_that_has_nothing_of_it_leaves_the_gain(name: str) -> None:
    model = nn.ModuleDict({"host": nn.Linear(2, 2), "up": make(name)})
    model.load_state_dict({"host.weight": torch.ones(2, 2), "host.bias": torch.ones(2)}, strict=False)
    assert not model["up"].gain.any()


@every
def test_copies_compute_the_same(name: str) -> None:
    for init in ("match", "paper"):
        module, x = moved(make(name, init=init)), noise(1, 16, 5, 6)
        more = given(name, x, (9, 9))
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x, (9, 9), **more), module(x, (9, 9), **more))
            assert repr(twin) == repr(module)


@every
def test_what_transformers_did_not_load_is_initialised(name: str) -> None:
    """It puts memory without values in the place of every tensor, loads some, and asks each module whether it is initialised."""
    module, like = make(name), make(name)
    loaded: dict[str, Tensor] = {}
    for at, (path, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        *above, last = path.split(".")
        owner = module.get_submodule(".".join(above))
        new = torch.full_like(tensor, 7.0)  # no operation wrote to it
        if last in owner._buffers:
            owner._buffers[last] = new
            continue
        owner._parameters[last] = parameter = nn.Parameter(new)
        if at % 3 == 1:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            loaded[path] = parameter.detach().clone()
    assert module._is_hf_initialized
    for path, parameter in module.named_parameters():
        if path in loaded:
            assert torch.equal(parameter, loaded[path]), path
        else:
            assert not parameter.eq(7).any(), path
    assert module.gain.eq(0).all()
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), like.buffers(), strict=True))
    with torch.no_grad():
        module.gain.add_(1.0)  # a step of training
    assert module._is_hf_initialized
    assert module.gain.eq(1).all()


class Fused(nn.Module):
    """A host that gives the upsampler what it takes."""

    def __init__(self, up: nn.Module, takes_guide: bool) -> None:
        super().__init__()
        self.up, self.takes_guide = up, takes_guide

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        more = {"guide": skip} if self.takes_guide else {}
        return self.up(x, size=skip.shape[-2:], **more) + skip.mean()


@pytest.mark.slow  # compilation
@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_compiled_traced_and_exported_it_is_the_same(name: str) -> None:
    channels = KINDS[name][1]
    model = Fused(moved(make(name)), channels is not None).double().eval()
    inputs = [
        (noise(2, 16, *size, seed=1).double(), noise(2, channels or 1, *skip, seed=2).double())
        for size, skip in (((6, 7), (11, 13)), ((9, 5), (18, 10)))
    ]
    torch._dynamo.reset()
    dim = torch.export.Dim
    sizes = ({2: dim("h", min=3), 3: dim("w", min=3)}, {2: dim("skip_h", min=5), 3: dim("skip_w", min=5)})
    twins = {
        "compiled": torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"),
        "exported": torch.export.export(model, inputs[0], dynamic_shapes=sizes).module(),
        "traced": torch.jit.trace(model, inputs[0]),
    }
    for one in inputs:
        for how, twin in twins.items():
            # A trace divides sizes in float32.
            assert torch.allclose(twin(*one), model(*one), atol=1e-5 if how == "traced" else 1e-8), how


@every
def test_it_is_one_node_of_a_graph(name: str) -> None:
    model = Fused(moved(make(name)), KINDS[name][1] is not None)
    graph = fx.symbolic_trace(model)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["up"]
    x, skip = noise(1, 16, 5, 6), noise(1, KINDS[name][1] or 1, 10, 12)
    assert torch.equal(graph(x, skip), model(x, skip))


@every
def test_gradients_are_those_of_what_it_computes(name: str) -> None:
    module = moved(make(name)).double()
    names = [name for name, _ in module.named_parameters()]
    x = noise(1, 16, 3, 4).double()
    inputs = (x, *given(name, x, (5, 7)).values())

    def call(*tensors: Tensor) -> Tensor:
        guide = {"guide": tensors[1]} if len(inputs) == 2 else {}
        state = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(module, state, (tensors[0], (5, 7)), guide)

    tensors = (*(tensor.requires_grad_() for tensor in inputs), *module.parameters())
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_it_trains(name: str, dtype: torch.dtype) -> None:
    module, before = moved(make(name)), nn.Conv2d(3, 16, 1)
    with torch.autocast("cpu", dtype=dtype):
        x = before(noise(1, 3, 4, 6))
        out = module(x, **given(name, x))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    unread = {"gain_hp", "content_encoder2.bias"} if name == "freqfusion" else set()
    for key, parameter in (*before.named_parameters(), *module.named_parameters()):
        assert parameter.grad is not None or key in unread, key
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["carafe", "lda_aqu"])
def test_a_model_patched_with_it_is_the_original(name: str) -> None:
    host = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(16, 4, 3)).eval()
    model = upswap.patch(copy.deepcopy(host), noise(1, 3, 9, 9), upsampler=name)
    report = upswap.verify(host, model, noise(1, 3, 9, 9))
    assert report.max_abs_diff == 0
    report.check(upswap.plan_of(model))


# ---- with a guide


@guided
def test_the_output_has_the_guides_size(name: str) -> None:
    module, x = moved(make(name)), noise(1, 16, 5, 6)
    for size in ((10, 12), (9, 11), (20, 24)):
        assert module(x, **given(name, x, size)).shape == (1, 16, *size)
    more = given(name, x)
    assert module(x, size=(7, 8), **more).shape == (1, 16, 7, 8)
    assert module(x, scale_factor=3, **more).shape == (1, 16, 15, 18)


@guided
def test_what_it_cannot_take_is_said(name: str) -> None:
    module, x = make(name), noise(1, 16, 5, 6)
    assert isinstance(module, GuidedUpsampler)
    count = module.guide_channels
    with pytest.raises(
        upswap.OptionError, match=rf"needs a guide, .*module\(x, guide=feature\), of shape \(1, {count}, h, w\)"
    ):
        module(x)
    for guide in (noise(1, count + 1, 10, 12), noise(2, count, 10, 12), noise(1, count, 4, 12), noise(count, 10, 12)):
        with pytest.raises(
            upswap.ShapeError, match=rf"guide of shape \(1, {count}, h, w\), at least as large as the map of \(5, 6\)"
        ):
            module(x, guide=guide)
    with pytest.raises(upswap.ShapeError, match=r"shape \(B, 16, H, W\)"):
        module(x[:, :3], **given(name, x))
    with pytest.raises(upswap.OptionError, match="not both"):
        module(x, (10, 12), 2, **given(name, x))


@every
@pytest.mark.parametrize("init", ["match", "paper"])
def test_one_step_of_training_is_seen(name: str, init: str) -> None:
    module, x = make(name, init=init), noise(1, 16, 5, 6)
    assert module.is_as_initialised()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(x, **given(name, x)).square().sum().backward()
    optimizer.step()
    assert not module.is_as_initialised()
    assert module.misfit() is None
    module.reset_parameters()
    assert module.is_as_initialised()
    assert not module.to("meta").is_as_initialised()


@every
def test_values_that_are_no_numbers_are_told(name: str) -> None:
    module = make(name)
    with torch.no_grad():
        module.gain[3] = float("nan")
    assert module.misfit() == "has values in gain that are no numbers"
    x = noise(1, 16, 5, 6)
    with pytest.warns(upswap.UpswapWarning, match="has values in gain that are no numbers"):
        module(x, **given(name, x))


@pytest.mark.parametrize("init", ["match", "paper"])
@pytest.mark.parametrize("name", ["carafe", "fade-ungated"])
def test_an_optimiser_that_does_not_know_it_is_told_of(name: str, init: str) -> None:
    module, x = make(name, init=init), noise(1, 16, 2, 2)
    for _ in range(PATIENCE):
        module(x, **given(name, x)).square().sum().backward()
    with pytest.warns(upswap.UpswapWarning, match=r"gradients over 100 forwards.*add_to_optimizer\(model, optimizer\)"):
        module(x, **given(name, x))
