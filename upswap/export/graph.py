"""The ONNX graph: made, its coordinates named, made smaller or less precise around them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from .flat import Flat
from .placing import weights_of

if TYPE_CHECKING:
    import onnx

T = TypeVar("T")

_DYNAMIC, _AUTO = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO

#: Bytes of weights from which they get a file of their own: protobuf writes none of 2 GiB, and the nodes need room too.
LARGEST = 2**31 - 2**26

#: In the names of what must stay float32 in any other precision.
COORDINATES, READING = "upswap/coords", "upswap/read"


def with_open_sizes(attempt: Callable[[Any], T], tensors: Sequence[Tensor], *, dynamic: bool) -> T:
    """What `attempt` gives for the sizes that may differ, as torch's exporters take them: all; else those the model lets be open.

    Raises the first error where no attempt is left.
    """
    failure: Exception | None = None
    for openness in (_DYNAMIC, _AUTO) if dynamic else (None,):
        try:
            return attempt(None if openness is None else (tuple(dimensions(tensor, openness) for tensor in tensors),))
        except Exception as error:  # noqa: BLE001 - exporters raise whatever they like
            failure = failure or error
    raise cast(Exception, failure)


def to_onnx(flat: Flat, tensors: Sequence[Tensor], opset: int, *, dynamic: bool) -> onnx.ModelProto:
    """The graph of a model, with batch and image sizes open where `dynamic` is set and the model's code lets them be.

    Raises what torch's exporter raises.
    """

    def attempt(shapes: Any) -> onnx.ModelProto:
        with quiet():
            program = torch.onnx.export(
                flat,
                tuple(tensors),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=flat.input_names,
                output_names=flat.output_names,
                verbose=False,
            )
        return cast(torch.onnx.ONNXProgram, program).model_proto

    return with_open_sizes(attempt, tensors, dynamic=dynamic)


def dimensions(tensor: Tensor, openness: Any = _DYNAMIC) -> dict[int, Any]:
    """What may differ from call to call: the batch, and the sides of an image."""
    if tensor.dim() < 3:
        return {0: _AUTO} if tensor.dim() else {}
    sides = (tensor.dim() - 2, tensor.dim() - 1)
    return dict.fromkeys((0, *sides) if tensor.dim() >= 4 else sides, openness)


def shapes(graph: onnx.ModelProto) -> dict[str, list[int | str]]:
    """The shape of each input by its name, with a name for what is open."""
    return {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.graph.input
    }


def save(graph: onnx.ModelProto, file: Path) -> list[Path]:
    """Write a graph to `file`; gives it, before the file beside it that has the weights where they are too many.

    These weights are not in `graph` any more then.
    """
    import onnx

    if not is_large(graph):
        onnx.save(graph, str(file))
        return [file]
    beside = weights_of(file)
    onnx.save(graph, str(file), save_as_external_data=True, location=beside.name)
    return [file, beside]


def is_large(graph: onnx.ModelProto) -> bool:
    """Whether its weights need a file of their own."""
    return sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LARGEST


def name_sizes(graph: onnx.ModelProto) -> None:
    """Call the open sizes of images batch, height and width, as far as they are names of the exporter's own."""
    names: dict[str, str] = {}
    for value in graph.graph.input:
        sides = value.type.tensor_type.shape.dim
        wanted = {0: "batch", len(sides) - 2: "height", len(sides) - 1: "width"} if len(sides) >= 4 else {}
        for axis, name in wanted.items():
            symbol = sides[axis].dim_param
            if symbol and symbol not in names:
                names[symbol] = name if name not in names.values() else f"{value.name}_{name}"
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), side.dim_param)


def name_coordinates(graph: onnx.ModelProto, paths: Iterable[str]) -> list[str]:
    """Rename the nodes of the upsamplers at `paths`: what computes coordinates and what reads by them; gives all these names.

    The names are `PATH/upswap/coords/...` and `PATH/upswap/read/...`: those stay as long as the upsampler does.
    """
    wanted = {f"model.{path}" if path else "model": path for path in paths}
    inside: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
        scope = next((scope for scope in wanted if repr(scope) in scopes), None)
        if scope is not None:
            inside.setdefault(wanted[scope], []).append(node)
    named = []
    for path, nodes in inside.items():
        reading = _reading(nodes)
        counts: dict[str, int] = {}
        for node in nodes:
            kind = f"{path or 'model'}/{READING if id(node) in reading else COORDINATES}/{node.op_type}"
            node.name = f"{kind}_{counts.setdefault(kind, 0)}"
            counts[kind] += 1
            named.append(node.name)
    return named


