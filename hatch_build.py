"""Puts what `upswap/nn/sampling/native.c` is compiled to into a wheel; without a C compiler the wheel is of Python alone."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeHook(BuildHookInterface):
    """Adds the compiled file, and the tag of the platform it was compiled on."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, or say in one line why nothing is compiled."""
        script = runpy.run_path(str(Path(self.root, "upswap/nn/sampling/compile_native.py")))
        binary: Path = script["BINARY"]
        binary.unlink(missing_ok=True)  # of another machine, or of other text
        problem = script["compile_native"]()
        if problem is not None:
            self.app.display_warning(f"upswap is built without its native code and slower on CPUs: {problem}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"/{binary.relative_to(self.root).as_posix()}")
