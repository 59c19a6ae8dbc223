"""The weights of a model in a file that holds them alone, or among the other things of a training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SourceError
from ..nn.state_dicts import upsamplers_in
from ..plan.plan import Plan
from ..shown import listed
from .fitting import Fit, choose, differences
from .formats import description
from .formats import pt as pickled
from .reading import Held, WeightsSource, read, tensors_in
from .state_dict import assign


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model in a file, by the model's names.

    `added` are those among them of which the model knows nothing, as it does of an upsampler. `taken` says where in the file
    they were. `plan` is that of a file which holds upsamplers alone; all in it are in `added` then.
    """

    tensors: Mapping[str, torch.Tensor]
    added: tuple[str, ...]
    path: str | Path
    taken: str
    plan: Plan | None = None

    @property
    def host(self) -> dict[str, torch.Tensor]:
        """Those that the model knows."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.added}

    @property
    def upsamplers(self) -> tuple[str, ...]:
        """The paths of upsamplers that, by their keys, those in `added` are of; none where they are of something else too."""
        found = upsamplers_in({name: self.tensors[name] for name in self.added})
        return tuple(found) if all(name.startswith(tuple(f"{path}." for path in found)) for name in self.added) else ()

    @property
    def added_parameters(self) -> int:
        """How many numbers are in those in `added`."""
        return sum(self.tensors[name].numel() for name in self.added)

    @property
    def unexpected(self) -> str:
        """What a message says of those in `added`: of those that no upsampler has, where there are some."""
        added = {name: self.tensors[name] for name in self.added}
        inside = tuple(f"{path}." for path in upsamplers_in(added))
        odd = {name: tensor for name, tensor in added.items() if not name.startswith(inside)}
        return differences({}, odd or added)


def weights_for(
    model: nn.Module,
    source: WeightsSource | Held | pickled.Contents,
    *,
    trust: Iterable[str] = (),
    key: str | None = None,
    without: Container[str] = (),
) -> Weights:
    """The weights of `model` in a file: a state dict, a model of the same keys, or the checkpoint of a training loop.

    Or those in a folder, of `save`'s or a host's. They may be given themselves in the place of the file, or as it was read. The
    entries `without` of the model's state dict are not asked for.

    Raises:
        SourceError: the file holds no weights, or they are not those of this model; the keys that differ are named. Or
            several could be meant, and their keys are listed.
    """
    held = source if isinstance(source, Held | pickled.Contents) else read(source, trust, key)
    if isinstance(held, Held) and held.plan is not None:
        return _of_upsamplers(model, held, held.plan)
    own = {name: tensor for name, tensor in tensors_in(model.state_dict()).items() if name not in without}
    with held.bounded():
        weights = held.weights
        if not weights:
            raise held.nothing()
        way = choose(weights, own, key, held.path, type(model).__name__)
        what = "model" if held.is_model(way.key) else "state_dict"
        return _taken(way, held.state_dict(way.key), held.path, what, held.names(way.key))


def _of_upsamplers(model: nn.Module, held: Held, found: Mapping[str, Any]) -> Weights:
    tensors = held.weights[""]
    with description.carried_out(model, held.path):
        plan = description.checked_plan(found, model, Path(held.path))
    said = f"{len(tensors)} tensors of {len(plan.swapped)} upsamplers"
    return Weights(tensors, tuple(tensors), held.path, said, plan)


def _taken(
    way: Fit, tensors: Mapping[str, torch.Tensor], path: str | Path, what: str, entries: Iterable[str] = ()
) -> Weights:
    """The weights that a way takes of those under its key, where `entries` stand."""
    names = {name: old for name, old in way.names.items() if old in tensors}
    for name in way.added:  # their sides are counted to, and no model says how large they may be
        tensor = tensors.get(way.names[name])
        if tensor is not None and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise SourceError(f"{path} is refused: {name!r} has the shape {tuple(tensor.shape)}, and memory for less")
    parts = [f"{what} of {way.key!r}" if way.key else what]
    parts += [f"prefix {prefix!r} removed" for prefix in way.removed]
    parts.append(f"{len(names)} tensors")
    known = {*way.names.values(), *way.outside}
    left = (*way.outside, *(name for name in entries if name not in known))
    if left:
        parts.append(f"left out {listed(left, 3)}")
    return Weights({name: tensors[old] for name, old in names.items()}, way.added, path, ", ".join(parts))


def load_weights(
    model: nn.Module, path: str | Path, *, trust: Iterable[str] = (), key: str | None = None, patched: bool = False
) -> Weights:
    """Load the weights in a file into `model`; those of upsamplers that it does not have are left out, and that is said.

    With `patched`, the caller deals with all that the model does not know.

    Raises:
        SourceError: as `weights_for`.
    """
    weights = weights_for(model, path, trust=trust, key=key)
    upsamplers = weights.upsamplers
    if weights.added and not patched:
        if weights.plan is not None:
            return dataclasses.replace(weights, taken=f"left out {weights.taken}")
        if not upsamplers:
            raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {weights.unexpected}")
        left = f"left out {len(weights.added)} tensors of {len(upsamplers)} upsamplers"
        weights = dataclasses.replace(weights, taken=f"{weights.taken}, {left}")
    if weights.plan is None:
        assign(model, weights.host, weights.path)
    return weights
