"""torch's own ways to train: what is patched before a wrap computes what the plain model does; after it, it is said."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as eager
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import upswap
from pages import run_page
from tiny_training import IMAGES, TRAINED, Net, assert_kept, loss_of, output, patched_net, states, train
from upswap.nn import Projection

ROOT = Path(__file__).parents[2]

quantising = pytest.mark.filterwarnings(
    # torch's own: the move to torchao, and observers that have seen nothing yet.
    "ignore:torch.ao.quantization is deprecated",
    "ignore:.*must run observer before calling calculate_qparams",
    "ignore:.*reduce_range will be deprecated",
    "ignore:.*quantized tensor creation functions",
)


def trained_net() -> Net:
    model = patched_net()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert states(model) == TRAINED
    return model


# -- torchvision's reference scripts --------------------------------------------------------------------------------------


class ExponentialMovingAverage(AveragedModel):
    """As the class of that name in the references of torchvision: all buffers are averaged too."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def epochs(model: nn.Module, optimizer: Any, scheduler: Any, ema: Any, count: int) -> None:
    for _ in range(count):
        train(model, optimizer, 2)
        ema.update_parameters(model)
        scheduler.step()


def made() -> tuple[Any, Any, Any, Any]:
    model = patched_net()
    optimizer = torch.optim.SGD(upswap.param_groups(model, 0.1, weight_decay=1e-4), momentum=0.9)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=5, power=0.9)
    return model, optimizer, scheduler, ExponentialMovingAverage(model, decay=0.5)


def test_the_steps_of_torchvisions_references(tmp_path: Path) -> None:
    whole = made()
    epochs(*whole, 4)
    first = made()
    epochs(*first, 2)
    names = ("model", "optimizer", "lr_scheduler", "model_ema")
    checkpoint = {name: part.state_dict() for name, part in zip(names, first, strict=True)}
    torch.save({**checkpoint, "epoch": 1}, tmp_path / "checkpoint.pth")
    resumed = made()
    loaded = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    for name, part in zip(names, resumed, strict=True):
        part.load_state_dict(loaded[name])
    assert_kept(resumed[0], first[0])
    epochs(*resumed, 2)
    assert_kept(resumed[0], whole[0])
    assert_kept(resumed[3].module, whole[3].module)
    model, optimizer, _, ema = whole
    assert states(model, optimizer, ema) == TRAINED
    # `init_pos` is averaged with the other buffers, and stays what it is.
    torch.testing.assert_close(ema.module.up.init_pos, model.up.init_pos, rtol=0, atol=0)
    assert_kept(upswap.load(tmp_path / "checkpoint.pth", patched_net(), key="model_ema"), first[3].module)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up.init_pos"):
        Net().load_state_dict(loaded["model"])


def test_averages_made_before_the_patch_are_told() -> None:
    model = Net()
    average = AveragedModel(model)
    upswap.patch(model, IMAGES[:1])
    assert "is not in the averaged weights" in str(upswap.status(model, ema=average))
    with pytest.raises((RuntimeError, ValueError)):  # torch's own, of sizes
        average.update_parameters(model)


# -- several devices ------------------------------------------------------------------------------------------------------


def two_processes(case: str, folder: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    script = ROOT / "tests" / "support" / "two_processes.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, case, str(rank), folder], env=env, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors


def alone() -> nn.Module:
    """The same steps in one process, on whole batches."""
    model = patched_net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def test_distributed_data_parallel(tmp_path: Path) -> None:
    two_processes("ddp", tmp_path)
    expected = alone().state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(found["inner"]) == list(expected)
        torch.testing.assert_close(found["inner"], expected)
        assert list(found["wrapped"]) == [f"module.{name}" for name in expected]
        # Wrapped before the patch, an upsampler of each process would go its own way.
        assert "is not known to the DistributedDataParallel" in (tmp_path / f"late{rank}.txt").read_text()
    again = upswap.load(tmp_path / "saved.pt", trust=["tiny_training"])
    torch.testing.assert_close(output(again), output(alone()))
    assert_kept(upswap.load(tmp_path / "0.pt", patched_net(), key="wrapped"), again)


def test_fully_shard(tmp_path: Path) -> None:
    two_processes("fsdp", tmp_path)
    found = torch.load(tmp_path / "0.pt", weights_only=True)["inner"]
    expected = alone()
    torch.testing.assert_close(dict(found), dict(expected.state_dict()))
    again = patched_net()
    again.load_state_dict(found)
    torch.testing.assert_close(output(again), output(expected))


def test_sync_batch_norm() -> None:
    model = trained_net()
    before = output(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.norm) is nn.SyncBatchNorm
    assert states(converted) == TRAINED
    torch.testing.assert_close(output(converted), before, rtol=0, atol=0)


# -- compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("whole_step", [False, True])
def test_a_compiled_step_trains_them(whole_step: bool) -> None:
    torch.compiler.reset()
    plain, compiled = patched_net(), patched_net()
    model: Any = compiled if whole_step else torch.compile(compiled)
    parts = [(plain, torch.optim.SGD(plain.parameters(), lr=0.5))]
    parts.append((model, torch.optim.SGD(model.parameters(), lr=0.5)))

    def step(model: nn.Module, optimizer: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    steps = (step, torch.compile(step) if whole_step else step)
    for _ in range(3):
        losses = [run(*part) for run, part in zip(steps, parts, strict=True)]
        torch.testing.assert_close(*losses)
    assert states(model, parts[1][1]) == TRAINED
    torch.testing.assert_close(dict(compiled.named_parameters()), dict(plain.named_parameters()), rtol=1e-3, atol=1e-5)
    assert states(upswap_saved(model)) == TRAINED


def upswap_saved(model: nn.Module) -> nn.Module:
    """A plain model with the weights of a compiled one, by the keys that it has."""
    again = patched_net()
    again.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()})
    return again


