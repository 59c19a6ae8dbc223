"""The Python in the docs runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import run_page


def test_finetuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "compiled" in run_page("finetuning.md")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it exports an FPN with sizes left open, two minutes on a quiet machine
# torch announces the end of what is tested, and warns of every size that a trace asks for
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
def test_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("deployment.md")
    assert names["done"].inputs == {"x": ["batch", 3, "height", "width"]}
    assert names["done"].error < 1e-5
    assert names["kept"] != "[]"
