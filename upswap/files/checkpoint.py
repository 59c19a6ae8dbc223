"""Models to files and back: one door for every form.

`.pt` holds the whole model, pickled (`pickled.py`). `.safetensors` holds the weights and in its header the Plan and how to
build the original (`portable.py`). A folder holds the same in the layout of model hubs (`folder.py`). The form is told by
the content when it is read and by the suffix when it is written: a name without one is a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import host_config
from ..architectures.rebuild import rebuilds, stored_spec
from ..architectures.spec import parse, path_of
from ..errors import OptionError, PlanError, SaveError, SourceError, UpswapWarning
from ..nn.state_dicts import upsamplers_in
from ..shown import errors_shown
from ..surgery.apply import is_patched, plan_of
from ..surgery.wrappers import unwrapped
from . import atomic
from .fitting import Fit, choose, differences, several
from .formats import description, folder
from .formats import pt as pickled
from .formats import safetensors as portable
from .provenance import spec_of, why_not_built_by
from .safety.time_limit import loading_within_bounds
from .state_dict import assign

SUFFIXES = (".pt", ".pth", ".safetensors")

#: What hosts, and `load`, read of a folder.
_READ = (".safetensors", ".bin", ".json")


def save(model: nn.Module, path: str | Path, *, source: str | Path | None = None, force: bool = False) -> Path:
    """Write a model, patched or not, and return the path.

    `path` ends in `.pt` or `.pth` (the whole model) or `.safetensors` (weights, Plan and the spec of the original), or has
    no suffix: then it is a folder in the layout of model hubs, with the library's own configuration for models of
    transformers and segmentation_models_pytorch. `source` is where the model came from: a file or folder, which is
    then never written over, or a spec, which is kept so that `load` needs no model, once it is seen to build this
    architecture. Models of segmentation_models_pytorch know their own spec. Of a model in one of torch's wrappers
    (DistributedDataParallel, torch.compile, AveragedModel) the model inside is written.

    Raises:
        SaveError: the target exists and `force` is not set, or it cannot be written; what was there before still is.
    """
    path = Path(path)
    model = unwrapped(model)
    check_target(path, source=source, force=force)
    if _is_folder(path):
        folder.save(model, _spec_for(model, source, path), path, force=force)
    elif path.suffix == ".safetensors":
        spec = _spec_for(model, source, path)
        atomic.write(path, lambda file: portable.save(model, spec, file), force=force)
    else:
        atomic.write(path, lambda file: pickled.write(model, file), force=force)
        pickled.warn_where_not_loadable(model, path)
    return path


def check_target(path: str | Path, *, source: str | Path | None = None, force: bool = False) -> None:
    """`SaveError` where `save` with these arguments would fail whatever the model; cheap, so ask before the work."""
    path = Path(path)
    if not _is_folder(path) and path.suffix not in SUFFIXES:
        raise SaveError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, or in none, for a folder")
    origin = None if source is None else path_of(source)
    if origin is not None and os.path.exists(origin) and _is_of(path, origin):
        raise SaveError(f"{path} is the source itself, which is never written over; name another file")
    if _is_folder(path):
        folder.check(path, force=force)
    else:
        atomic.check(path, force=force)


@errors_shown()
def load(
    path: str | Path, model: nn.Module | None = None, *, trust: Iterable[str] = (), key: str | None = None
) -> nn.Module:
    """The model in a file or folder that `save` or `torch.save` wrote, on the CPU, without running code from it.

    It comes as it was saved, whatever the form: each module in its own mode (train or eval), each parameter requiring
    gradients or not, so that training can go on. Call `.eval()` on a model that was saved in training.

    Args:
        path: a `.pt`, or a `.safetensors` or a folder, which are rebuilt from what they say of the original. Of the checkpoint
            of a training loop, the model that it holds.
        model: the original architecture, where a `.safetensors` or a folder does not say how it is built. It is patched in
            place, and given the file's weights, modes and whatever else the file has. Where the file has weights alone,
            the model that they are of, patched if it was; it is given them.
        trust: packages of your own: their classes a `.pt` may use, their factories a `python:` spec in a header may call.
        key: what to take of a checkpoint in which several things could be meant, such as `"ema"`.

    Raises:
        SourceError: no such file, or not one that holds a model; the message says what it is instead. Or several models,
            and it lists their keys.
        UntrustedFileError: the file needs code outside the allow-list.
        PlanError: the file's Plan does not fit the model; each site that does not is named.
    """
    return load_source(path, model, trust=trust, key=key)[0]


def load_source(
    path: str | Path, model: nn.Module | None = None, *, trust: Iterable[str] = (), key: str | None = None
) -> tuple[nn.Module, str | None]:
    """What `load` gives, and what was taken of the file; None where that is all of it."""
    path = Path(path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if not os.path.isdir(path):
        _check_readable(path)
    # The user's own model and packages may take their time.
    with loading_within_bounds(path) if model is None and not trust else contextlib.nullcontext():
        return _load(path, model, trust, key)


def _load(path: Path, model: nn.Module | None, trust: tuple[str, ...], key: str | None) -> tuple[nn.Module, str | None]:
    if os.path.isdir(path):
        _check_no_key(path, key)
        return folder.load(path, model, trust), None
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
        if header:
            _check_no_key(path, key)
            return portable.built(tensors, header, path, model, trust), None
        if model is None:
            raise SourceError(_weights_alone(path, {"": tensors}))
        return _with_weights(model, path, trust, key)
    contents = pickled.read(path, trust)
    if model is not None:
        if contents.is_model(""):
            raise OptionError(f"{path} holds a whole model; model= is for files of weights and for folders")
        return _with_weights(model, path, trust, key)
    return _whole_model(contents, path, key)


def _whole_model(contents: pickled.Contents, path: Path, key: str | None) -> tuple[nn.Module, str | None]:
    """The model of a `.pt`, the one under `key` where that is given."""
    models = contents.models
    # What has no weights is no model, but a loss.
    meant = [key] if key is not None else [name for name, count in models.items() if count] or list(models)
    if not meant or meant[0] not in models:
        if key is None and contents.weights:
            raise SourceError(_weights_alone(path, contents.weights), *contents.odd_names())
        nothing = contents.nothing()
        if key is not None:
            has = "is one itself" if "" in models else f"has {_keys(models)}"
            raise SourceError(f"{path} has no model under {key!r}; it {has}")
        raise nothing
    if len(meant) > 1:
        raise several(path, {name: models[name] for name in meant}, "models")
    taken = f"model of {meant[0]!r}, {models[meant[0]]} tensors" if meant[0] else None
    model = contents.model(meant[0])
    if is_patched(model):
        host_config.keep(model, plan_of(model).to_json())  # which files of upswap 0.1 do not have there
    return model, taken


def _weights_alone(path: Path, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    added = next((found for tensors in weights.values() if (found := upsamplers_in(tensors))), [])
    return pickled.weights_alone(path, weights, added)


def _keys(found: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in found if name) or "none"


def _check_no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise OptionError(f"{path} is one model, in which there is nothing to choose; leave out --key (key=)")


def _with_weights(
    model: nn.Module, path: Path, trust: tuple[str, ...], key: str | None
) -> tuple[nn.Module, str | None]:
    weights = weights_for(model, path, trust=trust, key=key)
    if weights.added:
        raise SourceError(
            f"{path} does not hold the weights of this {type(model).__name__}: {weights.unexpected}. If it was patched, patch "
            "this one alike before: upswap.patch(model), with the options it was patched with"
        )
    assign(model, weights.tensors, path)
    return model, weights.taken


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model in a file, by the model's names.

    `added` are those among them of which the model knows nothing, as it does of an upsampler. `taken` says where in the file
    they were.
    """

    tensors: Mapping[str, torch.Tensor]
    added: tuple[str, ...]
    path: Path
    taken: str

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
        """What a message says of those in `added`."""
        return differences({}, {name: self.tensors[name] for name in self.added})


