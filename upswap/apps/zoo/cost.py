"""What a run would take, without building a weight: models are made on the meta device and their parameters counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...architectures.spec import parse
from ...errors import UpswapError
from ...files.open_source import open_source


def costs(targets: Mapping[str, Path]) -> list[dict[str, Any]]:
    """For every source: its target, parameters, bytes of weights, or the error that keeps it from being built."""
    return [_cost(source, target) for source, target in targets.items()]


def _cost(source: str, target: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"source": source, "target": str(target), "parameters": None, "bytes": None, "error": ""}
    if parse(source) is None:  # a file: its size says enough
        path = Path(source)
        if path.is_file():
            return {**found, "bytes": path.stat().st_size}
        return {**found, "error": f"there is no file {source}"}
    try:
        with torch.device("meta"):
            model = open_source(source).model
    except UpswapError as error:
        return {**found, "error": str(error)}
    tensors = [*model.parameters(), *model.buffers()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        **found,
        "parameters": parameters,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
