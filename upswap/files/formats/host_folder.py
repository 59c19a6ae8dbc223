"""Model folders as the hosts write them, transformers and segmentation_models_pytorch: their `config.json` read and written.

A folder from elsewhere is a stranger's too: its configuration may not bring code along, nor have any fetched.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...architectures import host_config
from ...architectures.libraries import call
from ...architectures.spec import Spec
from ...errors import SourceError, UntrustedFileError, UpswapError, UpswapWarning
from ...nn.state_dicts import upsamplers_in
from ...shown import listed
from ...surgery.apply import unpatched_on_error
from ...surgery.replay import Within
from ...surgery.rewritten_class import original_class
from ..safety.memory_limit import Budget
from ..safety.time_limit import loading_within_bounds
from ..state_dict import assign
from . import description
from . import pt as pickled
from . import safetensors as portable
from .host_architecture import (
    CONFIG,
    SMP_CLASS,
    WEIGHTS,
    apart,
    build_smp,
    read_config,
    read_json,
    transformers_class,
)
from .host_class import patch_as_kept, patching, undo_without_weights

_LFS = b"version https://git-lfs"


def open_folder(folder: Path, like: nn.Module | None = None) -> nn.Module:
    """The model in a folder, with its weights, as the host's own `from_pretrained` gives it; patched where it was.

    Weights that the folder does not have, or has too many of, are named in an `UpswapWarning`. `like` is a model of the
    caller's own, of whose class and configuration it then is; of SMP it is that model itself.

    Raises:
        SourceError: the folder is not one that transformers or SMP wrote, or they cannot load it; or it has upsamplers, and
            does not say how the model was patched.
        UntrustedFileError: its configuration asks for code or files from elsewhere.
        PlanError: its plan does not fit the model.
    """
    model, left = open_host(folder, like)
    if left:
        raise SourceError(
            f"{folder} has the weights of upsamplers at {listed(upsamplers_in(left))}, and its {CONFIG} does not say how the "
            f"model was patched. With the options it was patched with: upswap convert hf:{folder} --weights {folder} (in "
            f"Python: upswap.convert({f'hf:{folder}'!r}, weights={str(folder)!r}))"
        )
    return model


def open_host(folder: Path, like: nn.Module | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """As `open_folder`, with the weights of upsamplers of which the folder has no plan; the model is then the original."""
    config = read_config(folder)
    with loading_within_bounds(folder) if like is None else contextlib.nullcontext():
        return _open_smp(folder, config, like) if SMP_CLASS in config else _open_transformers(folder, config, like)


def state_dict_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder of a host's, by the names that the model has for them; those of upsamplers among them."""
    if SMP_CLASS in read_config(folder):
        return read_weights(folder)
    model, left = open_host(folder)
    return {**model.state_dict(), **left}


