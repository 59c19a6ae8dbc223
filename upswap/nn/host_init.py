"""Upsamplers in models that transformers builds: it makes modules without values, and initialises what it did not load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .projection import KnownValues

#: What transformers sets on a tensor that it loaded, and asks of a module before it initialises it.
_FLAG = "_is_hf_initialized"


class InitialisesItself:
    """For an upsampler of `KnownValues`: asked by transformers whether it is initialised, it makes sure that it is.

    So the host's `_init_weights`, whatever it does to the modules it is given, is never given an upsampler.
    """

    @property
    def _is_hf_initialized(self) -> bool:
        give_missing_values(self)
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Nothing: it always is."""


@torch.no_grad()
def give_missing_values(upsampler: Any) -> None:
    """Initialise those tensors of an upsampler that were put into it without values; those that were loaded stay."""
    knowing = [module for module in upsampler.modules() if isinstance(module, KnownValues)]
    # Copies are as new to torch, but their values are known.
    replaced = {id(tensor) for each in knowing if each.was_changed() for tensor in each.parameters(recurse=False)}
    own = dict(upsampler.named_parameters())
    missing = {name for name, tensor in own.items() if id(tensor) in replaced and _was_never_written(tensor)}
    positions = any(_was_never_written(buffer) for buffer in upsampler.buffers())
    if missing:
        loaded = [(tensor, tensor.clone()) for name, tensor in own.items() if name not in missing]
        found = [(buffer, buffer.clone()) for buffer in upsampler.buffers() if not positions]
        upsampler.reset_parameters()
        for tensor, value in loaded + found:
            tensor.copy_(value)
    elif positions:
        upsampler.reset_positions()
    for module in knowing:
        if all(hasattr(parameter, _FLAG) for parameter in module.parameters(recurse=False)):
            module.note_values()


def _was_never_written(tensor: Tensor) -> bool:
    """Whether a tensor is as it was allocated: transformers did not load it, and no operation wrote to it."""
    if tensor.is_meta or tensor.is_inference() or getattr(tensor, _FLAG, False):
        return False
    return tensor._version == 0
