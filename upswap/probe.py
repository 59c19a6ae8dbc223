"""Run a model once or twice and record every resize call it makes: who calls, where in the source, on what, and what for.

The run is a real one on small inputs, with the model left exactly as found (`preserve.py`), or one under FakeTensorMode
where the inputs are large or the weights are not there. Real and small comes first because it is ten times cheaper (64x64
pixels: 13 to 26 ms for SMP's models, against 150 to 440 ms under fake tensors, whose price is a call, not a pixel) and
because control flow that looks at values then goes the way it goes in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import inputs as _inputs
from .dysample import DySample
from .errors import InputError, UpswapError
from .flow import Flow, Node, tensors_in
from .inputs import Inputs
from .kinds import kind_of
from .preserve import preserved
from .trail import Place, trail

#: Given inputs with more elements than this (three channels of 192x192) are run as fake tensors.
REAL_LIMIT = 3 * 192 * 192

_SIGNATURE = inspect.signature(F.interpolate)


@dataclasses.dataclass
class Call:
    """One resize call as it was seen to run.

    `without_gradients` says that the model had turned them off, `pooled` that its source's grid was made by an adaptive
    pooling.
    """

    owner: str
    place: Place
    arguments: dict[str, Any]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    without_gradients: bool
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
    cannot be described: what its FX trace needs to know of the modules around it. `called` has the paths of the modules that
    ran, `outputs` the tensors the model returned, which nothing else holds.
    """

    inputs: Inputs
    fake: bool
    training: bool
    calls: list[Call]
    forwards: dict[str, Any]
    called: set[str]
    outputs: list[torch.Tensor]


class ModelFailed(UpswapError):
    """The model raised an error of its own on the inputs it was given."""


def observe(model: nn.Module, inputs: Inputs, *, fake: bool = False, training: bool = False) -> Observation:
    """Run `model` in eval mode or train mode and record its resize calls.

    With `fake`, nothing is computed and no memory is used, but a model that looks at values cannot be run. Raises
    `ModelFailed`, from the model's own error.
    """
    recorder = _Recorder(model, inputs)
    with _running(model, inputs, fake, training) as own:
        recorder.flow.add_source(own.tensors(), "input")
        with _module_calls(recorder), recorder:
            try:
                result = model(*own.args, **own.kwargs)
            except Exception as error:
                raise ModelFailed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        recorder.flow.add_outputs(result)
        outputs = [tensor.detach().clone() for tensor in tensors_in(result)]  # one may be a buffer of the model
    return Observation(inputs, fake, training, recorder.classified(), recorder.forwards, recorder.called, outputs)


def run_again(model: nn.Module, seen: Observation) -> list[torch.Tensor]:
    """The model's outputs in another run as the observed one was, random numbers included, unwatched."""
    with _running(model, seen.inputs, seen.fake, seen.training) as own:
        return tensors_in(model(*own.args, **own.kwargs))


@contextlib.contextmanager
def _running(model: nn.Module, inputs: Inputs, fake: bool, training: bool) -> Iterator[Inputs]:
    """Inside, `model` can be run and is left as it was; gives the inputs to run it on, which it may write to."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved(model, training=training))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what the model has to say of its own runs it will say in use
        # No gradients are computed, because nothing requires any; turned off, one could not see where the model does so.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if any(_is_compiled(module) for module in model.modules()):
            # What runs compiled is not seen. (Asking for this imports the compiler, so only where it is needed.)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_quiet("torch._subclasses.fake_tensor"))
            yield inputs.copied().map(mode.from_tensor)
        else:
            yield inputs.copied()


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inside, a logger of torch's keeps quiet: that a run fails is told in the error it ends with."""
    log = logging.getLogger(logger)
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def first_that_runs(model: nn.Module, tries: Iterator[Inputs]) -> Observation:
    """The observation of the first inputs the model runs on; `InputError` with every failure where there is none."""
    failures: list[str] = []
    last: BaseException | None = None
    for inputs in tries:
        # A model that looks at values fails on fake ones, large inputs or not.
        for fake in (True, False) if needs_fake(model, inputs) else (False,):
            try:
                return observe(model, inputs, fake=fake)
            except ModelFailed as error:
                if fake and not _on_meta(model, inputs):
                    continue
                shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs.tensors())
                failures.append(f"  {shapes}: {error}")
                last = error.__cause__
                break
    raise InputError(
        f"{type(model).__name__} ran on none of the inputs tried; pass example_inputs (or --input-size) that it takes:\n"
        + "\n".join(failures)
    ) from last


def needs_fake(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a real run would cost memory or time worth avoiding, or cannot be had."""
    return sum(t.numel() for t in inputs.tensors()) > REAL_LIMIT or _on_meta(model, inputs)


def _on_meta(model: nn.Module, inputs: Inputs) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers(), *inputs.tensors()))


class _Recorder(TorchFunctionMode):
    """Sees every torch function a model calls."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.flow = Flow()
        self.flow.add_source((*model.parameters(), *model.buffers()), "parameter")
        self.names = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.stack: list[Entry] = [Entry(model, "", inputs.args, inputs.kwargs)]
        self.forwards: dict[str, Any] = {}
        self.called: set[str] = set()
        #: Whether gradients were on in any module below the model itself.
        self.gradients = False
        #: The code that stands around every module's forward while the recorder watches.
        self.boundary: CodeType = nn.Module.__call__.__code__
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
        way = trail(frame, self._knows, self.boundary)
        owner = way.owner or self.stack[-1].module
        entry = next((e for e in reversed(self.stack) if e.module is owner), self.stack[-1])
        # Kept until the owner's forward ends, so that no other frame gets the same id.
        entry.frames.append(way.counting)
        run = (id(way.counting), way.hops)
        place = Place(way.hops, entry.runs[run], way.problem)
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
            (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()) and not _is_checkpointed(frame),
        )

    def _knows(self, module: nn.Module) -> bool:
        return id(module) in self.names

    def classified(self) -> list[Call]:
        """The calls with their kinds, once the run is over and everything downstream of them is known."""
        outputs = set(map(id, self.flow.outputs))
        for call, node in self._seen:
            call.pooled = bool(node.inputs) and node.inputs[0].is_pooled()
        # A model that runs all of itself without gradients is made for inference, and that says nothing of a single call.
        always = not self.gradients
        for call, node in self._seen:
            call.kind, call.reason = kind_of(
                node,
                call.in_shape,
                call.out_shape,
                call.arguments["mode"],
                antialias=call.arguments["antialias"],
                is_output=id(node) in outputs,
                without_gradients=call.without_gradients and not always,
            )
        return [call for call, _ in self._seen]


def _is_checkpointed(frame: FrameType | None) -> bool:
    """Whether `torch.utils.checkpoint` runs this, which turns gradients off at first and computes them in another run."""
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


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
        recorder.called.add(path)
        recorder.gradients |= bool(path) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        above = recorder.stack[-1]
        recorder.stack.append(Entry(module, path, args, kwargs))
        try:
            result = original(module, *args, **kwargs)
        finally:
            recorder.stack.pop()
        above.children.append({"path": path.removeprefix(f"{above.path}."), "output": described(result)})
        return result

    nn.Module.__call__ = call  # type: ignore[method-assign]
    recorder.boundary = call.__code__
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