def _reading(nodes: Sequence[Any]) -> set[int]:
    """Which nodes of an upsampler carry the map itself: from where it is read to the end."""
    readers = {"GridSample", "GatherElements", "Gather"}
    used = {name for node in nodes for name in node.input}
    ends = deque(name for node in nodes for name in node.output if name not in used)
    made_by = {name: node for node in nodes for name in node.output}
    found: set[int] = set()
    while ends:
        node = made_by.get(ends.popleft())
        if node is None or id(node) in found:
            continue
        found.add(id(node))
        if node.op_type not in readers:
            ends.extend(name for name in node.input if _comes_from_reader(name, made_by, readers))
    return found


def _comes_from_reader(name: str, made_by: dict[str, Any], readers: set[str]) -> bool:
    waiting, seen = [name], set()
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or id(node) in seen or node.op_type == "Shape":
            continue
        if node.op_type in readers:
            return True
        seen.add(id(node))
        waiting.extend(node.input)
    return False


def simplified(graph: onnx.ModelProto) -> onnx.ModelProto:
    """By onnxslim."""
    import onnxslim

    with quiet():
        made: onnx.ModelProto = onnxslim.slim(graph)
    return made


def in_half(graph: onnx.ModelProto, kept: Iterable[str]) -> onnx.ModelProto:
    """In float16, inputs and outputs and the nodes named `kept` in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with tempfile.TemporaryDirectory() as folder:
        # Of a large graph shapes are inferred in files alone.
        source = str(save(graph, Path(folder, "model.onnx"))[0]) if is_large(graph) else graph
        made: onnx.ModelProto = convert_float_to_float16(source, keep_io_types=True, node_block_list=list(kept))
    _straighten(made.graph)
    OnnxModel(made).topological_sort()  # the converter adds what it adds at the end
    return made


def _straighten(graph: onnx.GraphProto) -> None:
    """Take out the casts that the converter adds to what stays float32: to float16 and back, and of float32 weights."""
    import onnx

    def casts(to: int) -> dict[str, str]:
        return {
            node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and node.attribute[0].i == to
        }

    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    down, up = casts(onnx.TensorProto.FLOAT16), casts(onnx.TensorProto.FLOAT)
    exact = {name: down.get(source, source) for name, source in up.items() if source in down or source in weights}
    for node in graph.node:
        node.input[:] = [exact.get(name, name) for name in node.input]
    for made in (up, down):
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        for node in [node for node in graph.node if node.output[0] in made and node.output[0] not in used]:
            graph.node.remove(node)
    there = {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name not in there]:
        graph.value_info.remove(value)


def in_int8(graph: onnx.ModelProto, kept: Iterable[str], batches: Sequence[Sequence[Tensor]]) -> onnx.ModelProto:
    """Quantised by static ranges seen on `batches`, as QDQ nodes; the nodes named `kept` stay float32."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [value.name for value in graph.graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: x.numpy() for name, x in zip(names, batch, strict=True)}

    with tempfile.TemporaryDirectory() as folder, quiet():
        before, ready, after = (str(Path(folder, f"{name}.onnx")) for name in ("before", "ready", "after"))
        large = len(save(graph, Path(before))) > 1
        quant_pre_process(before, ready, skip_symbolic_shape=True, save_as_external_data=large)
        present = {node.name for node in onnx.load(ready, load_external_data=False).graph.node}
        quantize_static(
            ready,
            after,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            use_external_data_format=large,
            nodes_to_exclude=[name for name in kept if name in present],
        )
        made: onnx.ModelProto = onnx.load(after)
    return made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print and warn for themselves, also past Python; what they raise says what went wrong."""
    level = logging.root.manager.disable
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)
        os.close(nowhere)
        logging.disable(level)