def weights_for(model: nn.Module, path: str | Path, *, trust: Iterable[str] = (), key: str | None = None) -> Weights:
    """The weights of `model` in a file: a state dict, a model of the same keys, or the checkpoint of a training loop. Or those
    in a folder, of `save`'s or a host's.

    Raises:
        SourceError: the file holds no weights, or they are not those of this model; the keys that differ are named. Or
            several could be meant, and their keys are listed.
    """
    path = Path(path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    own, kind = model.state_dict(), type(model).__name__
    if os.path.isdir(path):
        _check_no_key(path, key)
        tensors = folder.weights_in(path)
        return _taken(choose({"": tensors}, own, None, path, kind), tensors, path, "state_dict")
    _check_readable(path)
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
        tensors = description.all_names(tensors, header, path)
        way = choose({"": tensors}, own, key, path, kind)
        return _taken(way, tensors, path, "state_dict")
    with loading_within_bounds(path) if not trust else contextlib.nullcontext():
        contents = pickled.read(path, trust)
        weights = contents.weights
        if not weights:
            raise contents.nothing()
        way = choose(weights, own, key, path, kind)
        is_model = contents.is_model(way.key)
        return _taken(way, contents.state_dict(way.key), path, "model" if is_model else "state_dict")


def _taken(way: Fit, tensors: Mapping[str, torch.Tensor], path: Path, what: str) -> Weights:
    names = {name: old for name, old in way.names.items() if old in tensors}
    parts = [f"{what} of {way.key!r}" if way.key else what]
    parts += [f"prefix {prefix!r} removed" for prefix in way.removed]
    parts.append(f"{len(names)} tensors")
    if way.outside:
        more = f" and {len(way.outside) - 3} more" if len(way.outside) > 3 else ""
        parts.append(f"left out {', '.join(way.outside[:3])}{more}")
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
        if not upsamplers:
            raise SourceError(f"{path} does not hold the weights of this {type(model).__name__}: {weights.unexpected}")
        left = f"left out {len(weights.added)} tensors of {len(upsamplers)} upsamplers"
        weights = dataclasses.replace(weights, taken=f"{weights.taken}, {left}")
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
    _check_readable(path)
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
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
                raise SourceError(f"{path} has no weights under {key!r}; it has {_keys(weights)}")
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
    elif _is_folder(path):
        raise SaveError(
            f"{path}: weights without a model go to a .pt or .safetensors; --original SOURCE makes it a model"
        )
    else:
        atomic.write(path, lambda file: pickled.write(dict(tensors), file), force=force)
    return path


def read_header(path: str | Path) -> dict[str, Any]:
    """What upswap wrote about the model in a `.safetensors` or a folder (source spec, Plan, its own version); {} if nothing."""
    path = Path(path)
    if not os.path.isdir(path):
        return portable.read(path)[1]
    return {} if folder.is_hosts(path) else folder.read_description(path)


def says_how_it_is_built(path: str | Path, trust: Iterable[str] = ()) -> bool:
    """Whether `load` with the same `trust` needs no `model`; raises `SourceError` where the path leads to no file."""
    path = Path(path)
    if os.path.isdir(path):
        return folder.has_builder(path, trust)
    _check_readable(path)
    return not portable.looks_like_one(path) or rebuilds(spec_in(path), trust)


def spec_in(path: str | Path) -> str | None:
    """The spec of the original in a `.safetensors` or a folder; None in a `.pt`."""
    path = Path(path)
    if not os.path.isdir(path) and not portable.looks_like_one(path):
        return None
    spec = read_header(path).get("source")
    return spec if isinstance(spec, str) else None


def _is_folder(path: Path) -> bool:
    return path.suffix not in SUFFIXES and (os.path.isdir(path) or not path.suffix)


def _is_of(path: Path, origin: Path) -> bool:
    """Whether writing the file or folder `path` would change what is read of `origin`, whatever they are called."""
    written = [path, *(path / name for name in folder.FILES)] if _is_folder(path) else [path]
    read = [origin, *(file for file in origin.iterdir() if file.suffix in _READ)] if origin.is_dir() else [origin]
    there = [[file for file in files if os.path.exists(file)] for files in (written, read)]
    return any(os.path.samefile(*pair) for pair in itertools.product(*there))


def _spec_for(model: nn.Module, source: str | Path | None, path: Path) -> str | None:
    """The spec to keep: that of `source` where a file may build the model from it, else what the model itself knows."""
    spec = parse(source) if isinstance(source, str) else None
    if spec is None:
        return spec_of(model)
    if spec.scheme == "hf":
        return spec_of(model) or str(source)
    kept = stored_spec(spec)
    problem = "it is fetched from elsewhere" if kept is None else why_not_built_by(kept, model)
    if problem is None:
        return str(kept)
    known = spec_of(model)
    if known is None:
        warnings.warn(
            f"{path} does not say how its model is built: {source} is not kept, because {problem}. Pass the model to load "
            f"it: upswap.load({str(path)!r}, model)",
            UpswapWarning,
            stacklevel=3,
        )
    return known


def _check_readable(path: Path) -> None:
    if not os.path.exists(path):
        raise SourceError(f"there is no file {path}")
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise SourceError(f"{path} is empty")
