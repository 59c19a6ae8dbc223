"""What flows into what: the tensors of one run of a model, as a graph of the functions that made them.

The recorder is a `TorchFunctionMode`, so the graph is made of public functions (`conv2d`, `interpolate`, `Tensor.view`),
not of the kernels under them. It holds no tensors alive.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

#: Operations with weights, or that mix positions or channels by data. A resize with none of these after it makes an output.
MIXING = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_convolution",
    "deform_conv2d", "linear", "bilinear", "embedding", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum",
    "__matmul__", "__rmatmul__", "scaled_dot_product_attention", "multi_head_attention_forward", "batch_norm",
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "lstm", "gru",
})  # fmt: skip
#: Arithmetic and normalisation with weights or buffers (a mean, a gain): what comes of an image is still that image.
_POINTWISE = frozenset({
    "add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__truediv__", "__rtruediv__", "true_divide", "batch_norm", "layer_norm", "group_norm",
    "instance_norm", "rms_norm",
})  # fmt: skip
#: Products, in which a learned gain can be one of the factors.
PRODUCTS = frozenset({
    "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__",
})  # fmt: skip
#: More channels than this are those of a feature map, which a stand-alone decoder takes. Satellites' images have up to 29 bands.
_MOST_BANDS = 32
#: What passes no gradient on: what comes after is not learned from.
COMPARISONS = frozenset({
    "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__", "gt", "ge", "lt", "le", "eq", "ne", "greater",
    "less", "argmax", "argmin", "argsort", "__bool__", "bool", "long", "int", "nonzero", "isnan",
})  # fmt: skip
#: Functions that fuse maps of one size: sums, and concatenations of their channels.
ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
_REDUCTIONS = frozenset({
    "mean", "amax", "amin", "max", "sum", "logsumexp", "norm",
})  # fmt: skip
_WINDOWED = frozenset({"avg_pool2d", "max_pool2d", "lp_pool2d"})
#: Functions that read the values of a tensor and give no tensor.
READERS = frozenset({"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "equal", "allclose", "numpy"})
_WRITERS = frozenset({
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__",
})  # fmt: skip
#: Functions that take a tensor for its shape and type alone.
_SHAPED_LIKE = frozenset({
    "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like",
    "full_like", "rand_like", "randn_like",
})  # fmt: skip


class Operand(NamedTuple):
    """A tensor that a call was given: itself, and the one whose memory it has, which it may be a view of."""

    tensor: weakref.ref[torch.Tensor]
    memory: weakref.ref[torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Operand:
        """What stands for a tensor without holding it alive: of one that lives, the references are always the same objects."""
        return cls(weakref.ref(tensor), weakref.ref(tensor if tensor._base is None else tensor._base))


@dataclasses.dataclass(eq=False)
class Node:
    """One call of a function, or the source of a tensor that no recorded call made.

    `source` is None for calls; else "input", "parameter", "buffer", or "unknown" (a tensor whose maker was not seen).
    `parametric` says that it was made of parameters and buffers alone, `trained` that a parameter is among them. `order`
    counts the calls of a run; `operands` are the tensors that went into a sum or concatenation, in the order of `inputs`.
    """

    name: str
    inputs: list[Node]
    source: str | None = None
    integral: bool = False
    shape: tuple[int, ...] = ()
    reduces: bool = False
    users: list[Node] = dataclasses.field(default_factory=list)
    from_input: bool = False
    learned: bool = False
    parametric: bool = False
    trained: bool = False
    order: int = 0
    operands: tuple[Operand, ...] = ()

    def __post_init__(self) -> None:
        for node in self.inputs:
            node.users.append(self)
        # A tensor of unknown origin may come from the input by a path the recorder cannot see (a custom autograd function).
        self.from_input = self.source in ("input", "unknown")
        is_map = self.source == "input" and len(self.shape) == 4 and self.shape[1] > _MOST_BANDS
        self.learned = self.source == "unknown" or is_map
        self.parametric = self.source in ("parameter", "buffer")
        self.trained = self.source == "parameter"
        for node in self.inputs:
            self.from_input |= node.from_input
            self.learned |= node.learned
            self.parametric |= node.parametric
            self.trained |= node.trained
        # A weight may have been computed from parameters (scaled, standardised, low-rank) before it is used.
        self.learned |= self.parametric and self.from_input and self.name not in _POINTWISE
        self.parametric &= not self.from_input
        self.trained &= self.parametric

    def mixes(self) -> bool:
        """Whether this call has weights, or mixes positions or channels: one of `MIXING`, or a learned gain for each channel."""
        if self.name in MIXING:
            return True
        gains = [node for node in self.inputs if node.trained] if self.name in PRODUCTS else []
        return any(max(gain.shape, default=1) == math.prod(gain.shape) > 1 for gain in gains)

    def is_pooled(self) -> bool:
        """Whether this tensor's grid was made by an adaptive or global pooling, which gives one grid at every input size."""
        seen: set[int] = set()
        queue: list[Node] = [self]
        while queue:
            node = queue.pop()
            if node.name.startswith("adaptive_") or (node.reduces and self.shape[-2:] == (1, 1)):
                return True
            seen.add(id(node))
            if node.name == "interpolate":  # its grid is the one it was resized to
                continue
            queue += [n for n in node.inputs if id(n) not in seen and n.shape[-2:] == self.shape[-2:]]
        return False

    def downstream(self) -> Iterator[Node]:
        """Every node this one's result flows into with its gradient, itself left out."""
        seen: set[int] = set()
        queue = list(self.users)
        while queue:
            node = queue.pop()
            if id(node) not in seen:
                seen.add(id(node))
                if node.name not in COMPARISONS:
                    queue += node.users
                yield node


