"""What an exported file says of itself, in the place that its format has for that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .._version import __version__
from ..surgery.apply import is_patched, plan_of

if TYPE_CHECKING:
    import onnx

#: Names of nodes, a JSON list, that a quantiser has to leave float32.
FLOAT_NODES = "upswap.float_nodes"


def metadata(
    model: nn.Module, target: str, sampler: str, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, str]:
    """What a reader of a file wants to know: lists and plans as JSON.

    Args:
        model: patched, or with patched models in it; their plans are told, by their paths where there are several.
        target: the runtime.
        sampler: what upsamplers read with.
        inputs: the names of the inputs, in their order.
        outputs: those of the outputs.
    """
    found = {
        "upswap.version": __version__,
        "upswap.target": target,
        "upswap.sampler": sampler,
        "upswap.inputs": json.dumps(list(inputs)),
        "upswap.outputs": json.dumps(list(outputs)),
    }
    plans = {path: plan_of(module).to_json() for path, module in model.named_modules() if is_patched(module)}
    if len(plans) == 1:
        found["upswap.plan"] = next(iter(plans.values()))
    elif plans:
        found["upswap.plans"] = json.dumps({path: json.loads(plan) for path, plan in plans.items()})
    return found


def note_in_graph(graph: onnx.ModelProto, said: dict[str, str], kept: Iterable[str]) -> None:
    """In an ONNX graph: in its `metadata_props`, with the nodes of `kept` that it has."""
    present = {node.name for node in graph.graph.node}
    everything = {**said, FLOAT_NODES: json.dumps([name for name in kept if name in present])}
    for key, value in everything.items():
        graph.metadata_props.add(key=key, value=value)


def write_beside(file: Path, said: dict[str, str]) -> Path:
    """A JSON file beside `file`, for formats that have no place for it; its path."""
    beside = metadata_of(file)
    beside.write_text(json.dumps(said, indent=1), encoding="utf-8")
    return beside


def metadata_of(file: Path) -> Path:
    """Where the metadata of a file is that has it beside it."""
    return file.with_name(f"{file.name}.json")