def test_a_compiled_model_is_not_patched() -> None:
    with pytest.raises(upswap.OptionError, match=r"patch the model inside, model._orig_mod, before it is wrapped"):
        upswap.patch(torch.compile(Net()), IMAGES[:1])


# -- quantised ------------------------------------------------------------------------------------------------------------


def projections(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if type(module) is Projection]


def has_gradients(model: nn.Module) -> None:
    model.train()
    loss_of(model).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in projections(model))


@quantising
def test_qat_by_fx_leaves_upsamplers_float() -> None:
    model = trained_net()
    before = [weight.detach().clone() for weight in projections(model)]
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), eager.get_default_qat_qconfig_mapping("x86"), (IMAGES,))
    assert [type(module) for module in prepared.modules() if isinstance(module, upswap.DySample)] == [
        upswap.DySample
    ] * 2
    for weight, value in zip(projections(prepared), before, strict=True):
        torch.testing.assert_close(weight, value, rtol=0, atol=0)
    has_gradients(prepared)
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=0.01)
    train(prepared, optimizer)
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(weight) in known for weight in projections(prepared))
    float_output = output(prepared)
    converted = convert_fx(prepared.eval())
    assert len(projections(converted)) == 2
    assert all(weight.dtype == torch.float32 for weight in projections(converted))
    assert (output(converted) - float_output).abs().max() < 0.1 * float_output.abs().max()


@quantising
def test_eager_qat_leaves_upsamplers_float() -> None:
    model = trained_net()
    wrapped = eager.QuantWrapper(model).train()
    wrapped.qconfig = eager.get_default_qat_qconfig("x86")
    prepared = eager.prepare_qat(wrapped)
    assert "qat" in type(prepared.module.first).__module__
    assert len(projections(prepared)) == 2
    assert states(prepared) == TRAINED
    has_gradients(prepared)
    converted = eager.convert(prepared.eval())
    assert len(projections(converted)) == 2
    # Eager mode puts nothing around a float module by itself.
    with pytest.raises(upswap.ShapeError, match=r"floating-point input, got torch.quint8"):
        converted(IMAGES)


@quantising
@pytest.mark.filterwarnings("ignore:.*is an Enum subclass", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("qat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pt2e_leaves_upsamplers_float(qat: bool) -> None:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    model = trained_net()
    expected = output(model)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=qat))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own
        exported = torch.export.export(model.train() if qat else model.eval(), (IMAGES,)).module()
        prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(exported, quantizer)
        if qat:
            nn.functional.cross_entropy(prepared(IMAGES), torch.zeros(8, 32, 32, dtype=torch.long)).backward()
            offsets = [weight for name, weight in prepared.named_parameters() if "offset" in name]
            assert len(offsets) == 4
            assert all(weight.grad is not None and weight.grad.any() for weight in offsets)
            move_exported_model_to_eval(prepared)
        else:
            prepared(IMAGES)
        converted = convert_pt2e(prepared)
        found = converted(IMAGES)
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    quantised = [node for node in converted.graph.nodes if "quantize" in str(node.target)]
    assert quantised, "nothing was quantised at all"
    assert not [node for node in quantised if any("offset" in str(argument) for argument in node.all_input_nodes)]
    assert {
        tuple(value.shape): value.dtype for name, value in converted.state_dict().items() if "offset.weight" in name
    } == {(32, 16, 1, 1): torch.float32}


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/torch.md", {"make_model": Net, "images": IMAGES[:1]})
    torch.testing.assert_close(output(upswap.load("model.safetensors", Net())), output(names["ema"].module))
