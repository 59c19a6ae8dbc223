"""Runtimes that CI does not install: `python benchmarks/deploy.py` and these run where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

import upswap
from deployed import IMAGES, patched
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
