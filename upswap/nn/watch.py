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

#: After how many forwards that find a gradient unchanged weights are told of. Few people add up gradients over more.
PATIENCE = 100

#: How far the largest singular value of independent noise goes above its limit for large matrices: of 1,000 from 16 x 16 to
#: 32 x 256 none beyond 1.07. Training from zero gave 1.3 to 2.9 with 32 x 64 (lp), but 0.9 to 1.8 with 16 x 16 (pl): this alone
#: shows nothing.
_NOISE = 1.12


@dataclasses.dataclass
class _Forwards:
    """The forwards of one upsampler in training, its weight at the first, and what showed then that it was initialised again."""

    first: Tensor | None
    reinitialised: str | None
    count: int = 0


# Beside the modules, not in them: copies and files of a model begin anew.
_seen: WeakKeyDictionary[nn.Module, _Forwards] = WeakKeyDictionary()


def watch(upsampler: Any, weight: nn.Parameter, x: Tensor) -> None:
    """Note one forward in training of `upsampler`, which reads `weight`, on `x`; warn where its training would be lost.

    At the first, `UpswapWarning` for a state that no training explains, and for weights that are frozen where what feeds them
    is trained; after `PATIENCE` that found a gradient, for weights that are still what they were.
    """
    if not torch.is_grad_enabled() or type(x) is not Tensor or plain_functions_wanted():
        return
    if torch._C._len_torch_dispatch_stack():  # of fake tensors, or a trace of what runs: values are not to be asked for
        return
    if getattr(upsampler, "_is_replica", False):  # of nn.DataParallel, made anew for each forward
        return
    seen = _seen.get(upsampler)
    if seen is None:
        found = unexplained(upsampler)
        seen = _Forwards(weight.detach().clone() if weight.requires_grad else None, found)
        _seen[upsampler] = seen
        _say(upsampler, found)
        if not weight.requires_grad and x.requires_grad:
            _say(
                upsampler,
                "is frozen while what feeds it is trained: for p in upswap.parameters(model): p.requires_grad_(True). The "
                "adapter files of PEFT have it by upswap.integrations.peft.with_upsamplers",
            )
        elif not _is_known_to_wrapper(weight):
            _say(
                upsampler,
                "is not known to the DistributedDataParallel it runs in: each process trains its own, and one of them is saved. "
                "Patch the model before it is wrapped",
            )
    seen.count += (
        weight.is_leaf and weight.grad is not None
    )  # as `optimizer.zero_grad()` leaves it that does not know the weight
    if seen.count >= PATIENCE and seen.first is not None:
        same = seen.first.shape == weight.shape and seen.first.device == weight.device
        if same and torch.equal(seen.first, weight.detach().to(seen.first.dtype)):
            _say(
                upsampler,
                f"was given gradients over {PATIENCE} forwards in training, and its weights have not changed. An optimiser made "
                "before the patch does not know them: upswap.add_to_optimizer(model, optimizer) adds them, "
                "upswap.param_groups(model, lr) makes the groups of a new one",
            )
        seen.first = None


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
