"""The weights of a patched model's host, taken out of a file that has weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import upswap
from tiny_host import image, tiny
from upswap import PlanError, SaveError, SourceError
from upswap.files.host_weights import patched_weights, save_weights


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back(suffix: str, tmp_path: Path) -> None:
    model = upswap.patch(tiny(), image())
    path = save_weights(model.state_dict(), tmp_path / f"a{suffix}")
    weights = patched_weights(path)
    assert weights is not None
    assert set(weights.upsamplers) == set(upswap.upsamplers(model))
    assert weights.host.keys() == tiny().state_dict().keys()
    assert all(torch.equal(tensor, weights.host[name]) for name, tensor in tiny().state_dict().items())


def test_what_holds_none(tmp_path: Path) -> None:
    model = upswap.patch(tiny(), image())
    torch.save({"model": torch.nn.ReLU(), "ema": model.state_dict()}, tmp_path / "model.pt")
    assert patched_weights(tmp_path / "model.pt") is None
    assert patched_weights(tmp_path) is None
    torch.save({"net": model.state_dict(), "ema": model.state_dict()}, tmp_path / "two.pt")
    with pytest.raises(SourceError, match="--key ema"):
        patched_weights(tmp_path / "two.pt")
    with pytest.raises(SourceError, match="no weights under 'x'"):
        patched_weights(tmp_path / "two.pt", key="x")
    torch.save(tiny().state_dict(), tmp_path / "host.pt")
    with pytest.raises(PlanError, match="weights without upsamplers"):
        patched_weights(tmp_path / "host.pt")
    upswap.save(model, tmp_path / "alone.safetensors", only="upsamplers")
    with pytest.raises(PlanError, match="upsamplers alone"):
        patched_weights(tmp_path / "alone.safetensors")
    with pytest.raises(SaveError, match="weights without a model"):
        save_weights(model.state_dict(), tmp_path / "folder")
