"""Resizes that no `F.interpolate` makes: other kernels of torch, and maps enlarged by repeating. They are told, not replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .dataflow import Node

_LAYOUTS = ("contiguous", "clone")


class ResizeKernels(TorchDispatchMode):
    """Hears of every resize kernel that torch runs, whoever asked for it: `torch.ops.aten`, a scripted function.

    `heard` is called with the name of the kernel.
    """

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(("aten::upsample_", "aten::_upsample_")):
            self.heard(name)
        return func(*args, **(kwargs or {}))


def enlarges_by_repeating(node: Node) -> bool:
    """Whether a call makes a learned map larger by repeating its rows or columns: `repeat_interleave`, or `expand` and
    `reshape`."""
    if len(node.shape) != 4 or not node.learned or not node.inputs:
        return False
    source = node.inputs[0]
    if node.name in ("reshape", "view"):
        while source.name in _LAYOUTS and source.inputs:
            source = source.inputs[0]
        if source.name not in ("expand", "broadcast_to"):
            return False
        while len(source.shape) > 4 and source.inputs:
            source = source.inputs[0]
    elif node.name == "repeat_interleave":
        # Of rows and then of columns, or the other way round: of one alone, the pairs of an embedding are made.
        while source.name == "repeat_interleave" and source.inputs:
            source = source.inputs[0]
    else:
        return False
    larger = [new > old for new, old in zip(node.shape, source.shape, strict=False)]
    return len(source.shape) == 4 and larger == [False, False, True, True]
