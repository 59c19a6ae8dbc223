"""State dicts: taken from a model without shared memory, and put into one, strictly."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import SaveError, SourceError
from ..shown import one_line
from ..surgery.apply import added_keys, installed
from .fitting import differences

T = TypeVar("T")


def separated(model: nn.Module, keys: Container[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict as tensors that share no memory, and for the names left out, the name of the same tensor.

    With `keys`, of these entries of it.
    """
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        if keys is not None and name not in keys:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise SaveError(
                f"the state dict has a {type(tensor).__name__} under {name!r}, which .safetensors cannot hold; use .pt"
            )
        problem = _no_memory(tensor)
        if problem is not None:
            raise SaveError(f"{name!r} of the state dict {problem}")
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        marks = (tensor.is_conj(), tensor.is_neg())
        view = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, *marks)
        if tensor.numel() and view in first:
            shared[name] = first[view]
            continue
        first[view] = name
        # The format has bytes alone, in which torch's marks (conjugate, negative) would be lost.
        tensor = tensor.resolve_conj().resolve_neg()
        # Another view of a storage already taken: the format has no views, so it becomes a tensor of its own.
        tensors[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if place in storages else tensor.contiguous()
        )
        storages.add(place)
    return tensors, shared


def _no_memory(tensor: torch.Tensor) -> str | None:
    """Why a tensor has no bytes to be written, None for one that has."""
    if is_lazy(tensor):
        return "has no shape yet, which a lazy layer gets from its first input; run the model once"
    if tensor.is_meta:
        return "is on the meta device, where it has no values; load the model's weights first"
    if tensor.layout is not torch.strided:
        return f"is a tensor of the layout {tensor.layout}, which .safetensors cannot hold; use .pt"
    return None


def assign(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str | Path, *, keep_dtype: bool = False
) -> None:
    """`load_state_dict`, strict, with one message; `keep_dtype` makes the model take the dtypes of the file.

    Raises:
        SourceError: keys or shapes are not those of the model; some of each are named. The model is as it was.
    """
    problems = differences(model.state_dict(), tensors)
    if problems:
        raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {problems}")
    refusals = _refusals(model, tensors)
    if refusals:
        cause = one_line("; ".join(refusals[:3]), 1000)
        raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {cause}")
    if keep_dtype:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in tensors and tensors[name].dtype != tensor.dtype:
                tensor.data = tensor.data.to(tensors[name].dtype)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:  # a hook of the model's own
        cause = one_line(str(error), 500)
        raise SourceError(f"{path} cannot be loaded into this {type(model).__name__}: {cause}") from error


def assign_upsamplers(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """As `assign`, of the upsamplers of a patched model alone: nothing of its host is written to.

    Raises:
        SourceError: keys or shapes are not those of the upsamplers, or one refuses its tensors. The model is as it was.
    """
    added = added_keys(model)
    problems = differences({name: value for name, value in model.state_dict().items() if name in added}, tensors)
    if problems:
        raise SourceError(f"{path} does not hold the upsamplers of this {type(model).__name__}: {problems}")
    loads = [(part, below(place, tensors)) for place, part in installed(model)]
    try:
        for part, own in loads:  # copies first: one may refuse when others are loaded already
            copy.deepcopy(part).load_state_dict(own)
    except RuntimeError as error:
        cause = one_line(str(error), 500)
        raise SourceError(f"{path} does not hold the upsamplers of this {type(model).__name__}: {cause}") from error
    for part, own in loads:
        part.load_state_dict(own)


def below(path: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """What stands below a path, by the names that it has there."""
    return {name[len(path) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{path}.")}


def _refusals(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What layers with a loading of their own say against their tensors, as an upsampler of another base grid does.

    Asked of copies: torch would tell it when the rest of the model is loaded already.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:
            prefix = f"{path}." if path else ""
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            copy.deepcopy(module)._load_from_state_dict(own, prefix, {}, False, [], [], found)
    return found