class Flow:
    """The graph, filled in as a run goes on."""

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[weakref.ref[torch.Tensor], Node]] = {}
        self.outputs: list[Node] = []
        self._calls = 0
        #: When memory was written to, by the number of the call, for each tensor that owns some.
        self._written: dict[int, tuple[weakref.ref[torch.Tensor], list[int]]] = {}

    def add_source(self, tensors: Iterable[torch.Tensor], source: str) -> None:
        """Declare tensors that are there before the run: "input", "parameter" or "buffer"."""
        for tensor in tensors:
            self._bind(tensor, Node(source, [], source, integral=_integral(tensor), shape=tuple(tensor.shape)))

    def add_call(self, name: str, args: Any, kwargs: Any, result: Any) -> Node | None:
        """Record that `name(*args, **kwargs)` gave `result`."""
        outputs = tensors_in(result)
        in_place = _writes(name)
        if not outputs and not in_place and name not in READERS:
            return None  # a question about a tensor's shape or type
        given = [] if name in _SHAPED_LIKE else tensors_in((args, kwargs))
        inputs = [self.node_of(tensor) for tensor in given]
        shape = tuple(outputs[0].shape) if outputs else ()
        self._calls += 1
        node = Node(
            name,
            inputs,
            integral=any(_integral(t) for t in outputs),
            shape=shape,
            reduces=_reduces(name, args),
            order=self._calls,
            operands=tuple(map(Operand.of, given)) if name in ADDITIONS or name in CONCATENATIONS else (),
        )
        for tensor in outputs:
            self._bind(tensor, node)
        if in_place:
            self._write(args[0], node)
        return node

    def _write(self, target: Any, node: Node) -> None:
        """Record that `node` wrote to `target`, and with it to what it is a view of."""
        if isinstance(target, torch.Tensor):
            self._bind(target, node)
            if target._base is not None:
                base = target._base
                self._bind(
                    base, Node(node.name, [self.node_of(base), node], integral=_integral(base), shape=tuple(base.shape))
                )

    def add_writes(self, memory: Iterable[weakref.ref[torch.Tensor]]) -> None:
        """Record that the call added last, or one that gave nothing, wrote to these tensors that own memory."""
        for owner in memory:
            self._written.setdefault(id(owner), (owner, []))[1].append(self._calls)

    def written(self, operand: Operand, since: int) -> bool:
        """Whether the memory of a tensor was written to by the call of number `since` or a later one."""
        known = self._written.get(id(operand.memory))
        return known is not None and any(call >= since for call in known[1])

    def add_outputs(self, result: Any) -> None:
        """Declare what the model returned."""
        self.outputs = [self.node_of(tensor) for tensor in tensors_in(result)]

    def node_of(self, tensor: torch.Tensor) -> Node:
        """The node that made this tensor."""
        entry = self._nodes.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        node = Node("unknown", [], "unknown", integral=_integral(tensor))
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: torch.Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = (weakref.ref(tensor), node)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclass instances, in order."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif value is None or isinstance(value, bool | int | float | str | torch.Size):
        return  # most arguments, and most of the time
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name, None), found)


def _reduces(name: str, args: Any) -> bool:
    """Whether a call takes a whole map to one point: a reduction, or a pooling whose window is the map."""
    if name in _WINDOWED and len(args) > 1:
        window = args[1] if isinstance(args[1], tuple | list) else (args[1], args[1])
        return tuple(window) == tuple(args[0].shape[-2:])
    return name in _REDUCTIONS


def _writes(name: str) -> bool:
    """Whether a function writes to its first argument."""
    return name in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _integral(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
