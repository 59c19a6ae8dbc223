"""The way from a module's own method to a resize call, read off the Python stack.

A module's forward may call other methods of its own, inherited ones through `super()`, functions of another file,
lambdas, and functions that torch calls for it (`checkpoint`). A `Place` names each function on that way, outermost first,
with the expression that leads to the next, so that the way can be found again in the source and rewritten.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from ...errors import RewriteError
from .class_code import is_resize_layer, why_fixed
from .functions import reaching
from .syntax import call_at, has_source

Position = tuple[int | None, ...]

_TORCH = os.path.dirname(torch.__file__) + os.sep
# Files that may stand between a model's code and the recorder.
_NOT_THE_MODEL = (F.__file__, sys.modules["torch.overrides"].__file__, nn.modules.module.__file__)
_RESIZE_LAYER = nn.Upsample.forward.__code__
_AT_ONCE = ("<listcomp>", "<setcomp>", "<dictcomp>")
_COMPREHENSIONS = (*_AT_ONCE, "<genexpr>")


class Hop(NamedTuple):
    """One function on the way, and the (line, column, end line, end column) of the expression in its text that leads on.

    `fresh` says that something else than the function before calls it (`checkpoint`), perhaps again later; `inner` the
    same of a function inside this one's text that holds the expression. Runs are counted anew in those.
    """

    code: CodeType
    position: Position
    module: str
    fresh: bool = False
    inner: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a resize call stands: the hops that lead to it, and how many times they did before in one run of the first.

    `occurrence` None means all the times, where how many there are follows the input. `problem` is why the way cannot be
    rewritten, for one that does not start in a method of the module.
    """

    hops: tuple[Hop, ...]
    occurrence: int | None = 0
    problem: str = ""


class Trail(NamedTuple):
    """The module whose method a way starts in, the hops, and the frame whose run counts occurrences.

    `homes` are the frames of the last of the hops, those that call each other with nothing else between, down to the one that
    makes the call; none where something else makes it.
    """

    owner: nn.Module | None
    hops: tuple[Hop, ...]
    counting: FrameType
    homes: tuple[FrameType, ...]
    problem: str = ""


def trail(
    frame: FrameType, known: Callable[[nn.Module], bool], boundary: CodeType, *, through_layers: bool = False
) -> Trail:
    """The way to the call that `frame` is making.

    `known` tells the modules of the model; `boundary` is the code that stands around every module's forward. The owner is
    the nearest module one of whose replaceable methods is on the stack, and the way starts in the outermost method of its
    that leads there directly. A call of a resize layer that is no module of the model (one made in the forward, or kept in
    a plain list) is a resize call itself; with `through_layers`, so is that of any resize layer.
    """
    frames = _frames(frame, boundary, lambda layer: through_layers or not known(layer))
    start = next((i for i, f in enumerate(frames) if _is_method(f, known)), None)
    if start is None:
        outer = frames[-1] if frames else frame
        nearest = next((m for m in map(_first_argument, frames) if m is not None and known(m)), None)
        return Trail(nearest, (), outer, (), _why_no_method(frames, nearest))
    owner = _first_argument(frames[start])
    return Trail(owner, *_hops(frames[: _outermost(frames, start, known) + 1]))


def _frames(frame: FrameType | None, boundary: CodeType, passes: Callable[[nn.Module], bool]) -> list[FrameType]:
    """The frames of one module's forward, innermost first, without those of the resize layers that `passes` names."""
    frames: list[FrameType] = []
    while frame is not None:
        code = frame.f_code
        layer = frame.f_locals.get(code.co_varnames[0]) if code in (boundary, _RESIZE_LAYER) else None
        if not (is_resize_layer(layer) and passes(layer)):
            if code is boundary:
                break
            if code.co_filename not in _NOT_THE_MODEL:
                frames.append(frame)
        frame = frame.f_back
    return frames


def _first_argument(frame: FrameType) -> nn.Module | None:
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) else None


def _is_method(frame: FrameType, known: Callable[[nn.Module], bool]) -> bool:
    module = _first_argument(frame)
    return module is not None and known(module) and bool(reaching(type(module), frame.f_code))


