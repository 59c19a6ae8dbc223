"""From a model as a function of tensors to the files of a target, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from . import graph as graphs
from . import runtimes
from .exportable import upsampler_paths
from .flat import Flat
from .metadata import metadata, note_in_graph, write_beside
from .options import ExportOptions
from .runtimes import Run

if TYPE_CHECKING:
    import onnx


class Made(NamedTuple):
    """The files of an export."""

    file: Path
    """The one that names the export."""
    run: Run | None
    """Runs it; None where nothing here can."""
    inputs: dict[str, list[int | str]]
    """Their shapes by their names, with a name for every size that is open."""
    graph: onnx.ModelProto | None = None
    """The ONNX graph, where there is one."""
    weights: Path | None = None
    """A file with the weights, where they are not in it."""
    metadata: Path | None = None
    """A file with what it says of itself, where its format has no place for that."""


def make(
    flat: Flat,
    tensors: Sequence[Tensor],
    options: ExportOptions,
    file: Path,
    data: Sequence[Sequence[Tensor]] = (),
    named: NamedGraph | None = None,
) -> Made:
    """The files of `flat`; raises whatever exporters raise.

    Args:
        flat: the model, with its sampler chosen.
        tensors: example inputs.
        options: the target and what is asked of it.
        file: the name of an ONNX file, in an empty folder: such a file names the one of its weights. Others are renamed at will.
        data: for "int8", the inputs whose ranges are taken.
        named: what `named_graph` gives for the same model and options, where that is there already.
    """
    folder = file.parent
    if options.by_onnx:
        graph = _finished(named or named_graph(flat, tensors, options), flat, options, data)
        if options.target.name == "openvino":
            weights, made = runtimes.write_openvino(graph, folder)
            return Made(made, runtimes.run_openvino(made, flat.input_names), graphs.shapes(graph), graph, weights)
        made, *beside = graphs.save(graph, file)
        return Made(made, runtimes.run_onnx(made, flat.input_names), graphs.shapes(graph), graph, *beside)
    fixed: dict[str, list[int | str]] = {
        name: list(tensor.shape) for name, tensor in zip(flat.input_names, tensors, strict=True)
    }
    said = _said(flat, options, flat.input_names)
    match options.target.name:
        case "torch-export":
            made, shapes = runtimes.write_torch_export(flat, tensors, folder, said, dynamic=options.open_sizes)
            inputs = dict(zip(flat.input_names, shapes, strict=True))
            return Made(made, runtimes.run_torch_export(made), inputs)
        case "litert":
            made = runtimes.write_litert(flat, tensors, folder)
            return Made(made, runtimes.run_litert(made), fixed, metadata=write_beside(made, said))
        case "executorch":
            made = runtimes.write_executorch(flat, tensors, folder)
            return Made(made, runtimes.run_executorch(made), fixed, metadata=write_beside(made, said))
        case "ncnn":
            weights, made = runtimes.write_ncnn(flat, tensors, folder)
            return Made(made, runtimes.run_ncnn(made), fixed, None, weights, write_beside(made, said))
        case "coreml":
            made = runtimes.write_coreml(flat, tensors, folder, said, half=options.form == "half")
            return Made(made, None, fixed)  # macOS alone runs it
        case other:
            raise ValueError(f"nothing here writes files of {other}")


class NamedGraph(NamedTuple):
    """An ONNX graph as it comes from the exporter, with names. That takes most of the time."""

    graph: onnx.ModelProto
    kept: list[str]
    """The nodes that compute coordinates and read by them."""


def named_graph(flat: Flat, tensors: Sequence[Tensor], options: ExportOptions) -> NamedGraph:
    """The graph that any target of the same opset, sampler and open sizes is given."""
    graph = graphs.to_onnx(flat, tensors, options.opset, dynamic=options.open_sizes)
    graphs.name_sizes(graph)
    return NamedGraph(graph, graphs.name_coordinates(graph, upsampler_paths(flat.model)))


def _finished(
    named: NamedGraph, flat: Flat, options: ExportOptions, data: Sequence[Sequence[Tensor]]
) -> onnx.ModelProto:
    graph, kept = named
    if options.simplify:
        graph = graphs.simplified(graph)
    if options.form == "half":
        graph = graphs.in_half(graph, kept)
    elif options.form == "int8":
        graph = graphs.in_int8(graph, kept, data)
    note_in_graph(graph, _said(flat, options, [value.name for value in graph.graph.input]), kept)
    return graph


def _said(flat: Flat, options: ExportOptions, inputs: Sequence[str]) -> dict[str, str]:
    return metadata(flat.model, options.target.name, options.sampler, inputs, flat.output_names)
