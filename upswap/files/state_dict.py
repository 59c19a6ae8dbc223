"""State dicts: taken from a model without shared memory, and put into one, strictly."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import SaveError, SourceError
from ..shown import one_line
from ..surgery.apply import added_keys, installed
from .fitting import differences, no_memory

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
        problem = no_memory(tensor)
        if problem is not None:
            advice = (
                "run the model once" if is_lazy(tensor) else "load its weights first" if tensor.is_meta else "use .pt"
            )
            raise SaveError(f"{name!r} of the state dict {problem}; {advice}")
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


def assign(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str | Path, *, keep_dtype: bool = False
) -> None:
    """`load_state_dict`, strict, with one message; `keep_dtype` makes the model take the dtypes of the file.

    Extra state of layers that is no tensor stays as it is.

    Raises:
        SourceError: keys or shapes are not those of the model, or tensors have no values; some of each are named. Or a hook of
            the model's own refuses them. The model is as it was.
    """
    own = model.state_dict()
    extra = {name for name, value in own.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in extra}
    problems = differences({name: tensor for name, tensor in own.items() if name not in extra}, tensors)
    if problems:
        raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {problems}")
    refusals = _refusals(model, tensors)
    if refusals:
        cause = one_line("; ".join(refusals[:3]), 1000)
        raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {cause}")
    try:
        with _as_it_was(model.modules()):
            if keep_dtype:
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    if name in tensors and tensors[name].dtype != tensor.dtype:
                        tensor.data = tensor.data.to(tensors[name].dtype)
            _load(model, tensors, extra)
    except Exception as error:  # a hook of the model's own, or a tensor of a class of its own
        cause = one_line(str(error), 500)
        raise SourceError(f"{path} cannot be loaded into this {type(model).__name__}: {cause}") from error


def _load(model: nn.Module, tensors: Mapping[str, torch.Tensor], extra: Collection[str]) -> None:
    """`load_state_dict`, strict but for the extra state of layers, which is no tensor and stays as it is."""
    if not extra:
        model.load_state_dict(tensors, strict=True)
        return
    result = model.load_state_dict(tensors, strict=False)
    lost = [name for names in result or () for name in names if name not in extra]
    if lost:
        raise RuntimeError(f"a hook took away or put in {', '.join(lost[:3])}")


@contextlib.contextmanager
def _as_it_was(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, an error leaves the tensors of these modules, without their children's, as they were.

    Their values are kept in the CPU's memory meanwhile. A copy of the model to load into takes as much, on the model's device.
    Not every model can be copied.
    """
    places = [
        (module, name, tensor)
        for module in modules
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False)
    ]
    kept = []
    for tensor in {id(tensor): tensor for _, _, tensor in places}.values():
        data = tensor.data
        values = None if is_lazy(tensor) or tensor.is_meta else data.to("cpu", copy=True)
        kept.append((tensor, type(tensor), data, values))
    try:
        yield
    except BaseException:
        for tensor, cls, data, values in kept:
            if type(tensor) is not cls:  # a lazy one, which loading made real
                tensor.__class__ = cls
            tensor.data = data
            if values is not None:
                with contextlib.suppress(RuntimeError):  # what cannot be written to, as an expanded one, was not
                    data.copy_(values)
        for module, name, tensor in places:
            if getattr(module, name, None) is not tensor:
                setattr(module, name, tensor)
        raise


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
    with _as_it_was(module for part, _ in loads for module in part.modules()):
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
