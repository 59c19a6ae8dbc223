"""The weights in a file, a folder or a dict, read once, by the keys that lead to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SourceError
from ..plan.plan import Plan
from .formats import description, folder
from .formats import pt as pickled
from .formats import safetensors as portable
from .formats import upsamplers as alone
from .parts import Kinds, parts
from .paths import check_no_key, check_readable
from .safety.time_limit import loading_within_bounds

#: A file with weights, or what such a file would hold.
WeightsSource = str | Path | Mapping[str, Any]

#: What messages call weights that are in no file.
IN_MEMORY = "the state dict"


class Held:
    """What `pickled.Contents` is of a `.pt`, of the other sources of weights: nothing in them has to be judged.

    `plan` is that of a file which holds upsamplers alone.
    """

    def __init__(self, path: str | Path, found: Mapping[str, Any], plan: Mapping[str, Any] | None = None) -> None:
        self.path, self.plan = path, plan
        self._parts = found

    @property
    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors by their keys and names."""
        return {key: found for key in self._parts if (found := tensors_in(self.state_dict(key)))}

    def is_model(self, key: str) -> bool:
        """Whether a model is under this key."""
        return isinstance(self._parts[key], nn.Module)

    def state_dict(self, key: str) -> Mapping[str, Any]:
        """The weights under this key, or those of the model there."""
        found = self._parts[key]
        return found.state_dict() if isinstance(found, nn.Module) else found

    def names(self, key: str) -> list[str]:
        """Those of all that stands under this key."""
        return list(self.state_dict(key))

    def nothing(self) -> SourceError:
        """The error where there are no weights."""
        return SourceError(f"{self.path} has no tensors in it")

    def bounded(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what is done with a file's weights may take no longer than its size explains."""
        return loading_within_bounds(self.path) if isinstance(self.path, Path) else contextlib.nullcontext()


def tensors_in(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Without what layers keep among them as their extra state."""
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def read(source: WeightsSource, trust: Iterable[str] = (), key: str | None = None) -> Held | pickled.Contents:
    """What a source has of weights; raises `SourceError` where it is none."""
    if isinstance(source, Mapping):
        return Held(IN_MEMORY, dict(parts(source, _REAL)))
    path = Path(source)
    if os.path.isdir(path):
        check_no_key(path, key)
        return Held(path, {"": folder.weights_in(path)})
    check_readable(path)
    if portable.looks_like_one(path):
        return of_safetensors(*portable.read(path), path)
    return pickled.read(path, (trust,) if isinstance(trust, str) else tuple(trust))


def of_safetensors(tensors: dict[str, torch.Tensor], header: Mapping[str, Any], path: Path) -> Held:
    """What a `.safetensors` has, which was read."""
    plan = header.get("plan") or {}
    return Held(path, {"": description.all_names(tensors, header, path)}, plan if alone.is_alone(header) else None)


def plan_alone(path: str | Path) -> Plan | None:
    """The Plan in a file that holds upsamplers alone, for reading; None of any other path or spec."""
    path = Path(path)
    if not path.is_file() or not portable.looks_like_one(path):
        return None
    header = portable.read(path)[1]
    return Plan.from_dict(header.get("plan", {})) if alone.is_alone(header) else None


_REAL = Kinds(
    is_model=lambda value: isinstance(value, nn.Module),
    is_tensor=lambda value: isinstance(value, torch.Tensor),
    entries=lambda value: value.items() if isinstance(value, Mapping) else None,
)