def _outermost(frames: list[FrameType], start: int, known: Callable[[nn.Module], bool]) -> int:
    """The index of the outermost method of the same module from which plain calls `self.method(...)` lead to the one at
    `start`, through the decorators of each."""
    begins = start  # the frame that a call of the method begins with
    for index in range(start + 1, len(frames)):
        outer = frames[index]
        if _decorates(outer, frames[start]):
            begins = index
            continue
        if not _is_method(outer, known):
            if _is_nested(outer.f_code, frames[index + 1 :]):
                continue
            return start
        if _first_argument(outer) is not _first_argument(frames[start]):
            return start
        if not all(_within(outer.f_code, between.f_code) for between in frames[begins + 1 : index]):
            return start
        if not _calls_method(outer.f_code, position(frames[begins + 1]), frames[start]):
            return start
        start = begins = index
    return start


def _decorates(wrapper: FrameType, method: FrameType) -> bool:
    """Whether a frame is that of a decorator's wrapper around the method that another runs, of those that can be rewritten."""
    if wrapper.f_code is method.f_code or _is_torch(wrapper):
        return False
    cls = type(_first_argument(method))
    return bool({*reaching(cls, wrapper.f_code)} & {*reaching(cls, method.f_code)}) and has_source(wrapper.f_code)


def _is_nested(code: CodeType, outer: list[FrameType]) -> bool:
    return any(_within(frame.f_code, code) for frame in outer)


def _calls_method(caller: CodeType, where: Position, callee: FrameType) -> bool:
    """Whether the expression at a position of the caller is `something.method(...)`, of the method the callee's frame runs.

    The caller is the method whose text has it: a comprehension is a function of its own in Python 3.11 and none in 3.12.
    """
    try:
        function = call_at(caller, where).func
    except RewriteError:
        return False
    module = _first_argument(callee)
    return isinstance(function, ast.Attribute) and any(
        name == function.attr or name.endswith(f"__{function.attr.lstrip('_')}")
        for name in reaching(type(module), callee.f_code)
    )


def home_of(frame: FrameType) -> FrameType:
    """The frame of the function that a comprehension stands in, which runs at once; of anything else the frame itself."""
    while frame.f_code.co_name in _AT_ONCE and frame.f_back is not None and _within(frame.f_back.f_code, frame.f_code):
        frame = frame.f_back
    return frame


def _hops(frames: list[FrameType]) -> tuple[tuple[Hop, ...], FrameType, tuple[FrameType, ...], str]:
    """The hops from the last of the frames to the first, the frame that counts, those that call each other, and why the way
    cannot be rewritten."""
    hops: list[Hop] = []
    homes: list[FrameType] = []
    index = len(frames) - 1
    counting, fresh = frames[index], False
    while True:
        current = frames[index]
        # The innermost function that stands in the text of this one: what calls it in between need not be looked at.
        text = next((i for i in range(index) if _within(current.f_code, frames[i].f_code)), index)
        inner = any(not _within(current.f_code, frames[i].f_code) for i in range(text, index))
        if inner:
            counting = next(frames[i] for i in range(text, index) if frames[i].f_code.co_name not in _COMPREHENSIONS)
        homes = [] if inner else [current] if fresh else [*homes, current]
        module = str(current.f_globals.get("__name__", ""))
        hops.append(Hop(current.f_code, position(frames[text]), module, fresh, inner))
        if text == 0:
            return tuple(hops), counting, tuple(homes), ""
        below = next((i for i in range(text - 1, -1, -1) if not _is_torch(frames[i])), None)
        if below is None:
            # `checkpoint(F.interpolate, x)`: what the model hands to torch is the resize itself. `super().forward(x)` of a
            # layer that is a subclass of torch's is one too.
            runs_once = frames[text - 1].f_code is _RESIZE_LAYER or any(
                frame.f_code.co_filename == torch.utils.checkpoint.__file__ for frame in frames[:text]
            )
            return (
                tuple(hops),
                counting,
                (),
                "" if runs_once else f"{frames[0].f_code.co_qualname} of torch runs the resize",
            )
        index = below
        fresh = index != text - 1
        if fresh:
            counting = frames[index]


def _is_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH)


def _within(outer: CodeType, inner: CodeType) -> bool:
    """Whether a function stands in the text of another."""
    return any(
        constant is inner or _within(constant, inner) for constant in outer.co_consts if isinstance(constant, CodeType)
    )


def position(frame: FrameType) -> Position:
    """(line, column, end line, end column) of the expression a frame is running."""
    positions = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    line, end_line, column, end_column = positions
    return line, column, end_line, end_column


def _why_no_method(frames: list[FrameType], nearest: nn.Module | None) -> str:
    fixed = None if nearest is None else why_fixed(nearest)
    if fixed is not None:
        return fixed
    if not frames:
        return "no Python code of the model makes the call"
    return f"{frames[-1].f_code.co_qualname} makes the call, which is no method of a module of the model"
