"""A model as a function of tensors: what exporters take, with names for what goes in and comes out."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
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
        self._inputs = inputs
        arguments = (*zip(_bound(model, inputs), inputs.args, strict=True), *inputs.kwargs.items())
        self.input_names = _distinct([name for argument in arguments for name, _ in _named_tensors(*argument)])
        self.output_names: list[str] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output's tensors in the order of its structure."""
        return tuple(tensor for _, tensor in _named_tensors("", self._run(tensors)))

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        waiting = iter(tensors)
        given = self._inputs.map(lambda _: next(waiting))
        return self.model(*given.args, **given.kwargs)

    @torch.no_grad()
    def name_outputs(self, tensors: Sequence[Tensor]) -> None:
        """Run once, and name the outputs by their places in what the model gives."""
        names = [name or "output" for name, _ in _named_tensors("", self._run(tensors))]
        if not names:
            raise InputError(f"{type(self.model).__name__} gives no tensor to export")
        self.output_names = _distinct([f"output_{name}" if name[0].isdigit() else name for name in names])


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `value`, of dataclasses too, and names for them by their places."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        place = f"{name}{pytree.keystr(path)}"
        if isinstance(leaf, Tensor):
            yield re.sub(r"\W+", "_", place).strip("_"), leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _named_tensors(f"{place}.{field.name}", getattr(leaf, field.name, None))


def _bound(model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of the positional arguments."""
    try:
        parameters = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    return [parameters[i] if i < len(parameters) else f"input_{i}" for i in range(len(inputs.args))]


def _distinct(names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        number, candidate = 0, name
        while candidate in found:
            number += 1
            candidate = f"{name}_{number}"
        found.append(candidate)
    return found
