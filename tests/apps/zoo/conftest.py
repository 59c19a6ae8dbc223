"""Where the runs over many models are made."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo_runs import PACKAGE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with the package, and the log of what was built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("BUILT", str(tmp_path / "built"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "nets_of_zoo.py").write_text(textwrap.dedent(PACKAGE))
    (tmp_path / "built").touch()
    yield tmp_path
    sys.modules.pop("nets_of_zoo", None)
