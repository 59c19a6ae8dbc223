"""`upswap yaml` writes what ultralytics builds at any scale, trains, and opens again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn import tasks

import upswap
import upswap.integrations.ultralytics as u
import yolo as support
from upswap.apps.cli import run
from upswap.integrations.ultralytics_yaml import write
from upswap.probe.dataflow import tensors_in

pytestmark = support.WARNINGS

IMAGE = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def rows(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, upswap.DySample)}


@pytest.mark.parametrize("name", [
    "yolov8n", *(pytest.param(name, marks=pytest.mark.slow) for name in support.MODELS if name not in ("yolov8n", "yolo26n-seg"))
])  # fmt: skip
def test_each_family_at_two_scales(name: str, tmp_path: Path) -> None:
    done = write(f"{name}.yaml", tmp_path / f"{name}-dysample.yaml", style="pl")
    assert len(done.rows) == 2
    assert done.notes == ()
    larger = tmp_path / done.path.name.replace("n-", "s-", 1)
    larger.write_text(done.path.read_text())
    channels = []
    for path in (done.path, larger):
        found = YOLO(path).model.eval()
        patched = upswap.patch(YOLO(path.name.replace("-dysample", "")), style="pl").model.eval()
        assert {key: value.shape for key, value in found.state_dict().items()} == {
            key: value.shape for key, value in patched.state_dict().items()
        }
        found.load(patched, verbose=False)
        assert all(
            torch.equal(*pair) for pair in zip(tensors_in(found(IMAGE)), tensors_in(patched(IMAGE)), strict=True)
        )
        assert list(rows(found)) == [f"model.{index}" for index in done.rows]
        channels.append(next(iter(rows(found).values())).in_channels)
    assert channels[0] < channels[1]


def test_what_is_no_row_is_told(tmp_path: Path) -> None:
    done = write("yolo26n-seg.yaml", tmp_path / "mine.yaml", exclude=["model.14"], groups=8, dyscope=True)
    assert done.rows == (11,)
    assert "model.23.proto:0 is inside a row" in done.notes[0]
    assert "mine.yaml does not have that of yolo26n-seg.yaml" in done.notes[-1]
    text = done.path.read_text()
    assert "  - [-1, 1, DySample, [c2, 2, nearest, {groups: 8, dyscope: true}]] # 11\n" in text
    assert "nn.Upsample" in text
    with pytest.raises(upswap.SaveError, match="exists"):
        write("yolo26n-seg.yaml", done.path)
    with pytest.raises(upswap.NothingToSwapError, match="no row"):
        write("yolo26n-seg.yaml", tmp_path / "none.yaml", include=["*proto*"])
    with pytest.raises(upswap.OptionError, match="can be a dysample"):
        write("yolov8n.yaml", tmp_path / "none.yaml", upsampler="carafe")
    assert not (tmp_path / "none.yaml").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nc: 80\nbackbone:\n  - [-1, 1, Conv, [64, 3, 2]]\n", "does not build a model"),
        ("backbone: [[-1, 1, torch_safe_load, [evil.pt]]]\nhead: []\n", "would run what it names: torch_safe_load"),
        ("backbone: [[-1, 1, nn.functional, [1]]]\nhead: []\n", "would run what it names: nn.functional"),
        ("backbone: []\nhead: []\nactivation: print('run')\n", r"would run what it names: print\('run'\)"),
        ("backbone: []\nhead: []\nactivation: nn.ReLU(print('run'))\n", "would run what it names"),
    ],
)
def test_a_file_cannot_run_code(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "yolov8n-evil.yaml"
    source.write_text(text)
    with pytest.raises(upswap.SourceError, match=said):
        write(str(source), tmp_path / "out.yaml")
    assert "run\n" not in capsys.readouterr().out
    assert not (tmp_path / "out.yaml").exists()


def test_the_command_and_what_is_built_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["yaml", "yolov8n.yaml"]) == 0
    said = capsys.readouterr().out
    assert "yolov8n-dysample.yaml: DySample in the rows 10, 13" in said
    code = said.partition("In Python:")[2].replace("    ", "")
    code += "print([type(model.model.model[row]).__name__ for row in (10, 13)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "['DySample', 'DySample']" in done.stdout
    assert run(["yaml", "yolov8n.yaml", "--json"]) == 1
    assert "exists" in json.loads(capsys.readouterr().out)["error"]
    assert run(["yaml", "yolov8n.yaml", "--json", "--force", "--groups", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [10, 13]
    assert run(["yaml", "yolov8n.pt"]) == 1
    assert "upswap convert yolov8n.pt" in capsys.readouterr().err

    yolo = YOLO("yolov8n-dysample.yaml")
    yolo.train(**support.settings(yolo, tmp_path))
    trained = {path: module.offset.weight for path, module in rows(yolo.trainer.ema.ema).items()}
    assert all(weight.any() for weight in trained.values())
    best = str(tmp_path / "runs" / "train" / "weights" / "best.pt")
    loaded = upswap.load(best)
    for path, weight in trained.items():
        assert torch.equal(loaded.get_submodule(path).offset.weight, weight.half())
    # A fresh process that opens it knows the rows, and trains on.
    code = f"""
import torch
from ultralytics import YOLO
yolo = YOLO({best!r})
before = yolo.model.state_dict()
yolo.add_callback("on_train_start", lambda t: print("same", all(
    torch.equal(t.model.state_dict()[k], v) for k, v in before.items() if "offset" in k)))
yolo.train(**{support.settings(yolo, tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "same True" in done.stdout


def test_a_row_by_itself() -> None:
    u.register()
    assert tasks.DySample is u.DySample
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(u.DySample(8)(x), torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    with pytest.raises(upswap.OptionError, match="style"):
        u.DySample(64, 2, "nearest", {"style": "pq"})


def test_a_dysample_of_the_users_own_stays(tmp_path: Path) -> None:
    code = f"""
import importlib
import pytest
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.nn import tasks

class Theirs(nn.Module):
    pass

tasks.DySample = Theirs
import upswap
upswap.patch(YOLO("yolov8n.yaml"))
assert tasks.DySample is Theirs

import upswap.integrations.ultralytics as u
from upswap.integrations.ultralytics_yaml import write
for use in (u.register, lambda: write("yolov8n.yaml", "out.yaml")):
    with pytest.raises(upswap.OptionError, match="__main__.Theirs, .* tasks.Other = tasks.DySample; del tasks.DySample"):
        use()
assert tasks.DySample is Theirs
del tasks.DySample
yolo = YOLO(str(write("yolov8n.yaml", {str(tmp_path / "yolov8n-rows.yaml")!r}).path))
assert tasks.DySample is u.DySample
tasks.DySample = Theirs
with pytest.raises(upswap.OptionError, match="__main__.Theirs"):
    yolo.train(data="none.yaml")

del tasks.DySample
before = tasks.BaseModel.load, Model.train, Model.predict
importlib.reload(u)
assert (tasks.BaseModel.load, Model.train, Model.predict) == before
assert tasks.DySample is u.DySample
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.yaml").exists()
