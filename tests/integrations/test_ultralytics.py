"""ultralytics' own trainers, checkpoints, predictors and exporters keep the upsamplers; each step as its users write it."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionTrainer

import upswap
import yolo as support
from upswap.errors import UpswapWarning

pytestmark = [
    *support.WARNINGS,
    # torch announces the end of what its exporter traces with.
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]

IMAGE = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))


class Stopped(Exception):
    """Raised where a training has begun, which is all that is asked."""


def values(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of all upsamplers, by the layer they are in."""
    found = {path.removeprefix("model."): module for path, module in upswap.upsamplers(model).items()}
    return {
        f"{path.removeprefix('model.')}.{name}": tensor.detach().clone().float()
        for path, module in found.items()
        for name, tensor in module.state_dict().items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], half: bool = False) -> None:
    """Checkpoints of ultralytics are in half precision."""
    assert found.keys() == expected.keys()
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.half().float() if half else tensor), name


def assert_all_trained(trainer: Any) -> None:
    """In the model, its optimiser and its averaged weights."""
    status = upswap.status(trainer.model, trainer.optimizer, trainer.ema)
    assert status.ok, status
    assert {row.state for row in status.rows} == {"trained"}


def started(yolo: YOLO, folder: Path, **arguments: Any) -> Any:
    """The trainer of `yolo.train` when its first epoch begins."""

    def stop(trainer: Any) -> None:
        raise Stopped

    yolo.add_callback("on_train_start", stop)
    try:
        with pytest.raises(Stopped):
            yolo.train(**support.settings(yolo, folder, name="started", **arguments))
    finally:
        yolo.clear_callback("on_train_start")
    return yolo.trainer


