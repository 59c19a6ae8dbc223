"""What was taken of the files that a source is opened from, and a key where there is nothing to choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import upswap
from upswap.files.open_source import open_source

SPEC = "python:tiny_host:tiny"


def test_a_key_is_of_the_weights_or_else_of_the_source(tmp_path: Path) -> None:
    first, second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    torch.save({"model": first, "epoch": 3}, tmp_path / "model.pt")
    torch.save({"a": first.state_dict(), "b": second.state_dict()}, tmp_path / "weights.pt")
    source = open_source(str(tmp_path / "model.pt"), weights=tmp_path / "weights.pt", key="b")
    assert source.said == "source: model of 'model', 2 tensors; weights: state_dict of 'b', 2 tensors"
    assert torch.equal(source.model.weight, second.weight)
    assert open_source(str(tmp_path / "model.pt"), key="model").path == tmp_path / "model.pt"


def test_where_there_is_nothing_to_choose(tmp_path: Path) -> None:
    with pytest.raises(upswap.OptionError, match="--key"):
        open_source(SPEC, key="ema")
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "w.pt")
    with pytest.raises(upswap.SourceError, match="no weights under 'ema'; it has them under no key"):
        open_source(SPEC, weights=tmp_path / "w.pt", key="ema")
    path = upswap.save(nn.Conv2d(1, 1, 1), tmp_path / "model.safetensors")
    with pytest.raises(upswap.OptionError, match="leave out --key"):
        open_source(str(path), key="ema")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "model.pt")
    with pytest.raises(upswap.SourceError, match="no model under 'ema'; it is one itself"):
        open_source(str(tmp_path / "model.pt"), key="ema")


def test_all_of_a_file_is_nothing_to_say(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "model.pt")
    assert open_source(str(tmp_path / "model.pt")).said is None
    assert open_source(SPEC).said is None
