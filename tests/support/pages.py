"""The Python of a page of the docs, as a reader would run it: block by block, in one session."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a page's blocks of Python, with the names that it takes from its reader; all names are given back.

    Raises whatever they raise, at the line of the page.
    """
    page = DOCS / name
    text = page.read_text()
    names: dict[str, Any] = {"__name__": "a_page", **(given or {})}
    blocks = list(re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{name} has no Python in it"
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(2))
        exec(compile(above + textwrap.dedent(block[2]), str(page), "exec"), names)
    return names
