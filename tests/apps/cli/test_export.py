"""`upswap export` on the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import get_args

import onnx
import pytest

import upswap
from deployed import patched
from upswap.apps.cli import run
from upswap.errors import UpswapWarning
from upswap.export.targets import TARGETS
from upswap.nn.sampling.samplers import SamplerName


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UpswapWarning, match="--trust deployed"):
        upswap.save(patched(), tmp_path / "net.pt")
    return tmp_path


def test_the_choices_are_those_of_the_table() -> None:
    export = importlib.import_module("upswap.apps.cli.export")
    assert tuple(TARGETS) == export.TARGETS
    assert ("auto", *get_args(SamplerName)) == export.SAMPLERS


def test_a_file_beside_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["export", "net.pt", "--static", "--input-size", "8x12", "--sampler", "gridsample"]
    assert run([*asked, "--trust", "deployed"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "inputs     image 1x3x8x12" in told
    assert "of the largest output, in onnxruntime" in told
    assert "saved      net.onnx" in told
    onnx.checker.check_model(onnx.load("net.onnx"))
    assert run([*asked, "--trust", "deployed"]) == 1
    assert "--force" in capsys.readouterr().err
    (folder / "models").mkdir()
    (folder / "net.pt").rename("models/net.pt")
    asked[1] = "models/net.pt"
    assert run([*asked, "--trust", "deployed", "--no-check"]) == 0
    assert "checked    not asked for" in capsys.readouterr().out
    assert run([*asked, "--trust", "deployed", "--force", "--no-check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["weights"]) == ("models/net.onnx", None)
    assert (found["checked"], found["error"]) == ([], None)
    assert found["inputs"] == {"image": [1, 3, 8, 12]}


def test_what_is_wrong_is_told_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, code, message in (
        (["--target", "rknn", "--sampler", "gridsample"], 2, "rknn has no gridsample"),
        (["-o", "net.xml"], 2, "a file of onnxruntime ends in .onnx"),
        (["--int8", "missing.npy"], 2, "no calibration file missing.npy"),
        (["--target", "tflite"], 2, "'tflite' is not one of"),
    ):
        assert run(["export", "net.pt", "--trust", "deployed", *asked]) == code
        assert message in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["net.pt"]