def trained_and_killed(name: str, folder: Path, **arguments: Any) -> YOLO:
    """A patched YOLO whose training of three epochs was killed in the second; its last.pt can be resumed."""

    def kill(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise Stopped

    yolo = upswap.patch(YOLO(name))
    yolo.add_callback("on_train_epoch_start", kill)
    with pytest.raises(Stopped):
        yolo.train(**support.settings(yolo, folder, name="killed", epochs=3, **arguments))
    return yolo


@dataclasses.dataclass
class Run:
    """A training to its end, and one that was killed."""

    folder: Path
    yolo: YOLO
    trainer: Any
    killed: YOLO

    @property
    def best(self) -> str:
        return str(self.folder / "runs" / "train" / "weights" / "best.pt")

    @property
    def last(self) -> str:
        return str(self.folder / "runs" / "killed" / "weights" / "last.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ultralytics")
    yolo = upswap.patch(YOLO("yolov8n.yaml"))
    yolo.train(**support.settings(yolo, folder))
    return Run(folder, yolo, yolo.trainer, trained_and_killed("yolov8n.yaml", folder))


def python(code: str, folder: Path) -> str:
    """What a fresh process prints, which upswap is imported in by unpickling alone."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- the object -----------------------------------------------------------------------------------------------------------


def test_the_yolo_object_is_taken_for_its_model(tmp_path: Path) -> None:
    yolo, original = YOLO("yolov8n.yaml"), YOLO("yolov8n.yaml")
    original.model.load_state_dict(yolo.model.state_dict())
    keys = list(yolo.model.state_dict())
    assert [site.name for site in upswap.inspect(yolo).swapped] == ["model.10", "model.13"]
    copied = upswap.patch(yolo, inplace=False, groups=2)
    assert type(copied) is YOLO
    assert copied is not yolo
    assert (upswap.is_patched(copied), upswap.is_patched(yolo)) == (True, False)
    assert upswap.patch(yolo) is yolo
    assert list(upswap.upsamplers(yolo)) == ["model.model.10", "model.model.13"]
    assert list(upswap.upsamplers(yolo.model)) == ["model.10", "model.13"]
    assert upswap.status(yolo).ok
    assert upswap.verify(original, yolo).ok
    with torch.no_grad():
        for parameter in upswap.parameters(yolo):
            parameter.add_(torch.randn_like(parameter))
    assert not upswap.verify(original, yolo).ok
    yolo.model.eval()
    with upswap.disabled(yolo):
        assert torch.equal(yolo.model(IMAGE)[0], original.model.eval()(IMAGE)[0])
    with pytest.warns(UpswapWarning, match="patched already"):
        upswap.patch(yolo)
    whole = upswap.save(yolo, tmp_path / "whole.safetensors")
    alone = upswap.save(yolo, tmp_path / "alone.safetensors", only="upsamplers")
    for source in (whole, alone, yolo.model.state_dict()):
        again = YOLO("yolov8n.yaml")
        assert upswap.load(source, again) is again
        assert_equal(values(again), values(yolo))
    assert upswap.unpatch(yolo) is yolo
    assert list(yolo.model.state_dict()) == keys
    assert vars(yolo.model).keys() == vars(original.model).keys()


# -- training -------------------------------------------------------------------------------------------------------------


def test_a_plain_training_keeps_the_upsamplers_everywhere(run: Run) -> None:
    trained = values(run.trainer.ema.ema)
    assert_all_trained(run.trainer)
    assert_equal(values(run.yolo), trained, half=True)
    assert upswap.status(run.yolo).ok
    for name in (run.best, run.best.replace("best", "last")):
        found = YOLO(name)
        assert_equal(values(found), trained, half=True)
        assert upswap.plan_of(found) == upswap.plan_of(run.trainer.model)


def test_the_model_alone_may_be_patched(tmp_path: Path) -> None:
    yolo = YOLO("yolov8n.yaml")
    upswap.patch(yolo.model, style="pl")
    trainer = started(yolo, tmp_path)
    assert {module.style for module in upswap.upsamplers(trainer.model).values()} == {"pl"}
    assert upswap.status(trainer.model, trainer.optimizer, trainer.ema).ok


def test_a_second_fine_tuning_starts_from_the_trained_values(run: Run, tmp_path: Path) -> None:
    yolo = YOLO(run.best)
    expected = values(yolo)
    trainer = started(yolo, tmp_path)
    assert_equal(values(trainer.model), expected)
    assert_equal(values(trainer.ema.ema), expected)
    # In another way from the same file: another model's pretrained=, the weights put into a new one, a trainer by itself.
    named = started(YOLO("yolov8n.yaml"), tmp_path, pretrained=run.best)
    assert_equal(values(named.model), expected)
    assert_equal(values(YOLO("yolov8n.yaml").load(run.best)), expected)
    alone = DetectionTrainer(overrides=support.settings(yolo, tmp_path, name="alone", model=run.best))
    alone.setup_model()
    assert_equal(values(alone.model), expected)
    # Made anew from the architecture, which is that of the patched model.
    again = started(YOLO(run.best), tmp_path, pretrained=False)
    assert {row.state for row in upswap.status(again.model).rows} == {"as initialised"}


def test_a_killed_training_goes_on_where_it_stopped(run: Run) -> None:
    code = f"""
import sys
import torch
from ultralytics import YOLO

yolo = YOLO({run.last!r})
expected = {{name: value.clone() for name, value in yolo.model.state_dict().items()}}

def same(trainer):
    assert trainer.start_epoch == 1
    found = trainer.ema.ema.state_dict()
    assert found.keys() == expected.keys() and "model.10.offset.weight" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(trainer.model.state_dict()[name], expected[name]) for name in expected)
    print("begins as it stopped", "upswap.api" in sys.modules)

yolo.add_callback("on_train_start", same)
yolo.train(resume=True)
import upswap
status = upswap.status(yolo.trainer.model, yolo.trainer.optimizer, yolo.trainer.ema)
assert status.ok and {{row.state for row in status.rows}} == {{"trained"}}, status
assert not torch.equal(yolo.model.state_dict()["model.10.offset.weight"], expected["model.10.offset.weight"])
"""
    assert "begins as it stopped True" in python(code, run.folder)


def test_best_pt_predicts_validates_and_exports_in_a_fresh_process(run: Run) -> None:
    model = upswap.load(run.best).float().eval()
    torch.save((IMAGE, model(IMAGE)[0]), run.folder / "expected.pt")
    code = f"""
import torch
from ultralytics import YOLO

