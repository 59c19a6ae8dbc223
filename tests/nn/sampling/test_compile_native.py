"""Compiling `native.c`: what there is afterwards, and why there is nothing. `test_native.py` tests what it computes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from upswap.nn.sampling import compile_native


@pytest.mark.skipif(compile_native.compiler() is None or sys.platform == "win32", reason="there is no C compiler")
def test_what_is_compiled_names_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPSWAP_NATIVE", raising=False)
    binary = tmp_path / "_native.so"
    binary.write_text("of another time")
    assert compile_native.compile_native(binary) is None
    assert list(tmp_path.iterdir()) == [binary]
    source = ctypes.CDLL(str(binary)).upswap_source
    source.restype = ctypes.c_int64
    assert source() == compile_native.source_number()


def test_without_a_compiler_there_is_a_reason_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "_native.so"
    for environment, reason in (
        ({"UPSWAP_NATIVE": "0"}, "UPSWAP_NATIVE is 0"),
        ({"CC": str(tmp_path / "none")}, "cannot be run"),
        ({"CC": "false"}, "false failed: exit code 1"),
        ({"PATH": str(tmp_path)}, "there is no C compiler"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("CC", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert reason in (compile_native.compile_native(binary) or "")
    assert list(tmp_path.iterdir()) == []


def test_the_script_stands_alone() -> None:
    """The build of a wheel runs it without torch and without upswap."""
    code = f"import runpy, sys; runpy.run_path({compile_native.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", code], check=False).returncode == 0
