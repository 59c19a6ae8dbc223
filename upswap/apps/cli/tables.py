"""The consoles that commands print on, and what is shown while something takes time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

#: Width for pipes and files, where there is no terminal to measure.
_PIPE_WIDTH = 200


def stdout() -> Console:
    """The console for results."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """The console for notes and progress."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; nothing where stderr is no terminal."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
