"""What a model has beside the values of its state dict: modes, what is trained, memory layouts, types of unsaved buffers.

A pickle keeps these by itself. The other forms have them in their description, so that all give back what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import SourceError

#: The memory format, beside the contiguous one, of tensors of so many dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def traits_of(model: nn.Module) -> dict[str, Any]:
    """The traits as plain data; `docs/plan.md` lists the entries."""
    state = model.state_dict()
    return {
        "training": model.training,
        "other_mode": [path for path, module in model.named_modules() if module.training != model.training],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "channels_last": [name for name, tensor in state.items() if _is_channels_last(tensor)],
        "unsaved": {
            name: _name(buffer.dtype)
            for name, buffer in model.named_buffers()
            if name not in state and buffer.is_floating_point()
        },
    }


def check_traits(found: Mapping[str, Any], path: Path) -> None:
    """`SourceError` where a description read from `path` has traits of another form. Those of older files may be missing."""
    for entry in ("other_mode", "frozen", "channels_last"):
        names = found.get(entry, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"{path} has a damaged upswap header: {entry} is no list of names")
    unsaved = found.get("unsaved", {})
    if not isinstance(unsaved, dict) or not all(isinstance(dtype, str) for dtype in unsaved.values()):
        raise SourceError(f"{path} has a damaged upswap header: unsaved does not give the types of buffers")


def give_traits(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Give a model the traits in a checked description. What it says of names that the model does not have is not read."""
    training, others = bool(found.get("training")), set(found.get("other_mode", ()))
    for path, module in model.named_modules():
        module.training = training != (path in others)  # not by `train`, which reaches the children, and may do more
    if "frozen" in found:
        frozen = set(found["frozen"])
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name not in frozen)
    channels_last, unsaved = set(found.get("channels_last", ())), found.get("unsaved", {})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in channels_last and tensor.dim() in _CHANNELS_LAST:
            tensor.data = tensor.data.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
        dtype = vars(torch).get(unsaved.get(name, ""))
        # Numbers of another kind would be other numbers.
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _is_channels_last(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dim() in _CHANNELS_LAST
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
