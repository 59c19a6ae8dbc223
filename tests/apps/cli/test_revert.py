"""`upswap revert` of what has no model in it: the state dict of a patched model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import upswap
from tiny_host import image, tiny
from upswap.apps.cli import run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """That of a patched model, and the current folder an empty one."""
    monkeypatch.chdir(tmp_path)
    model = upswap.patch(tiny(), image())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model.state_dict()


def is_hosts(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor], prefix: str = "") -> bool:
    return list(found) == [f"{prefix}{name}" for name in tiny().state_dict()] and all(
        torch.equal(found[f"{prefix}{name}"], state[name]) for name in tiny().state_dict()
    )


def test_the_hosts_weights_are_written(state: dict[str, torch.Tensor], capsys: Captured) -> None:
    torch.save({"model": state, "epoch": 3}, "best.pth")
    assert run(["revert", "best.pth"]) == 0
    out = capsys.readouterr().out
    assert "state dict: 4 upsamplers taken out" in out
    assert "taken state_dict of 'model', 8 tensors, left out 10 of straight.upsample" in out
    assert "saved best.reverted.pth" in out
    assert is_hosts(torch.load("best.reverted.pth"), state)
    model = tiny()
    model.load_state_dict(torch.load("best.reverted.pth"))
    assert run(["revert", "best.pth"]) == 1
    assert "exists" in capsys.readouterr().err
    assert run(["revert", "best.reverted.pth"]) == 1
    assert "weights without upsamplers: there is nothing to take out" in capsys.readouterr().err


def test_names_stay_as_they_are_in_the_file(state: dict[str, torch.Tensor], capsys: Captured) -> None:
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, "last.ckpt")
    assert run(["revert", "last.ckpt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["saved"], told["upsamplers_removed"], told["model"]) == ("last.reverted.pt", 4, None)
    assert is_hosts(torch.load("last.reverted.pt"), state, "model.")


def test_weights_in_a_safetensors(state: dict[str, torch.Tensor], capsys: Captured) -> None:
    save_file(state, "best.safetensors")
    assert run(["revert", "best.safetensors"]) == 0
    found = load_file("best.reverted.safetensors")
    assert is_hosts({name: found[name] for name in tiny().state_dict()}, state)
    assert run(["revert", "best.safetensors", "-o", "folder"]) == 1
    assert "--original SOURCE makes it a model" in capsys.readouterr().err


def test_with_its_original_it_becomes_a_model(state: dict[str, torch.Tensor], capsys: Captured) -> None:
    torch.save(state, "best.pth")
    assert (
        run(["revert", "best.pth", "--original", "python:tiny_host:tiny", "-o", "host.pt", "--trust", "tiny_host"]) == 0
    )
    assert "Tiny: 4 upsamplers taken out" in capsys.readouterr().out
    assert is_hosts(upswap.load("host.pt", trust="tiny_host").state_dict(), state)


def test_several_are_listed(state: dict[str, torch.Tensor], capsys: Captured) -> None:
    torch.save({"model": state, "ema": state, "teacher": tiny().state_dict()}, "best.pth")
    assert run(["revert", "best.pth"]) == 1
    assert "--key ema" in capsys.readouterr().err
    assert run(["revert", "best.pth", "--key", "ema"]) == 0
    assert run(["revert", "best.pth", "--key", "emma", "--force"]) == 1
    assert "no weights under 'emma'; it has 'model', 'ema', 'teacher'" in capsys.readouterr().err
