"""A bound on the memory that building what a file describes may take.

A header of a few bytes can name an architecture of any size. The file also holds the weights, and these say how large the
architecture can be: what is built has the same tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import SourceError

# Measured over 37 models of SMP, timm, torchvision: building makes at most 1.8 times the bytes of the state dict (weights,
# their first values, tables of positions) and 2.7 times its tensors. Files of half precision hold half the bytes.
# The floors are for small models with large tables.
_BYTES_EACH, _BYTES_FLOOR = 8, 256 * 2**20
_TENSORS_EACH, _TENSORS_FLOOR = 10, 5_000

# No layer count or image size is larger; a larger number has to be a dimension of a tensor in the file.
_PLAIN_NUMBER = 4096


@contextlib.contextmanager
def allocating_at_most(tensors: Mapping[str, torch.Tensor], path: str) -> Iterator[None]:
    """Inside, making tensors of more memory than those in the file at `path` explain raises `SourceError`.

    All memory that operations ask for is counted, before they get it, whether it is given back later or not.
    """
    once = {id(tensor): tensor for tensor in tensors.values()}
    held = sum(tensor.numel() * tensor.element_size() for tensor in once.values())
    meter = _Meter(_BYTES_FLOOR + _BYTES_EACH * held, _TENSORS_FLOOR + _TENSORS_EACH * len(tensors))
    try:
        with meter:
            yield
    except Exception as error:
        # A library may have put an error of its own in the place of ours.
        if meter.exceeded:
            raise SourceError(_refusal(path, meter.exceeded, held, len(tensors))) from error
        raise
    if meter.exceeded:
        raise SourceError(_refusal(path, meter.exceeded, held, len(tensors)))


def check_numbers(values: Any, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """`SourceError` for a number among the options of an architecture that the file's tensors cannot explain.

    Not all that a number makes is tensors: libraries count layers in plain Python.
    """
    largest = max((size for tensor in tensors.values() if tensor.numel() for size in tensor.shape), default=0)
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, int | float) and not abs(leaf) <= max(_PLAIN_NUMBER, largest):
            raise SourceError(
                f"{path} names an architecture with the number {str(leaf)[:20]}, and its largest tensor has a side of {largest}: "
                "these do not belong together. Where they do, build the model yourself and pass it as model="
            )


def _refusal(path: str, exceeded: str, held: int, count: int) -> str:
    return (
        f"{path} describes a model far larger than the weights in it ({count} tensors, {held / 2**20:.1f} MiB): building it "
        f"would take more than {exceeded}. Where that is meant, build the model yourself and pass it as model="
    )


class _Meter(TorchDispatchMode):
    """Adds up the memory of the results of every operation; raises before the one that goes beyond the limit."""

    def __init__(self, most_bytes: int, most_tensors: int) -> None:
        super().__init__()
        self.most_bytes, self.most_tensors = most_bytes, most_tensors
        self.bytes = self.tensors = 0
        self.exceeded = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        kwargs = kwargs or {}
        # The mode of fake tensors comes after this one, whichever was entered first.
        if not _makes_tensors(func) or detect_fake_mode(None) is not None:
            return func(*args, **kwargs)
        made = _on_meta(func, args, kwargs)
        if made is not None:
            self._count(made)
            return func(*args, **kwargs)
        # No way to tell beforehand: how many elements are not zero, for one; never more than the arguments have.
        result = func(*args, **kwargs)
        self._count(_real(result))
        return result

    def _count(self, made: list[torch.Tensor]) -> None:
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in made)
        self.tensors += len(made)
        if self.bytes > self.most_bytes:
            self.exceeded = f"{self.most_bytes / 2**20:,.0f} MiB"
        elif self.tensors > self.most_tensors:
            self.exceeded = f"{self.most_tensors:,} tensors"
        if self.exceeded:
            raise SourceError(f"more than {self.exceeded}")


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation gives tensors with memory of their own: neither views nor what it was given to write to."""
    returns = func._schema.returns
    return any("Tensor" in str(value.type) and value.alias_info is None for value in returns)


def _on_meta(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor] | None:
    """The results of an operation without their memory; none where it takes none, as with fake tensors; None if unknown."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    device = kwargs.get("device")
    if any(_is_unreal(leaf) for leaf in leaves) or (device is not None and torch.device(device).type == "meta"):
        return []
    if not leaves and "device" not in kwargs and not _takes_device(func):
        return None
    meta_args, meta_kwargs = pytree.tree_map_only(torch.Tensor, _meta, (args, kwargs))
    if _takes_device(func):
        meta_kwargs = {**meta_kwargs, "device": "meta"}
    try:
        return _tensors(func(*meta_args, **meta_kwargs))
    except (RuntimeError, NotImplementedError):
        return None


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _is_unreal(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


def _real(result: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(result) if not _is_unreal(tensor)]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