yolo = YOLO({run.best!r})
image, expected = torch.load("expected.pt")
assert torch.equal(yolo.model(image)[0], expected)
print(len(yolo.predict({support.image_in(run.folder)!r}, imgsz=96, conf=0.001, device="cpu")), "predicted")
print(len(yolo.val(imgsz=96, batch=2, device="cpu", workers=0, plots=False).box.all_ap), "validated")
path = yolo.export(format="torchscript", imgsz=96, device="cpu")
found = torch.jit.load(path)(image)
assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=1e-2), (found - expected).abs().max()
print("exported")
"""
    said = python(code, run.folder)
    assert "1 predicted" in said
    assert "exported" in said


def test_trainers_of_ones_own_keep_them_too(run: Run, tmp_path: Path) -> None:
    class Own(DetectionTrainer):
        """Leaves the weights alone."""

        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return super().get_model(cfg, None, verbose)

    made = []

    def make(**arguments: Any) -> DetectionTrainer:
        made.append(DetectionTrainer(**arguments))
        return made[-1]

    for trainer in (Own, make, functools.partial(DetectionTrainer)):
        yolo = upswap.patch(YOLO("yolov8n.yaml"))
        found = started(yolo, tmp_path, trainer=trainer)
        assert len(upswap.upsamplers(found.model)) == 2
    assert isinstance(started(upswap.patch(YOLO("yolov8n.yaml")), tmp_path, trainer=Own), Own)
    assert len(made) == 1
    # One that does not load what it is given gets the trained values all the same.
    yolo = YOLO(run.best)
    expected = values(yolo)
    assert_equal(values(started(yolo, tmp_path, trainer=Own).model), expected)


def test_a_model_that_is_not_patched_is_trained_as_ever(tmp_path: Path) -> None:
    yolo = upswap.unpatch(upswap.patch(YOLO("yolov8n.yaml")))
    trainer = started(yolo, tmp_path)
    assert type(trainer) is DetectionTrainer
    assert not upswap.is_patched(trainer.model)
    other = YOLO("yolov8n.yaml").load(yolo.model)
    assert not upswap.is_patched(other)


def test_weights_with_upsamplers_that_do_not_fit_are_told_of(run: Run) -> None:
    with pytest.warns(UpswapWarning, match=r"6 tensors, such as model\.10\.init_pos.*SegmentationModel.*upswap\.patch"):
        yolo = YOLO("yolov8n-seg.yaml").load(run.best)
    assert not upswap.is_patched(yolo)
    with pytest.warns(UpswapWarning, match="does not take"):
        yolo = upswap.patch(YOLO("yolov8n.yaml"), groups=1).load(run.best)
    assert upswap.status(yolo).ok


@pytest.mark.slow
def test_what_several_devices_are_sent_is_patched(tmp_path: Path) -> None:
    from ultralytics.utils.dist import generate_ddp_file

    trainer = started(upswap.patch(YOLO("yolov8n.yaml")), tmp_path)
    sent = DetectionTrainer.__new__(type(trainer))
    sent.__dict__ = {"args": trainer.args, "callbacks": {}, "model": "yolov8n.yaml"}
    script = Path(generate_ddp_file(sent))
    code = f"""
