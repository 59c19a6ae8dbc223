"""One model of a zoo: how to build it small with random weights, and what to run it on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet

#: `model(*args, **kwargs)`
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model that resizes something, or that is right to have nothing to swap.

    `build()` gives the same random weights each time, in eval mode. `inputs(model, 0)` and `inputs(model, 1)` are eval inputs
    of two sizes (two batches of one size, where the model takes one size only); further numbers, up to `count`, are odd sizes
    and other batches. `training(model)` is a batch for train mode, with targets where the model computes its own loss; None
    where it cannot be trained. All are seeded and new at each call.
    """

    zoo: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], Arguments]
    training: Callable[[nn.Module], Arguments] | None
    count: int = 2
    #: Site name -> "kind" or "kind => route", every site; None where only the checks are of interest.
    expected: Mapping[str, str] | None = None
    #: Whether `upswap.patch(model)` is to find example inputs by itself; else it is given `inputs(model, 0)`.
    inferred: bool = True
    #: max|difference| / max|output| at step 0 in float32, with the reason beside it where it is not the promised 1e-5.
    tolerance: float = 1e-5
    #: Options of `patch`.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: In the tests as well as in the coverage command.
    tested: bool = True


def seeded(build: Callable[[], nn.Module], settle: Callable[[nn.Module], Arguments] | None = None) -> nn.Module:
    """The same random weights each time, in eval mode, without touching the global random state.

    Residual branches are made small, as training leaves them: random ones of that depth send every box out of the image.
    With `settle`, batch-norm statistics are those of a batch, without which maps die out on their way through a narrow network
    and no output depends on what is resized.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build()
        for module in model.modules():
            if isinstance(module, resnet.BasicBlock | resnet.Bottleneck):
                nn.init.constant_(
                    module.bn2.weight if isinstance(module, resnet.BasicBlock) else module.bn3.weight, 0.1
                )
        if settle is not None:
            norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
            for norm, _ in norms:
                norm.momentum = 1.0
            args, kwargs = settle(model)
            with torch.no_grad():
                model.train()(*args, **kwargs)
            for norm, momentum in norms:
                norm.momentum = momentum
                norm.num_batches_tracked.zero_()
        return model.eval()


def batches(*shapes: tuple[int, int, int]) -> Callable[[nn.Module, int], Arguments]:
    """Batches of (count, height, width), each the same whenever it is asked for."""

    def inputs(model: nn.Module, number: int) -> Arguments:
        count, height, width = shapes[number]
        return (torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(number)),), {}

    return inputs


def seeded_case(
    zoo: str,
    name: str,
    build: Callable[[], nn.Module],
    expected: Mapping[str, str] | None,
    inputs: Callable[[nn.Module, int], Arguments],
    *,
    training: Callable[[nn.Module], Arguments] | None = None,
    batch: int = 1,
    count: int = 3,
    **fields: Any,
) -> Case:
    """A case that trains on the batch of the number `batch`, or on `training`, which its norms are settled by too."""
    training = training or (lambda model: inputs(model, batch))
    made = functools.partial(seeded, build, training)
    return Case(zoo, name, made, inputs, training, count=count, expected=expected, **fields)
