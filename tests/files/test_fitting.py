"""Checkpoints as training loops write them: what is taken for a model's weights, and when nothing is."""

from __future__ import annotations

import copy
import shlex
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from tiny_host import image, tiny
from upswap import SourceError
from upswap.files.open_source import open_source
from upswap.files.weights import weights_for

SPEC = "python:tiny_host:tiny"


@pytest.fixture
def trained() -> nn.Module:
    """A model with other weights than a new one has."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return model


def behind(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return OrderedDict((f"{prefix}{name}", tensor) for name, tensor in state.items())


def loop(model: nn.Module) -> dict[str, Any]:
    """What a training loop has beside the model."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
    model(image()).sum().backward()
    optimizer.step()
    schedule.step()
    return {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "epoch": 3, "loss": torch.ones(())}


def lightning(state: dict[str, Any]) -> dict[str, Any]:
    """The shape that Lightning documents, with a loss that has a tensor of its own."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": behind("model.", state) | {"criterion.weight": torch.ones(2)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def average(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def wrapped_inside(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("branch.", "branch._orig_mod.", 1): tensor for name, tensor in state.items()}


CASES = {
    "as it is": (lambda m: m.state_dict(), "state_dict, 8 tensors"),
    "a loop": (lambda m: {"model": m.state_dict(), **loop(copy.deepcopy(m))}, "state_dict of 'model', 8 tensors"),
    "any name": (lambda m: {"params": m.state_dict()}, "state_dict of 'params', 8 tensors"),
    "nested": (lambda m: {"ema": {"module": m.state_dict(), "n": 3}}, "state_dict of 'ema.module', 8 tensors"),
    "lightning": (
        lambda m: lightning(m.state_dict()),
        "state_dict of 'state_dict', prefix 'model.' removed, 8 tensors, left out criterion.weight",
    ),
    "averaged": (
        lambda m: {"ema": average(m).state_dict()},
        "state_dict of 'ema', prefix 'module.' removed, 8 tensors, left out n_averaged",
    ),
    "compiled": (lambda m: torch.compile(m).state_dict(), "state_dict, prefix '_orig_mod.' removed, 8 tensors"),
    "parallel": (
        lambda m: nn.DataParallel(torch.compile(m)).state_dict(),
        "state_dict, prefix 'module._orig_mod.' removed, 8 tensors",
    ),
    "compiled inside": (
        lambda m: wrapped_inside(m.state_dict()),
        "state_dict, prefix '_orig_mod.' removed, 8 tensors",
    ),
    "compiled inside, behind a prefix": (
        lambda m: behind("net.", wrapped_inside(m.state_dict())),
        "state_dict, prefix 'net.' removed, prefix '_orig_mod.' removed, 8 tensors",
    ),
    "one of two fits": (
        lambda m: {"model": m.state_dict(), "discriminator": nn.Conv2d(3, 1, 3).state_dict()},
        "state_dict of 'model', 8 tensors",
    ),
    "twice the same": (lambda m: {"model": m.state_dict(), "best": m.state_dict()}, "state_dict of 'model', 8 tensors"),
    "a step among them": (lambda m: {**m.state_dict(), "step": 3}, "state_dict, 8 tensors, left out step"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_taken_and_it_is_said_which(case: str, trained: nn.Module, tmp_path: Path) -> None:
    make, said = CASES[case]
    expected = copy.deepcopy(trained)
    torch.save(make(trained), tmp_path / "best.ckpt")
    source = open_source(SPEC, weights=tmp_path / "best.ckpt")
    assert source.said == f"weights: {said}"
    assert torch.equal(source.model(image()), expected(image()))


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_the_same_of_a_safetensors(prefix: str, trained: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(behind(prefix, trained.state_dict()), tmp_path / "best.safetensors")
    assert torch.equal(open_source(SPEC, weights=tmp_path / "best.safetensors").model(image()), trained(image()))
    assert torch.equal(upswap.load(tmp_path / "best.safetensors", tiny())(image()), trained(image()))


def test_several_that_fit_are_listed_with_what_to_paste(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    torch.save({"model": tiny().state_dict(), "state_dict_ema": trained.state_dict()}, path)
    with pytest.raises(SourceError) as caught:
        open_source(SPEC, weights=path)
    assert str(caught.value).splitlines() == [
        f"{path} holds several weights that could be meant. Choose one:",
        "  --key model           8 tensors",
        "  --key state_dict_ema  8 tensors",
        'In Python: key="model"',
    ]
    assert torch.equal(open_source(SPEC, weights=path, key="state_dict_ema").model(image()), trained(image()))
    with pytest.raises(SourceError, match=r"no weights under 'emma'; it has 'model' \(8 tensors\), 'state_dict_ema'"):
        open_source(SPEC, weights=path, key="emma")


def test_a_key_is_shown_as_a_shell_takes_it(trained: nn.Module, tmp_path: Path) -> None:
    keys = ("it's; rm -rf x", "a\nb")
    torch.save({keys[0]: tiny().state_dict(), keys[1]: trained.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        open_source(SPEC, weights=tmp_path / "w.pt")
    _, first, second, _ = str(caught.value).splitlines()
    assert shlex.split(first)[:2] == ["--key", keys[0]]
    assert "'a\\nb'" in second
    assert torch.equal(open_source(SPEC, weights=tmp_path / "w.pt", key=keys[1]).model(image()), trained(image()))


def test_two_nets_behind_prefixes_of_one_state_dict(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "distilled.ckpt"
    both = behind("student.", trained.state_dict()) | behind("teacher.", tiny().state_dict())
    torch.save({"state_dict": both}, path)
    with pytest.raises(SourceError, match=r"--key state_dict\.student +8 tensors(\n|.)*--key state_dict\.teacher"):
        open_source(SPEC, weights=path)
    assert torch.equal(open_source(SPEC, weights=path, key="state_dict.student").model(image()), trained(image()))


def test_no_prefix_is_taken_off_names_that_fit(trained: nn.Module, tmp_path: Path) -> None:
    """The model has a layer called `module`, and the file another net behind that name."""
    model = nn.Sequential(OrderedDict(module=nn.Sequential(nn.Conv2d(1, 1, 1)), last=nn.Conv2d(1, 1, 1)))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    way = weights_for(copy.deepcopy(model), tmp_path / "w.pt")
    assert way.taken == "state_dict, 4 tensors"


def test_a_partial_fit_names_what_differs_and_what_is_near(trained: nn.Module, tmp_path: Path) -> None:
    state = behind("module.", trained.state_dict())
    state["module.final.weight"] = state.pop("module.last.weight")
    state["module.stem.bias"] = torch.zeros(9)
    torch.save({"model": state, "other": {"a": torch.ones(1)}}, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        open_source(SPEC, weights=tmp_path / "w.pt")
    said = str(caught.value)
    assert "w.pt under 'model' behind 'module.' does not hold the weights of this Tiny: missing: last.weight" in said
    assert "unexpected: final.weight" in said
    assert "stem.bias is (9,) in the file and (4,) in the model" in said
    state = trained.state_dict()
    state["straight.conv1.weight"] = state.pop("straight.conv.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        SourceError, match=r"missing: straight.conv.weight \(near it in the file: straight.conv1.weight\)"
    ):
        open_source(SPEC, weights=tmp_path / "w.pt")


def test_a_name_stays_in_its_line(tmp_path: Path) -> None:
    """A key of a stranger's may not say something of its own beside the message."""
    odd = "a\nnote: all is well"
    files = {
        "unexpected": {**tiny().state_dict(), odd: torch.zeros(1)},
        "several": {odd: tiny().state_dict(), "b": {name: value + 1 for name, value in tiny().state_dict().items()}},
        "patched": {**upswap.patch(tiny(), image()).state_dict(), odd: torch.zeros(1)},
    }
    for name, contents in files.items():
        torch.save(contents, tmp_path / f"{name}.pt")
        with pytest.raises(SourceError) as caught:
            upswap.load(tmp_path / f"{name}.pt", tiny())
        assert "note: all is well" in str(caught.value)
        assert not any(line.startswith("note:") for line in str(caught.value).splitlines())
