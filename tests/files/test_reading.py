"""Weights are read once, whoever asks for them, and within a bound."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from tiny_host import image, tiny
from upswap import SourceError
from upswap.files.formats import pt as pickled
from upswap.files.formats import safetensors as portable
from upswap.files.safety import time_limit


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, each as often as it was."""
    found: list[Path] = []
    for module, name in ((pickled, "_unpickled"), (portable, "read")):
        real = getattr(module, name)

        def read(file: Any, *args: Any, real: Any = real) -> Any:
            found.append(file if isinstance(file, Path) else Path(file.name))
            return real(file, *args)

        monkeypatch.setattr(module, name, read)
    return found


def files(folder: Path) -> dict[str, Path]:
    state = upswap.patch(tiny(), image(), groups=2).state_dict()
    torch.save({"state_dict": state}, folder / "a.pt")
    portable.write(dict(state), {"format": "pt"}, folder / "a.safetensors")
    upswap.save(upswap.patch(tiny(), image(), groups=2), folder / "alone.safetensors", only="upsamplers")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "alone.safetensors"])
def test_a_file_is_read_once(name: str, tmp_path: Path, opened: list[Path]) -> None:
    path = files(tmp_path)[name]
    for model, fits in (
        (tiny(), True),
        (upswap.patch(tiny(), image(), groups=2), True),
        (upswap.patch(tiny(), image(), style="pl", groups=1), False),  # where it is looked whether the host's would fit
    ):
        opened.clear()
        try:
            upswap.load(path, model)
        except upswap.UpswapError:
            assert not fits
        assert opened == [path]


@pytest.mark.parametrize("model", [None, "given"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_every_reading_is_bounded(
    form: str, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host = tmp_path / "folder", upswap.patch(smp_unet(), torch.zeros(1, 3, 64, 64))
    host.save_pretrained(folder)
    torch.save(host.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, value in {"_SECONDS": 0.5, "_SLOW": 0.2, "_AGAIN": 0.3, "_EVERY": 0.02}.items():
        monkeypatch.setattr(time_limit, name, value)
    monkeypatch.setattr(time_limit, "_SECONDS_EACH_MEBIBYTE", 0.0)

    def busy(*_: Any) -> None:
        end = time.process_time() + 5
        while time.process_time() < end:
            pass
        pytest.fail("nobody ended it")

    monkeypatch.setattr(pickled, "_unpickled", busy)
    path = folder if form == "folder" else folder / "pytorch_model.bin"
    with pytest.raises(SourceError, match=r"takes more than \S+ s to load"):
        upswap.load(path, None if model is None else smp_unet())


def test_a_file_that_another_takes_the_place_of_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not looked through is not read."""
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, path)
    real = pickled.screen.instructions

    def exchanged(*args: Any) -> Any:
        torch.save({"weight": torch.ones(2, 2), "bias": bytearray(b"never looked at")}, tmp_path / "other.pt")
        (tmp_path / "other.pt").replace(path)
        return real(*args)

    monkeypatch.setattr(pickled.screen, "instructions", exchanged)
    assert not upswap.load(path, nn.Linear(2, 2)).weight.any()


def smp_unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(8, 8, 8, 8, 8)).eval()
