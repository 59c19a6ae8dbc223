"""Run a model once or twice and record every resize call it makes: who calls, where in the source, on what, and what for.

The run is a real one on small inputs, with the model left exactly as found (`preserve.py`), or one under FakeTensorMode where
the inputs are large or the weights are not there. Real and small comes first because it is ten times cheaper (64x64 pixels:
13 to 26 ms for SMP's models, against 150 to 440 ms under fake tensors, whose price is a call, not a pixel) and because control
flow that looks at values then goes the way it goes in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import inputs as _inputs
from .dysample import DySample
from .errors import InputError, UpswapError
from .flow import Flow, Node
from .inputs import Inputs
from .kinds import kind_of
from .preserve import preserved

#: Given inputs with more elements than this (three channels of 192x192) are run as fake tensors.
REAL_LIMIT = 3 * 192 * 192

_SIGNATURE = inspect.signature(F.interpolate)
# Files that may stand between a model's code and the recorder.
_NOT_THE_MODEL = (F.__file__, sys.modules["torch.overrides"].__file__, __file__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the owner's code a call stands: the functions from the owner's own down to the one with the call in it.

    `positions` are the (line, column, end line, end column) of the calls that lead there, one a function; `occurrence` counts
    the runs of the call within one run of the owner's function.
    """

    codes: tuple[CodeType, ...]
    positions: tuple[tuple[int | None, ...], ...]
    occurrence: int


@dataclasses.dataclass
class Call:
    """One resize call as it was seen to run. `pooled` says that its source's grid was made by an adaptive pooling."""

    owner: str
    place: Place | None
    arguments: dict[str, Any]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = ""
    reason: str = ""
    pooled: bool = False


@dataclasses.dataclass
class Entry:
    """One module's forward on the stack of running ones; `children` are the modules it called and what they gave."""

    module: nn.Module
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    runs: Counter[Any] = dataclasses.field(default_factory=Counter)
    frames: list[FrameType] = dataclasses.field(default_factory=list)
    children: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Observation:
    """What one run showed: the resize calls in order, and the first forward of each owner as plain data.

    `forwards` has for an owner's path `{"arguments": ..., "children": [{"path": ..., "output": ...}]}`, or None where that
    cannot be described: what its FX trace needs to know of the modules around it.
    """

    inputs: Inputs
    calls: list[Call]
    forwards: dict[str, Any]


class ModelFailed(UpswapError):
    """The model raised an error of its own on the inputs it was given."""


def observe(model: nn.Module, inputs: Inputs, *, fake: bool = False) -> Observation:
    """Run `model` in eval mode, without gradients, and record its resize calls.

    With `fake`, nothing is computed and no memory is used, but a model that looks at values cannot be run. Raises
    `ModelFailed`, from the model's own error.
    """
    recorder = _Recorder(model, inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.no_grad())
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            inputs = inputs.map(mode.from_tensor)
        recorder.flow.add_source(inputs.tensors(), "input")
        stack.enter_context(_module_calls(recorder))
        stack.enter_context(recorder)
        try:
            result = model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise ModelFailed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        recorder.flow.add_outputs(result)
    return Observation(inputs, recorder.classified(), recorder.forwards)


def first_that_runs(model: nn.Module, tries: Iterator[Inputs]) -> Observation:
    """The observation of the first inputs the model runs on; `InputError` with every failure where there is none."""
    failures: list[str] = []
    last: BaseException | None = None
    for inputs in tries:
        try:
            return observe(model, inputs, fake=needs_fake(model, inputs))
        except ModelFailed as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs.tensors())
            failures.append(f"  {shapes}: {error}")
            last = error.__cause__
    raise InputError(
        f"{type(model).__name__} ran on none of the inputs tried; pass example_inputs (or --input-size) that it takes:\n"
        + "\n".join(failures)
    ) from last


