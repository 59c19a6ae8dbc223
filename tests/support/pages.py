"""Pages of docs whose code is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run the Python blocks of a page in their order, with the names that it takes from its reader; gives all names."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names = {"__name__": "a_page", **given}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names
