"""The FX tracer whose proxies carry fake-tensor values.

It traces the forward of one module, its children as leaves. Because every proxy knows the value it stands for on the example
inputs, shapes propagate in the same pass and can be unpacked. A trace is only good for other inputs if nothing was decided
from those values, so anything that would decide raises `NotFaithful`, and the caller takes the source route.
"""

from __future__ import annotations

import ast
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import inputs as _inputs
from .errors import RewriteError
from .locate import function_node

# What a trace would run once and bake in, or lose: decisions, contexts, effects on anything but local names.
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.For, ast.Pass, ast.FunctionDef)
_DECISIONS = (ast.IfExp, ast.BoolOp, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)


class NotFaithful(RewriteError):
    """The owner's forward does not reduce to one graph that is right for every input."""


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

    def __init__(self, code: CodeType, values: list[Any], children: list[Any]) -> None:
        super().__init__(autowrap_modules=())
        self._code = code
        self._values = values
        self._children = children
        self.helpers: set[CodeType] = set()

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
            self._note_helpers(sys._getframe(1))
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
            raise NotFaithful(f"it calls {path} where the probe saw a call of {seen}")
        return output

    def _note_helpers(self, frame: FrameType | None) -> None:
        """Collect the functions, outside torch and Python's library, through which the forward came to make a node."""
        while frame is not None and frame.f_code is not self._code:
            if _outside_libraries(frame) and frame.f_code.co_name not in ("<listcomp>", "<genexpr>"):
                self.helpers.add(frame.f_code)
            frame = frame.f_back


def _method(name: str) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, name)(*args, **kwargs)

    return call


class Trace(NamedTuple):
    """A graph of an owner's forward, and the owner's own settings that it was made with."""

    graph: fx.Graph
    settings: dict[str, Any]


def trace(owner: nn.Module, forward: Any, device: torch.device) -> Trace:
    """The graph of `owner.forward`, with the original names and defaults of its parameters.

    `forward` describes one run of it, as `probe.Observation.forwards` does; its tensors are made fake, on `device`. Raises
    `NotFaithful`, with the reason, where the graph would not do for other inputs, or cannot be made.
    """
    code = type(owner).forward.__code__
    signature = inspect.signature(type(owner).forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in signature.parameters.values()):
        raise NotFaithful("the forward takes a variable or keyword-only list of arguments")
    straight_line(code)
    state = random.getstate(), torch.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():

        def make(description: Any) -> Any:
            return _inputs.build(description, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))

        arguments = make(forward["arguments"])
        bound = signature.bind(owner, *arguments.args, **arguments.kwargs)
        bound.apply_defaults()
        children = [(c["path"], make(c["output"])) for c in forward["children"] if c["output"] is not None]
        tracer = ValueTracer(code, list(bound.arguments.values())[1:], children)
        try:
            graph = tracer.trace(owner)
        except RewriteError:
            raise
        except Exception as error:  # FX and the traced code raise what they like on what they cannot do
            first_line = (str(error).splitlines() or [""])[0]
            raise NotFaithful(f"tracing stopped with {type(error).__name__}: {first_line}") from error
    if state[0] != random.getstate() or not torch.equal(state[1], torch.get_rng_state()):
        raise NotFaithful("a random number was drawn while tracing, and would be drawn only once")
    for helper in tracer.helpers:
        straight_line(helper)
    settings = {name: value for each in (code, *tracer.helpers) for name, value in settings_read(owner, each).items()}
    return Trace(graph, settings)


def straight_line(code: CodeType) -> None:
    """`NotFaithful` unless a function only computes local names from its arguments, the same way every time."""
    try:
        tree = function_node(code)
    except RewriteError as error:
        raise NotFaithful(str(error)) from error
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)} of {code.co_qualname}"
        if isinstance(node, _DECISIONS) or (isinstance(node, ast.comprehension) and node.ifs):
            raise NotFaithful(f"{where} decides")
        if isinstance(node, ast.Attribute) and (node.attr == "training" or not isinstance(node.ctx, ast.Load)):
            raise NotFaithful(f"{where} reads the training flag or sets an attribute")
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            raise NotFaithful(f"{where} changes a container")
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS) and not docstring:
            raise NotFaithful(f"{where} has a {type(node).__name__.lower()} statement")


def settings_read(owner: nn.Module, code: CodeType) -> dict[str, Any]:
    """The plain attributes of `owner` that a method reads, with the values a trace fixes.

    Raises `NotFaithful` for what cannot be compared later: attributes that are containers or objects, and settings of children.
    """
    first = code.co_varnames[0] if code.co_argcount else None
    found: dict[str, Any] = {}
    for node in ast.walk(function_node(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == first:
            value = getattr(owner, node.attr, None)
            if value is None or isinstance(value, bool | int | float | str):
                found[node.attr] = value
            elif not (isinstance(value, nn.Module | torch.Tensor) or callable(value)):
                raise NotFaithful(
                    f"line {node.lineno} of {code.co_qualname} reads {node.attr}, a {type(value).__name__}"
                )
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            outer = node.value
            if isinstance(outer.value, ast.Name) and outer.value.id == first:
                child = getattr(owner, outer.attr, None)
                if isinstance(child, nn.Module) and not isinstance(getattr(child, node.attr, None), nn.Module):
                    raise NotFaithful(f"line {node.lineno} of {code.co_qualname} reads a setting of {outer.attr}")
    return found


def _outside_libraries(frame: FrameType) -> bool:
    """Whether a frame runs code of a model, rather than of torch, Python's own library or this file."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    library = package == "torch" or package in sys.stdlib_module_names or package.startswith("namedtuple_")
    return not library and frame.f_code.co_filename != __file__
