"""The ONNX graph and what is renamed in it, on graphs written by hand."""

from __future__ import annotations

import os
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from upswap.export.graph import dimensions, name_coordinates, name_sizes, quiet, shapes


def scoped(op: str, inputs: list[str], outputs: list[str], scope: str) -> onnx.NodeProto:
    node = helper.make_node(op, inputs, outputs, name=f"node_{outputs[0]}")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(["", "model", scope, outputs[0]]))
    return node


def graph_of(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["s1", 3, "s2", "s3"])
    other = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["s1", 1, "s9", "s3"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["s1", 3, "2*s2", "s3 + s9"])
    return helper.make_model(helper.make_graph(nodes, "g", [image, other], [out]))


def test_coordinates_and_reading_are_told_apart() -> None:
    graph = graph_of(
        [
            scoped("Relu", ["image"], ["x"], "model.other"),
            scoped("Conv", ["x", "w"], ["field"], "model.up"),
            scoped("Shape", ["x"], ["shape"], "model.up"),
            scoped("Reshape", ["field", "shape"], ["grid"], "model.up"),
            scoped("GridSample", ["x", "grid"], ["read"], "model.up"),
            scoped("Reshape", ["read", "shape"], ["out"], "model.up"),
        ]
    )
    named = name_coordinates(graph, ["up", "elsewhere"])
    assert [node.name for node in graph.graph.node] == [
        "node_x",
        "up/upswap/coords/Conv_0",
        "up/upswap/coords/Shape_0",
        "up/upswap/coords/Reshape_0",
        "up/upswap/read/GridSample_0",
        "up/upswap/read/Reshape_0",
    ]
    assert named == [node.name for node in graph.graph.node][1:]


def test_a_scope_is_not_the_beginning_of_another() -> None:
    graph = graph_of([scoped("Relu", ["image"], ["a"], "model.up"), scoped("Relu", ["a"], ["out"], "model.up2")])
    name_coordinates(graph, ["up2"])
    assert [node.name for node in graph.graph.node] == ["node_a", "up2/upswap/read/Relu_0"]


def test_open_sizes_have_names_a_reader_knows() -> None:
    graph = graph_of([])
    name_sizes(graph)
    assert shapes(graph) == {
        "image": ["batch", 3, "height", "width"],
        "mask": ["batch", 1, "mask_height", "width"],
    }
    assert [side.dim_param or side.dim_value for side in graph.graph.output[0].type.tensor_type.shape.dim] == [
        "batch", 3, "2*height", "width + mask_height",
    ]  # fmt: skip


def test_which_sizes_are_open() -> None:
    assert set(dimensions(torch.zeros(2, 3, 4, 5))) == {0, 2, 3}
    assert set(dimensions(torch.zeros(3, 4, 5))) == {1, 2}
    assert set(dimensions(torch.zeros(2, 7))) == {0}
    assert dimensions(torch.zeros(())) == {}


def test_nothing_is_printed_and_everything_works_again(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with quiet():
            print("from Python")
            print("from Python", file=sys.stderr)
            os.write(1, b"from below")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fails()
    os.write(1, b"after")
    print("later", flush=True)
    out, err = capfd.readouterr()
    assert (out, err) == ("afterlater\n", "")
