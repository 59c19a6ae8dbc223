"""Compiles `native.c` beside itself: run by the build of a wheel, or `python -m upswap.nn.sampling.compile_native` in a checkout.

It stands alone: the build runs it where neither torch nor upswap can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
BINARY = Path(__file__).with_name("_native.so")

# Comparisons with NaN need not raise a flag that nobody reads: as long as they have to, none is computed as a vector.
_FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")


def is_x86() -> bool:
    """Whether this machine's code is x86-64, for which AVX2 is taken for granted when compiling and asked for when loading."""
    return platform.machine().lower() in ("x86_64", "amd64")


def source_number() -> int:
    """A number of the text of `native.c`, that its binary gives back: so none is used with another text's description."""
    return int(hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:15], 16)


def compiler() -> list[str] | None:
    """The C compiler: what `CC` says, or the first of the usual names that is there."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def compile_native(binary: Path = BINARY) -> str | None:
    """Compile to `binary`; None, or in one line why there is none."""
    command = compiler()
    if os.environ.get("UPSWAP_NATIVE") == "0":
        return "UPSWAP_NATIVE is 0"
    if sys.platform == "win32":
        return "it is not compiled on Windows"
    if command is None:
        return "there is no C compiler"
    command += [*_FLAGS, *(("-mavx2", "-mfma") if is_x86() else ()), f"-DUPSWAP_SOURCE={source_number()}"]
    problem = None
    fresh = binary.with_suffix(f".{os.getpid()}")  # a process may be running the code that is there
    # Without OpenMP the code is for one thread. On macOS a second runtime of it, beside torch's, would end the process.
    for parallel in ([],) if sys.platform == "darwin" else (["-fopenmp"], []):
        try:
            done = subprocess.run(
                [*command, *parallel, "-o", str(fresh), str(SOURCE)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            return f"{command[0]} cannot be run: {error}"
        if done.returncode == 0:
            fresh.replace(binary)
            return None
        problem = problem or next((line for line in done.stderr.splitlines() if "error" in line), None)
    return f"{command[0]} failed: {problem or f'exit code {done.returncode}'}"


if __name__ == "__main__":
    sys.exit(compile_native())
