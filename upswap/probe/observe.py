"""Run a model once or twice and record every resize call it makes: who calls, where in the source, on what, and what for.

The run is a real one on small inputs, with the model left exactly as found (`preserve.py`), or one under FakeTensorMode
where the inputs are large or the weights are not there. Real and small comes first because it is ten times cheaper (64x64
pixels: 13 to 26 ms for SMP's models, against 150 to 440 ms under fake tensors, whose price is a call, not a pixel) and
because control flow that looks at values then goes the way it goes in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ..errors import InputError, UpswapError
from .dataflow import tensors_in
from .inputs.infer import Candidate
from .inputs.inputs import Inputs
from .preserve import leaving_no_trace
from .resize_calls import Call, _module_calls, _Recorder

#: Given inputs with more elements than this (three channels of 192x192) are run as fake tensors.
REAL_LIMIT = 3 * 192 * 192


@dataclasses.dataclass
class Observation:
    """What one run showed: the resize calls in order, and the first forward of each owner as plain data.

    `forwards` has for an owner's path `{"arguments": ..., "children": [{"path": ..., "output": ...}]}`, or None where that
    cannot be described: what its FX trace needs to know of the modules around it. `called` has the paths of the modules that
    ran, `outputs` the tensors the model returned, which nothing else holds. `unseen` has the path of each module that
    resizes in another way than by `F.interpolate`, and the way. `reads_values` says that the model's code looked at the values of
    what it computed, by which it may have chosen its way.
    """

    inputs: Inputs
    fake: bool
    training: bool
    calls: list[Call]
    forwards: dict[str, Any]
    called: set[str]
    outputs: list[torch.Tensor]
    unseen: list[tuple[str, str]]
    reads_values: bool


class ModelFailed(UpswapError):
    """The model raised an error of its own on the inputs it was given."""


def observe(
    model: nn.Module, inputs: Inputs, *, fake: bool = False, training: bool = False, guides: bool = False
) -> Observation:
    """Run `model` in eval mode or train mode and record its resize calls, with `guides` also what their results are fused with.

    With `fake`, nothing is computed and no memory is used, but a model that looks at values cannot be run. Raises
    `ModelFailed`, from the model's own error.
    """
    with _running(model, inputs, fake, training) as own:
        recorder = _Recorder(model, inputs, guides=guides)
        recorder.flow.add_source(own.tensors(), "input")
        with _module_calls(recorder), recorder.kernels(), recorder:
            try:
                result = model(*own.args, **own.kwargs)
            except Exception as error:
                raise ModelFailed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        recorder.flow.add_outputs(result)
        outputs = [tensor.detach().clone() for tensor in tensors_in(result)]  # one may be a buffer of the model
    return Observation(
        inputs,
        fake,
        training,
        recorder.classified(),
        recorder.forwards,
        recorder.called,
        outputs,
        list(recorder.unseen),
        recorder.reads_values,
    )


def run_again(model: nn.Module, seen: Observation) -> list[torch.Tensor]:
    """The model's outputs in another run as the observed one was, random numbers included, unwatched."""
    with _running(model, seen.inputs, seen.fake, seen.training) as own:
        return tensors_in(model(*own.args, **own.kwargs))


@contextlib.contextmanager
def _running(model: nn.Module, inputs: Inputs, fake: bool, training: bool) -> Iterator[Inputs]:
    """Inside, `model` can be run and is left as it was; gives the inputs to run it on, which it may write to."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving_no_trace(model, training=training))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what the model has to say of its own runs it will say in use
        # No gradients are computed, because nothing requires any; turned off, one could not see where the model does so.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in model.parameters():
            if parameter.is_leaf:  # as in `preserve`
                parameter.requires_grad_(False)
        if any(_is_compiled(module) for module in model.modules()):
            # What runs compiled is not seen. (Asking for this imports the compiler, so only where it is needed.)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_quiet("torch._subclasses.fake_tensor"))
            _materialise(model)
            yield inputs.copied().map(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else mode.from_tensor(t))
        else:
            yield inputs.copied()


def _materialise(model: nn.Module) -> None:
    """Give a model that waits for its weights fake ones on the CPU, where what its code makes of its own is."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


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


#: Errors that come of what an argument is, whatever its size, and those that code which refuses a size raises itself. torch's
#: own may be the same at two small sizes, of maps that are a single point at both.
_NOT_OF_SIZE = (TypeError, AttributeError, KeyError)
_OF_SIZE = (ValueError, AssertionError)


def first_that_runs(model: nn.Module, tries: Iterable[Candidate], *, guides: bool = False) -> Observation:
    """The observation of the first inputs the model runs on; `InputError` with every failure where there is none.

    What fails in the same words at several sizes, the sizes themselves left aside, does not fail for its size: then only sizes
    that the model names are tried. Code that refuses a size itself may say the same of each.
    """
    failures: list[str] = []
    last: BaseException | None = None
    errors: Counter[tuple[int, str]] = Counter()
    hopeless: set[int] = set()
    looks = False
    for inputs, choice, declared in tries:
        if choice in hopeless and not declared:
            continue
        # A model that looks at values fails on fake ones, large inputs or not.
        for fake in (True, False) if needs_fake(model, inputs) else (False,):
            try:
                return observe(model, inputs, fake=fake, guides=guides)
            except ModelFailed as error:
                if fake and not _on_meta(model, inputs):
                    continue
                shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs.tensors())
                failures.append(f"  {shapes}: {error}")
                last = error.__cause__
                looks |= isinstance(last, DataDependentOutputException)
                said = (choice, _without_sizes(str(error), inputs))
                errors[said] += 1
                if errors[said] >= (2 if isinstance(last, _NOT_OF_SIZE) else 3) and not isinstance(last, _OF_SIZE):
                    hopeless.add(choice)
                break
    advice = "pass example_inputs (or --input-size) that it takes"
    if looks:
        advice = (
            "it looks at values, which there are none of on the meta device. Plan on a copy with weights, and carry the plan "
            "out here: upswap.patch(model, plan=upswap.inspect(copy_with_weights))"
        )
    raise InputError(
        f"{type(model).__name__} ran on none of the inputs tried; {advice}:",
        *failures,
    ) from last


def _without_sizes(text: str, inputs: Inputs) -> str:
    """A message with the sides of the images it was said of left out."""
    sides = {str(side) for tensor in inputs.tensors() for side in tensor.shape[-2:]}
    return re.sub(r"\d+", lambda number: "" if number[0] in sides else number[0], text)


def needs_fake(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a real run would cost memory or time worth avoiding, or cannot be had."""
    return sum(t.numel() for t in inputs.tensors()) > REAL_LIMIT or _on_meta(model, inputs)


def _on_meta(model: nn.Module, inputs: Inputs) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers(), *inputs.tensors()))
