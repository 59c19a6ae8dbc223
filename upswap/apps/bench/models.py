"""A whole model: the original against the patched one, inference and training step, in one process and in turn."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import api
from ...errors import InputError
from ...probe.dataflow import tensors_in
from ...probe.inputs.infer import candidates
from ...probe.inputs.inputs import Inputs
from ...probe.inputs.variations import images_of
from ...probe.observe import first_that_runs
from ...surgery.apply import is_patched
from . import flops, meters
from .clock import interleaved, ratio
from .setting import LAYOUTS, TRAINING, problem_of, set_threads

ORIGINAL, PATCHED = "original", "patched"


@dataclasses.dataclass
class Row:
    """One of the two models in one setting: docs/bench.md explains the fields. None: not known, or it does not run."""

    model: str
    what: str
    dtype: str
    layout: str
    compiled: bool
    threads: int
    ms: float | None = None
    slow_down: float | None = None
    """Of the patched model against the original in the same setting, in percent."""
    eager_ratio: float | None = None
    """Of a compiled model against itself in eager mode."""
    parameters: int | None = None
    flops: int | None = None
    peak_memory: int | None = None
    problem: str = ""


class ModelBench(NamedTuple):
    """What is measured how often and where."""

    dtype: str = "float32"
    layout: str = "contiguous"
    threads: Sequence[int] = (1,)
    compiled: bool = False
    repeats: int = 9
    device: torch.device = torch.device("cpu")

    def run(self, original: nn.Module, patched: nn.Module, inputs: Inputs, what: str) -> Iterator[list[Row]]:
        """The rows of both models for one number of threads after the other.

        Weights stay as they are; gradients are dropped, and batch-norm statistics move in training.
        """
        if self.compiled:
            torch._dynamo.reset()
        with set_threads(self.threads[0]):
            given = inputs.map(self.placed)
            runs = [
                self._prepared(name, self.module(model, what), given, what, compiled)
                for name, model in ((ORIGINAL, original), (PATCHED, patched))
                for compiled in ((False, True) if self.compiled else (False,))
            ]
        for threads in self.threads:
            with set_threads(threads):
                yield self._timed(runs, threads)

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor of the inputs as the models are given it."""
        layout = LAYOUTS[self.layout] if tensor.dim() == 4 else torch.contiguous_format
        return tensor.to(self.device).contiguous(memory_format=layout)

    def module(self, model: nn.Module, what: str) -> nn.Module:
        """The model itself, on the device, in the layout and mode that are measured."""
        return model.to(self.device).to(memory_format=LAYOUTS[self.layout]).train(what == TRAINING)

    def _prepared(
        self, name: str, model: nn.Module, inputs: Inputs, what: str, compiled: bool
    ) -> tuple[Row, Callable[[], object]]:
        """A row with all that does not depend on the number of threads, and the call to time."""
        row = Row(name, what, self.dtype, self.layout, compiled, threads=0)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        call = self.call(model, model, inputs, what)
        try:
            row.flops = flops.count(call)
            if compiled:
                call = self.call(torch.compile(model), model, inputs, what)
            call()
            row.peak_memory = meters.peak_memory(call, self.device)
        except Exception as error:  # noqa: BLE001 - a model's own code, which may refuse to be trained or compiled
            row.problem = problem_of(error)
        return row, call

    def call(self, forward: Callable[..., Any], model: nn.Module, inputs: Inputs, what: str) -> Callable[[], object]:
        """A forward in eval mode without gradients, or the forward, loss and backward of a training step."""
        weights: dict[int, Tensor] = {}

        def run() -> Any:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != "float32"):
                return forward(*inputs.args, **inputs.kwargs)

        def infer() -> Any:
            with torch.no_grad():
                return run()

        def train() -> None:
            _loss(run(), weights).backward()
            for parameter in model.parameters():
                parameter.grad = None

        return train if what == TRAINING else infer

    def _timed(self, runs: Sequence[tuple[Row, Callable[[], object]]], threads: int) -> list[Row]:
        rows = [dataclasses.replace(row, threads=threads) for row, _ in runs]
        times = interleaved(
            {(row.model, row.compiled): call for row, call in runs if not row.problem}, self.repeats, self.device
        )
        for row in rows:
            own = times.get((row.model, row.compiled))
            if own is None:
                continue
            row.ms = statistics.median(own) * 1e3
            if row.model == PATCHED and (ORIGINAL, row.compiled) in times:
                row.slow_down = 100 * (ratio(own, times[ORIGINAL, row.compiled]) - 1)
            if row.compiled and (row.model, False) in times:
                row.eager_ratio = ratio(own, times[row.model, False])
        return rows


def both(model: nn.Module, example_inputs: Any, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The original and the patched model, with the same weights; one that is patched already is undone in a copy.

    Raises what `upswap.patch` raises.
    """
    if is_patched(model):
        return api.unpatch(copy.deepcopy(model)), model
    return model, api.patch(copy.deepcopy(model), example_inputs, **options)


def inputs_for(model: nn.Module, size: tuple[int, int], batch: int) -> Inputs:
    """Inputs of `batch` images of that size, which the model runs on.

    Raises:
        InputError: none are known, it runs on none of them, or its inputs have no batch.
    """
    return batched(first_that_runs(model, candidates(model, size)).inputs, batch, type(model).__name__)


def batched(single: Inputs, batch: int, name: str) -> Inputs:
    """The inputs of the model `name` repeated to a batch; `InputError` where its images are not in one tensor."""
    images = images_of(single)
    counts = {len(image) for image in images if image.dim() >= 4}
    if len(counts) != 1 or any(image.dim() < 4 for image in images):
        if batch == 1:
            return single
        raise InputError(
            f"{name} takes no tensor of several images, so that no batch of {batch} can be made; use --batch 1"
        )
    (count,) = counts
    return single.map(lambda t: t.repeat_interleave(batch, 0)[:batch] if t.dim() and len(t) == count else t)


def _loss(outputs: Any, weights: dict[int, Tensor]) -> Tensor:
    """The sum of all outputs that have a gradient, each value weighted at random, always in the same way."""
    found = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad and tensor.is_floating_point()]
    if not found:
        raise InputError("no output of the model in train mode has a gradient; it may need targets")
    total = found[0].new_zeros((), dtype=torch.float32)
    for index, tensor in enumerate(found):
        if index not in weights or weights[index].shape != tensor.shape:
            weights[index] = torch.randn_like(tensor)
        total = total + (tensor * weights[index]).sum()
    return total
