"""What the released modules of the authors give: their outputs and gradients, from the files under `data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor, nn

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "dysample_reference.safetensors"
KERNELS = DATA / "guided_reference.safetensors"


def golden_cases() -> list[Any]:
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
    return [pytest.param(case, id=f"{case['name']}-{case['style']}-x{case['scale']}-{case['dtype']}") for case in cases]


def golden_tensors(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118 (a file, not a dict)
        return {key.removeprefix(f"{name}."): file.get_tensor(key) for key in keys}


def relative_error(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().item()
    return (got - expected).abs().max().item() / (scale or 1.0)


class Case(NamedTuple):
    """A module of a kernel upsampler's authors: its state, inputs, outputs, and the gradients that `upstream` gives."""

    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    out: list[Tensor]
    upstream: list[Tensor]
    grad: dict[str, Tensor]


def kernel_case(name: str) -> Case:
    with safe_open(KERNELS, "pt") as file:
        parts: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (a file, not a dict)
            case, part, rest = key.split("/", 2)
            if case == name:
                parts.setdefault(part, {})[rest] = file.get_tensor(key)
    numbered = {part: [parts[part][key] for key in sorted(parts[part])] for part in ("out", "upstream")}
    return Case(parts["state"], parts["in"], numbered["out"], numbered["upstream"], parts["grad"])


def differences(module: nn.Module, case: Case, out: list[Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """How far outputs, and gradients of the module's parameters and the inputs, are off, relative to the largest of each."""
    sum((one * by).sum() for one, by in zip(out, case.upstream, strict=True)).backward()  # type: ignore[union-attr]
    found = {f"out.{n}": relative_error(one, case.out[n]) for n, one in enumerate(out)}
    found |= {name: relative_error(each.grad, case.grad[name]) for name, each in module.named_parameters()}  # type: ignore[arg-type]
    found |= {f"in.{name}": relative_error(x.grad, case.grad[f"in.{name}"]) for name, x in inputs.items()}  # type: ignore[arg-type]
    assert found.keys() - {f"out.{n}" for n in range(len(out))} == case.grad.keys()
    return found
