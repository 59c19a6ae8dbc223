"""What cannot be had is refused before the work, with what can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import upswap
from deployed import IMAGES, patched
from upswap.errors import OptionError, UpswapWarning
from upswap.export.options import ExportOptions
from upswap.export.targets import TARGETS


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.onnx", {"target": "onnx"}, "no target 'onnx'; there are onnxruntime, "),
        ("m.onnx", {"target": "openvino"}, r"m\.onnx: a file of openvino ends in \.xml"),
        ("m.onnx", {"sampler": "nearest"}, "no sampler 'nearest'; there are auto, gridsample"),
        ("m.onnx", {"target": "rknn", "sampler": "gridsample"}, "rknn has no gridsample; it takes gather, window"),
        ("m.onnx", {"target": "rknn", "dynamic": True}, "rknn takes fixed sizes"),
        ("m.onnx", {"target": "rknn", "opset": 20}, "rknn reads 19 at most"),
        ("m.onnx", {"target": "rknn", "half": True}, "no half for rknn"),
        ("m.onnx", {"opset": 16}, r"opset 16 is too low.*exportable\(model\)"),
        ("m.pt2", {"target": "torch-export", "opset": 20}, "torch-export takes none: leave it out"),
        ("m.onnx", {"calibration": [IMAGES]}, "for the sampler 'window', and this is 'gather'"),
        ("m.onnx", {"half": True, "int8": [IMAGES]}, "exclude each other"),
        ("m.pt2", {"target": "torch-export", "simplify": True}, "torch-export takes none"),
        ("m.onnx", {"int8": "nowhere.npy"}, "no calibration file nowhere.npy"),
        (
            "m.onnx",
            {"int8": [IMAGES[:, :2]]},
            r"does not fit the model: image is \(2, 2, 6, 5\) float32, and the model takes \(any, 3, any, any\) float32",
        ),
        ("m.onnx", {"int8": []}, "nothing in the calibration data"),
    ],
)
def test_misfits(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        upswap.export_onnx(patched(), tmp_path / name, IMAGES, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told_with_the_line_for_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="'ncnn' needs pnnx, ncnn: pip install pnnx ncnn"):
        upswap.export_onnx(patched(), tmp_path / "m.ncnn.param", IMAGES, target="ncnn")


def test_tensorrt_above_its_opset_is_a_warning() -> None:
    options = ExportOptions(TARGETS["tensorrt"], 20, None, "auto", "float32")
    with pytest.warns(UpswapWarning, match="TensorRT reads mode='linear' of opset 20 and later as nearest"):
        options.refuse_misfits(Path("m.onnx"))
