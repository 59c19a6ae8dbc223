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
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import RewriteError
from .inputs import Inputs
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

    def __init__(self, mode: FakeTensorMode, values: list[Any]) -> None:
        super().__init__(autowrap_modules=())
        self._mode = mode
        self._values = values
        self.computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf: only the owner's own forward is rewritten."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that know their value."""
        return _ValueProxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A child's call is a node; under it, when a value is computed, it is a call."""
        if self.computing:  # FX has patched nn.Module.__call__; here a leaf runs for its value
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are nodes, except while a value is computed."""
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

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
        elif kind != "output":
            node_args, node_kwargs = fx.node.map_arg((proxy.node.args, proxy.node.kwargs), self._value_of)
            proxy.node.meta["value"] = self._value(kind, target, node_args, node_kwargs)
        return proxy

    def _value_of(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # FX makes the nodes of parameters and buffers without a proxy
            node.meta["value"] = self._value(node.op, node.target, node.args, node.kwargs)
        return node.meta["value"]

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self.computing = True
        try:
            with self._mode, torch.no_grad():
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                value: Any = self.root
                for name in target.split("."):
                    value = getattr(value, name)
                return value
        finally:
            self.computing = False


def trace(owner: nn.Module, arguments: Inputs, mode: FakeTensorMode) -> fx.Graph:
    """The graph of `owner.forward` on fake `arguments`, with the original names and defaults of its parameters.

    Raises `NotFaithful`, with the reason, where the graph would not do for other inputs, or cannot be made.
    """
    signature = inspect.signature(type(owner).forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in signature.parameters.values()):
        raise NotFaithful("the forward takes a variable or keyword-only list of arguments")
    bound = signature.bind(owner, *arguments.args, **arguments.kwargs)
    bound.apply_defaults()
    values = list(bound.arguments.values())[1:]
    straight_line(type(owner).forward.__code__)
    state = random.getstate(), torch.get_rng_state()
    tracer = ValueTracer(mode, values)
    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not tracer.computing and _outside_libraries(frame):
            called.add(frame.f_code)

    profile = sys.getprofile()
    sys.setprofile(note)
    try:
        graph = tracer.trace(owner)
    except RewriteError:
        raise
    except Exception as error:  # FX and the traced code raise whatever they like on what they cannot do
        first_line = (str(error).splitlines() or [""])[0]
        raise NotFaithful(f"tracing stopped with {type(error).__name__}: {first_line}") from error
    finally:
        sys.setprofile(profile)
    if state[0] != random.getstate() or not torch.equal(state[1], torch.get_rng_state()):
        raise NotFaithful("a random number was drawn while tracing, and would be drawn only once")
    for code in called:
        if code.co_name not in ("<listcomp>", "<genexpr>"):  # parts of a function that is looked at whole
            straight_line(code)
    return graph


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


def _outside_libraries(frame: FrameType) -> bool:
    """Whether a frame runs code of a model, rather than of torch, Python's own library or this file."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    library = package == "torch" or package in sys.stdlib_module_names or package.startswith("namedtuple_")
    return not library and frame.f_code.co_filename != __file__
