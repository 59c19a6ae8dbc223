"""Runs over many models: a package of tiny ones, the command in a process, and what it leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from upswap.apps.zoo.journal import Journal
from upswap.apps.zoo.rows import Row

#: A package of tiny models. Each leaves a line when it is built, so that a model that is done twice shows.
PACKAGE = """
import os, sys, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Conv2d(width, 2, 3, padding=1)
    def forward(self, x):
        return self.head(nn.functional.interpolate(self.stem(x), scale_factor=2))

def log(name):
    with open(os.environ["BUILT"], "a") as file:
        file.write(f"{name}\\n")

def make(name, seconds=0.0):
    log(name)
    time.sleep(seconds)
    return Net()

def hangs():
    log("hangs")
    time.sleep(600)

def eats():
    log("eats")
    held = []
    while True:
        held.append(torch.ones(50_000_000))

def crashes():
    log("crashes")
    sys.stderr.write("about to crash\\n")
    sys.stderr.flush()
    os.abort()

def raises():
    raise ValueError("no such width")

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1))
"""


def built(place: Path) -> list[str]:
    return (place / "built").read_text().split()


def listing(place: Path, *names: str) -> str:
    path = place / "models.txt"
    path.write_text("# the models\n\n" + "\n".join(f"python:nets_of_zoo:{name}" for name in names) + "\n")
    return str(path)


def rows(folder: Path) -> dict[str, Row]:
    return {source.rpartition(":")[2]: row for source, row in Journal(folder).rows().items()}


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "upswap", "zoo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        # A shell makes what it starts in the background deaf to interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait for a condition; what it gave when it held."""
    end = time.monotonic() + seconds
    while not (given := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return given


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)
