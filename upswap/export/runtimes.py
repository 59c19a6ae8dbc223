"""Writing the files of runtimes, and running them: a function each, which alone names the runtime's packages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn import dysample
from .flat import Flat
from .graph import quiet, save, with_open_sizes
from .metadata import FLOAT_NODES

if TYPE_CHECKING:
    import numpy as np
    import onnx

#: Runs a file on the input tensors.
Run = Callable[[Sequence[Tensor]], list["np.ndarray[Any, Any]"]]


def run_onnx(file: Path, inputs: Sequence[str]) -> Run:
    """By onnxruntime on the CPU, with as many threads as torch has; `inputs` are the names of the tensors it will be given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    left = {value.name for value in session.get_inputs()}  # a simplifier drops those that are not used

    def run(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        given = zip(inputs, _numpy(tensors), strict=True)
        found: list[np.ndarray[Any, Any]] = session.run(None, {name: array for name, array in given if name in left})
        return found

    return run


def write_openvino(graph: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    """A .bin and its .xml, in the graph's own precision: its compression to float16 would round coordinates too."""
    import openvino

    with tempfile.TemporaryDirectory() as temporary:
        model = openvino.convert_model(save(graph, Path(temporary, "model.onnx"))[0])
        # It takes the graph's metadata over, as "framework", and has its own operations: some of other names.
        kept = json.loads(next(entry.value for entry in graph.metadata_props if entry.key == FLOAT_NODES))
        names = [operation.get_friendly_name() for operation in model.get_ordered_ops()]
        here = [name for name in names if any(name == each or name.startswith(f"{each}/") for each in kept)]
        model.set_rt_info(json.dumps(here), ["framework", FLOAT_NODES])
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.bin", folder / "model.xml"


def run_openvino(file: Path, inputs: Sequence[str]) -> Run:
    """On the CPU, in float32; `inputs` are the names of the tensors it will be given."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.compile_model(file, "CPU", hints)
    left = {name for port in model.inputs for name in port.names}

    def run(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        given = zip(inputs, _numpy(tensors), strict=True)
        found = model({name: array for name, array in given if name in left})
        return [found[output] for output in model.outputs]

    return run


def write_torch_export(
    flat: Flat, tensors: Sequence[Tensor], folder: Path, said: dict[str, str], *, dynamic: bool
) -> tuple[Path, list[list[int | str]]]:
    """A .pt2, as `torch.export.load` reads it, with `said` for its extra files; and the shapes of its inputs, a name for every
    size that is open.
    """

    def attempt(shapes: Any) -> torch.export.ExportedProgram:
        with quiet():
            return torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes)

    program = with_open_sizes(attempt, tensors, dynamic=dynamic)
    with quiet():
        torch.export.save(program, folder / "model.pt2", extra_files=said)
    wanted = set(program.graph_signature.user_inputs)
    shapes = [
        [side if type(side) is int else str(side) for side in node.meta["val"].shape]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted
    ]
    return folder / "model.pt2", shapes


def run_torch_export(file: Path) -> Run:
    """By torch."""
    with quiet():
        model = torch.export.load(file).module()
    return lambda tensors: [tensor.detach().numpy() for tensor in model(*tensors)]


def write_litert(flat: Flat, tensors: Sequence[Tensor], folder: Path) -> Path:
    """A .tflite."""
    import litert_torch

    with quiet():
        litert_torch.convert(flat, tuple(tensors)).export(str(folder / "model.tflite"))
    return folder / "model.tflite"


def run_litert(file: Path) -> Run:
    """By its interpreter on the CPU."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file), num_threads=torch.get_num_threads())
    runner = interpreter.get_signature_runner()
    names = sorted(runner.get_input_details(), key=_number)

    def run(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        found = runner(**dict(zip(names, _numpy(tensors), strict=True)))
        return [found[name] for name in sorted(found, key=_number)]

    return run


def _number(name: str) -> int:
    """Of "args_0", "output_10"."""
    return int(name.rpartition("_")[2])


def write_executorch(flat: Flat, tensors: Sequence[Tensor], folder: Path) -> Path:
    """A .pte, for XNNPACK and the portable kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet():
        program = torch.export.export(flat, tuple(tensors))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    file = folder / "model.pte"
    file.write_bytes(lowered.buffer)
    return file


def run_executorch(file: Path) -> Run:
    """By its Python runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda tensors: [tensor.numpy() for tensor in method.execute(list(tensors))]


def write_coreml(flat: Flat, tensors: Sequence[Tensor], folder: Path, said: dict[str, str], *, half: bool) -> Path:
    """An .mlpackage, an ML program, with `said` for its metadata; in `half`, what upsamplers compute stays float32."""
    import coremltools
    from coremltools.converters.mil.mil.scope import ScopeSource

    def elsewhere(operation: Any) -> bool:
        return dysample.__file__ not in str(operation.scopes.get(ScopeSource.EXIR_STACK_TRACE))

    with quiet():
        program = torch.export.export(flat, tuple(tensors)).run_decompositions({})
        halved = coremltools.transform.FP16ComputePrecision(op_selector=elsewhere)
        precision = halved if half else coremltools.precision.FLOAT32
        made = coremltools.convert(program, convert_to="mlprogram", compute_precision=precision)
        made.user_defined_metadata.update(said)
        made.save(str(folder / "model.mlpackage"))
    return folder / "model.mlpackage"


def write_ncnn(flat: Flat, tensors: Sequence[Tensor], folder: Path) -> tuple[Path, Path]:
    """A .bin and its .param."""
    import pnnx

    with quiet():
        pnnx.export(flat, str(folder / "model.pt"), tuple(tensors), fp16=False)
    return folder / "model.ncnn.bin", folder / "model.ncnn.param"


def run_ncnn(file: Path) -> Run:
    """On the CPU, image by image: ncnn knows no batch."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    net.opt.num_threads = torch.get_num_threads()
    net.load_param(str(file))
    net.load_model(str(file.with_suffix(".bin")))

    def run(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        batches = []
        for number in range(len(tensors[0])):
            extractor = net.create_extractor()
            for index, x in enumerate(_numpy(tensors)):
                extractor.input(f"in{index}", ncnn.Mat(np.ascontiguousarray(x[number])).clone())
            names = sorted(net.output_names(), key=lambda name: int(name.removeprefix("out")))  # as they are computed
            batches.append([np.array(extractor.extract(name)[1]) for name in names])
        return [np.stack(outputs) for outputs in zip(*batches, strict=True)]

    return run


def _numpy(tensors: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]
