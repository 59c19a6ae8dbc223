"""A model in the layout of model hubs: a folder that the host library opens as its own, and `upswap.load` as the patched one.

model.safetensors    the host's weights, under the host's names
upswap.safetensors   the upsamplers' weights
config.json          the host's configuration, for models of transformers and segmentation_models_pytorch
upswap.json          the Plan and what else `portable.describe` says; written last: without it the folder is no model
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...architectures.rebuild import rebuild, rebuilds
from ...architectures.spec import parse_stored
from ...errors import SaveError, SourceError
from ...surgery.apply import added_keys, is_patched, plan_of, unpatched_on_error
from ...surgery.replay import apply_plan
from .. import atomic
from ..provenance import same_modules
from ..safety.instance_rules import check_parts
from ..safety.memory_limit import Budget
from ..safety.time_limit import loading_within_bounds
from ..state_dict import assign, separated
from . import description as _description
from . import host_architecture as architecture
from . import host_folder as hub
from . import safetensors as portable

DESCRIPTION = "upswap.json"
UPSAMPLERS = "upswap.safetensors"

#: All that `save` may write.
FILES = (architecture.WEIGHTS, UPSAMPLERS, architecture.CONFIG, DESCRIPTION)


def save(model: nn.Module, spec: str | None, folder: Path, *, force: bool) -> None:
    """Write the folder. What other files it has stay (a README, a .git)."""
    tensors, shared = separated(model)
    added = added_keys(model)
    host = {name: tensor for name, tensor in tensors.items() if name not in added}
    own = {name: tensor for name, tensor in tensors.items() if name in added}
    across = [name for name, same in shared.items() if (name in added) != (same in added)]
    if across:
        raise SaveError(f"{across[0]} is shared between the host and an upsampler, which a folder cannot hold; use .pt")
    config = architecture.config_of(model, spec)
    if config is None and architecture.has_config(folder):
        raise SaveError(
            f"{folder} has a {architecture.CONFIG} that is not of this model; name another folder, or remove it"
        )
    description = _description.describe(model, spec, shared) | {"config_builds": _builds(config, model)}
    texts = {architecture.CONFIG: config, DESCRIPTION: json.dumps(description, indent=2, sort_keys=True)}
    fills: dict[str, Callable[[Path], None]] = {
        # transformers opens only files that say they are of PyTorch.
        architecture.WEIGHTS: partial(portable.write, host, {"format": "pt"}),
        # An older model's upsamplers may not stay where this one has none.
        **(
            {UPSAMPLERS: partial(portable.write, own, {"format": "pt"})}
            if own or (folder / UPSAMPLERS).exists()
            else {}
        ),
        **{name: partial(_write_text, text) for name, text in texts.items() if text is not None},
    }
    atomic.write_together(folder, fills, DESCRIPTION, FILES, force=force)


def check(folder: Path, *, force: bool) -> None:
    """`SaveError` where `save` would fail for a reason that shows before the work is done."""
    atomic.recover(folder, DESCRIPTION, FILES)
    if folder.is_dir() and not (folder / DESCRIPTION).exists():
        taken = [name for name in (architecture.WEIGHTS, architecture.CONFIG, UPSAMPLERS) if (folder / name).exists()]
        if taken:
            raise SaveError(
                f"{folder} holds another model ({', '.join(taken)}), which is not written over; name another"
            )
    atomic.check_together(folder, (architecture.WEIGHTS, UPSAMPLERS, DESCRIPTION), force=force)


def load(folder: Path, model: nn.Module | None, trust: Iterable[str]) -> nn.Module:
    """The model in a folder that `save` wrote, built from what the folder says or, where it is given, in `model`.

    The same of a folder that transformers wrote of a patched model.
    """
    if is_hosts(folder):
        return _from_host(folder, model)
    description, tensors = _read(folder)
    return _description.restored(
        description, tensors, folder, model, lambda: _build(folder, description, tensors, tuple(trust))
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder, of `save`'s or a host's, by the names that the model has for them."""
    finish_save(folder)
    if (folder / DESCRIPTION).exists() or not architecture.has_config(folder):
        description, tensors = _read(folder)
        return _description.all_names(tensors, description, folder)
    return hub.state_dict_in(folder)


