"""Models to files and back: one door for every form.

`.pt` holds the whole model, pickled (`pickled.py`). `.safetensors` holds the weights and in its header the Plan and how to
build the original (`portable.py`). A folder holds the same in the layout of model hubs (`folder.py`). The form is told by
the content when it is read and by the suffix when it is written: a name without one is a folder.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures.rebuild import rebuilds, stored_spec
from ..architectures.spec import parse, path_of
from ..errors import OptionError, SaveError, SourceError, UpswapWarning
from ..shown import errors_shown
from . import atomic
from .formats import description, folder
from .formats import pt as pickled
from .formats import safetensors as portable
from .provenance import spec_of, why_not_built_by
from .safety.time_limit import loading_within_bounds
from .state_dict import assign, is_state_dict

SUFFIXES = (".pt", ".pth", ".safetensors")

#: What hosts, and `load`, read of a folder.
_READ = (".safetensors", ".bin", ".json")


def save(model: nn.Module, path: str | Path, *, source: str | Path | None = None, force: bool = False) -> Path:
    """Write a model, patched or not, and return the path.

    `path` ends in `.pt` or `.pth` (the whole model) or `.safetensors` (weights, Plan and the spec of the original), or has
    no suffix: then it is a folder in the layout of model hubs, with the library's own configuration for models of
    transformers and segmentation_models_pytorch. `source` is where the model came from: a file or folder, which is
    then never written over, or a spec, which is kept so that `load` needs no model, once it is seen to build this
    architecture. Models of segmentation_models_pytorch know their own spec.

    Raises:
        SaveError: the target exists and `force` is not set, or it cannot be written; what was there before still is.
    """
    path = Path(path)
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
def load(path: str | Path, model: nn.Module | None = None, *, trust: Iterable[str] = ()) -> nn.Module:
    """The model in a file or folder that `save` or `torch.save` wrote, on the CPU, without running code from it.

    It comes as it was saved, whatever the form: each module in its own mode (train or eval), each parameter requiring
    gradients or not, so that training can go on. Call `.eval()` on a model that was saved in training.

    Args:
        path: a `.pt`, or a `.safetensors` or a folder, which are rebuilt from what they say of the original.
        model: the original architecture, where a `.safetensors` or a folder does not say how it is built. It is patched in
            place, and given the file's weights, modes and whatever else the file has.
        trust: packages of your own: their classes a `.pt` may use, their factories a `python:` spec in a header may call.

    Raises:
        SourceError: no such file, or not one that holds a model; the message says what it is instead.
        UntrustedFileError: the file needs code outside the allow-list.
        PlanError: the file's Plan does not fit the model; each site that does not is named.
    """
    path = Path(path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if not os.path.isdir(path):
        _check_readable(path)
    # The user's own model and packages may take their time.
    with loading_within_bounds(path) if model is None and not trust else contextlib.nullcontext():
        return _load(path, model, trust)


def _load(path: Path, model: nn.Module | None, trust: tuple[str, ...]) -> nn.Module:
    if os.path.isdir(path):
        return folder.load(path, model, trust)
    if portable.looks_like_one(path):
        return portable.load(path, model, trust)
    if model is not None:
        raise OptionError(f"{path} holds a whole model; model= is for .safetensors files and folders")
    found = pickled.read(path, trust)
    if isinstance(found, nn.Module):
        return found
    raise SourceError(pickled.not_a_model(path, found))


@errors_shown()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state-dict file (`.pt` of tensors, or any `.safetensors`) into `model`, strictly.

    Raises:
        SourceError: the file holds no weights, or they are not those of this model; the keys that differ are named.
    """
    path = Path(path)
    _check_readable(path)
    if portable.looks_like_one(path):
        tensors, header = portable.read(path)
        tensors = description.all_names(tensors, header, path)
    else:
        with loading_within_bounds(path):
            found = pickled.read(path, ())
        found = found.get("state_dict", found) if isinstance(found, Mapping) else found
        if not is_state_dict(found):
            raise SourceError(f"{path} holds no state dict, but a {type(found).__name__}")
        tensors = dict(found)
    assign(model, tensors, path)


def read_header(path: str | Path) -> dict[str, Any]:
    """What upswap wrote about the model in a `.safetensors` or a folder (source spec, Plan, its own version); {} if nothing."""
    path = Path(path)
    return folder.read_description(path) if os.path.isdir(path) else portable.read(path)[1]


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
