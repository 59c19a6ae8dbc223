"""Loaders that do what a load may not, to see that the watch sees it."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from upswap import SourceError


def runs_a_command(path: Path) -> Any:
    os.system("true")
    raise SourceError("refused")


def runs_a_process(path: Path) -> Any:
    subprocess.run(["true"], check=False)
    return nn.Identity()


def unpickles_a_command(path: Path) -> Any:
    pickle.loads(b"cos\nsystem\n(Vtrue\ntR.")
    return nn.Identity()


def evaluates_text(path: Path) -> Any:
    eval("1 + 1")
    return nn.Identity()


def imports_from_python(path: Path) -> Any:
    importlib.import_module("turtledemo")
    return nn.Identity()


def writes_a_file(path: Path) -> Any:
    (path.parent / "written").write_text("x")
    return nn.Identity()


def removes_a_file(path: Path) -> Any:
    path.unlink()
    return nn.Identity()


def raises_another_error(path: Path) -> Any:
    raise KeyError("plan")


def says_nothing(path: Path) -> Any:
    raise SourceError("")


def gives_no_model(path: Path) -> Any:
    return {"a": 1}


def warns_and_warns(path: Path) -> Any:
    for index in range(100):
        warnings.warn(f"warning {index}", stacklevel=1)
    return nn.Identity()


def takes_memory(path: Path) -> Any:
    return nn.Identity() if b"x" * (800 * 2**20) else None


def takes_too_much_memory(path: Path) -> Any:
    return bytearray(10**13)


def takes_time(path: Path) -> Any:
    end = time.process_time() + 8.5
    while time.process_time() < end:
        pass
    return nn.Identity()


def refuses(path: Path) -> Any:
    raise SourceError("refused, as it should be")


def loads(path: Path) -> Any:
    return nn.Identity()


def hangs(path: Path) -> Any:
    time.sleep(3600)


def dies(path: Path) -> Any:
    os.abort()


#: What the watch has to say of each; "" for those that behave.
SEEN: dict[Callable[[Path], Any], str] = {
    runs_a_command: "os.system",
    runs_a_process: "subprocess.Popen",
    unpickles_a_command: "os.system",
    evaluates_text: "compile of",
    imports_from_python: "import of turtledemo",
    writes_a_file: "opened for writing",
    removes_a_file: "os.remove",
    raises_another_error: "KeyError: 'plan'",
    says_nothing: "without a message",
    gives_no_model: "gave a dict",
    warns_and_warns: "100 warnings",
    takes_memory: "MB",
    takes_too_much_memory: "MemoryError",
    takes_time: "took 8",
    refuses: "",
    loads: "",
}
