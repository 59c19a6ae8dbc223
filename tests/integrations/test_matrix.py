"""The table of `benchmarks/trainers.py` names tests that exist; that they pass is for the tests to say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_cell_names_tests_that_exist(monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("trainers", ROOT / "benchmarks" / "trainers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trainers", module)
    spec.loader.exec_module(module)
    for tool in module.tools():
        there = set(re.findall(r"^def (test_\w+)", (ROOT / module.FOLDER / tool.file).read_text(), re.MULTILINE))
        assert set(tool.cells) <= set(module.STEPS)
        for step, cell in tool.cells.items():
            assert set(cell.tests) <= there, (tool.name, step)
