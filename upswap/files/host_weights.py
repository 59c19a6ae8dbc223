"""The host's weights without those of its upsamplers: taken out of a patched model's, and saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import PlanError, SaveError, SourceError
from ..nn.state_dicts import upsamplers_in
from ..shown import listed
from . import atomic
from .fitting import keys_listed, several
from .formats import pt as pickled
from .formats import safetensors as portable
from .formats import upsamplers as alone
from .paths import check_readable, check_target, is_folder
from .weights import Weights


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
    contents = pickled.read(path, trust)
    with contents.bounded():
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
    left = f"{len(tensors) - len(added)} tensors, left out {len(added)} of {listed(found[:3])}"
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
