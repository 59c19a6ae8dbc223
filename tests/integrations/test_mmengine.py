"""MMEngine's Runner keeps the upsamplers of a patched model, and does not load them into one that has none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import Runner, load_checkpoint
from torch import nn

import upswap
from pages import run_page
from tiny_training import IMAGES, TRAINED, Net, assert_kept, loader, loss_of, output, states
from upswap.integrations.mmengine import UpswapHook, load_patched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass"),  # of torchao, which mmengine's imports bring
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),  # see below
    pytest.mark.filterwarnings("ignore:.*pkg_resources is deprecated"),
]
_names = itertools.count()


@pytest.fixture(autouse=True)
def _readable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Of MMEngine 0.10.7 itself: torch's default since 2.6 refuses what it writes.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield
    logging.disable(logging.NOTSET)


class Head(BaseModule, Net):
    def __init__(self, init_cfg: Any = None) -> None:
        Net.__init__(self)
        self._is_init, self.init_cfg = False, init_cfg


class Model(BaseModel):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()
        self.head = Head(init_cfg)

    def forward(self, inputs, labels=None, mode="tensor"):
        return {"loss": loss_of(self.head, inputs, labels)} if mode == "loss" else self.head(inputs)


def patched(init_cfg: Any = None) -> Model:
    model = Model(init_cfg)
    upswap.patch(model.head, IMAGES[:1])
    return model


def runner(
    model: nn.Module, folder: Path, epochs: int = 2, *, hooks: Any = ({"type": "UpswapHook"},), **options: Any
) -> Any:
    wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.05}}
    return Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader(),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper=wrapper | options.pop("wrapper", {}),
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        custom_hooks=list(hooks),
        log_level="ERROR",
        default_scope="mmengine",
        experiment_name=f"upswap_{next(_names)}",
        **options,
    )


def test_train_checkpoint_resume_reload(tmp_path: Path) -> None:
    model = patched()
    runner(model, tmp_path).train()
    assert states(model) == TRAINED
    path = tmp_path / "epoch_2.pth"
    reloaded = patched()
    load_checkpoint(reloaded, str(path), strict=True)
    assert_kept(reloaded, model)
    assert_kept(load_patched(Model(), path), model)
    assert_kept(upswap.load(path, patched()), model)
    # Cut off after two epochs of four, and not.
    resumed, whole = patched(), patched()
    (tmp_path / "whole").mkdir()
    runner(resumed, tmp_path, 4, resume=True).train()
    runner(whole, tmp_path / "whole", 4).train()
    assert_kept(resumed, whole)


def test_a_second_fine_tuning_starts_from_what_was_trained(tmp_path: Path) -> None:
    model = patched()
    runner(model, tmp_path).train()
    still = {"wrapper": {"optimizer": {"type": "SGD", "lr": 0.0}}}
    path = tmp_path / "epoch_2.pth"
    for again, options in ((patched(), {"load_from": str(path)}), (load_patched(Model(), path), {})):
        runner(again, tmp_path / "again", 1, **still, **options).train()
        for (key, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            if "norm" not in key:  # its statistics go on
                torch.testing.assert_close(other, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["resume", "load_from"])
def test_a_model_that_is_not_patched_does_not_lose_them(how: str, tmp_path: Path) -> None:
    runner(patched(), tmp_path).train()
    options = {"resume": True} if how == "resume" else {"load_from": str(tmp_path / "epoch_2.pth")}
    with pytest.raises(
        upswap.PlanError, match=r"trained upsamplers at head.up, head.upsample, which this Model has not"
    ):
        runner(Model(), tmp_path, 4, **options).train()


def test_what_mmengine_says_without_the_hook(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own limit: it loads what fits, and names the rest in its log alone."""
    model = patched()
    runner(model, tmp_path, hooks=()).train()
    plain = Model()
    load_checkpoint(plain, str(tmp_path / "epoch_2.pth"))
    assert not torch.equal(output(plain), output(model))
    with pytest.raises(RuntimeError, match=r"unexpected key in source state_dict: .*head.up.init_pos"):
        load_checkpoint(Model(), str(tmp_path / "epoch_2.pth"), strict=True)
    assert_kept(load_patched(Model(), tmp_path / "epoch_2.pth"), model)  # patched by the shapes of the weights


