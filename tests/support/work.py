"""How much Python a call runs, counted: what a clock would tell on a machine that nobody else uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


def calls_made(function: Callable[[], Any]) -> int:
    """How many functions are called, of Python and of C, until `function` returns or raises."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        with contextlib.suppress(Exception):
            function()
    finally:
        sys.setprofile(before)
    return count
