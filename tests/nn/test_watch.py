"""An upsampler that loses what it learned, or is not trained, says so in training; one that is right says nothing."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import upswap
from upswap import DySample
from upswap.nn.watch import PATIENCE, is_noise

X = torch.randn(2, 32, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def all_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", upswap.UpswapWarning)
        yield


def of_all_parameters(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)


@pytest.mark.parametrize("options", [{}, {"dyscope": True}, {"init": "paper"}, {"groups": 8}], ids=str)
def test_what_an_initialisation_of_all_parameters_left_is_told_at_the_first_forward(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = DySample(32, **options)
    module.apply(of_all_parameters)
    module.eval()(X)
    with torch.no_grad():
        module.train()(X)
    with pytest.warns(upswap.UpswapWarning, match=r"DySample\(32.*standard deviation 0.02.*reset_parameters"):
        module(X)
    module(X)  # once
    module.reset_parameters()
    assert module.is_as_initialised()


def _trained(module: DySample) -> DySample:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    target = torch.randn(2, 32, 12, 14, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        (module(X) - target).square().mean().backward()
        optimizer.step()
    return module


def _noisy() -> DySample:
    """As training may leave one of few channels: with entries that look independent, and are known to be its own."""
    module = DySample(32)
    state = module.state_dict()
    state["offset.weight"] = torch.randn(state["offset.weight"].shape, generator=torch.Generator().manual_seed(2))
    module.load_state_dict(state)
    return module


def _pickled(module: DySample) -> DySample:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: DySample = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("make", [lambda: DySample(32), lambda: _trained(DySample(32)), _noisy])
@pytest.mark.parametrize(
    "carry",
    [lambda m: m, copy.deepcopy, _pickled, lambda m: m.double().float(), lambda m: m.half().float().to("cpu")],
    ids=["itself", "copy", "pickle", "cast", "half"],
)
def test_weights_of_ones_own_are_not_told(make: Callable[[], DySample], carry: Callable[[DySample], DySample]) -> None:
    module = carry(make())
    assert is_noise(module.offset.weight) == (make is _noisy)
    module(X)


def test_what_is_loaded_after_an_initialisation_counts() -> None:
    module = DySample(32)
    module.apply(of_all_parameters)
    module.load_state_dict(DySample(32).state_dict())
    module(X)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.offset.bias.data.fill_(float("nan")), "values in offset.bias that are no numbers"),
        (lambda m: m.init_pos.fill_(3.0), "another init_pos than it was made with"),
    ],
    ids=["nan", "init_pos"],
)
def test_other_losses_are_told(spoil: Callable[[DySample], Any], message: str) -> None:
    module = DySample(32)
    spoil(module)
    with pytest.warns(upswap.UpswapWarning, match=message):
        module(X.clone().requires_grad_())


HOST = nn.Conv2d(32, 32, 1)  # trained, before the upsampler
FROZEN = r"DySample\(32.*was frozen over 100 forwards.*while what feeds it is trained.*with_upsamplers"


def test_a_frozen_upsampler_in_a_trained_host_is_told_once() -> None:
    module = DySample(32).requires_grad_(False)
    for _ in range(PATIENCE - 1):
        module(HOST(X))
    with pytest.warns(upswap.UpswapWarning, match=FROZEN):
        module(HOST(X))
    for _ in range(PATIENCE):
        module(HOST(X))


def test_a_network_that_is_frozen_for_the_step_of_another_is_no_loss() -> None:
    """A discriminator, in the generator's step; either may be first, and go on for longer."""
    module = DySample(32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        module.requires_grad_(False)
        for _ in range(PATIENCE - 1):
            module(HOST(X)).square().sum().backward()
        module.requires_grad_(True)
        optimizer.zero_grad()
        module(HOST(X).detach()).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: DySample(32), lambda: X),
        (lambda: DySample(32), lambda: X.clone().requires_grad_()),  # an image's gradient is asked for
        (lambda: DySample(32), lambda: 2 * X.clone().requires_grad_()),
        (lambda: _trained(DySample(32)), lambda: HOST(X)),
        (lambda: copy.deepcopy(_trained(DySample(32))), lambda: HOST(X)),  # trained elsewhere
    ],
    ids=["frozen host", "leaf", "computed", "trained", "loaded"],
)
def test_what_is_frozen_and_no_loss(make: Callable[[], DySample], given: Callable[[], torch.Tensor]) -> None:
    module = make().requires_grad_(False)
    for _ in range(2 * PATIENCE):
        module(given())


def test_weights_that_were_frozen_first_are_watched_from_then_on() -> None:
    module = DySample(32).requires_grad_(False)
    for _ in range(PATIENCE + 1):
        module(X.clone().requires_grad_())
    module.requires_grad_(True)
    for _ in range(PATIENCE):
        module(X).square().sum().backward()
    with pytest.warns(upswap.UpswapWarning, match=r"gradients over 100 forwards"):
        module(X)


def test_weights_that_no_step_changes_are_told_once() -> None:
    module = DySample(32)
    for _ in range(PATIENCE):
        module(X).square().sum().backward()
    with pytest.warns(upswap.UpswapWarning, match=r"gradients over 100 forwards.*add_to_optimizer\(model, optimizer\)"):
        module(X)
    module(X)


def test_gradients_may_be_added_up_before_a_step() -> None:
    module = DySample(32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for forward in range(2 * PATIENCE):
        module(X).square().sum().backward()
        if forward % 64 == 63:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.trace(_method)?. is deprecated:FutureWarning"
)  # it is called on purpose
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants of the trace, as asked
def test_compiled_and_traced_training_asks_nothing() -> None:
    module = DySample(32)
    module.apply(of_all_parameters)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(X)
    torch.func.vmap(module)(X.unsqueeze(1))
    torch.func.grad(lambda x: module(x).sum())(X)
    torch.compile(module, backend="eager", fullgraph=True)(X)
    torch.jit.trace(module, X)


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (32, 256), (128, 64)], ids=str)
@pytest.mark.parametrize(
    "init",
    [nn.init.normal_, nn.init.trunc_normal_, nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_],
)
def test_noise(shape: tuple[int, int], init: Callable[[torch.Tensor], Any]) -> None:
    torch.manual_seed(0)
    weight = torch.empty(shape)
    for _ in range(20):
        init(weight)
        assert is_noise(weight)
        assert not is_noise(weight + 2 * weight.std() * torch.randn(shape[0], 1) @ torch.randn(1, shape[1]))


@pytest.mark.parametrize(
    "weight", [torch.zeros(32, 32), torch.ones(32, 32), torch.full((32, 32), float("nan")), torch.randn(8, 4)]
)
def test_no_noise(weight: torch.Tensor) -> None:
    assert not is_noise(weight)
