"""From a model as a function of tensors to the files of a target, and what runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .._version import __version__
from ..surgery.apply import is_patched, plan_of
from . import graph as graphs
from . import runtimes
from .exportable import upsampler_paths
from .flat import Flat
from .options import ExportOptions
from .runtimes import Run

if TYPE_CHECKING:
    import onnx

#: Of an ONNX file's metadata: names of nodes, a JSON list, that a quantiser has to leave float32.
FLOAT_NODES = "upswap.float_nodes"


class Made(NamedTuple):
    """The files of an export."""

    files: list[Path]
    """The one that names the export last."""
    run: Run | None
    """Runs it; None where nothing here can."""
    inputs: dict[str, list[int | str]]
    """Their shapes by their names, with a name for every size that is open."""
    graph: onnx.ModelProto | None = None
    """The ONNX graph, where there is one."""


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
            files = runtimes.write_openvino(graph, folder)
            return Made(files, runtimes.run_openvino(files[-1], flat.input_names), graphs.shapes(graph), graph)
        files = graphs.save(graph, file)
        return Made(files, runtimes.run_onnx(files[-1], flat.input_names), graphs.shapes(graph), graph)
    fixed: dict[str, list[int | str]] = {
        name: list(tensor.shape) for name, tensor in zip(flat.input_names, tensors, strict=True)
    }
    match options.target.name:
        case "torch-export":
            files, shapes = runtimes.write_torch_export(flat, tensors, folder, dynamic=options.open_sizes)
            inputs = dict(zip(flat.input_names, shapes, strict=True))
            return Made(files, runtimes.run_torch_export(files[-1]), inputs)
        case "litert":
            files = runtimes.write_litert(flat, tensors, folder)
            return Made(files, runtimes.run_litert(files[-1]), fixed)
        case "executorch":
            files = runtimes.write_executorch(flat, tensors, folder)
            return Made(files, runtimes.run_executorch(files[-1]), fixed)
        case "ncnn":
            files = runtimes.write_ncnn(flat, tensors, folder)
            return Made(files, runtimes.run_ncnn(files[-1]), fixed)
        case "coreml":
            files = runtimes.write_coreml(flat, tensors, folder, half=options.form == "half")
            return Made(files, None, fixed)  # macOS alone runs it
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
    present = {node.name for node in graph.graph.node}
    inputs = [value.name for value in graph.graph.input]
    for key, value in _metadata(flat, options, inputs, [name for name in kept if name in present]):
        graph.metadata_props.add(key=key, value=value)
    return graph


def _metadata(flat: Flat, options: ExportOptions, inputs: list[str], kept: list[str]) -> Iterator[tuple[str, str]]:
    """What a reader of the file, or a quantiser, wants to know."""
    yield "upswap.version", __version__
    yield "upswap.target", options.target.name
    yield "upswap.sampler", options.sampler
    yield "upswap.inputs", json.dumps(inputs)
    yield "upswap.outputs", json.dumps(flat.output_names)
    yield FLOAT_NODES, json.dumps(kept)
    patched = list(filter(is_patched, flat.model.modules()))
    if len(patched) == 1:
        yield "upswap.plan", plan_of(patched[0]).to_json()
