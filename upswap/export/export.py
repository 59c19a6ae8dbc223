"""From a patched model to the file of a runtime: choose, export, shrink, check, and only then write."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, UpswapWarning
from ..probe.inputs.infer import Candidate, candidates
from ..probe.inputs.inputs import Inputs, as_inputs
from ..probe.observe import first_that_runs
from ..surgery.apply import is_patched, undo
from ..surgery.wrappers import patched_models, unwrapped
from .calibration import batches
from .checking import Checked, allowed, compared, first_images, image_count, inputs_to_check
from .exportable import choose
from .flat import Flat
from .making import Made, make
from .metadata import metadata_of
from .options import ExportOptions, form_of
from .placing import check_place, place, weights_of
from .runtimes import Run
from .targets import OPSET, target_named


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote, and how it compared with the model."""

    path: Path
    """The file."""
    weights: Path | None
    """The file beside it that has its weights: of OpenVINO, ncnn, and ONNX graphs of 2 GB or more."""
    metadata: Path | None
    """The file beside it that says what it is: of LiteRT, ExecuTorch and ncnn, whose formats have no place for that."""
    target: str
    """The runtime."""
    sampler: str
    """What upsamplers read with in it."""
    form: str
    """"float32", "half" or "int8"."""
    opset: int | None
    """None where the file is no ONNX graph."""
    nodes: int | None
    """Of the ONNX graph."""
    inputs: dict[str, list[int | str]]
    """By name, their shapes, with a name for every size that is open."""
    outputs: list[str]
    """Their names."""
    checked: tuple[Checked, ...]
    """The inputs it ran on, none where it was not checked."""
    unpatched_error: float | None
    """That of the unpatched model in the same precision, where it is not float32."""
    ran_in: str | None
    """The runtime that it was checked in, None where it was not."""

    @property
    def error(self) -> float | None:
        """The largest of `checked`."""
        return max((row.error for row in self.checked), default=None)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    target: str = "onnxruntime",
    opset: int = OPSET,
    dynamic: bool | None = None,
    sampler: str = "auto",
    half: bool = False,
    int8: Any = None,
    calibration: Any = None,
    simplify: bool = False,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Exported:
    """Write a model as a file of `target`, once it computes there what it computes here.

    The model is exported in eval mode and is not changed. Coordinates stay in float32 whatever the precision; an ONNX file
    lists their nodes in its metadata, under "upswap.float_nodes", for a quantiser of your own.

    Args:
        model: a patched model, or one that is not, which is exported all the same, with a warning.
        path: the file to write. Its name ends as the target's files do: .onnx, .xml, .tflite, .pte, .mlpackage, .ncnn.param,
            .pt2.
        example_inputs: as `patch` takes them; found by trying where left out.
        target: "onnxruntime", "openvino", "tensorrt", "rknn", "coreml", "litert", "executorch", "ncnn" or "torch-export".
        opset: of the ONNX graph, 18 at least.
        dynamic: whether batch and image size stay open; None for what the target takes.
        sampler: "gridsample", "gather", "window", or "auto" for what was measured fastest in the target.
        half: float16, but for coordinates, inputs and outputs.
        int8: calibration data, for 8-bit integers by static ranges: a path of a .npy or .npz, or a list of inputs.
        calibration: the same for the sampler "window"; `int8`'s where left out.
        simplify: whether onnxslim goes over the graph.
        check: whether the file has to agree with the model, on three inputs, before it is written.
        force: whether an existing file is replaced.
        progress: called with a text for every step; gives a context manager.

    Raises:
        OptionError: a target, sampler, opset, precision or calibration that cannot be used.
        InputError: no inputs were found that the model runs on.
        ExportError: the exporter fails, or the file does not compute what the model does.
        SaveError: the file exists, or cannot be written.
    """
    chosen = ExportOptions(
        target_named(target), opset, dynamic, sampler, form_of(half=half, int8=int8), int8, calibration, simplify, check
    )
    path = Path(path)
    chosen.refuse_misfits(path)
    check_place(path, force=force)
    host = _in_float32(copy.deepcopy(unwrapped(model)).eval().cpu())
    inputs = _inputs(host, example_inputs)
    if not chosen.target.batches:
        inputs = first_images(inputs)
    elif chosen.open_sizes:
        inputs = _with_a_batch(host, inputs)
    with tempfile.TemporaryDirectory() as folder:
        made, done = _Export(chosen, host, inputs, Path(folder, path.name), progress).carry_out(path)
        with progress("writing"):
            place(made.file, path, {to: file for file, to in _beside(made, done)}, force=force)
    return done


