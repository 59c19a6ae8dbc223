"""A bound on what building and running a model that a file describes may take: memory, operations, modules.

A header of a few bytes can name an architecture of any size. The file also holds the weights, and these say how large the
architecture can be: what is built has the same tensors.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import SourceError

# Measured over 37 models of SMP, timm, torchvision: building makes at most 1.8 times the bytes of the state dict (weights,
# their first values, tables of positions) and 2.7 times its tensors. Files of half precision hold half the bytes.
# The floors are for small models with large tables.
_BYTES_EACH, _BYTES_FLOOR = 8, 256 * 2**20
_TENSORS_EACH, _TENSORS_FLOOR = 10, 2_000
# Modules without tensors and operations on the meta device take no memory there, but time.
_MODULES_EACH, _MODULES_FLOOR = 20, 2_000
_OPERATIONS_EACH, _OPERATIONS_FLOOR = 100, 50_000
# What one run of a model computes at small inputs is not bounded by its weights: attention at full resolution.
_RUN_BYTES_FLOOR = 2**30

# No layer count or image size is larger; a larger number has to be a dimension of a tensor in the file.
PLAIN_NUMBER = 4096


class Budget:
    """What a model that is described by the file at `path` may take, which holds `tensors`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: str) -> None:
        self._path, self._count = path, len(tensors)
        storages = {id(tensor): tensor.untyped_storage() for tensor in tensors.values() if _has_memory(tensor)}
        # A tensor can be larger than its memory, and several can share one.
        self._held = sum({storage.data_ptr(): storage.nbytes() for storage in storages.values()}.values())
        sides = (size for tensor in tensors.values() if _has_memory(tensor) for size in tensor.shape)
        self._largest = max(sides, default=0)
        self._operations = _OPERATIONS_FLOOR + _OPERATIONS_EACH * self._count
        self._building = _Meter(
            _BYTES_FLOOR + _BYTES_EACH * self._held,
            _TENSORS_FLOOR + _TENSORS_EACH * self._count,
            self._operations,
            _MODULES_FLOOR + _MODULES_EACH * self._count,
        )

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Inside, all times together, making more than the file's tensors explain raises `SourceError`.

        All memory that operations ask for is counted, before they get it, whether it is given back later or not.
        """
        meter = self._building
        try:
            with meter.on():
                yield
        except Exception as error:
            # A library may have put an error of its own in the place of ours.
            if meter.exceeded:
                raise SourceError(self._refusal()) from error
            raise
        if meter.exceeded:
            raise SourceError(self._refusal())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a run that takes more memory or operations than a small model's raises `MemoryError`."""
        meter = _Meter(
            _RUN_BYTES_FLOOR + _BYTES_EACH * self._held, self._operations, self._operations, self._operations
        )
        try:
            with meter.on():
                yield
        finally:
            if meter.exceeded:
                raise MemoryError(f"running the model would take more than {meter.exceeded}")

    def check_numbers(self, values: Any, most: int = PLAIN_NUMBER) -> None:
        """`SourceError` for a number above `most` in what describes a model that the file's tensors cannot explain.

        Not all that a number makes is tensors: libraries count layers in plain Python.
        """
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, int | float) and not abs(leaf) <= max(most, self._largest):
                raise SourceError(
                    f"{self._path} describes a model with the number {str(leaf)[:20]}, and its largest tensor has a "
                    f"side of {self._largest}: these do not belong together. Where they do, build the model yourself and "
                    "pass it as model="
                )

    def _refusal(self) -> str:
        return (
            f"{self._path} describes a model far larger than the weights in it ({self._count} tensors, "
            f"{self._held / 2**20:.1f} MiB): building it would take more than {self._building.exceeded}. Where that is "
            "meant, build the model yourself and pass it as model="
        )


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether there is memory for all elements of a tensor, as there is not for an expanded one, and for one at all."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


class _Meter(TorchDispatchMode):
    """Adds up the memory of the results of every operation; raises before the one that goes beyond the limit."""

    def __init__(self, most_bytes: int, most_tensors: int, most_operations: int, most_modules: int) -> None:
        super().__init__()
        self.most_bytes, self.most_tensors = most_bytes, most_tensors
        self.most_operations, self.most_modules = most_operations, most_modules
        self.bytes = self.tensors = self.operations = self.modules = 0
        self.exceeded = ""

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, count what this thread does."""
        thread = threading.get_ident()

        def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if threading.get_ident() == thread:
                self.modules += 1
                self._check()

        hook = register_module_module_registration_hook(count)
        try:
            with self:
                yield
        finally:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        kwargs = kwargs or {}
        self.operations += 1
        self._check()
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
        self._check()

    def _check(self) -> None:
        if self.bytes > self.most_bytes:
            self.exceeded = f"{self.most_bytes / 2**20:,.0f} MiB"
        elif self.tensors > self.most_tensors:
            self.exceeded = f"{self.most_tensors:,} tensors"
        elif self.operations > self.most_operations:
            self.exceeded = f"{self.most_operations:,} operations"
        elif self.modules > self.most_modules:
            self.exceeded = f"{self.most_modules:,} modules"
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
