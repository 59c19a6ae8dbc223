"""Memory formats: telling contiguous from channels_last, and changing large maps from one to the other on a CPU.

The changes are no operations of autograd: they are for code that computes its own gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on torch 2.15: the numbers in an image's map from which torch's own copy is slower.
_LARGE = 2**18
# Bytes. Addresses that lie this far apart, or a multiple of it, share their few places in a processor's first cache.
_ALIASED = 2**12


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` (B, C, H, W) is laid out as channels_last and not, ambiguously, as contiguous too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of what is computed from `x` (B, C, H, W)."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()` of (B, C, H, W); of large channels_last maps on a CPU in a quarter to two thirds of the time.

    One image after the other it is the transposition of a matrix, which torch does block by block.
    """
    if not _is_large(x) or not is_channels_last(x):
        return x.contiguous()
    out = x.new_empty(x.shape)
    for image, place in zip(x.permute(0, 2, 3, 1).flatten(1, 2), out.flatten(2), strict=True):
        place.copy_(image.t())
    return out


def channels_last(x: Tensor) -> Tensor:
    """`x.contiguous(memory_format=torch.channels_last)` of (B, C, H, W); of large contiguous maps on a CPU faster.

    torch reads every channel of a pixel before the next pixel. Of few channels at a time all that is read stays in the
    cache: a fifth of the time where channels are a power of two apart, as they are in an image of 512 x 512.
    """
    if not _is_large(x) or not x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    apart = x.shape[2] * x.shape[3] * x.element_size()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    channels = 32 if apart % _ALIASED else 16
    for some, place in zip(x.split(channels, 1), out.split(channels, 1), strict=True):
        place.copy_(some)
    return out


def _is_large(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() >= _LARGE * max(1, x.shape[0])
