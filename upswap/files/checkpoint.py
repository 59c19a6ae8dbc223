"""Models to files and back: one door for every form.

`.pt` holds the whole model, pickled (`pickled.py`). `.safetensors` holds the weights and in its header the Plan and how to
build the original (`portable.py`). A folder holds the same in the layout of model hubs (`folder.py`). The form is told by
the content when it is read and by the suffix when it is written: a name without one is a folder.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..architectures import host_config
from ..architectures.rebuild import rebuilds, stored_spec
from ..architectures.spec import parse
from ..errors import OptionError, SaveError, SourceError, UpswapWarning
from ..nn.state_dicts import upsamplers_in
from ..shown import errors_shown
from ..surgery.apply import is_patched, plan_of
from ..surgery.wrappers import held, the_patched, unwrapped
from . import atomic
from .adopt import adopt
from .fitting import keys_listed, several
from .formats import folder
from .formats import pt as pickled
from .formats import safetensors as portable
from .formats import upsamplers as alone
from .paths import check_no_key, check_readable, check_target, is_folder
from .provenance import spec_of, why_not_built_by
from .reading import WeightsSource, of_safetensors, read
from .safety.time_limit import loading_within_bounds


def save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | Path | None = None,
    force: bool = False,
    only: Literal["upsamplers"] | None = None,
) -> Path:
    """Write a model, patched or not, and return the path.

    Of a model in one of torch's wrappers (DistributedDataParallel, torch.compile, AveragedModel) the model inside is written.

    Args:
        model: the model.
        path: it ends in `.pt` or `.pth` (the whole model) or `.safetensors` (weights, Plan and the spec of the original), or has
            no suffix: then it is a folder in the layout of model hubs, with the library's own configuration for models of
            transformers and segmentation_models_pytorch.
        source: where the model came from: a file or folder, which is then never written over, or a spec. A spec is kept so
            that `load` needs no model, once it is seen to build this architecture. Models of segmentation_models_pytorch know
            their own.
        force: whether a target that exists is replaced.
        only: "upsamplers" writes a `.safetensors` of the upsamplers and the Plan, without the host's weights. `load` puts it
            onto the host or onto an original. None writes all.

    Raises:
        SaveError: the target exists and `force` is not set, or it cannot be written; what was there before still is.
        PlanError: there are no upsamplers that could be written alone.
    """
    path = Path(path)
    _check_only(only, path)
    model = unwrapped(model) if only is None else the_patched(model)
    check_target(path, source=source, force=force)
    if is_folder(path):
        folder.save(model, _spec_for(model, source, path), path, force=force)
    elif path.suffix == ".safetensors":
        spec = _spec_for(model, source, path)
        write = portable.save if only is None else alone.save
        atomic.write(path, lambda file: write(model, spec, file), force=force)
    else:
        atomic.write(path, lambda file: pickled.write(model, file), force=force)
        pickled.warn_where_not_loadable(model, path)
    return path


def _check_only(only: object, path: Path) -> None:
    if only not in (None, "upsamplers"):
        raise OptionError(f'only={only!r}: it takes "upsamplers", or None for the whole model')
    if only is not None and path.suffix != ".safetensors":
        form = str(path.with_suffix(".safetensors"))
        raise SaveError(
            f'{path}: upsamplers alone go to a .safetensors: upswap.save(model, {form!r}, only="upsamplers")'
        )


@errors_shown()
def load(
    path: WeightsSource, model: nn.Module | None = None, *, trust: Iterable[str] = (), key: str | None = None
) -> nn.Module:
    """The model in a file or folder that `save` or `torch.save` wrote, on the CPU, without running code from it.

    `load(state_dict, model)` gives a model weights that are in memory, as `load(path, model)` does those of a file.

    It comes as it was saved, whatever the form: each module in its own mode (train or eval), each parameter requiring
    gradients or not, so that training can go on. Call `.eval()` on a model that was saved in training.

    Args:
        path: a `.pt`, or a `.safetensors` or a folder, which are rebuilt from what they say of the original. Of the checkpoint
            of a training loop, the model that it holds. Or weights themselves: a state dict, or such a checkpoint as a dict.
        model: the original architecture, where a `.safetensors` or a folder does not say how it is built. It is patched in
            place, and given the file's weights, modes and whatever else the file has. Where the file has weights alone,
            the model that they are of; it is given them. If they are of a patched model and this one is not, it is patched on
            the way, with the options that the shapes of the upsamplers say. Where the file has upsamplers alone, the model that
            has the host's weights, which stay as they are; it is patched as the file says if it is not patched.
        trust: packages of your own: their classes a `.pt` may use, their factories a `python:` spec in a header may call.
        key: what to take of a checkpoint in which several things could be meant, such as `"ema"`.

    Raises:
        SourceError: no such file, or not one that holds a model; the message says what it is instead. Or several models,
            and it lists their keys.
        InputError: the model has to be patched on the way, and no example inputs were found that it runs on.
        UntrustedFileError: the file needs code outside the allow-list.
        PlanError: the file's Plan does not fit the model; each site that does not is named.
    """
    if isinstance(path, nn.Module):
        raise OptionError("load takes first what is loaded, a path or a state dict: upswap.load(state_dict, model)")
    if not isinstance(path, Mapping):
        return load_source(path, model, trust=trust, key=key)[0]
    if model is None:
        raise OptionError("a state dict is no model: pass the one that it is of, upswap.load(state_dict, model)")
    adopt(held(model), read(path), key)
    return model


def load_source(
    path: str | Path, model: nn.Module | None = None, *, trust: Iterable[str] = (), key: str | None = None
) -> tuple[nn.Module, str | None]:
    """What `load` gives, and what was taken of the file; None where that is all of it."""
    path = Path(path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if not os.path.isdir(path):
        check_readable(path)
    # The user's own model and packages may take their time.
    with loading_within_bounds(path) if model is None and not trust else contextlib.nullcontext():
        found, taken = _load(path, None if model is None else held(model), trust, key)
    return found if model is None else model, taken


def _load(path: Path, model: nn.Module | None, trust: tuple[str, ...], key: str | None) -> tuple[nn.Module, str | None]:
    if os.path.isdir(path):
        check_no_key(path, key)
        return folder.load(path, model, trust), None
    if portable.looks_like_one(path):
        with loading_within_bounds(path):
            tensors, header = portable.read(path)
        if header:
            check_no_key(path, key)
            if not alone.is_alone(header):
                return portable.built(tensors, header, path, model, trust), None
            if model is None:
                raise SourceError(alone.without_host(path, header))
        elif model is None:
            raise SourceError(_weights_alone(path, {"": tensors}))
        return model, adopt(model, of_safetensors(tensors, header, path), key).taken
    contents = pickled.read(path, trust)
    if model is not None:
        if contents.is_model(""):
            raise OptionError(f"{path} holds a whole model; model= is for files of weights and for folders")
        return model, adopt(model, contents, key).taken
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
            has = "is one itself" if "" in models else f"has {keys_listed(models)}"
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
    check_readable(path)
    if not portable.looks_like_one(path):
        return True
    header = portable.read(path)[1]
    return not alone.is_alone(header) and rebuilds(header.get("source"), trust)


def spec_in(path: str | Path) -> str | None:
    """The spec of the original in a `.safetensors` or a folder; None in a `.pt`."""
    path = Path(path)
    if not os.path.isdir(path) and not portable.looks_like_one(path):
        return None
    spec = read_header(path).get("source")
    return spec if isinstance(spec, str) else None


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
