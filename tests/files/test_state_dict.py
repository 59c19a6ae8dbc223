"""State dicts as files have them: every value as it is read, and a word about those that have no bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import upswap


class Marked(nn.Module):
    """Buffers that torch has marked as conjugate or negative, without changing their bytes."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
        self.register_buffer("base", base)
        self.register_buffer("conjugate", base.conj())
        self.register_buffer("turned", base.conj().t())
        self.register_buffer("negative", base.conj().imag)
        self.register_buffer("alone", (2 * base).conj())


def unmarked() -> nn.Module:
    """The same names, each with memory of its own."""
    model = Marked()
    for name, buffer in model.named_buffers():
        model.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def test_conjugates_are_written_as_they_are_read(tmp_path: Path) -> None:
    again = upswap.load(upswap.save(Marked(), tmp_path / "model.safetensors"), unmarked())
    for name, buffer in Marked().named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_tensors_without_bytes_are_named(name: str, tmp_path: Path) -> None:
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    for model, says in (
        (nn.Conv2d(1, 1, 1, device="meta"), "'weight' .* meta device"),
        (nn.LazyConv2d(1, 1), "'weight' .* run the model once"),
        (sparse, "'table' .* use .pt"),
    ):
        with pytest.raises(upswap.SaveError, match=says):
            upswap.save(model, tmp_path / name)
    assert [*tmp_path.iterdir()] == []


def test_a_refused_state_dict_changes_nothing(tmp_path: Path) -> None:
    """An upsampler trained on another base grid refuses its tensors; the layers before it keep theirs."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1))

    x = torch.zeros(1, 3, 8, 8)
    torch.save(upswap.patch(net(), x, init="paper").state_dict(), tmp_path / "trained.pt")
    model = upswap.patch(net(), x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(upswap.SourceError, match="another base grid"):
        upswap.load(tmp_path / "trained.pt", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
