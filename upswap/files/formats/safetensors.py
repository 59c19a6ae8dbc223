"""Weights as `.safetensors`, with a description of the model in the header: what it is built from, and its Plan.

The same description is `upswap.json` in a folder (see `folder.py`). It is data from a stranger: what it names is built
only where that neither runs code of the file nor fetches anything, and takes no more memory than the weights explain.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...architectures.rebuild import rebuild
from ...errors import SaveError, SourceError
from ..state_dict import separated
from .description import check_description, describe, restored

#: The one key of ours in a safetensors header. One, because the writer puts several in random order.
HEADER_KEY = "upswap"


def save(model: nn.Module, spec: str | None, path: Path) -> None:
    """Write the file; `SaveError` where a state dict holds something other than tensors."""
    tensors, shared = separated(model)
    write(tensors, {HEADER_KEY: json.dumps(describe(model, spec, shared), sort_keys=True)}, path)


def built(
    tensors: dict[str, torch.Tensor],
    header: dict[str, Any],
    path: Path,
    model: nn.Module | None,
    trust: Iterable[str],
) -> nn.Module:
    """The model that `save` wrote with this header, built anew or, where it is given, in `model`."""

    def build() -> nn.Module:
        if not isinstance(header.get("source"), str):
            raise SourceError(f"{path} does not say how its model is built; pass it: upswap.load({str(path)!r}, model)")
        return rebuild(header["source"], str(path), trust)

    return restored(header, tensors, path, model, build)


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a `.safetensors`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is not None:  # the disk's own trouble, which `atomic` tells by its number
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise SaveError(f"{path} cannot be written: {error}") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of any `.safetensors`, and what upswap wrote in its header; {} if nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path} is not a whole .safetensors file: {error}") from error
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} has a damaged upswap header: {error}") from error
    return tensors, check_description(header, path)


def looks_like_one(path: Path) -> bool:
    """Whether a file is a `.safetensors`. It has no magic number: eight bytes of length, then the brace of a JSON header."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and not head.startswith(b"PK"))
