"""What both benchmarks set for a measurement, and what they tell of the machine."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD, TRAINING = "forward", "training"


@contextlib.contextmanager
def set_threads(count: int) -> Iterator[None]:
    """torch's threads inside, those that there were afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(name: str) -> torch.device:
    """The device of that name; `OptionError` where this machine has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no CUDA device here; leave it out to measure on the CPU")
    return torch.device(name)


def problem_of(error: Exception) -> str:
    """An error in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def environment(device: torch.device, memory_kept: bool) -> dict[str, Any]:
    """The machine and versions, for whoever reads numbers elsewhere."""
    return {
        "upswap": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "memory_kept": memory_kept,
    }


def _processor() -> str:
    """The processor's name, from Linux where it tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
