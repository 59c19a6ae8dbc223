"""The Python in the docs runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import run_page


def test_finetuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "compiled" in run_page("finetuning.md")