from ultralytics.utils.patches import torch_load
state = torch_load({str(script.with_suffix(".pt"))!r}, map_location="cpu")
trainer = state["trainer"](overrides=dict(state["args"], save_dir=""))
trainer.model = state["model"]
trainer.setup_model()
import upswap
print("upsamplers", len(upswap.upsamplers(trainer.model)))
"""
    assert "upsamplers 2" in python(code, tmp_path)


def test_reset_weights_is_step_0(run: Run) -> None:
    yolo = YOLO(run.best).reset_weights()
    assert {row.state for row in upswap.status(yolo).rows} == {"as initialised"}


# -- predicting -----------------------------------------------------------------------------------------------------------


def test_predictions_follow_the_patch(run: Run) -> None:
    def boxes(yolo: YOLO) -> torch.Tensor:
        return yolo.predict(support.image_in(run.folder), imgsz=96, conf=0.0001, device="cpu", verbose=False)[
            0
        ].boxes.data

    yolo = YOLO(run.best)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in upswap.parameters(yolo):
            parameter.copy_(torch.randn_like(parameter))
        # Features of unit variance: after one epoch they are so small that no offset shows in a box.
        for norm in yolo.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        yolo.model.train()(IMAGE)
        yolo.model.eval()
    with upswap.disabled(yolo):
        off = boxes(yolo)
    on = boxes(yolo)
    assert not torch.equal(on, off)
    with upswap.disabled(yolo):
        assert torch.equal(boxes(yolo), off)
    predictor = yolo.predictor
    upswap.unpatch(yolo)
    assert torch.equal(boxes(yolo), off)
    assert yolo.predictor is not predictor
    predictor = yolo.predictor
    boxes(yolo)
    assert yolo.predictor is predictor  # kept, as ultralytics does


def test_a_predictor_of_ones_own_is_kept(run: Run) -> None:
    class Own(DetectionPredictor):
        pass

    yolo = YOLO("yolov8n.yaml")
    image = support.image_in(run.folder)
    yolo.predict(image, imgsz=96, device="cpu", verbose=False, predictor=Own)
    before = yolo.predictor
    upswap.patch(yolo)
    yolo.predict(image, imgsz=96, device="cpu", verbose=False)
    assert type(yolo.predictor) is Own
    assert yolo.predictor is not before
    assert (
        len(list(yolo.predict(image, True, imgsz=96, device="cpu", verbose=False, predictor=DetectionPredictor))) == 1
    )
    assert type(yolo.predictor) is DetectionPredictor


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("best", marks=pytest.mark.slow), "last", "released"])
def test_converted_checkpoints_are_what_yolo_opens(run: Run, tmp_path: Path, name: str) -> None:
    source = {"best": run.best, "last": run.last}.get(name)
    if source is None:
        yolo = YOLO("yolov8n.yaml")
        yolo.ckpt = {"epoch": -1}
        source = str(tmp_path / "yolov8n.pt")
        yolo.save(source)
        done = upswap.convert(source, tmp_path / "out.pt")
    else:
        with pytest.warns(UpswapWarning, match="patched already"):
            done = upswap.convert(source, tmp_path / "out.pt")
    yolo = YOLO(str(tmp_path / "out.pt"))
    assert_equal(values(yolo), values(done.model))
    assert len(yolo.predict(support.image_in(run.folder), imgsz=96, device="cpu", verbose=False)) == 1
    assert_equal(values(started(yolo, tmp_path).model), values(done.model))
    assert YOLO(str(tmp_path / "out.pt")).export(format="torchscript", imgsz=96, device="cpu", verbose=False)
    upswap.save(upswap.unpatch(upswap.load(tmp_path / "out.pt")), tmp_path / "back.pt")
    assert not upswap.is_patched(YOLO(str(tmp_path / "back.pt")))
    again = YOLO(upswap.save(YOLO(run.best), tmp_path / "yolo.pt"))
    assert again.overrides["imgsz"] == 96
    assert_equal(values(again), values(YOLO(run.best)))


# -- each family and task -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) for name in support.MODELS
])  # fmt: skip
def test_every_family_and_task(name: str, tmp_path: Path) -> None:
    yolo = upswap.patch(YOLO(f"{name}.yaml"))
    yolo.train(**support.settings(yolo, tmp_path))
    trained = values(yolo.trainer.ema.ema)
    assert_all_trained(yolo.trainer)
    best = tmp_path / "runs" / "train" / "weights" / "best.pt"
    again = YOLO(best)
    assert_equal(values(again), trained, half=True)
    again.predict(support.image_in(tmp_path, yolo.task), imgsz=96, device="cpu", verbose=False)
    expected = values(again)
    trainer = started(again, tmp_path)
    assert_equal(values(trainer.model), expected)
    assert_equal(values(upswap.load(best)), expected)
    assert YOLO(best).export(format="torchscript", imgsz=96, device="cpu", verbose=False)


def test_a_classifier_resizes_nothing() -> None:
    with pytest.raises(upswap.NothingToSwapError, match="ClassificationModel makes no resize call"):
        upswap.patch(YOLO("yolov8n-cls.yaml"))


# -- the page -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations" / "ultralytics.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^    upswap (yaml .*)$", page, re.MULTILINE)
    small = support.settings(YOLO("yolov8n.yaml"), tmp_path, project=str(tmp_path / "runs" / "detect"))
    given = ", ".join(f"{name}={value!r}" for name, value in {**small, "data": "data.yaml"}.items())
    (tmp_path / "data.yaml").write_text(Path(small["data"]).read_text())
    Path(support.image_in(tmp_path)).rename(tmp_path / "image.png")
    yolo = YOLO("yolov8n.yaml")
    yolo.ckpt = {"epoch": -1}
    yolo.save(tmp_path / "yolov8n.pt")
    subprocess.run([sys.executable, "-m", "upswap", *command.split()], cwd=tmp_path, check=True)
    code = "\n".join(blocks).replace('data="data.yaml", epochs=100, imgsz=640', given)
    assert code.count(given) > 1
    python(code.replace('format="onnx"', 'format="torchscript"'), tmp_path)
