"""From a patched model to the file of a runtime: choose, export, shrink, check, and only then write."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import ExportError, OptionError, SaveError, UpswapWarning
from ..files import atomic
from ..nn.sampling.samplers import Sampler
from ..probe.inputs.infer import example_inputs_for
from ..probe.inputs.inputs import Inputs, as_inputs
from ..surgery.apply import is_patched, plan_of, undo
from ..surgery.wrappers import unwrapped
from . import graph as graphs
from . import runtimes
from .calibration import batches
from .checking import Checked, allowed, compared, inputs_to_check
from .exportable import choose, upsampler_paths
from .flat import Flat
from .targets import OPSET, Target, sampler_for, target_named

if TYPE_CHECKING:
    import onnx

Form = Literal["float32", "half", "int8"]

#: Keys of an ONNX file's metadata.
_FLOAT_NODES = "upswap.float_nodes"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote, and how it compared with the model."""

    path: Path
    """The file; others that belong to it stand beside it."""
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
        path: the file to write; its name ends as the target's files do: .onnx, .xml, .tflite, .pte, .mlpackage, .ncnn.param, .pt2.
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
    chosen = _Options(
        target_named(target), opset, dynamic, sampler, _form(half, int8), int8, calibration, simplify, check
    )
    path = Path(path)
    chosen.refuse_misfits(path)
    _check_place(path, force)
    host = copy.deepcopy(unwrapped(model)).eval().cpu()
    inputs = as_inputs(example_inputs) if example_inputs is not None else example_inputs_for(host)
    inputs = _with_a_batch(host, inputs) if chosen.open_sizes else inputs
    with tempfile.TemporaryDirectory() as folder:
        made = _Export(chosen, host, inputs, Path(folder), progress)
        done = made.carry_out(path)
        with progress("writing"):
            _place(made.files, path, chosen.target, force)
    return done


def _form(half: bool, int8: Any) -> Form:
    if half and int8 is not None:
        raise OptionError("half and int8 exclude each other")
    return "half" if half else "float32" if int8 is None else "int8"


@dataclasses.dataclass(frozen=True)
class _Options:
    target: Target
    opset: int
    dynamic: bool | None
    sampler_name: str
    form: Form
    int8: Any
    window_data: Any
    simplify: bool
    check: bool

    @property
    def sampler(self) -> Sampler:
        return sampler_for(self.target, self.sampler_name)

    @property
    def open_sizes(self) -> bool:
        return self.target.dynamic if self.dynamic is None else self.dynamic

    @property
    def by_onnx(self) -> bool:
        """Whether an ONNX graph is made on the way."""
        return self.target.writes_onnx or self.target.name == "openvino"

    def refuse_misfits(self, path: Path) -> None:
        """`OptionError` for what the target does not take."""
        target = self.target
        _ = self.sampler
        if not path.name.endswith(target.suffix):
            raise OptionError(f"{path}: a file of {target.name} ends in {target.suffix}")
        if self.open_sizes and not target.dynamic:
            raise OptionError(f"{target.name} takes fixed sizes: leave dynamic out")
        if self.form not in target.formats:
            raise OptionError(f"no {self.form} for {target.name} from here; it takes {', '.join(target.formats)}")
        if self.by_onnx and self.opset < OPSET:
            raise OptionError(f"opset {self.opset} is too low: the exporter writes {OPSET} and later")
        if self.by_onnx and self.opset > target.newest_opset:
            message = f"{target.name} is known to read opset {target.newest_opset} at most; {OPSET} is the default"
            if target.name != "tensorrt":
                raise OptionError(f"opset {self.opset}: {message}")
            warnings.warn(UpswapWarning(f"{message}: it takes mode='linear' of later ones for nearest"), stacklevel=3)
        if self.simplify and not self.by_onnx:
            raise OptionError(f"simplify works on ONNX graphs, and {target.name} takes none")
        if self.simplify and not _importable("onnxslim"):
            raise OptionError("simplify needs onnxslim: pip install onnxslim")


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


