"""What must hold while a file is loaded, and the watch over it: exceptions, time, memory, warnings, code, files."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from upswap import UpswapError
from upswap.nn.sampling.compile_native import BINARY

#: Seconds of processor time, also for each MiB of the files, and memory beyond what was held before, that one load may take.
SECONDS, SECONDS_EACH_MEBIBYTE = 8.0, 2.0
MEGABYTES = 700
WARNINGS = 20

# Packages that a file may make upswap import more of.
ADMITTED = (
    "torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers", "ultralytics", "monai", "einops", "upswap",
    "numpy", "safetensors", "encodings",
)  # fmt: skip

_ACTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "webbrowser.", "urllib.", "ftplib.", "smtplib.")
_HARMLESS = (
    "os.listdir",
    "os.scandir",
    "os.walk",
    "socket.gethostname",
    "ctypes.dlsym",
    "ctypes.cdata",
    "ctypes.addressof",
)
#: What torch opens to see whether there is a GPU, and what upswap's own code in C is compiled to.
_LIBRARIES = (("libnvidia-ml.so.1",), (str(BINARY),))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one load: the kind of end, and what must not be, if anything."""

    ended: str
    wrong: str
    seconds: float
    megabytes: float


class Watch:
    """Records, while `active`, what loading may not do. Audit hooks cannot be taken off again: one a process."""

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []
        self._modules: frozenset[str] = frozenset()
        sys.addaudithook(self._hook)

    def begin(self) -> None:
        """From here on."""
        self._modules = frozenset(sys.modules)
        self.seen = []
        self.active = True

    def end(self) -> None:
        """Note modules that came without an event: `importlib.import_module` gives none."""
        self.active = False
        for name in sorted(set(sys.modules) - self._modules):
            if name.partition(".")[0] not in ADMITTED and f"import of {name}" not in self.seen:
                self._note(f"import of {name}")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = args
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if isinstance(flags, int) and flags & writing and not str(path).startswith("/proc/"):
                self._note(f"{path} opened for writing ({mode})")
        elif event == "import":
            if args[0].partition(".")[0] not in ADMITTED and args[0] not in self._modules and not self._importing():
                self._note(f"import of {args[0]}")
        elif event in ("compile", "exec"):
            if not self._own_code(sys._getframe(1), isinstance(args[0], str | bytes)):
                self._note(f"{event} of {str(args[0])[:80]}")
        elif (
            event.startswith(_ACTS) and event not in _HARMLESS and not (event == "ctypes.dlopen" and args in _LIBRARIES)
        ):
            self._note(f"{event} {str(args)[:80]}")

    def _note(self, what: str) -> None:
        if len(self.seen) < 10:
            self.seen.append(what)

    @staticmethod
    def _importing() -> bool:
        """Whether the import is one that another module makes while it is imported itself."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == "_load_unlocked":
                return True
            frame = frame.f_back
        return False

    @staticmethod
    def _own_code(frame: FrameType | None, text: bool) -> bool:
        """Whether code is made by upswap's rewriting, not from text, by parsing without running, or by importing a module."""
        while frame is not None:
            code = frame.f_code
            if code.co_name in ("_load_unlocked", "_call_with_frames_removed"):
                return True
            if code.co_name == "parse" and code.co_filename.endswith("ast.py"):
                return True
            if code.co_filename.endswith(("routes/rewrite_calls.py", "routes/graph_route.py")) and not text:
                return True
            if code.co_filename.endswith(("collections/__init__.py", "dataclasses.py")):
                return True
            if "/torch/_" in code.co_filename:
                # torch's own, but not where its unpickler would be the one that calls.
                return "_weights_only_unpickler" not in code.co_filename
            frame = frame.f_back
        return False


def watched(load: Callable[[Path], Any], path: Path, watch: Watch) -> Outcome:
    """Load one file, with everything that must hold checked."""
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    memory, start = Peak(), time.process_time()
    wrong = ""
    watch.begin()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = load(path)
        ended = "loaded"
        if not isinstance(found, nn.Module):
            wrong = f"gave a {type(found).__name__}"
    except UpswapError as error:
        ended = type(error).__name__
        if not str(error).strip():
            wrong = "an error without a message"
        elif len(str(error)) > 20_000:
            wrong = f"a message of {len(str(error))} characters"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        ended = type(error).__name__
        wrong = f"{type(error).__name__}: {error}"[:300]
    finally:
        watch.active = False
    watch.end()
    seconds, megabytes = time.process_time() - start, memory.megabytes()
    if watch.seen:
        wrong = "; ".join(watch.seen)
    elif not wrong and len(said) > WARNINGS:
        wrong = f"{len(said)} warnings, the first: {said[0].message}"[:300]
    elif not wrong and seconds > SECONDS + SECONDS_EACH_MEBIBYTE * size / 2**20:
        wrong = f"took {seconds:.1f} s"
    elif not wrong and megabytes > MEGABYTES:
        wrong = f"took {megabytes:.0f} MB"
    left = [str(other) for other in path.parent.rglob("*.tmp")]
    return Outcome(ended, wrong or "; ".join(left), seconds, megabytes)


class Peak:
    """How much more memory than now this process has held at most. (`ru_maxrss` only grows, and begins with the parent's.)"""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        self._before = self._peak()

    def megabytes(self) -> float:
        return self._peak() - self._before

    @staticmethod
    def _peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


def limit_memory(megabytes: int) -> None:
    """Let this process map so much more than it has, so that a load that wants more fails here and not the machine."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
