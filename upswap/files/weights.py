"""The weights of a model in a file that holds them alone, or among the other things of a training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, SaveError, SourceError
from ..nn.state_dicts import upsamplers_in
from ..plan.plan import Plan
from . import atomic
from .fitting import Fit, choose, differences, keys_listed, several
from .formats import description, folder
from .formats import pt as pickled
from .formats import safetensors as portable
from .formats import upsamplers as alone
from .paths import check_no_key, check_readable, check_target, is_folder
from .safety.time_limit import loading_within_bounds
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


#: A file with weights, or what such a file would hold.
WeightsSource = str | Path | Mapping[str, Any]

#: What messages call weights that are in no file.
_IN_MEMORY = "the state dict"

#: How many keys lead to a state dict at most, as in files.
_MOST_KEYS = 4


def weights_for(
    model: nn.Module,
    source: WeightsSource,
    *,
    trust: Iterable[str] = (),
    key: str | None = None,
    without: Container[str] = (),
) -> Weights:
    """The weights of `model` in a file: a state dict, a model of the same keys, or the checkpoint of a training loop.

    Or those in a folder, of `save`'s or a host's. They may be given themselves in the place of the file. The entries `without` of
    the model's state dict are not asked for.

    Raises:
        SourceError: the file holds no weights, or they are not those of this model; the keys that differ are named. Or
            several could be meant, and their keys are listed.
    """
    own = {name: tensor for name, tensor in _tensors(model.state_dict()).items() if name not in without}
    kind = type(model).__name__
    if isinstance(source, Mapping):
        found = dict(_state_dicts(source))
        if not found:
            raise SourceError(f"{_IN_MEMORY} has no tensors in it")
        way = choose({part: _tensors(values) for part, values in found.items()}, own, key, _IN_MEMORY, kind)
        return _taken(way, found[way.key], _IN_MEMORY, "state_dict", found[way.key])
    path = Path(source)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if os.path.isdir(path):
        check_no_key(path, key)
        tensors = folder.weights_in(path)
        return _taken(choose({"": tensors}, own, None, path, kind), tensors, path, "state_dict")
    check_readable(path)
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
        tensors = description.all_names(tensors, header, path)
        if alone.is_alone(header):
            with description.carried_out(model, path):
                plan = description.checked_plan(header.get("plan"), model, path)
            said = f"{len(tensors)} tensors of {len(plan.swapped)} upsamplers"
            return Weights(tensors, tuple(tensors), path, said, plan)
        way = choose({"": tensors}, own, key, path, kind)
        return _taken(way, tensors, path, "state_dict")
    with loading_within_bounds(path) if not trust else contextlib.nullcontext():
        contents = pickled.read(path, trust)
        weights = contents.weights
        if not weights:
            raise contents.nothing()
        way = choose(weights, own, key, path, kind)
        what = "model" if contents.is_model(way.key) else "state_dict"
        return _taken(way, contents.state_dict(way.key), path, what, contents.names(way.key))


def _tensors(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Without what layers keep among them as their extra state."""
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _state_dicts(value: Mapping[Any, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state dicts in a dict of a training loop, with the keys that lead to each; as `pt.Contents` finds them in a file."""
    named = {name: found for name, found in value.items() if isinstance(name, str)}
    if 2 * len(_tensors(named)) > len(value):
        yield ".".join(keys), named
    elif len(keys) < _MOST_KEYS:
        for name, found in named.items():
            inner = found.state_dict() if isinstance(found, nn.Module) else found
            if isinstance(inner, Mapping):
                yield from _state_dicts(inner, (*keys, name))


def plan_alone(path: str | Path) -> Plan | None:
    """The Plan in a file that holds upsamplers alone, for reading; None of any other path or spec."""
    path = Path(path)
    if not path.is_file() or not portable.looks_like_one(path):
        return None
    header = portable.read(path)[1]
    return Plan.from_dict(header.get("plan", {})) if alone.is_alone(header) else None


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
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        parts.append(f"left out {', '.join(left[:3])}{more}")
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


def patched_weights(path: str | Path, *, trust: Iterable[str] = (), key: str | None = None) -> Weights | None:
    """The weights in a file that has a patched model's weights alone, with those of upsamplers as `added`, all by the names in
    the file. None where the file has a model, or nothing of the kind.

    Raises:
        PlanError: there are no upsamplers among the weights.
        SourceError: several could be meant, and their keys are listed.
    """
    path = Path(path)
    if os.path.isdir(path):
        return None
    check_readable(path)
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
        if alone.is_alone(header):
            raise PlanError(f"{path} holds upsamplers alone: there is no host in it to be taken out of")
        return None if header else _without_upsamplers("", tensors, path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    with loading_within_bounds(path) if not trust else contextlib.nullcontext():
        contents = pickled.read(path, trust)
        weights = contents.weights
        if contents.models or not weights:
            return None
        patched = {name: len(found) for name, found in weights.items() if upsamplers_in(found)}
        if key is not None:
            if key not in weights:
                raise SourceError(f"{path} has no weights under {key!r}; it has {keys_listed(weights)}")
            patched = {key: 0}
        if len(patched) > 1:
            raise several(path, patched, "weights")
        meant = next(iter(patched), next(iter(weights)))
        return _without_upsamplers(meant, contents.state_dict(meant), path)


def _without_upsamplers(key: str, tensors: Mapping[str, torch.Tensor], path: Path) -> Weights:
    found = upsamplers_in(tensors)
    if not found:
        raise PlanError(f"{path} holds weights without upsamplers: there is nothing to take out")
    below = tuple(f"{upsampler}." for upsampler in found)
    added = tuple(name for name in tensors if name.startswith(below))
    of = f"state_dict of {key!r}" if key else "state_dict"
    left = f"{len(tensors) - len(added)} tensors, left out {len(added)} of {', '.join(found[:3])}"
    return Weights(tensors, added, path, f"{of}, {left}{' and so on' if len(found) > 3 else ''}")


def save_weights(
    tensors: Mapping[str, torch.Tensor], path: str | Path, *, source: str | Path | None = None, force: bool = False
) -> Path:
    """Write a state dict to a `.pt` or `.safetensors`; raises as `save`."""
    path = Path(path)
    check_target(path, source=source, force=force)
    if path.suffix == ".safetensors":
        apart = {name: tensor.clone() for name, tensor in tensors.items()}  # the format has no shared memory
        atomic.write(path, lambda file: portable.write(apart, {"format": "pt"}, file), force=force)
    elif is_folder(path):
        raise SaveError(
            f"{path}: weights without a model go to a .pt or .safetensors; --original SOURCE makes it a model"
        )
    else:
        atomic.write(path, lambda file: pickled.write(dict(tensors), file), force=force)
    return path
