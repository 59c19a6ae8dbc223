"""Upsamplers side by side: every contender at one shape after the other, all in one process and in turn."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...nn.sampling.positions import compute_dtype
from . import flops, meters
from .clock import interleaved, ratio
from .contenders import BASELINE, Contender, Settings, contenders
from .setting import DTYPES, LAYOUTS, TRAINING, problem_of, set_threads

Shape = tuple[int, int, int, int]

#: What `sweep` varies.
SWEEPS = ("hw", "channels", "scale", "groups")


class Case(NamedTuple):
    """Everything that is the same for contenders that are timed in turn, but for the number of threads."""

    shape: Shape
    what: str
    scale: int = 2
    groups: int | None = None
    dtype: str = "float32"

    def autocast(self, device: torch.device) -> torch.autocast:
        """What calls of this case run under."""
        return torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=self.dtype != "float32",
            cache_enabled=False,  # a kept cast of the weights would belong to the graph of the first call
        )


def sweep(case: Case, along: str) -> list[Case]:
    """Cases around one that differ in one thing: the map's size, its channels, the scale, or DySample's groups."""
    batch, channels, height, width = case.shape
    if along == "hw":
        sizes = dict.fromkeys((max(1, int(height * f)), max(1, int(width * f))) for f in (1 / 8, 1 / 4, 1 / 2, 1, 2))
        return [case._replace(shape=(batch, channels, *size)) for size in sizes]
    if along == "channels":
        counts = dict.fromkeys(max(1, int(channels * f)) for f in (1 / 8, 1 / 4, 1 / 2, 1, 2))
        return [case._replace(shape=(batch, count, height, width)) for count in counts]
    if along == "scale":
        return [case._replace(scale=scale) for scale in (2, 3, 4)]
    return [case._replace(groups=groups) for groups in (1, 2, 4, 8, 16)]


@dataclasses.dataclass
class Row:
    """One contender in one case: docs/bench.md explains the fields. None: not known, or the contender does not run."""

    contender: str
    shape: Shape
    scale: int
    groups: int | None
    dtype: str
    layout: str
    what: str
    compiled: bool
    threads: int
    ms: float | None = None
    ratio: float | None = None
    parameters: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None
    bytes_floor: int | None = None
    peak_memory: int | None = None
    saved: int | None = None
    problem: str = ""


class Bench(NamedTuple):
    """Which contenders are measured how often, and where."""

    contenders: Sequence[Contender]
    layouts: Sequence[str] = ("contiguous",)
    threads: Sequence[int] = (1,)
    compiled: bool = False
    repeats: int = 9
    device: torch.device = torch.device("cpu")

    def run(self, case: Case) -> Iterator[list[Row]]:
        """The rows of a case for one number of threads after the other."""
        if self.compiled:
            torch._dynamo.reset()  # or the shapes before would make it compile for any shape
        autocast = case.autocast(self.device)
        with autocast, set_threads(self.threads[0]):
            tensors = Tensors(case, self.device)
            entries = [_prepared(case, tensors, *which) for which in self._which()]
        for threads in self.threads:
            with autocast, set_threads(threads):
                yield self._timed(entries, threads)

    def _which(self) -> Iterator[tuple[Contender, str, bool]]:
        """Contender, layout, and whether it is compiled; the baseline in eager mode and both layouts in any case."""
        (base,) = contenders([BASELINE])
        if base not in self.contenders:
            yield from ((base, layout, False) for layout in LAYOUTS)
        for contender in self.contenders:
            for layout in LAYOUTS if contender == base else self.layouts:
                for compiled in (False, True) if self.compiled else (False,):
                    yield contender, layout, compiled

    def _timed(self, entries: Sequence[tuple[Row, Callable[[], object]]], threads: int) -> list[Row]:
        rows = [dataclasses.replace(row, threads=threads) for row, _ in entries]
        calls = {index: call for index, (row, call) in enumerate(entries) if not row.problem}
        times = interleaved(calls, self.repeats, self.device)
        base = next((seconds for index, seconds in times.items() if _is_base(rows[index])), None)
        for index, seconds in times.items():
            rows[index].ms = statistics.median(seconds) * 1e3
            rows[index].ratio = None if base is None else ratio(seconds, base)
        return rows


def _is_base(row: Row) -> bool:
    return (row.contender, row.layout, row.compiled) == (BASELINE, "contiguous", False)


class Tensors:
    """The tensors that contenders share: the input and the guide in each layout, and gradients of outputs."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._device, self._generator = case, device, torch.Generator().manual_seed(0)
        self.inputs = self._drawn(case.shape)
        self._gradients: dict[Any, Tensor] = {}

    @functools.cached_property
    def guides(self) -> dict[str, Tensor]:
        """What guided contenders see beside the input: a map of its channels and of the output's size, in each layout."""
        batch, channels, height, width = self._case.shape
        return self._drawn((batch, channels, height * self._case.scale, width * self._case.scale))

    def _drawn(self, shape: Shape) -> dict[str, Tensor]:
        x = torch.randn(shape, generator=self._generator).to(self._device, DTYPES[self._case.dtype])
        return {
            name: x.clone().contiguous(memory_format=layout).requires_grad_(self._case.what == TRAINING)
            for name, layout in LAYOUTS.items()
        }

    def gradient(self, out: Tensor) -> Tensor:
        """A gradient for an output of this dtype and layout."""
        key = out.dtype, out.stride()
        if key not in self._gradients:
            self._gradients[key] = torch.randn_like(out)
        return self._gradients[key]


