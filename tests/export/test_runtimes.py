"""Runtimes that CI does not install: `python benchmarks/deploy.py` and these run where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import upswap
from deployed import IMAGES, Small, patched, randomise
from upswap.export.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("target", ["litert", "executorch", "ncnn", "coreml"])
def test_a_file_of_a_runtime(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for package in TARGETS[target].packages:
        pytest.importorskip(package)
    done = upswap.export_onnx(patched(), tmp_path / f"net{TARGETS[target].suffix}", IMAGES, target=target)
    assert (tmp_path / f"net{TARGETS[target].suffix}").exists()
    if TARGETS[target].runs_here:
        assert done.error is not None
        assert done.error < 1e-5
    assert capfd.readouterr().out == ""
    assert done.metadata == (None if target == "coreml" else done.path.with_name(f"{done.path.name}.json"))
    if done.metadata is not None:
        said = json.loads(done.metadata.read_text())
    else:
        import coremltools

        said = coremltools.models.MLModel(str(done.path), skip_model_load=True).user_defined_metadata
    assert upswap.Plan.from_json(said["upswap.plan"]) == upswap.plan_of(patched())
    assert (said["upswap.target"], said["upswap.inputs"]) == (target, '["image"]')


class Several(Small):
    """Outputs in another order than that in which they are computed."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stem = self.stem(image)
        up = self.up(stem)
        return self.last(up), up, stem, up * 2, up - 1, up + 3, stem * 2, stem - 1, stem + 3, stem / 2, up / 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["litert", "executorch", "ncnn"])
def test_outputs_are_in_the_order_of_the_model(target: str, tmp_path: Path) -> None:
    for package in TARGETS[target].packages:
        pytest.importorskip(package)
    model = upswap.patch(Several().eval(), IMAGES, kinds=upswap.KINDS)
    randomise(model)
    upswap.export_onnx(model, tmp_path / f"net{TARGETS[target].suffix}", IMAGES, target=target)


@pytest.mark.slow
def test_core_ml_computes_coordinates_in_float32(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    path = tmp_path / "net.mlpackage"
    upswap.export_onnx(patched(), path, IMAGES, target="coreml", half=True)
    program = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram
    (block,) = program.functions["main"].block_specializations.values()
    types = {
        (each.type, value.type.tensorType.dataType)
        for each in block.operations
        for value in each.outputs
        if each.type in ("conv", "pixel_shuffle", "resample", "add", "mul")
    }
    halves, floats = 10, 11  # of Core ML's MIL.proto
    assert {kind for kind, number in types if number == halves} == {"conv"}
    assert {kind for kind, number in types if number == floats} == {"conv", "pixel_shuffle", "resample", "add", "mul"}