def test_averaged_weights(tmp_path: Path) -> None:
    model = patched()
    hooks = ({"type": "EMAHook", "momentum": 0.5}, {"type": "UpswapHook"})
    trained = runner(model, tmp_path, hooks=hooks)
    trained.train()
    ema = next(hook for hook in trained.hooks if type(hook).__name__ == "EMAHook").ema_model
    assert states(model, trained.optim_wrapper.optimizer, ema) == TRAINED
    # MMEngine swaps them: the averages are under "state_dict".
    averages, last = (load_patched(Model(), tmp_path / "epoch_2.pth", key) for key in ("state_dict", "ema_state_dict"))
    assert_kept(averages, ema.module)
    assert_kept(last, model)
    resumed, whole = patched(), patched()
    (tmp_path / "whole").mkdir()
    runner(resumed, tmp_path, 4, hooks=hooks, resume=True).train()
    runner(whole, tmp_path / "whole", 4, hooks=hooks).train()
    assert_kept(resumed, whole)


def test_patched_too_late_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    class Late(UpswapHook):
        def before_train(self, runner: Any) -> None:
            upswap.patch(runner.model.head, IMAGES[:1])
            super().before_train(runner)

    with pytest.raises(
        upswap.OptionError, match=r"head.up is not in the optimizer.* Patch the model before the Runner"
    ):
        runner(Model(), tmp_path, hooks=[Late()]).train()

    class LateAverage(UpswapHook):
        def before_train(self, runner: Any) -> None:
            upswap.patch(runner.model.head, IMAGES[:1], optimizer=runner.optim_wrapper.optimizer)
            super().before_train(runner)

    with pytest.raises(upswap.OptionError, match=r"head.up is not in the averaged weights"):
        runner(Model(), tmp_path, hooks=[{"type": "EMAHook"}, LateAverage()]).train()


def test_initialisation_leaves_upsamplers_alone(tmp_path: Path) -> None:
    """`Runner.train` calls `init_weights`, which goes by the names of classes."""
    layers = [{"type": "Kaiming", "layer": "Conv2d"}, {"type": "Constant", "val": 1, "layer": "BatchNorm2d"}]
    model = patched(layers)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.init_weights()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {"head.first.weight", "head.second.weight", "head.last.weight"} <= changed
    assert not {key for key in changed if "up" in key}
    assert states(model) == ["as initialised"] * 2


def test_rates_by_name(tmp_path: Path) -> None:
    model = patched()
    keys = {path: {"lr_mult": 10.0, "decay_mult": 0.0} for path in upswap.upsamplers(model)}
    wrapper = {
        "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        "paramwise_cfg": {"custom_keys": keys, "bias_decay_mult": 0.0},
    }
    trained = runner(model, tmp_path, 1, wrapper=wrapper)
    trained.train()
    added = {id(parameter) for parameter in upswap.parameters(model)}
    rates = {
        (id(parameter) in added, group["lr"], group["weight_decay"])
        for group in trained.optim_wrapper.optimizer.param_groups
        for parameter in group["params"]
        if parameter.ndim > 1
    }
    assert rates == {(True, 0.1, 0.0), (False, 0.01, 0.1)}


def test_a_model_that_is_not_patched_is_left_alone(tmp_path: Path) -> None:
    runner(Model(), tmp_path, 1).train()
    assert "upswap" not in torch.load(tmp_path / "epoch_1.pth", weights_only=False)["meta"]


def test_export_of_a_trained_model(tmp_path: Path) -> None:
    runner(patched(), tmp_path).train()
    model = load_patched(Model(), tmp_path / "epoch_2.pth").eval()
    exported = torch.export.export(model.head, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), output(model))


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/mmengine.md", {"make_model": Model, "batches": loader(), "images": IMAGES[:1]})
    assert_kept(names["model"], names["runner"].model)