class _Export:
    """One export: of the patched model, and of the unpatched one where that tells whose fault something is."""

    def __init__(
        self,
        options: _Options,
        host: nn.Module,
        inputs: Inputs,
        folder: Path,
        progress: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.options, self.host, self.inputs, self.folder = options, host, inputs, folder
        self.progress = progress
        self.files: list[Path] = []
        self.tensors = inputs.tensors()
        self.reference = self._flat(host)
        self._data = None if options.int8 is None else batches(options.int8, self.reference, self.tensors)

    def carry_out(self, path: Path) -> Exported:
        """Make the files in `folder`; `ExportError` where that fails or they are wrong."""
        options = self.options
        model = copy.deepcopy(self.host)
        choose(model, options.sampler, self._window_data())
        patched = is_patched(self.host)
        flat = self._flat(model)
        with self.progress(f"exporting {type(self.host).__name__} for {options.target.name}"):
            run, graph = self._guarded(partial(self._make, flat, self.folder), patched)
        checked: tuple[Checked, ...] = ()
        unpatched = None
        if options.check and run is not None:
            if options.form != "float32" and patched:
                with self.progress("the unpatched model in the same precision, to compare with"):
                    unpatched = self._unpatched_error()
            with self.progress("checking"):
                checked = self._checked(run, unpatched, patched)
        return Exported(
            path,
            options.target.name,
            options.sampler.name,
            options.form,
            options.opset if graph is not None and options.target.writes_onnx else None,
            len(graph.graph.node) if graph is not None else None,
            self._shapes(graph),
            flat.output_names,
            checked,
            unpatched,
            None if not checked else options.target.name if options.target.runs_here else "onnxruntime",
        )

    def _flat(self, model: nn.Module) -> Flat:
        flat = Flat(model, self.inputs).eval()
        flat.name_outputs([tensor.clone() for tensor in self.tensors])
        return flat

    def _window_data(self) -> Any:
        given = self.options.window_data if self.options.window_data is not None else self.options.int8
        if given is None:
            return None
        return [self._inputs_of(tensors) for tensors in batches(given, self.reference, self.tensors)]

    def _inputs_of(self, tensors: Sequence[Tensor]) -> Inputs:
        waiting = iter(tensors)
        return self.inputs.map(lambda _: next(waiting))

    def _make(self, flat: Flat, folder: Path) -> tuple[runtimes.Run | None, onnx.ModelProto | None]:
        """The files of a model in `folder`, and what runs them."""
        options, target = self.options, self.options.target
        if not options.by_onnx:
            return self._make_from_torch(flat, folder), None
        graph = graphs.to_onnx(flat, self.tensors, options.opset, dynamic=options.open_sizes)
        kept = graphs.name_coordinates(graph, upsampler_paths(flat.model))
        if options.simplify:
            graph = graphs.simplified(graph)
        if options.form == "half" and target.writes_onnx:
            graph = graphs.in_half(graph, kept)
        elif options.form == "int8":
            assert self._data is not None
            graph = graphs.in_int8(graph, kept, self._data)
        self._note(graph, kept, flat)
        if target.name == "openvino":
            self.files = runtimes.write_openvino(graph, folder, half=options.form == "half")
            return runtimes.run_openvino(self.files[-1]), graph
        import onnx

        file = folder / "model.onnx"
        onnx.save(graph, str(file))
        self.files = [file]
        return runtimes.run_onnx(graph) if options.check else None, graph

    def _make_from_torch(self, flat: Flat, folder: Path) -> runtimes.Run | None:
        name = self.options.target.name
        if name == "torch-export":
            shapes = (tuple(graphs.dimensions(tensor) for tensor in self.tensors),) if self.options.open_sizes else None
            self.files = runtimes.write_torch_export(flat, self.tensors, shapes, folder)
            return runtimes.run_torch_export(self.files[-1])
        if name == "coreml":
            self.files = runtimes.write_coreml(flat, self.tensors, folder, half=self.options.form == "half")
            return None  # macOS alone can run it
        write: Any = getattr(runtimes, f"write_{name}")
        self.files = write(flat, self.tensors, folder)
        run: Any = getattr(runtimes, f"run_{name}")
        return run(self.files[-1])  # type: ignore[no-any-return]

    def _note(self, graph: onnx.ModelProto, kept: Sequence[str], flat: Flat) -> None:
        """What a reader of the file, or a quantiser, wants to know."""
        present = {node.name for node in graph.graph.node}
        entries = {
            "upswap.version": __version__,
            "upswap.target": self.options.target.name,
            "upswap.sampler": self.options.sampler.name,
            "upswap.inputs": json.dumps(flat.input_names),
            "upswap.outputs": json.dumps(flat.output_names),
            _FLOAT_NODES: json.dumps([name for name in kept if name in present]),
        }
        if is_patched(self.host):
            entries["upswap.plan"] = plan_of(self.host).to_json()
        for key, value in entries.items():
            graph.metadata_props.add(key=key, value=value)

    def _guarded(self, make: Callable[[], Any], patched: bool) -> Any:
        """`make()`, or an `ExportError` that says whether the unpatched model can be exported."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - exporters raise whatever they like
            whose = self._whose() if patched else ""
            raise ExportError(
                f"{self.options.target.name} cannot be given this {type(self.host).__name__}: "
                f"{type(error).__name__}: {_first_line(error)}{whose}"
            ) from error

    def _whose(self) -> str:
        with self.progress("the unpatched model, to tell whose limit it is"):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    self._make(self._original(), Path(folder))
            except Exception:  # noqa: BLE001 - see above
                return ". The unpatched model cannot be exported either: the limit is the model's or the exporter's"
        return ". The unpatched model can be exported: please report this, with the model"

    def _original(self) -> Flat:
        original = copy.deepcopy(self.host)
        undo(original)
        return self._flat(original)

    def _unpatched_error(self) -> float | None:
        original = self._original()
        with tempfile.TemporaryDirectory() as folder:
            kept = self.files
            try:
                run, _ = self._make(original, Path(folder))
                rows = [] if run is None else self._rows(original, run)
            except Exception:  # noqa: BLE001 - then there is nothing to compare with
                return None
            finally:
                self.files = kept
        return max((row.error for row in rows), default=None)

    def _rows(self, flat: Flat, run: runtimes.Run) -> list[Checked]:
        form, sizes = self.options.form, inputs_to_check(flat, self.inputs, dynamic=self.options.open_sizes)
        return list(compared(flat, run, sizes, form))

    def _checked(self, run: runtimes.Run, unpatched: float | None, patched: bool) -> tuple[Checked, ...]:
        rows = self._rows(self.reference, run)
        limit = allowed(self.options.form, unpatched)
        wrong = next((row for row in rows if row.problem or not row.error <= limit), None)
        if wrong is None:
            return tuple(rows)
        what = wrong.problem or f"it is {wrong.error:.1e} of the largest output away, and {limit:.0e} is allowed"
        simplified = " Leave simplify out: onnxslim may have changed the graph." if self.options.simplify else ""
        raise ExportError(
            f"the file for {self.options.target.name} does not compute what the model does at {wrong.shapes}: {what}; nothing was "
            f"written.{simplified}{self._whose_error(patched)}"
        )

    def _whose_error(self, patched: bool) -> str:
        if not patched:
            return ""
        original = self._original()
        limit = allowed(self.options.form, None)
        with tempfile.TemporaryDirectory() as folder:
            try:
                run, _ = self._make(original, Path(folder))
                rows = [] if run is None else self._rows(original, run)
            except Exception:  # noqa: BLE001 - see `_guarded`
                return " The unpatched model cannot be exported at all."
        if any(row.problem or not row.error <= limit for row in rows):
            return " The unpatched model comes out wrong too: the limit is the model's or the runtime's."
        return " The unpatched model comes out right."

    def _shapes(self, graph: onnx.ModelProto | None) -> dict[str, list[int | str]]:
        names = self.reference.input_names
        if graph is not None:
            return dict(zip(names, graphs.open_sizes(graph), strict=True))
        return {name: list(tensor.shape) for name, tensor in zip(names, self.tensors, strict=True)}


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _with_a_batch(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with two images where they have one: an exporter takes a size of 1 for a constant. As given where that fails."""
    if any(tensor.dim() < 4 or len(tensor) != 1 for tensor in inputs.tensors()):
        return inputs
    twice = inputs.map(lambda tensor: torch.cat((tensor, tensor.flip(-1))))
    try:
        with torch.no_grad():
            own = twice.copied()
            model(*own.args, **own.kwargs)
    except Exception:  # noqa: BLE001 - a model that takes one image
        return inputs
    return twice


def _check_place(path: Path, force: bool) -> None:
    if path.suffix == ".mlpackage":
        if path.exists() and not force:
            raise SaveError(f"{path} exists; --force, or force=True, replaces it")
        return
    for file in _places(path, 2):
        atomic.check(file, force=force)


def _places(path: Path, number: int) -> list[Path]:
    """The files that belong to `path`, itself last."""
    has_weights = path.suffix in (".xml", ".param") and number > 1
    return [path.with_suffix(".bin"), path] if has_weights else [path]


def _place(files: Sequence[Path], path: Path, target: Target, force: bool) -> None:
    if path.suffix == ".mlpackage":
        _place_folder(files[-1], path)
        return
    fills = {place.name: partial(_copy, file) for file, place in zip(files, _places(path, len(files)), strict=True)}
    if len(fills) == 1:
        atomic.write(path, fills[path.name], force=force)
    else:
        atomic.write_together(path.parent, fills, path.name, force=force)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _place_folder(made: Path, path: Path) -> None:
    with _beside(path) as waiting:
        shutil.copytree(made, waiting / path.name)
        if path.exists():
            os.replace(path, waiting / "old")
        os.replace(waiting / path.name, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder)
