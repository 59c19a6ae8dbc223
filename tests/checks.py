"""The checks every patched model has to pass, whatever library it comes from."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from upswap.flow import tensors_in


def decisions(plan: upswap.Plan) -> dict[str, str]:
    """Site name -> kind, with `=> route` where the site is swapped."""
    return {site.name: f"{site.kind} => {site.route}" if site.swap else site.kind for site in plan.sites}


def outputs(model: nn.Module, *args: Any) -> list[torch.Tensor]:
    """Every tensor a model returns."""
    return list(tensors_in(model(*args)))


def assert_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> None:
    """Equality relative to the largest value of each expected tensor."""
    assert len(got) == len(expected) > 0
    for new, old in zip(got, expected, strict=True):
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        scale = old.abs().max().item()
        assert (new - old).abs().max().item() <= tolerance * scale, (
            f"{(new - old).abs().max().item() / scale:.2e} relative"
        )


def check_step_0(
    original: nn.Module, patched: nn.Module, images: Sequence[torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Equal outputs in eval mode on each batch; a batch the original refuses is refused by both in the same words."""
    original.eval()
    patched.eval()
    with torch.no_grad():
        for image in images:
            try:
                expected = outputs(original, image)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    outputs(patched, image)
            else:
                assert_close(outputs(patched, image), expected, tolerance)


def check_training(original: nn.Module, patched: nn.Module, image: torch.Tensor) -> None:
    """In train mode, from the same seed: equal outputs, and in float64 equal gradients of the input and of every host weight."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        results = []
        for model in (copy.deepcopy(original), copy.deepcopy(patched)):
            model.to(dtype).train()
            x = image.to(dtype, copy=True).requires_grad_()
            torch.manual_seed(0)
            out = outputs(model, x)
            generator = torch.Generator().manual_seed(1)
            sum(
                (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for o in out
            ).backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            buffers = dict(model.named_buffers())
            results.append((out, x.grad, gradients, buffers))
        (old, old_x, old_gradients, old_buffers), (new, new_x, new_gradients, new_buffers) = results
        assert_close(new, old, tolerance)
        if dtype == torch.float64:
            assert_close([new_x], [old_x], 1e-7)
            largest = max(g.abs().max().item() for g in old_gradients.values() if g is not None)
            for name, gradient in old_gradients.items():
                assert (gradient is None) == (new_gradients[name] is None), name
                if gradient is not None:
                    assert (new_gradients[name] - gradient).abs().max().item() <= 1e-7 * largest, name
            for name, buffer in old_buffers.items():
                assert torch.allclose(new_buffers[name].double(), buffer.double(), rtol=1e-9, atol=1e-12), name


def check_keys(original: nn.Module, patched: nn.Module) -> None:
    """Every original key with its shape; a checkpoint of the original misses the upsamplers' keys and nothing else."""
    old, new = original.state_dict(), patched.state_dict()
    assert list(old) == [key for key in new if key in old]
    assert all(old[key].shape == new[key].shape for key in old)
    added = {f"{path}.{key}" for path, module in upswap.upsamplers(patched).items() for key in module.state_dict()}
    assert set(new) - set(old) == added
    clone = copy.deepcopy(patched)
    result = clone.load_state_dict(dict(old), strict=False)
    assert set(result.missing_keys) == added
    assert result.unexpected_keys == []


def check_learning(
    patched: nn.Module, image: torch.Tensor, loss: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
) -> None:
    """One optimiser step moves every parameter of every upsampler."""
    model = copy.deepcopy(patched).train()
    before = [parameter.detach().clone() for parameter in upswap.parameters(model)]
    assert before
    optimiser = torch.optim.SGD(upswap.param_groups(model, lr=1.0))
    torch.manual_seed(0)
    out = outputs(model, image)
    generator = torch.Generator().manual_seed(1)
    value = loss(out) if loss else sum((o * torch.randn(o.shape, generator=generator)).sum() for o in out)
    value.backward()
    optimiser.step()
    still = [
        name
        for (name, parameter), old in zip(_named_added(model), before, strict=True)
        if torch.equal(parameter.detach(), old)
    ]
    assert not still, f"not moved by a step: {still}"


def _named_added(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{path}.{name}", parameter)
        for path, module in upswap.upsamplers(model).items()
        for name, parameter in module.named_parameters()
    ]


def check_unpatch(original: nn.Module, patched: nn.Module, image: torch.Tensor) -> None:
    """Undone, which ends the use of `patched`: the original's classes, keys and attributes, its output bit for bit."""
    model = upswap.unpatch(patched).eval()
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [path for path, _ in model.named_modules()] == [path for path, _ in original.named_modules()]
    assert list(model.state_dict()) == list(original.state_dict())
    assert set(model.__dict__) == set(original.__dict__)
    original.eval()
    with torch.no_grad():
        for new, old in zip(outputs(model, image), outputs(original, image), strict=True):
            assert torch.equal(new, old)


def check_repatch(patched: nn.Module) -> None:
    """A second patch changes nothing and says so."""
    keys, plan = list(patched.state_dict()), upswap.plan_of(patched)
    classes = [type(module) for module in patched.modules()]
    with pytest.warns(upswap.UpswapWarning, match="patched already"):
        assert upswap.patch(patched) is patched
    assert list(patched.state_dict()) == keys
    assert upswap.plan_of(patched) == plan
    assert [type(module) for module in patched.modules()] == classes
