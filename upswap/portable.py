"""Weights as `.safetensors`, with a description of the model in the header: what it is built from, and its Plan.

The same description is `upswap.json` in a folder (see `folder.py`). It is data from a stranger: what it names is built
only where that neither runs code of the file nor fetches anything, and takes no more memory than the weights explain.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import trust as trusting
from ._version import __version__
from .budget import allocating_at_most, check_numbers
from .errors import OptionError, PlanError, SaveError, SourceError, UntrustedFileError, UpswapError
from .rewrite import is_patched, plan_of, undo
from .sites import Plan
from .sources import rebuild
from .spec import parse
from .weights import assign, separated

#: The one key of ours in a safetensors header. One, because the writer puts several in random order.
HEADER_KEY = "upswap"
HEADER_SCHEMA = 1


def describe(model: nn.Module, spec: str | None, shared: Mapping[str, str]) -> dict[str, Any]:
    """What a file says about its model, as plain data; `docs/plan.md` lists the entries."""
    try:
        plan: dict[str, Any] | None = plan_of(model).to_dict()
    except PlanError:
        plan = None
    return {
        "schema": HEADER_SCHEMA,
        "upswap_version": __version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "source": spec,
        "training": model.training,
        "shared": dict(shared),
        "plan": plan,
    }


def check_description(found: Any, path: Path) -> dict[str, Any]:
    """A description read from `path`, or `SourceError` where it is not one this version knows."""
    if not isinstance(found, dict) or (found and found.get("schema") != HEADER_SCHEMA):
        version = found.get("upswap_version") if isinstance(found, dict) else None
        raise SourceError(
            f"{path} was written by upswap {version}, in a form this upswap ({__version__}) does not know; "
            "update upswap to load it"
        )
    shared = found.get("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(name, str) for name in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: its shared tensors are not named")
    return found


def save(model: nn.Module, spec: str | None, path: Path) -> None:
    """Write the file; `SaveError` where a state dict holds something other than tensors."""
    tensors, shared = separated(model)
    write(tensors, {HEADER_KEY: json.dumps(describe(model, spec, shared), sort_keys=True)}, path)


def load(path: Path, model: nn.Module | None, trust: Iterable[str]) -> nn.Module:
    """The model in a file that `save` wrote, built anew or, where it is given, in `model`."""
    tensors, header = read(path)
    if not header:
        raise SourceError(
            f"{path} holds weights that upswap did not write, without a plan. Name the architecture: upswap convert "
            f"smp:unet?encoder_name=resnet34 --weights {path}"
        )

    def build() -> nn.Module:
        if not isinstance(header.get("source"), str):
            raise SourceError(f"{path} does not say how its model is built; pass it: upswap.load({str(path)!r}, model)")
        return rebuild(header["source"], str(path), trust)

    return restored(header, tensors, path, model, build)


def restored(
    description: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    path: Path,
    model: nn.Module | None,
    build: Callable[[], nn.Module],
) -> nn.Module:
    """The model that `description` describes with the weights `tensors`: built by `build` unless given as `model`."""
    from .api import patch

    if model is not None and is_patched(model):
        raise OptionError(
            f"the model given for {path} is patched already; upswap.unpatch(model) first, or give a new one"
        )
    tensors = all_names(tensors, description, path)
    try:
        spec = parse(description["source"]) if model is None and isinstance(description.get("source"), str) else None
        if spec is not None:
            check_numbers(spec.options, tensors, str(path))
        with allocating_at_most(tensors, str(path)):
            made = build().train(bool(description.get("training"))) if model is None else model
            if description.get("plan") is not None:
                made = patch(made, plan=_checked(description["plan"], made, path))
        assign(made, tensors, path, keep_dtype=True)
    except Exception as error:  # the entries of a damaged or made-up description reach all of the above
        if model is not None and is_patched(model):
            undo(model)  # the caller's own
        if isinstance(error, UpswapError):
            raise
        cause = trusting.shown((str(error).splitlines() or [""])[0])
        raise SourceError(f"{path} describes a model that cannot be made: {type(error).__name__}: {cause}") from error
    return made


def _checked(found: Any, model: nn.Module, path: Path) -> Plan:
    """The Plan in a stranger's description."""
    plan = Plan.from_dict(found)
    try:
        trusting.check_names(vars(site) for site in plan.sites)
        trusting.check_values(plan.calls, {type(module).__module__ for module in model.modules()})
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path} is refused: {error}") from error
    return plan


def all_names(tensors: dict[str, torch.Tensor], description: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """`tensors` under all the names that a state dict had, the shared ones too."""
    shared = description.get("shared", {})
    if not all(name in tensors for name in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: it shares tensors that it does not hold")
    return {**tensors, **{alias: tensors[name] for alias, name in shared.items()}}


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a `.safetensors`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is not None:  # the disk's own trouble, which `atomic` tells by its number
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise SaveError(f"{path} cannot be written: {error}") from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of any `.safetensors`, and what upswap wrote in its header; {} if nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path} is not a whole .safetensors file: {error}") from error
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} has a damaged upswap header: {error}") from error
    return tensors, check_description(header, path)


def looks_like_one(path: Path) -> bool:
    """Whether a file is a `.safetensors`. It has no magic number: eight bytes of length, then the brace of a JSON header."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and not head.startswith(b"PK"))