def _beside(made: Made, done: Exported) -> Iterator[tuple[Path, Path]]:
    """The other files, and where they go."""
    for file, to in ((made.weights, done.weights), (made.metadata, done.metadata)):
        if file is not None and to is not None:
            yield file, to


class _Export:
    """One export: of the patched model, and of the unpatched one where that tells whose fault something is."""

    def __init__(
        self,
        options: ExportOptions,
        host: nn.Module,
        inputs: Inputs,
        file: Path,
        progress: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.options, self.host, self.inputs, self.file, self.progress = options, host, inputs, file, progress
        self.patched = any(map(is_patched, host.modules()))
        self.tensors = inputs.tensors()
        self.reference = self._flat(host)
        given = options.int8
        self.data = [] if given is None else self._batches(given, fixed=not options.open_sizes)

    def carry_out(self, path: Path) -> tuple[Made, Exported]:
        """The files, and what is to be told of them; `ExportError` where that fails or they are wrong."""
        options = self.options
        model = _of_the_same_weights(self.host)
        choose(model, options.target, options.sampler, self._window_data())
        flat = self._flat(model)
        with self.progress(f"exporting {type(self.host).__name__} for {options.target.name}"):
            made = self._make(flat)
        checked: tuple[Checked, ...] = ()
        unpatched = None
        if options.check and made.run is not None:
            if options.form != "float32" and self.patched:
                with self.progress(f"the unpatched model in {options.form}, to compare with"):
                    unpatched = max((row.error for row in self._unpatched() or ()), default=None)
            with self.progress("checking"):
                checked = self._checked(made.run, unpatched)
        if options.open_sizes:
            self._tell_fixed(made.inputs)
        return made, Exported(
            path=path,
            weights=None if made.weights is None else weights_of(path),
            metadata=None if made.metadata is None else metadata_of(path),
            target=options.target.name,
            sampler=options.sampler,
            form=options.form,
            opset=options.opset if options.target.writes_onnx else None,
            nodes=None if made.graph is None else len(made.graph.graph.node),
            inputs=made.inputs,
            outputs=flat.output_names,
            checked=checked,
            unpatched_error=unpatched,
            ran_in=None if not checked else options.target.name if options.target.runs_here else "onnxruntime",
        )

    def _tell_fixed(self, inputs: Mapping[str, Sequence[int | str]]) -> None:
        """Warn of batches and images whose sizes were to be open, and are not."""
        for name, shape in inputs.items():
            if len(shape) >= 4 and any(type(shape[axis]) is int for axis in (0, -2, -1)):
                what = "x".join(map(str, shape))
                message = f"{name} is {what} in the file: the model's own code ties it to a size there"
                warnings.warn(UpswapWarning(message), stacklevel=4)

    def _flat(self, model: nn.Module) -> Flat:
        flat = Flat(model, self.inputs).eval()
        flat.name_outputs([tensor.clone() for tensor in self.tensors])
        return flat

    def _batches(self, given: Any, *, fixed: bool = False) -> list[list[Tensor]]:
        return batches(given, self.reference, self.tensors, fixed=fixed)

    def _window_data(self) -> list[Inputs] | None:
        given = self.options.window_data if self.options.window_data is not None else self.options.int8
        return None if given is None else [self._inputs_of(row) for row in self._batches(given)]

    def _inputs_of(self, tensors: Sequence[Tensor]) -> Inputs:
        waiting = iter(tensors)
        return self.inputs.map(lambda _: next(waiting))

    def _make(self, flat: Flat) -> Made:
        """`make`, or an `ExportError` that says whether the unpatched model can be exported."""
        try:
            return make(flat, self.tensors, self.options, self.file, self.data)
        except Exception as error:
            raise ExportError(
                f"{self.options.target.name} cannot be given this {type(self.host).__name__}: "
                f"{type(error).__name__}: {_first_line(error)}. {self._whose()}"
            ) from error

    def _checked(self, run: Run, unpatched: float | None) -> tuple[Checked, ...]:
        rows = self._rows(self.reference, run)
        wrong = next((row for row in rows if not row.is_right(self.options.form, unpatched)), None)
        if wrong is None:
            return tuple(rows)
        measure = "of the standard deviation (rms)" if self.options.form == "int8" else "of its largest output"
        limit = allowed(self.options.form, unpatched, wrong.rounding)
        what = wrong.problem or f"it is {wrong.error:.1e} {measure} away, and {limit:.0e} is allowed"
        coarse = (
            ""
            if self.options.form == "float32"
            else "Points move with the rounding of the maps, and check=False (--no-check) writes it all the same. "
        )
        simplified = "Leave simplify out: onnxslim may have changed the graph. " if self.options.simplify else ""
        raise ExportError(
            f"the file for {self.options.target.name} does not compute what the model does at {wrong.shapes}: {what}; nothing "
            f"was written. {simplified}{coarse}{self._whose()}"
        )

    def _whose(self) -> str:
        """How the unpatched model fares, in a sentence."""
        if not self.patched:
            return "The model is not patched"
        with self.progress("the unpatched model, to tell whose limit it is"):
            rows = self._unpatched()
        if rows is None:
            return "The unpatched model cannot be exported either: the limit is the model's or the exporter's"
        if not all(row.is_right(self.options.form) for row in rows):
            return "The unpatched model comes out wrong too: the limit is the model's or the runtime's"
        return "The unpatched model comes out right; another sampler may, and a report of this is welcome"

    def _unpatched(self) -> list[Checked] | None:
        """The unpatched model by the same way: how it compares with itself, None where it cannot be exported."""
        original = _of_the_same_weights(self.host)
        for part in patched_models(original).values():
            undo(part)
        flat = self._flat(original)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
            made = make(flat, self.tensors, self.options, Path(folder, self.file.name), self.data)
            return [] if made.run is None else self._rows(flat, made.run)
        return None

    def _rows(self, flat: Flat, run: Run) -> list[Checked]:
        sizes = inputs_to_check(flat, self.inputs, dynamic=self.options.open_sizes)
        return list(compared(flat, run, sizes, self.options.form))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, with its parameters in float32: runtimes on a CPU have no others, and half is a matter of the file."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    others = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32})
    if not others:
        return model
    message = f"{type(model).__name__} has parameters of {', '.join(others)}: it is exported in float32"
    warnings.warn(UpswapWarning(message), stacklevel=3)
    return model.float()


def _of_the_same_weights(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters: those of a large model are gigabytes."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _inputs(model: nn.Module, given: Any) -> Inputs:
    """What the model is run on; `InputError` where it does not run."""
    if given is None:
        return first_that_runs(model, candidates(model)).inputs
    inputs = as_inputs(given).map(lambda x: x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype))
    return first_that_runs(model, [Candidate(inputs, 0)]).inputs


def _with_a_batch(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with two images where they have one: an exporter takes a size of 1 for a constant. As given where that fails."""
    if image_count(inputs) != 1:
        return inputs
    twice = inputs.map(lambda tensor: torch.cat((tensor, tensor.flip(-1))) if tensor.shape[:1] == (1,) else tensor)
    with contextlib.suppress(Exception), torch.no_grad():  # a model may take one image alone
        own = twice.copied()
        model(*own.args, **own.kwargs)
        return twice
    return inputs