def _prepared(
    case: Case, tensors: Tensors, contender: Contender, layout: str, compiled: bool
) -> tuple[Row, Callable[[], object]]:
    """A row with all that does not depend on the number of threads, and the call to time."""
    row = Row(contender.name, case.shape, case.scale, case.groups, case.dtype, layout, case.what, compiled, threads=0)
    x = tensors.inputs[layout]
    guides = (tensors.guides[layout],) if contender.guided else ()
    settings = Settings(case.shape[1], case.scale, case.groups)
    try:
        module: Any = contender.make(settings).to(x.device).to(memory_format=LAYOUTS[layout])
        parameters = list(module.parameters())

        def forward() -> Tensor:
            out: Tensor = module(x, guide=guides[0]) if guides else module(x)
            return out

        call = eager = step(forward, (x, *guides, *parameters), tensors, case.what)
        row.parameters = sum(parameter.numel() for parameter in parameters)
        row.bytes_floor = _floor((x, *guides), forward(), contender.predicted(settings), case.what)
        row.flops = flops.count(eager)
        if compiled:
            module = torch.compile(module)
            call()
        else:
            row.bytes_moved = meters.bytes_moved(eager)
        row.peak_memory = meters.peak_memory(call, x.device)
        if case.what == TRAINING:
            row.saved = meters.saved_for_backward(forward, [x, *guides, *parameters, *module.buffers()])
    except Exception as error:  # noqa: BLE001 - a contender's own code; one must not stop the others
        row.problem = problem_of(error)
        return row, _nothing
    return row, call


def _nothing() -> None:
    """For what cannot be called."""


def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor], tensors: Tensors, what: str) -> Callable[[], object]:
    """One forward without gradients; or one forward and backward, to every input and parameter."""

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    def train() -> None:
        out = forward()
        # Not autograd.grad, which FlopCounterMode does not take.
        out.backward(tensors.gradient(out))
        for leaf in leaves:
            leaf.grad = None

    return train if what == TRAINING else infer


def _floor(inputs: Sequence[Tensor], out: Tensor, predicted: int, what: str) -> int:
    """The bytes that no implementation can do without: the inputs and what is predicted read once, the output written once.

    On the way back the output's gradient is read and those of the inputs written; where something is predicted, it and the inputs
    are read again, and its gradient is written.
    """
    x = inputs[0]
    values = x.numel() // x.shape[1] * predicted
    field = values * torch.empty(0, dtype=compute_dtype(x.dtype)).element_size()
    source, made = (sum(each.numel() * each.element_size() for each in tensors) for tensors in (inputs, (out,)))
    total = source + field + made
    if what == TRAINING:
        total += made + source + (source + 2 * field if predicted else 0)
    return total
