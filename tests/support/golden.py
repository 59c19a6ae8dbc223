"""What the released module of the authors gives: its outputs and gradients, from the file under `data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "dysample_reference.safetensors"


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