def has_upsamplers(folder: Path) -> bool:
    """Whether `save` wrote the folder, of a patched model."""
    finish_save(folder)
    return (folder / DESCRIPTION).exists() and read_description(folder).get("plan") is not None


def is_hosts(folder: Path) -> bool:
    """Whether transformers wrote the folder, of a patched model."""
    finish_save(folder)
    return not (folder / DESCRIPTION).exists() and architecture.has_plan(folder)


def _from_host(folder: Path, model: nn.Module | None) -> nn.Module:
    if model is None:
        return check_parts(hub.open_folder(folder), str(folder))
    made = hub.open_folder(folder, model)
    if made is model:
        return model
    budget = Budget(made.state_dict(), str(folder))
    pairs = [(part, model.get_submodule(path)) for path, part in made.named_modules() if is_patched(part)]
    with unpatched_on_error(*(mine for _, mine in pairs)):
        for part, mine in pairs:
            if not is_patched(mine):
                apply_plan(mine, plan_of(part), budget.building, contextlib.nullcontext)
        assign(model, made.state_dict(), folder, keep_dtype=True)
    return model.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the weights, of one save: where another comes between, they are read again."""
    with loading_within_bounds(folder):
        return _read_one_save(folder)


def _read_one_save(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    while True:
        finish_save(folder)
        before = atomic.state_of(folder / DESCRIPTION)
        try:
            description = read_description(folder)
            tensors: dict[str, torch.Tensor] = {}
            for name in (architecture.WEIGHTS, UPSAMPLERS) if description.get("plan") else (architecture.WEIGHTS,):
                if not (folder / name).is_file():
                    raise SourceError(f"{folder} is not whole: there is no {name} in it")
                tensors |= hub.read_tensors(folder / name)
        except SourceError:
            if before == atomic.state_of(folder / DESCRIPTION):
                raise
        else:
            if before == atomic.state_of(folder / DESCRIPTION):
                return description, tensors


def read_description(folder: Path) -> dict[str, Any]:
    """What `upswap.json` says; `SourceError` where there is none, with what the folder is instead."""
    finish_save(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        if architecture.has_config(folder):
            raise SourceError(f"{folder} has no {DESCRIPTION}. If transformers or SMP wrote it, name it hf:{folder}")
        raise SourceError(f"{folder} is a folder without {DESCRIPTION}; name a file in it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if not found:
        raise SourceError(f"{path} describes no model")
    return _description.check_description(found, path)


def finish_save(folder: Path) -> None:
    """Put the files of a save that was cut off in their places, with a warning; they are all there."""
    try:
        atomic.recover(folder, DESCRIPTION, FILES)
    except SaveError as error:
        raise SourceError(
            f"{folder} is not whole: a save into it was cut off, and it cannot be finished. {error}"
        ) from error


def has_builder(folder: Path, trust: Iterable[str]) -> bool:
    """Whether `load` needs no `model`."""
    if is_hosts(folder):
        return True
    description = read_description(folder)
    return rebuilds(description.get("source"), trust) or _has_config(folder, description)


def _build(
    folder: Path, description: dict[str, Any], tensors: dict[str, torch.Tensor], trust: tuple[str, ...]
) -> nn.Module:
    source = description.get("source")
    if not rebuilds(source, trust) and _has_config(folder, description):
        return architecture.build_from_config(folder, tensors)
    spec = parse_stored(source) if isinstance(source, str) else None
    if spec is None or spec.scheme == "hf":
        raise SourceError(f"{folder} does not say how its model is built; pass it: upswap.load({str(folder)!r}, model)")
    Budget(tensors, str(folder)).check_numbers(spec.options)
    return rebuild(str(source), str(folder), trust)


def _has_config(folder: Path, description: dict[str, Any]) -> bool:
    """Whether the folder's `config.json` describes its model."""
    return description.get("config_builds") is True and architecture.has_config(folder)


def _builds(config: str | None, model: nn.Module) -> bool:
    """Whether a `config.json` is enough to build the architecture of `model`, which may be a class of the user's own, or have
    been changed after it was made."""
    built = None if config is None else architecture.skeleton(model, config)
    return built is not None and same_modules(model, built)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text + "\n", encoding="utf-8")
