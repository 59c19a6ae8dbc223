"""Where two models that should compute the same begin to differ: in their weights, and in the first layer of a run."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...probe.dataflow import tensors_in
from ...probe.inputs.inputs import Inputs
from ...probe.preserve import leaving_no_trace
from ..apply import installed, is_patched


@dataclasses.dataclass(frozen=True)
class Difference:
    """`layer` is the path of the first module whose output differs, None where every module's agrees; `after` the path of
    the upsampler that ran just before it; `weights` the state-dict keys that hold other values, in the original's order."""

    layer: str | None
    layer_class: str
    after: str | None
    weights: tuple[str, ...]

    def __str__(self) -> str:
        if self.layer is None:
            where = "no layer by itself gives another output"
        else:
            where = f"the first layer that differs is {self.layer or 'the model itself'} ({self.layer_class})"
            where += f", just after the upsampler {self.after}" if self.after else ""
        if self.weights:
            more = f" and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
            where += (
                f". The weights are not the same either ({self.weights[0]}{more}): the patched model was trained, or the "
                "original was made anew with other weights"
            )
        return where


def first_difference(original: nn.Module, patched: nn.Module, inputs: Inputs, tolerance: float) -> Difference:
    """Run both in eval mode and compare what each module that both have gives, call by call, in the order of the run.

    `tolerance` is relative to the largest absolute value of the original's output. Both models are left as found.
    """
    expected: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
    _watched(original, inputs, lambda path, _, tensors: expected[path].append(tensors))
    upsamplers = {path for path, _ in installed(patched)} if is_patched(patched) else set()
    calls: Counter[str] = Counter()
    found: list[Difference] = []
    before: list[str] = [""]

    def look(path: str, module: nn.Module, tensors: list[torch.Tensor]) -> None:
        index, calls[path] = calls[path], calls[path] + 1
        if not found and index < len(expected[path]) and not _agree(expected[path][index], tensors, tolerance):
            after = before[0] if before[0] in upsamplers else None
            found.append(Difference(path, type(module).__name__, after, ()))
        before[0] = path

    _watched(patched, inputs, look)
    weights = _other_weights(original, patched)
    return dataclasses.replace(found[0] if found else Difference(None, "", None, ()), weights=weights)


def _watched(model: nn.Module, inputs: Inputs, see: Callable[[str, nn.Module, list[torch.Tensor]], None]) -> None:
    """Run a model and call `see` with the path, the module and a copy of the tensors of every module's output."""

    def watch(path: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            see(path, module, [tensor.detach().clone() for tensor in tensors_in(output)])

        module.register_forward_hook(hook)

    with leaving_no_trace(model), torch.no_grad():  # the hooks go with the rest of what is put back
        for path, module in model.named_modules():
            watch(path, module)
        own = inputs.copied()
        model(*own.args, **own.kwargs)


def _agree(expected: list[torch.Tensor], got: list[torch.Tensor], tolerance: float) -> bool:
    return len(expected) == len(got) and all(
        old.shape == new.shape and _close(old, new, tolerance) for old, new in zip(expected, got, strict=True)
    )


def _close(old: torch.Tensor, new: torch.Tensor, tolerance: float) -> bool:
    if not old.numel() or not old.is_floating_point():
        return torch.equal(old, new)
    old, new = old.double().nan_to_num(), new.double().nan_to_num()
    return (new - old).abs().max().item() <= tolerance * max(old.abs().max().item(), 1e-30)


def _other_weights(original: nn.Module, patched: nn.Module) -> tuple[str, ...]:
    theirs = patched.state_dict()
    return tuple(
        name
        for name, tensor in original.state_dict().items()
        if isinstance(tensor, torch.Tensor)
        and (name not in theirs or tensor.shape != theirs[name].shape or not torch.equal(tensor, theirs[name]))
    )
