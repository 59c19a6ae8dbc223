"""What an upsampler says by itself while it is trained: that its weights are lost, before the training is spent."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UpswapWarning
from .sampling.autograd import plain_functions_wanted

#: After how many forwards that find a gradient unchanged weights are told of, and frozen ones after how many. Few people add up
#: gradients over more, or train one of two networks for longer before the other.
PATIENCE = 100

#: How far the largest singular value of independent noise goes above its limit for large matrices: of 1,000 from 16 x 16 to
#: 32 x 256 none beyond 1.07. Training from zero gave 1.3 to 2.9 with 32 x 64 (lp), but 0.9 to 1.8 with 16 x 16 (pl): this alone
#: shows nothing.
_NOISE = 1.12


@dataclasses.dataclass
class _Forwards:
    """The forwards of one upsampler in training, and what its first showed of an initialisation over its own."""

    reinitialised: str | None
    frozen: int = 0
    """For how many its weights were frozen, and its input was not, before the first that could train it."""
    is_trained: bool = False
    first: Tensor | None = None
    """Its weight at the first that could train it, until it is known whether it changes."""
    found_gradient: int = 0


# Beside the modules, not in them: copies and files of a model begin anew.
_seen: WeakKeyDictionary[nn.Module, _Forwards] = WeakKeyDictionary()


def watch(upsampler: Any, weight: nn.Parameter, x: Tensor) -> None:
    """Note one forward in training of `upsampler`, which reads `weight`, on `x`; warn where its training would be lost.

    At the first, `UpswapWarning` for a state that no training explains. After `PATIENCE` that found a gradient, for weights that
    are still what they were; after as many in which they were frozen and never trained, where what feeds them is.
    """
    if not torch.is_grad_enabled() or type(x) is not Tensor or plain_functions_wanted():
        return
    if (
        type(torch.empty(0, device=x.device)) is not Tensor
    ):  # all that is computed here is fake, and has no values to be asked for
        return
    if getattr(upsampler, "_is_replica", False):  # of nn.DataParallel, made anew for each forward
        return
    seen = _seen.get(upsampler)
    if seen is None:
        seen = _seen[upsampler] = _Forwards(unexplained(upsampler))
        _say(upsampler, seen.reinitialised)
    if weight.requires_grad:
        _watch_training(upsampler, weight, seen)
    elif not seen.is_trained and x.requires_grad:
        seen.frozen += 1
        if seen.frozen == PATIENCE:
            _say(upsampler, _frozen(upsampler, x))


def _watch_training(upsampler: Any, weight: nn.Parameter, seen: _Forwards) -> None:
    if not seen.is_trained:
        seen.is_trained = True
        seen.first = weight.detach().clone()
        if not _is_known_to_wrapper(weight):
            _say(
                upsampler,
                "is not known to the DistributedDataParallel it runs in: each process trains its own, and one of them is saved. "
                "Patch the model before it is wrapped",
            )
    # As `optimizer.zero_grad()` leaves it that does not know the weight.
    seen.found_gradient += weight.is_leaf and weight.grad is not None
    if seen.found_gradient >= PATIENCE and seen.first is not None:
        same = seen.first.shape == weight.shape and seen.first.device == weight.device
        if same and torch.equal(seen.first, weight.detach().to(seen.first.dtype)):
            _say(
                upsampler,
                f"was given gradients over {PATIENCE} forwards in training, and its weights have not changed. An optimiser made "
                "before the patch does not know them: upswap.add_to_optimizer(model, optimizer) adds them, "
                "upswap.param_groups(model, lr) makes the groups of a new one",
            )
        seen.first = None


def _frozen(upsampler: Any, x: Tensor) -> str | None:
    """What to say of an upsampler that was frozen all the time, where that is a loss: it learned nothing, and others do."""
    if not upsampler.is_as_initialised() or not _is_fed_by_parameters(x):
        return None
    return (
        f"was frozen over {PATIENCE} forwards in training, while what feeds it is trained: for p in upswap.parameters(model): "
        "p.requires_grad_(True). The adapter files of PEFT have it by upswap.integrations.peft.with_upsamplers"
    )


def _is_fed_by_parameters(x: Tensor) -> bool:
    """Whether a gradient of `x` would reach a parameter, and not only an input that was asked for its own."""
    todo, known = [x.grad_fn], {x.grad_fn}
    while todo:
        node = todo.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        found = {following for following, _ in getattr(node, "next_functions", ())} - known
        known |= found
        todo += found
    return False


def unexplained(upsampler: Any) -> str | None:
    """What an upsampler has that neither its own initialisation, nor a load, nor training puts there; None if nothing.

    What training leaves can look like an initialisation: of one that was trained here, what its first forward showed holds.
    """
    seen = _seen.get(upsampler)
    found = upsampler.misfit() or (upsampler.reinitialised() if seen is None else seen.reinitialised)
    return cast("str | None", found)


def _is_known_to_wrapper(weight: nn.Parameter) -> bool:
    """Whether the DistributedDataParallel that runs, if one does, had the weight when it was made."""
    running: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    known = getattr(running, "_module_parameters", None)
    return known is None or not weight.requires_grad or any(weight is each for each in known)


def _say(upsampler: nn.Module, what: str | None) -> None:
    if what is not None:
        text = (
            f"{type(upsampler).__name__}({upsampler.extra_repr()}) {what}. upswap.status(model) lists every upsampler by its "
            "place in the model"
        )
        warnings.warn(text, UpswapWarning, stacklevel=5)


def values(tensor: Tensor) -> Tensor | None:
    """The values of a parameter or buffer, gathered where they are spread; None where it has none."""
    if tensor.is_meta:
        return None
    whole = getattr(tensor, "full_tensor", None)  # a DTensor's
    return (tensor if whole is None else whole()).detach()


def is_noise(weight: Tensor) -> bool:
    """Whether the entries of a weight (out, in, ...) look drawn independently of each other, as an initialisation draws them.

    The largest singular value of such an m x n matrix is s * (sqrt(m) + sqrt(n)) for entries of standard deviation s, if m
    and n are large (Marchenko and Pastur, 1967). Gradients are sums of few outer products, so that training from zero
    leaves a larger one. Small matrices, in which both look alike, are no noise.
    """
    matrix = weight.detach().flatten(1).double()
    rows, columns = matrix.shape
    norm = float(matrix.norm())
    edge = (math.sqrt(rows) + math.sqrt(columns)) / math.sqrt(rows * columns)
    if not math.isfinite(norm) or norm == 0 or edge * _NOISE > 0.75:
        return False
    return float(torch.linalg.matrix_norm(matrix, 2)) <= _NOISE * edge * norm
