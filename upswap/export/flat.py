"""A model as a function of tensors: what exporters take, with names for what goes in and comes out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..probe.inputs.inputs import Inputs


class Flat(nn.Module):
    """`model` with the tensors among its arguments for arguments, and a tuple of the tensors among its outputs."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        bound = _bound(model, inputs)
        leaves, self._spec = pytree.tree_flatten_with_path((inputs.args, inputs.kwargs))
        self._constants = [None if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]
        self._places = [place for place, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.input_names = _distinct([_input_name(path, bound) for path, leaf in leaves if isinstance(leaf, Tensor)])
        self.output_names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output's tensors in the order of its structure."""
        return tuple(leaf for leaf in pytree.tree_leaves(self._run(tensors)) if isinstance(leaf, Tensor))

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def name_outputs(self, tensors: Sequence[Tensor]) -> None:
        """Run once, and name the outputs by their places in what the model gives."""
        found, _ = pytree.tree_flatten_with_path(self._run(tensors))
        names = [_plain(pytree.keystr(path)) or "output" for path, leaf in found if isinstance(leaf, Tensor)]
        if not names:
            raise InputError(f"{type(self.model).__name__} gives no tensor to export")
        self.output_names = _distinct([f"output_{name}" if name[0].isdigit() else name for name in names])


def _bound(model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of the positional arguments."""
    try:
        parameters = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    return [parameters[i] if i < len(parameters) else f"input_{i}" for i in range(len(inputs.args))]


def _input_name(path: Any, positional: list[str]) -> str:
    kind, first, *rest = path
    name = positional[first.idx] if kind.idx == 0 else first.key
    return _plain(f"{name}{pytree.keystr(tuple(rest))}")


def _plain(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _distinct(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        number, candidate = 0, name
        while candidate in found:
            number += 1
            candidate = f"{name}_{number}"
        found.append(candidate)
    return found
