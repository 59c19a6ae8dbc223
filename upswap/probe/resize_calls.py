"""One run of a model seen from inside: every resize call, and the calls of every module."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from .callsites.class_code import is_resize_layer
from .callsites.functions import reaching
from .callsites.stack import Place, Trail, home_of, trail
from .dataflow import ADDITIONS, CONCATENATIONS, READERS, Flow, Node, Operand, tensors_in
from .guides import AtHand, Fused, Fusion, Relay, Watched, expression_in, fused_with, maps_in
from .handmade import ResizeKernels, enlarges_by_repeating
from .inputs import describe
from .inputs.inputs import Inputs
from .kinds import kind_of

#: How many modules above a guide is looked for.
_LEVELS = 4

_SIGNATURE = inspect.signature(F.interpolate)


class Caller(NamedTuple):
    """Who calls a resize layer: the path of the module whose code does, and where."""

    owner: str
    place: Place


@dataclasses.dataclass
class Call:
    """One resize call as it was seen to run.

    `without_gradients` says that the model had turned them off, `pooled` that its source's grid was made by an adaptive
    pooling. `caller` is who calls the owner, where that is a resize layer and its caller is known. `twin` is empty, or the
    owner that made the call in the place of this one, which did not run and is like it. `guide` is what its result is fused with,
    or why that cannot be had; "" where it was not looked for.
    """

    owner: str
    place: Place
    caller: Caller | None
    arguments: dict[str, Any]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    without_gradients: bool
    kind: str = ""
    reason: str = ""
    pooled: bool = False
    twin: str = ""
    guide: Fused | str = ""

    @property
    def mode_is_nearest(self) -> bool:
        """Whether it copies values, and mixes none."""
        return str(self.arguments["mode"]).startswith("nearest")


@dataclasses.dataclass
class Entry:
    """One module's forward on the stack of running ones; `children` are the modules it called and what they gave.

    `frames` are kept alive until it ends, so that no other frame gets the same id.
    """

    module: nn.Module
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 0
    runs: Counter[Any] = dataclasses.field(default_factory=Counter)
    frames: list[FrameType] = dataclasses.field(default_factory=list)
    children: list[Any] = dataclasses.field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Sees every torch function a model calls; with `guides`, also what the results of resizes are fused with."""

    def __init__(self, model: nn.Module, inputs: Inputs, *, guides: bool = False) -> None:
        super().__init__()
        self.guides = guides
        self._fusions: dict[int, Fusion] = {}
        self._watched: dict[int, Watched] = {}
        self._entered = 0
        self.flow = Flow()
        self.flow.add_source(model.parameters(), "parameter")
        self.flow.add_source(model.buffers(), "buffer")
        self.names = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.stack: list[Entry] = [Entry(model, "", inputs.args, inputs.kwargs)]
        self.forwards: dict[str, Any] = {}
        self.called: set[str] = set()
        #: Whether gradients were on in any module below the model itself.
        self.gradients = False
        #: The code that stands around every module's forward while the recorder watches.
        self.boundary: CodeType = nn.Module.__call__.__code__
        #: The modules that resize in another way than by `F.interpolate`, and how, in order.
        self.unseen: dict[tuple[str, str], None] = {}
        #: Whether the model's code looked at the values of what it computed, and may have chosen its way by them.
        self.reads_values = False
        self._resizing = False
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
        self._resizing = bound is not None
        versions = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()] if self.guides else []
        try:
            result = func(*args, **kwargs)
        finally:
            self._resizing = False
        node = self.flow.add_call(name, args, kwargs, result)
        if self.guides:
            self.flow.add_writes([Operand.of(t).memory for t, version in versions if t._version != version])
            if node is not None and (name in ADDITIONS or name in CONCATENATIONS):
                self._note_fusion(node, sys._getframe(1))
        self.reads_values |= node is not None and node.from_input and name in READERS
        if node is not None and enlarges_by_repeating(node):
            self._heard("expand and reshape" if name != "repeat_interleave" else name)
        # An upsampler's own resizing of its offsets is no call of the model.
        if bound is not None and node is not None and not getattr(self.stack[-1].module, "is_upsampler", False):
            bound.apply_defaults()
            self._seen.append((self._call(sys._getframe(1), dict(bound.arguments), result, node), node))
        return result

    def _call(self, frame: FrameType, arguments: dict[str, Any], result: torch.Tensor, node: Node) -> Call:
        source = arguments.pop("input")
        way = trail(frame, self._knows, self.boundary)
        owner, place = self._placed(way)
        caller = None
        if is_resize_layer(way.owner):
            outer = trail(frame, self._knows, self.boundary, through_layers=True)
            caller = None if outer.owner is None else Caller(*self._placed(outer))
        if self.guides:
            self._watched[node.order] = Watched(
                Operand.of(source),
                self._at_hand(way, place, (), result),
                () if way.owner is None else self._above(frame, way.owner, place, result),
                _is_checkpointed(frame),
            )
        return Call(
            owner,
            place,
            caller,
            arguments,
            tuple(source.shape),
            tuple(result.shape),
            source.dtype,
            (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()) and not _is_checkpointed(frame),
        )

    def _at_hand(self, way: Trail, place: Place, through: tuple[Relay, ...], result: torch.Tensor) -> AtHand | None:
        """The maps of a result's size that the function at the end of a way has at hand."""
        if way.owner is None or not way.homes or way.problem:
            return None
        entry = self._entry_of(way.owner)
        entry.frames += way.homes
        homes = tuple((entry.number, id(home)) for home in way.homes)
        maps = maps_in(way.homes[-1], result.shape[2:], self.flow)
        return AtHand(self.names[id(way.owner)], place, through, homes, maps)

    def _above(self, frame: FrameType, owner: nn.Module, place: Place, result: torch.Tensor) -> tuple[AtHand, ...]:
        """What the modules have at hand that lead to the one whose forward makes a resize in `frame`, nearest first.

        A guide can be handed down by the forward of each module between.
        """
        found: list[AtHand] = []
        through: tuple[Relay, ...] = ()
        running = self._call_of(frame)
        if not is_resize_layer(owner) and not self._is_forward(owner, running, place):
            return ()
        while running is not None and running.f_back is not None and len(found) < _LEVELS:
            caller = running.f_back
            running = self._call_of(caller)
            above = caller.f_locals.get("self")
            if isinstance(above, nn.Sequential) and caller.f_code is nn.Sequential.forward.__code__:
                if id(above) not in self.names or type(above).forward is not nn.Sequential.forward:
                    break
                through = (Relay(self.names[id(above)], None), *through)
                continue
            way = trail(caller, self._knows, self.boundary)
            way = _from_last_method(way)
            at_hand = self._at_hand(way, Place(way.hops, None, way.problem), through, result)
            if at_hand is None or way.owner is None:
                break
            found.append(at_hand)
            if not self._is_forward(way.owner, running, at_hand.place):
                break
            through = (Relay(at_hand.owner, at_hand.place), *through)
        return tuple(found)

    def _call_of(self, frame: FrameType | None) -> FrameType | None:
        """The frame of the call of the module whose forward a frame runs in."""
        while frame is not None and frame.f_code is not self.boundary:
            frame = frame.f_back
        return frame

    def _is_forward(self, module: nn.Module, running: FrameType | None, place: Place) -> bool:
        """Whether a place is in the text of the forward of a module that runs by `running`, which can hand on a keyword."""
        if running is None or running.f_locals[self.boundary.co_varnames[0]] is not module or len(place.hops) != 1:
            return False
        return "forward" in reaching(type(module), place.hops[0].code)

    def _note_fusion(self, node: Node, frame: FrameType) -> None:
        """Keep where a sum or concatenation stands, in a function that made a resize before."""
        home = home_of(frame)
        for entry in reversed(self.stack):
            if any(kept is home for kept in entry.frames):
                self._fusions[node.order] = Fusion((entry.number, id(home)), expression_in(home, frame))
                return

    def enter(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module's forward begins."""
        self._entered += 1
        self.stack.append(Entry(module, path, args, kwargs, self._entered))

    def _entry_of(self, owner: nn.Module) -> Entry:
        return next((entry for entry in reversed(self.stack) if entry.module is owner), self.stack[-1])

    def _placed(self, way: Trail) -> tuple[str, Place]:
        """The path of the owner of a way, and the place with the run of it that this is."""
        owner = way.owner or self.stack[-1].module
        entry = self._entry_of(owner)
        entry.frames.append(way.counting)
        run = (id(way.counting), way.hops)
        place = Place(way.hops, entry.runs[run], way.problem)
        entry.runs[run] += 1
        path = self.names[id(owner)]
        if path not in self.forwards:
            known = described(Inputs(entry.args, entry.kwargs)) if entry.module is owner else None
            # The list of children goes on being filled while the owner's forward runs.
            self.forwards[path] = known and {"arguments": known, "children": entry.children}
        return path, place

    def kernels(self) -> ResizeKernels:
        """A mode that tells the recorder of the resize kernels that it does not see called."""
        return ResizeKernels(lambda name: None if self._resizing else self._heard(name))

    def _heard(self, how: str) -> None:
        if not any(getattr(entry.module, "is_upsampler", False) for entry in self.stack):
            self.unseen[self.stack[-1].path, how] = None

    def _knows(self, module: nn.Module) -> bool:
        return id(module) in self.names

    def classified(self) -> list[Call]:
        """The calls with their kinds, once the run is over and everything downstream of them is known."""
        outputs = self.flow.outputs
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
                outputs=outputs,
                without_gradients=call.without_gradients and not always,
            )
            if self.guides:
                call.guide = fused_with(node, self._watched[node.order], self.flow, self._fusions)
        return [call for call, _ in self._seen]


def _from_last_method(way: Trail) -> Trail:
    """A way from the last method of its owner on, which other methods may call too: a `predict` that `forward` and `loss` do."""
    if way.owner is None or way.problem:
        return way
    start = max(number for number, hop in enumerate(way.hops) if reaching(type(way.owner), hop.code))
    first, *rest = way.hops[start:]
    return way._replace(hops=(first._replace(fresh=False), *rest), homes=way.homes[-len(way.hops[start:]) :])


def _is_checkpointed(frame: FrameType | None) -> bool:
    """Whether `torch.utils.checkpoint` runs this, which turns gradients off at first and computes them in another run."""
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def described(value: Any) -> Any:
    """`inputs.describe`, or None for what plain data cannot describe."""
    try:
        return describe.describe(value)
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
        recorder.enter(module, path, args, kwargs)
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
