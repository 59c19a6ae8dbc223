"""timm's training tools keep the upsamplers of a patched model with no help of upswap's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import upswap
from pages import run_page
from tiny_training import IMAGES, TRAINED, Net, assert_kept, loss_of, output, patched_net, states, train


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, float]]:
    """Rate, weight decay and layer scale of each weight, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_the_optimiser_has_the_upsamplers() -> None:
    model = patched_net()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    assert upswap.status(model, optimizer).ok
    found = rates(model, optimizer)
    assert found["up.offset.weight"] == found["second.weight"] == (1e-3, 0.05, 1.0)
    assert found["up.offset.bias"] == found["norm.weight"] == (1e-3, 0.0, 1.0)
    groups = upswap.param_groups(model, 1e-3, weight_decay=0.05, upsampler_lr_mult=10)
    found = rates(model, create_optimizer_v2(groups, opt="adamw", lr=1e-3))
    assert found["up.offset.weight"] == (1e-2, 0.0, 1.0)
    assert found["second.weight"] == (1e-3, 0.05, 1.0)


def test_layer_decay_counts_an_upsampler_to_the_layer_it_stands_in() -> None:
    model = upswap.patch(timm.create_model("hrnet_w18_small"))
    names = [f"{path}.*" for path in upswap.upsamplers(model)]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert upswap.status(model, optimizer).ok
    found = rates(model, optimizer)
    assert found["stage2.0.fuse_layers.0.1.2.offset.weight"] == found["stage2.0.fuse_layers.0.1.0.weight"]
    assert found["stage4.0.fuse_layers.0.1.2.offset.weight"] == found["stage4.0.fuse_layers.0.1.0.weight"]
    assert found["stage2.0.fuse_layers.0.1.2.offset.weight"][2] < found["stage4.0.fuse_layers.0.1.2.offset.weight"][2]
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=names)
    found = rates(model, create_optimizer_v2(groups, opt="adamw", lr=1e-3))
    assert {found[name][1] for name in found if ".2.offset.weight" in name} == {0.0}
    assert found["stage4.0.fuse_layers.0.1.0.weight"][1] == 0.05


@pytest.mark.parametrize("foreach", [False, True])
def test_train_average_checkpoint_resume_reload(foreach: bool, tmp_path: Path) -> None:
    model = patched_net()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    ema = ModelEmaV3(model, decay=0.5, foreach=foreach)
    for _ in range(3):
        train(model, optimizer, 1)
        ema.update(model)
    assert states(model, optimizer, ema) == TRAINED
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(0, metric=1.0)
    last = str(tmp_path / "last.pth.tar")
    for averaged, kept in ((False, model), (True, ema.module)):
        reloaded = patched_net()
        load_checkpoint(reloaded, last, use_ema=averaged)
        assert_kept(reloaded, kept)
        key = "state_dict_ema" if averaged else "state_dict"
        assert_kept(upswap.load(last, patched_net(), key=key), kept)
    resumed = patched_net()
    optimizer2 = create_optimizer_v2(resumed, opt="adamw", lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm's, about torch.load
        assert resume_checkpoint(resumed, last, optimizer2, log_info=False) == 1
    for each, other in ((resumed, optimizer2), (model, optimizer)):
        train(each, other, 2)
    assert_kept(resumed, model)


def test_a_model_that_is_not_patched_refuses_the_checkpoint(tmp_path: Path) -> None:
    model = patched_net()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    train(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path).save_checkpoint(0, metric=1.0)
    last = str(tmp_path / "last.pth.tar")
    for load in (load_checkpoint, resume_checkpoint):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*up.init_pos"):
            load(Net(), last)
    # Its own limit: asked for with strict=False, it gives the names back.
    assert "up.offset.weight" in load_checkpoint(Net(), last, strict=False).unexpected_keys


def test_averages_made_before_the_patch() -> None:
    model = Net()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    upswap.patch(model, IMAGES[:1], optimizer=optimizer)
    found = upswap.status(model, optimizer, ema)
    assert not found.ok
    assert "is not in the averaged weights: make them, a copy of the model, after the patch" in str(found)
    with pytest.raises(RuntimeError, match="size of tensor"):  # timm goes by the order of the weights
        ema.update(model)


def test_export_of_what_was_reloaded(tmp_path: Path) -> None:
    model = patched_net()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    train(model, optimizer)
    CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path).save_checkpoint(0, metric=1.0)
    again = patched_net()
    load_checkpoint(again, str(tmp_path / "last.pth.tar"))
    exported = torch.export.export(again.eval(), (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), output(model))
    assert loss_of(model).isfinite()


def test_the_page() -> None:
    run_page("integrations/timm.md", {"make_model": Net, "images": IMAGES[:1]})
