"""What became of every upsampler of a model in training: `status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..nn.watch import unexplained
from ..surgery.apply import installed
from ..surgery.wrappers import patched_models
from .row import Row, State


@dataclasses.dataclass(frozen=True)
class Status:
    """What `status` found, a row for each upsampler. As text, a table with what to do below it."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every upsampler is trained and kept. A model of no upsamplers is not ok."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __repr__(self) -> str:
        lost = sum(not row.ok for row in self.rows)
        return f"<Status: {len(self.rows)} upsamplers, {'ok' if self.ok else f'{lost} with problems'}>"

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self.rows)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        from .table import as_html

        return as_html(self.rows)


def status(model: nn.Module, optimizer: Any = None, ema: Any = None) -> Status:
    """Whether each upsampler of a patched model is trained and kept; nothing is changed.

    Args:
        model: a patched model, or one that holds patched ones: wrapped, compiled, a LightningModule.
        optimizer: the optimiser, or several, whose groups should have the upsamplers' parameters.
        ema: the averaged weights that should have their keys: a module (`AveragedModel`, timm's `ModelEmaV3`), a state dict, or
            an object with such a module among its attributes.

    Raises:
        PlanError: the model is not patched.
        OptionError: `ema` has no weights.
    """
    known = None if optimizer is None else _parameters_of(optimizer)
    keys = None if ema is None else _keys_of(ema)
    found = patched_models(model)
    rows: list[Row] = []
    for prefix, patched in found.items():
        in_training = any(parameter.requires_grad for parameter in patched.parameters())
        for inside, upsampler in installed(patched):
            path = f"{prefix}.{inside}" if prefix else inside
            # Averages may be of the one patched model, without what holds it.
            averaged = None if keys is None else _are_in(keys, path if len(found) > 1 else inside, upsampler)
            rows.append(_row(path, upsampler, known, averaged, in_training))
    return Status(tuple(rows))


def _are_in(keys: set[str], path: str, upsampler: nn.Module) -> bool:
    return all(_has(keys, f"{path}.{name}") for name in upsampler.state_dict())


def _row(path: str, upsampler: nn.Module, known: set[int] | None, in_ema: bool | None, in_training: bool) -> Row:
    state, problem = _state(upsampler)
    problems = [] if problem is None else [problem]
    trainable = [parameter for parameter in upsampler.parameters() if parameter.requires_grad]
    if in_training and not trainable and any(True for _ in upsampler.parameters()):
        problems.append(
            "is frozen: for p in upswap.parameters(model): p.requires_grad_(True). The adapter files of PEFT have it by "
            "upswap.integrations.peft.with_upsamplers"
        )
    in_optimizer = None if known is None else all(id(parameter) in known for parameter in trainable)
    if in_optimizer is False:
        problems.append(
            "is not in the optimizer: upswap.add_to_optimizer(model, optimizer), or make it after the patch, of "
            "upswap.param_groups(model, lr)"
        )
    if in_ema is False:
        problems.append("is not in the averaged weights: make them, a copy of the model, after the patch")
    return Row(path, state, bool(trainable), in_optimizer, in_ema, tuple(problems))


def _state(upsampler: nn.Module) -> tuple[State, str | None]:
    """The state of an upsampler, from those in it that know theirs, and what is wrong with it."""
    if any(parameter.is_meta for parameter in upsampler.parameters()):
        return "no values", None
    # Asked of the class: PEFT's wrapper has its copy's attributes for its own.
    knowing: list[Any] = [module for module in upsampler.modules() if hasattr(type(module), "is_as_initialised")]
    for module in knowing:
        problem = unexplained(module)
        if problem is not None:
            return "lost", problem
    if not knowing:
        return "unknown", None
    return "as initialised" if all(module.is_as_initialised() for module in knowing) else "trained", None


def _parameters_of(optimizer: Any) -> set[int]:
    optimizers = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    return {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}


def _keys_of(ema: Any) -> set[str]:
    """The names of the averaged weights in a state dict, a module, or an object that has either."""
    if isinstance(ema, Mapping):
        return set(ema)
    holders: Iterable[Any] = (
        [ema] if isinstance(ema, nn.Module) else vars(ema).values() if hasattr(ema, "__dict__") else []
    )
    keys = {key for part in holders for key in _state_dict_of(part)}
    if not keys:
        raise OptionError(
            f"ema: a {type(ema).__name__} has neither a module nor a state dict in it; give the module, or its state_dict()"
        )
    return keys


def _state_dict_of(part: Any) -> Iterable[str]:
    if isinstance(part, nn.Module):
        return part.state_dict()
    tensors = isinstance(part, Mapping) and part and all(isinstance(value, torch.Tensor) for value in part.values())
    return [key for key in part if isinstance(key, str)] if tensors else []


def _has(keys: set[str], name: str) -> bool:
    """Whether a name in the patched model is among the keys, which may be those of a wrapper around it."""
    return name in keys or any(key.endswith(f".{name}") for key in keys)
