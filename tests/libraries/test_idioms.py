"""A model of each idiom through all that is done with one: patch, save, load, train, compile, trace, undo."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import invariants
import upswap
from zoos.case import Case
from zoos.idioms_zoo import CASES

#: The package the models are in, which is no library that upswap knows.
TRUST = ["zoos"]
FORMS = ("model.pt", "model.safetensors", "model")
#: Those that torch.compile cannot take in one graph, unpatched neither: they warn, or make a scripted function.
SEVERAL_GRAPHS = {"Segmentor aligned", "Scripted"}
#: Those that another of the same code base stands for, but in the slow test.
VARIANTS = {
    "NestedU", "Segmentor", "Segmentor aligned", "BothWays attn bilinear", "RecurrentFlow", "Boundary", "DenoisingUNet"
}  # fmt: skip


def spec_of(case: Case) -> str:
    """What the forms without a pickle build the original from."""
    make, _ = case.build.args  # type: ignore[attr-defined]
    options = "&".join(f"{name}={value!r}" for name, value in make.keywords.items())
    return f"python:{make.func.__module__}:{make.func.__qualname__}" + (f"?{options}" if options else "")


def outputs(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """What a model gives in eval mode on a batch that it was not patched with."""
    with torch.no_grad():
        return invariants.outputs(model.eval(), case.inputs(model, 1))


class Life:
    """One model, patched, with upsamplers that show in its output; each method is something done with it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.original = case, folder, case.build()
        given = None if case.inferred else case.inputs(self.original, 0)
        self.model = upswap.patch(case.build(), given)
        with torch.no_grad():
            for number, parameter in enumerate(upswap.parameters(self.model)):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise, alpha=0.3)
        self.expected = outputs(self.model, case)
        plain = outputs(self.original, case)
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(self.expected, plain, strict=True)), "not in use"

    def save_and_load(self, form: str) -> None:
        path = self.folder / form
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", upswap.UpswapWarning)
            upswap.save(self.model, path, source=spec_of(self.case))
        told = [str(one.message) for one in said if issubclass(one.category, upswap.UpswapWarning)]
        assert [form.endswith(".pt")] * len(told) == ["will refuse it" in one for one in told], told
        loaded = upswap.load(path, trust=TRUST)
        assert upswap.plan_of(loaded) == upswap.plan_of(self.model)
        invariants.assert_equal(outputs(loaded, self.case), self.expected)
        if form == FORMS[-1]:
            assert self.case.training is not None
            invariants.check_learning(loaded, self.case.training(loaded))

    def compile(self, backend: str) -> None:
        """Compiled, it trains as it does in eager mode: the same loss, the same gradients of the upsamplers."""
        assert self.case.training is not None
        arguments = self.case.training(self.original)
        gradients: list[list[torch.Tensor]] = []
        for compiled in (False, True):
            torch._dynamo.reset()
            model: Any = copy.deepcopy(self.model).train()
            added = list(upswap.parameters(model))
            if compiled:
                model = torch.compile(model, backend=backend, fullgraph=self.case.name not in SEVERAL_GRAPHS)
            found = invariants.outputs(model, arguments)
            invariants.loss_of(found).backward()
            assert all(parameter.grad is not None for parameter in added)
            gradients.append([*(t.detach() for t in found), *(p.grad for p in added if p.grad is not None)])
        invariants.assert_close(gradients[1], gradients[0], 1e-3)

    def trace(self) -> None:
        """Traced, with torch's own check; `strict` would refuse every model that gives a dict."""
        self.model.eval()
        args, _ = self.case.inputs(self.model, 1)
        traced = torch.jit.trace(self.model, args, strict=False)
        assert isinstance(traced, nn.Module)
        with torch.no_grad():
            invariants.assert_close(invariants.outputs(traced, (args, {})), self.expected, 1e-5)

    def undo(self) -> None:
        invariants.check_unpatch(self.original, copy.deepcopy(self.model), self.case.inputs(self.original, 1))
        invariants.assert_equal(outputs(self.model, self.case), self.expected)


def live(case: Case, folder: Path, backends: Sequence[str]) -> None:
    with invariants.quiet():
        life = Life(case, folder)
        for form in FORMS:
            life.save_and_load(form)
        for backend in backends:
            life.compile(backend)
        life.trace()
        life.undo()


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in VARIANTS], ids=lambda case: case.name)
def test_everything_that_is_done_with_a_model(case: Case, tmp_path: Path) -> None:
    live(case, tmp_path, ["eager"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everything_with_the_compilers(case: Case, tmp_path: Path) -> None:
    live(case, tmp_path, ["aot_eager", "inductor"])