def _open_smp(
    folder: Path, config: dict[str, Any], like: nn.Module | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = read_weights(folder)
    budget = Budget(tensors, str(folder))
    plan = host_config.kept_in(config)
    left: dict[str, torch.Tensor] = {}
    building, patched, running = _bounds(budget, like)
    with unpatched_on_error(*() if like is None else (like,)):
        with building():
            model = build_smp(folder, config, tensors) if like is None else like
            if not upsamplers_in(tensors):
                if plan is not None:
                    _warn(
                        f"{folder} has the plan of a patched model, and no weights of upsamplers: taken for the original"
                    )
            elif plan is not None:
                patch_as_kept(model, budget, patched, running, plan)
            else:
                known = model.state_dict()
                paths = tuple(f"{path}." for path in upsamplers_in(tensors))
                left = {name: value for name, value in tensors.items() if name not in known and name.startswith(paths)}
        kept = {name: value for name, value in tensors.items() if name not in left}
        assign(model, kept, folder, keep_dtype=like is not None)
    return model.eval(), left


def _bounds(budget: Budget, like: nn.Module | None) -> tuple[Within, Within, Within]:
    """What a model is built in, patched, and run.

    What the caller has may take what it takes; what a plan patches onto it is the folder's, as all of it is without one.
    """
    unbound: Within = contextlib.nullcontext
    return (budget.building, unbound, budget.running) if like is None else (unbound, budget.building, unbound)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the weight files that hosts write to a folder: one or several, `.safetensors` or `.bin`."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts: dict[str, torch.Tensor] = {}
            for shard in _shards(index):
                parts |= read_tensors(shard)
            return parts
    raise SourceError(f"{folder} has a {CONFIG} but no weights: there is no {WEIGHTS} in it")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in one weight file; `SourceError` says what it holds instead."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if head == _LFS:
        raise SourceError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if path.suffix == ".safetensors":
        tensors, header = portable.read(path)
        return description.all_names(tensors, header, path)
    contents = pickled.read(path, ())
    if "" not in contents.weights:
        contents.nothing()  # which tells what is refused
        raise SourceError(f"{path} holds no state dict, but a {type(contents.found).__name__}")
    return contents.state_dict("")


def _open_transformers(
    folder: Path, config: dict[str, Any], like: nn.Module | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = read_weights(folder)
    found: dict[str, Any] = {}
    budget = Budget(tensors, str(folder))
    building, patched, running = _bounds(budget, like)
    with apart(folder), building():
        spec, cls, settings = (
            transformers_class(folder, config, tensors) if like is None else _like(folder, config, like)
        )
        settings.name_or_path = str(folder)
        parts: list[nn.Module] = []

        def make() -> Any:
            # With the tensors instead of the folder: in a folder transformers also looks for adapters, which lead to other
            # folders, and for forms of weights that are pickles.
            model, info = patching(cls, budget, patched, running, patched=parts).from_pretrained(
                None, config=settings, state_dict=tensors, torch_dtype="auto", output_loading_info=True
            )
            found.update(info)
            return model

        try:
            model: Any = call(spec, make)
        except SourceError as error:
            if isinstance(error.__cause__, UpswapError):  # of the plan
                raise error.__cause__ from None
            raise
    missing, unexpected = found.get("missing_keys", ()), sorted(found.get("unexpected_keys", ()))
    if len(unexpected) == len(tensors):
        raise SourceError(f"{folder} does not hold the weights of a {cls.__name__}: none is of that model")
    missing = sorted(set(missing) - undo_without_weights(model, parts, missing, folder))
    if missing:
        # No error: published checkpoints lack weights that their model does not use.
        _warn(f"{folder} does not hold {listed(missing)} of a {cls.__name__}; random now, as transformers makes them")
    spare = {name: tensors[name] for name in unexpected if name in tensors}
    paths = tuple(f"{path}." for path in upsamplers_in(spare))
    left = {name: tensor for name, tensor in spare.items() if name.startswith(paths)}
    others = [name for name in unexpected if name not in left]
    if others:
        _warn(f"{folder} holds weights that are of no part of a {cls.__name__} and are left out: {listed(others)}")
    return cast(nn.Module, model), left


def _warn(text: str) -> None:
    warnings.warn(text, UpswapWarning, stacklevel=5)


def _shards(index: Path) -> list[Path]:
    """The files that an index of weights lists; they may only be beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SourceError(f"{index} is not an index of weights: it has no weight_map")
    files = sorted(set(names.values()))
    outside = next((name for name in files if name != Path(name).name or "\\" in name), None)
    if outside is not None:
        raise UntrustedFileError(f"{index} names a file outside its folder: {outside[:80]!r}")
    missing = next((name for name in files if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise SourceError(f"{index.parent} is not whole: there is no {missing} in it")
    return [index.with_name(name) for name in files]


def _like(folder: Path, config: dict[str, Any], like: nn.Module) -> tuple[Spec, Any, Any]:
    """As `transformers_class`, of a model that the caller has: of the folder's configuration the plan alone is read."""
    cls: Any = original_class(like)
    if not hasattr(cls, "from_pretrained") or not hasattr(like, "config"):
        raise SourceError(f"{folder} holds a model of transformers, and a {cls.__name__} is none")
    settings = host_config.without_plan(copy.deepcopy(like.config))
    plan = host_config.kept_in(config)
    if plan is not None:
        host_config.put(settings, plan)
    return Spec("hf", str(folder), {}), cls, settings
