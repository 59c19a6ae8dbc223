"""The FX tracer whose proxies carry fake-tensor values.

It traces the forward of one module, its children as leaves. Because every proxy knows the value it stands for on the example
inputs, shapes propagate in the same pass and can be unpacked. A trace is only good for other inputs if nothing was decided
from those values: `traceable.py` admits only code that cannot, and anything that still would raises `NotFaithful`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import RewriteError
from ...probe.inputs import describe
from ...shown import brief
from .refusals import NotFaithful
from .traceable import straight_line


class _ValueProxy(fx.Proxy):
    """A proxy that answers from its value what is the same for every input, and refuses the rest."""

    def __len__(self) -> int:
        return len(self._size("len() of"))

    def __iter__(self) -> Iterator[Any]:
        proxy: Any = self
        return iter([proxy[i] for i in range(len(self._size("iteration over")))])

    def __bool__(self) -> bool:
        raise NotFaithful(f"a branch looks at the value of `{self.node.name}`")

    def __index__(self) -> int:
        raise NotFaithful(f"`{self.node.name}` is used as a plain number")

    def _size(self, what: str) -> Any:
        value = self.node.meta["value"]
        # How many dimensions a tensor has is the one length a resize itself fixes.
        if not isinstance(value, torch.Size):
            raise NotFaithful(f"{what} `{self.node.name}`, whose length other inputs may change")
        return value


class ValueTracer(fx.Tracer):
    """Records the forward of one module; every node's `meta["value"]` is its value on the example arguments."""

    def __init__(self, values: list[Any], children: list[Any]) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type,unused-ignore]  # torch 2.14 wants one module
        self._values = values
        self._children = children

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf: only the owner's own forward is rewritten."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that know their value."""
        return _ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Refuse tensors that are neither an input's descendant nor a parameter or buffer."""
        if isinstance(a, torch.Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise NotFaithful("a tensor is made without any of the inputs, and would be made only once")
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        """A node, and its value."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "placeholder":
            proxy.node.meta["value"] = self._values.pop(0)
        elif kind == "call_module":
            proxy.node.meta["value"] = self._output_of(target)
        elif kind == "get_attr":
            self._value_of(proxy.node)
        elif kind != "output":
            node_args, node_kwargs = fx.node.map_arg((proxy.node.args, proxy.node.kwargs), self._value_of)
            function = target if kind == "call_function" else _method(target)
            proxy.node.meta["value"] = function(*node_args, **node_kwargs)
        return proxy

    def _value_of(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # FX makes the nodes of parameters and buffers without a proxy
            # Not by getattr: FX has patched it to give proxies.
            owned = {**dict(self.root.named_parameters()), **dict(self.root.named_buffers())}
            if node.target not in owned:
                raise NotFaithful(f"the attribute {node.target} is neither a parameter nor a buffer")
            node.meta["value"] = torch.empty_like(owned[str(node.target)])  # on fake tensors: no memory
        return node.meta["value"]

    def _output_of(self, path: str) -> Any:
        """What the probe saw a child give; calls come in the order they came then."""
        seen, output = self._children.pop(0) if self._children else ("nothing", None)
        if seen != path:
            raise NotFaithful(f"it calls {path} where the probe saw a call of {brief(seen)}")
        return output


def _method(name: str) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, name)(*args, **kwargs)

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of what does not work on fake tensors: the reason goes into the plan."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def trace(owner: nn.Module, forward: Any, device: torch.device) -> fx.Graph:
    """The graph of `owner.forward`, with the original names and defaults of its parameters.

    `forward` describes one run of it, as `probe.Observation.forwards` does; its tensors are made fake, on `device`. Raises
    `NotFaithful`, with the reason, where the graph would not do for other inputs, or cannot be made.
    """
    calls = straight_line(owner)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

        def make(description: Any) -> Any:
            return describe.build(description, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))

        arguments = make(forward["arguments"])
        bound = inspect.signature(type(owner).forward).bind(owner, *arguments.args, **arguments.kwargs)
        bound.apply_defaults()
        children = [(c["path"], make(c["output"])) for c in forward["children"] if c["output"] is not None]
        tracer = ValueTracer(list(bound.arguments.values())[1:], children)
        try:
            with _quiet():
                graph = tracer.trace(owner)
        except RewriteError:
            raise
        except Exception as error:  # FX and the traced code raise what they like on what they cannot do
            first_line = (str(error).splitlines() or [""])[0]
            raise NotFaithful(f"tracing stopped with {type(error).__name__}: {first_line}") from error
    # A call that left no node was run once, while tracing (`torch.is_grad_enabled()`), and its result baked in.
    made = sum(node.op in ("call_module", "call_method") or _is_torch(node.target) for node in graph.nodes)
    if made != calls:
        raise NotFaithful(f"its code makes {calls} calls, the graph has {made}")
    return graph


def _is_torch(target: Any) -> bool:
    """Whether a node calls a torch function, rather than an operator or `getattr`."""
    return callable(target) and (getattr(target, "__module__", None) or "torch").partition(".")[0] == "torch"
