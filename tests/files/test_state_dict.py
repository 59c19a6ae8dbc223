"""State dicts as files have them: every value as it is read, and a word about those that have no bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import upswap
from upswap.files.state_dict import assign


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


class Picky(nn.Module):
    """Reads its tensors, and refuses them in a hook of its own."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1).half()
        self.register_buffer("step", torch.zeros(()))
        self.error = error
        self.register_load_state_dict_post_hook(self._check)

    @staticmethod
    def _check(module: Any, _: Any) -> None:
        if module.error is not None:
            module.step = torch.ones(())
            raise module.error


def assert_refused(model: nn.Module, load: Callable[[], object], says: str) -> None:
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(upswap.SourceError, match=says):
        load()
    after = model.state_dict(keep_vars=True)
    assert [*after] == [*before]
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert tensor.dtype == values.dtype
        assert torch.equal(tensor, values), name


@pytest.mark.filterwarnings("ignore:(Validating sparse|Sparse invariant)")  # torch says so
@pytest.mark.parametrize("kind", ["meta", "sparse", "number"])
def test_what_cannot_be_copied_is_named_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    state: dict[str, Any] = {name: torch.ones_like(tensor) for name, tensor in Picky().state_dict().items()}
    odd = torch.zeros(2)
    state["last.bias"] = {"meta": odd.to("meta"), "sparse": odd.to_sparse(), "number": 1.0}[kind]
    says = {"meta": "last.bias .*meta device", "sparse": "last.bias .*sparse_coo", "number": r"last\.bias"}[kind]
    torch.save(state, tmp_path / "w.pt")
    for source in (state, tmp_path / "w.pt"):
        model = Picky()
        assert_refused(model, functools.partial(upswap.load, source, model), says)
    model = Picky()
    assert_refused(model, functools.partial(assign, model, state, "w", keep_dtype=True), says)


@pytest.mark.parametrize("error", [RuntimeError("not mine"), KeyError("not mine")], ids=["RuntimeError", "KeyError"])
def test_a_hook_that_refuses_leaves_the_model_as_it_was(error: Exception) -> None:
    """Its values, dtypes and tensors themselves."""
    state = {name: torch.ones_like(tensor, dtype=torch.float64) for name, tensor in Picky().state_dict().items()}
    for keep_dtype in (False, True):
        model = Picky(error)
        assert_refused(model, functools.partial(assign, model, state, "w", keep_dtype=keep_dtype), "not mine")
    model = nn.Sequential(nn.LazyConv2d(4, 1), Picky(error))
    tensors = {f"1.{name}": tensor for name, tensor in state.items()}
    tensors |= {"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.ones(4)}
    with pytest.raises(upswap.SourceError, match="not mine"):
        assign(model, tensors, "w")
    assert is_lazy(model[0].weight)
    model[1].error = None
    assign(model, tensors, "w")
    assert model[0].weight.sum() == 12


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # is deprecated; models still have such tensors
def test_what_torch_does_not_copy_changes_nothing() -> None:
    """A quantized tensor has the layout and shape of another."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    state["1.bias"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert_refused(model, functools.partial(upswap.load, state, model), r"1\.bias")


def test_a_sparse_buffer_is_given_its_own() -> None:
    model = nn.Conv2d(3, 4, 1)
    model.register_buffer("table", torch.eye(3).to_sparse())
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    upswap.load(state, model)
    assert torch.equal(model.get_buffer("table").to_dense(), 2 * torch.eye(3))