def needs_fake(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a real run would cost memory or time worth avoiding, or cannot be had."""
    tensors = inputs.tensors()
    return sum(t.numel() for t in tensors) > REAL_LIMIT or any(
        t.is_meta for t in (*model.parameters(), *model.buffers(), *tensors)
    )


class _Recorder(TorchFunctionMode):
    """Sees every torch function a model calls."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.flow = Flow()
        self.flow.add_source((*model.parameters(), *model.buffers()), "parameter")
        self.names = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.stack: list[Entry] = [Entry(model, "", inputs.args, inputs.kwargs)]
        self.forwards: dict[str, Any] = {}
        self._seen: list[tuple[Call, Node]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute of a tensor: its shape, dtype, device; but `x.mT` is a tensor
            result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                self.flow.add_call("view", args, kwargs, result)
            return result
        # Kept before the call: an in-place function changes them.
        bound = _SIGNATURE.bind(*args, **kwargs) if func is F.interpolate else None
        result = func(*args, **kwargs)
        node = self.flow.add_call(name, args, kwargs, result)
        # An upsampler's own resizing of its offsets is no call of the model.
        if bound is not None and node is not None and not isinstance(self.stack[-1].module, DySample):
            bound.apply_defaults()
            self._seen.append((self._call(sys._getframe(1), dict(bound.arguments), result), node))
        return result

    def _call(self, frame: FrameType, arguments: dict[str, Any], result: torch.Tensor) -> Call:
        source = arguments.pop("input")
        owner, entry, codes, positions, top = self._owner(frame)
        # Kept until the owner's forward ends, so that no other frame gets the same id.
        entry.frames.append(top)
        run = (id(top), codes[-1], positions[-1])
        place = Place(codes, positions, entry.runs[run])
        entry.runs[run] += 1
        path = self.names[id(owner)]
        if path not in self.forwards:
            known = described(Inputs(entry.args, entry.kwargs)) if entry.module is owner else None
            # The list of children goes on being filled while the owner's forward runs.
            self.forwards[path] = known and {"arguments": known, "children": entry.children}
        return Call(
            path,
            place,
            arguments,
            tuple(source.shape),
            tuple(result.shape),
            source.dtype,
        )

    def _owner(
        self, frame: FrameType
    ) -> tuple[nn.Module, Entry, tuple[CodeType, ...], tuple[tuple[int | None, ...], ...], FrameType]:
        """The module whose own code made the call, its entry on the stack, the way from its code to the call, its frame."""
        codes: list[CodeType] = []
        positions: list[tuple[int | None, ...]] = []
        first: Any = None
        while True:
            code = frame.f_code
            if code.co_filename not in _NOT_THE_MODEL:
                codes.insert(0, code)
                positions.insert(0, _position(frame))
                first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
                if isinstance(first, nn.Module) and id(first) in self.names:
                    break
            if frame.f_back is None:
                first = self.stack[-1].module
                break
            frame = frame.f_back
        entry = next((e for e in reversed(self.stack) if e.module is first), self.stack[-1])
        return first, entry, tuple(codes), tuple(positions), frame

    def classified(self) -> list[Call]:
        """The calls with their kinds, once the run is over and everything downstream of them is known."""
        outputs = set(map(id, self.flow.outputs))
        for call, node in self._seen:
            call.pooled = bool(node.inputs) and node.inputs[0].is_pooled()
        for call, node in self._seen:
            call.kind, call.reason = kind_of(
                node,
                call.in_shape,
                call.out_shape,
                call.arguments["mode"],
                call.arguments["antialias"],
                id(node) in outputs,
            )
        return [call for call, _ in self._seen]


def _position(frame: FrameType) -> tuple[int | None, ...]:
    """(line, column, end line, end column) of the expression a frame is running."""
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    line, end_line, column, end_column = positions
    return line, column, end_line, end_column


def described(value: Any) -> Any:
    """`inputs.describe`, or None for what plain data cannot describe."""
    try:
        return _inputs.describe(value)
    except InputError:
        return None


@contextlib.contextmanager
def _module_calls(recorder: _Recorder) -> Iterator[None]:
    """Keep the recorder's stack of running modules, by wrapping `nn.Module.__call__` as torch.fx does when it traces."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = recorder.names.get(id(module))
        if path is None:
            return original(module, *args, **kwargs)
        above = recorder.stack[-1]
        recorder.stack.append(Entry(module, path, args, kwargs))
        try:
            result = original(module, *args, **kwargs)
        finally:
            recorder.stack.pop()
        above.children.append({"path": path.removeprefix(f"{above.path}."), "output": described(result)})
        return result

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
