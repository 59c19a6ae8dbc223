"""Compiles `upswap/nn/sampling/native.c` into the wheel, where there is a C compiler; without one the wheel has no native code.

`UPSWAP_NATIVE=0` leaves it out. What is compiled for x86-64 needs AVX2, which `native.py` asks for before it loads it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "upswap/nn/sampling/native.c"
BINARY = "upswap/nn/sampling/_native.so"

# Comparisons with NaN need not raise a flag that nobody reads: with it no comparison would be computed as a vector.
FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def compile_native(root: Path, compiler: str) -> str | None:
    """Compile beside the source; None, or what went wrong."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    wanted = [*FLAGS, *(["-mavx2", "-mfma"] if x86 else [])]
    problem = None
    # A compiler without OpenMP, as Apple's, makes code for one thread.
    for parallel in (["-fopenmp"], ["-fopenmp-simd"], []):
        command = [*shlex.split(compiler), *wanted, *parallel, "-o", str(root / BINARY), str(root / SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return None
        problem = problem or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    return problem


def _compiler() -> str | None:
    """The C compiler: `CC`, or the first of the usual names that is there."""
    return os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


class NativeHook(BuildHookInterface):  # type: ignore[misc,type-arg]
    """Adds the compiled file and the platform's tag to a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, or say in one line why there is nothing compiled."""
        binary = Path(self.root) / BINARY
        binary.unlink(missing_ok=True)
        compiler = _compiler()
        if os.environ.get("UPSWAP_NATIVE") == "0":
            problem: str | None = "UPSWAP_NATIVE=0"
        elif sys.platform == "win32":
            problem = "not on Windows"
        elif compiler is None:
            problem = "no C compiler"
        else:
            problem = compile_native(Path(self.root), compiler)
        if problem is not None:
            self.app.display_warning(f"upswap is built without native code, and is slower on CPUs: {problem}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{BINARY}")
