"""What one call takes besides time: bytes moved, memory, and what autograd keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...probe.dataflow import tensors_in

_aten = torch.ops.aten

# They make memory without writing to it.
_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
# They write to their first argument without reading it.
_WRITE_ONLY = {_aten.copy_, _aten.fill_, _aten.zero_}


def bytes_moved(call: Callable[[], object]) -> int:
    """Bytes that the operators of a call read and write: the sizes of their inputs and outputs, views excluded.

    A count, not a measurement: every input of every operator counts once, whether a cache has it or not, and what a kernel
    makes for itself does not count. Compiled code is not looked into.
    """
    with _Traffic() as traffic:
        call()
    return traffic.bytes


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at one time, its result included, beyond those that there were before it.

    On the CPU from the allocations that torch's profiler records, what compiled code and kernels ask torch for among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library writes what it does to stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, size in steps:
        held += size
        peak = max(peak, held)
    return peak


def saved_for_backward(call: Callable[[], Any], besides: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of a call, those of `besides` left out.

    A view keeps all of the storage that it is of. What a function of one's own keeps other than by `save_for_backward` is
    not seen.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is):
        result = call()
    known = {_storage(tensor) for tensor in besides}
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    del result  # until here no storage could be given to another tensor
    return sum(size for storage, size in sizes.items() if storage not in known)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Traffic(TorchDispatchMode):
    """Adds up what each operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written, inputs = 0, set[int](), set[int]()
        for argument, value in _by_argument(func, args, kwargs):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (argument.is_out or (writes and func.overloadpacket in _WRITE_ONLY))
            for tensor in tensors_in(value):
                inputs.add(_storage(tensor))
                if writes:
                    written.add(_storage(tensor))
                if reads:
                    read += _size(tensor)
        made = [tensor for tensor in tensors_in(out) if _storage(tensor) not in inputs - written]
        # Where nothing is made, what there is was only looked at in another way.
        if made and func.overloadpacket not in _UNWRITTEN:
            self.bytes += read + sum(map(_size, made))
        return out


def _by_argument(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument of an operator's schema that is given, with its value."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]
        elif position < len(args):
            yield argument, args[position]


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: along a dimension that is only expanded there is one."""
    numel = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= length if stride else min(length, 1)
    return numel * tensor.element_size()
