"""Whole models as `.pt` files: pickled by torch, read back without running anything from the file.

Where a file is something else, the message says what.
"""

from __future__ import annotations

import io
import pickle
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import PlanError, SaveError, SourceError, UntrustedFileError, UpswapWarning
from ...shown import one_line
from ...surgery import apply as rewrite
from ..safety import allowed_names as trusting
from ..safety import pickle_scan as screen
from ..safety.judgement import judged, made_real
from ..safety.stand_ins import SafeGlobal
from ..state_dict import is_state_dict
from .attributes import held_by

if TYPE_CHECKING:
    from typing_extensions import Buffer


# What torch may load is a list of the whole process, from which a load that ends takes its names.
_LOADING = threading.Lock()


def write(model: nn.Module, path: Path) -> None:
    """Write the file; `SaveError` for a model that cannot be pickled."""
    # To an open file: given a path, torch.save names the records inside after the (temporary) file.
    with _Writer(io.FileIO(path, "w")) as file:
        _pickle(model, file)


class _Writer(io.BufferedWriter):
    """A file that remembers why writing failed: torch's writer puts an error of its own in its place."""

    error: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        """As the base class."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _pickle(model: nn.Module, writer: _Writer) -> None:
    try:
        torch.save(model, writer)
    except Exception as error:  # pickling runs the __reduce__ of any object the model holds
        if writer.error is not None:
            raise writer.error from None
        unpicklable = [
            place for place, value in held_by(model) if not (isinstance(value, nn.Module) or _is_picklable(value))
        ]
        place = max(unpicklable, key=len, default="")  # a container fails with what is in it
        raise SaveError(
            f"{type(model).__name__} cannot be pickled{f', because of {place}' if place else ''}: {error}. {_OTHER_FORM}"
        ) from error


_OTHER_FORM = (
    'A .safetensors has the weights and the plan: upswap.save(model, "model.safetensors"), and '
    'upswap.load("model.safetensors", model) puts them into the model as your code makes it'
)


def _is_picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def warn_where_not_loadable(model: nn.Module, path: Path) -> None:
    """Tell now, not on loading, that a file needs more than the allow-list has, and where the model holds it."""
    try:
        pickled = screen.archive(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        pairs = trusting.safe_globals(names, str(path))
        screen.instructions(pickled, names, trusting.restoring(pairs))
        judged(_unpickled(path, pairs, "meta"))
    except SourceError as error:
        told = UpswapWarning(
            f"the file is written, and upswap.load will refuse it without trust: {error.args[0]}",
            *_places_of(model, error),
            f"{_OTHER_FORM}. That needs no trust",
        )
        warnings.warn(told, stacklevel=3)


def _places_of(model: nn.Module, error: SourceError) -> list[str]:
    """Lines that name the attributes with what an error refuses, and how to trust it."""
    if not isinstance(error, UntrustedFileError) or not error.names:
        return [str(line) for line in error.args[1:]]
    places: dict[str, str] = {}
    for place, value in held_by(model):
        for name in _names_of(value):
            places.setdefault(name, place)
    lines = [
        f"  {name}{f' at {places[name]}' if name in places else ''}: {reason}" for name, reason in error.names.items()
    ]
    more = [f"  and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return lines[:_MOST_SHOWN] + more + trusting.trust_advice(error.names)


_MOST_SHOWN = 20


def _names_of(value: Any) -> list[str]:
    """The names that a pickle of a value asks for: its own, of a function or class, or that of its class."""
    return [
        f"{found.__module__}.{found.__qualname__}"
        for found in (value, type(value))
        if hasattr(found, "__qualname__") and hasattr(found, "__module__")
    ]


def read(path: Path, trust: tuple[str, ...]) -> Any:
    """What the file holds, a model or anything else, made without running anything from it."""
    try:
        pickled = screen.archive(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a file can be broken in any way; the message says which it looks like
        raise SourceError(_not_a_checkpoint(path, error)) from error
    pairs = trusting.safe_globals(names, str(path), trust)
    try:
        screen.instructions(pickled, names, trusting.restoring(pairs))
        found, blanks = judged(_unpickled(path, pairs, "cpu"), trust)
        made_real(blanks)
        if isinstance(found, nn.Module):
            screen.check_tree(found, len(pickled))
            if rewrite.is_patched(found):
                rewrite.plan_of(found)  # of a schema that this version reads
        return found
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(f"{path} is refused: {_cause(error)}") from error
    except PlanError:
        raise
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path} is refused: {error}") from error
    except SourceError as error:
        raise SourceError(f"{path} is refused: {error}") from error
    except Exception as error:  # as above: truncated records, impossible shapes, missing storages
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {_cause(error)}") from error


def _unpickled(path: Path, pairs: list[SafeGlobal], device: str) -> Any:
    """What torch makes of the file with these stand-ins; on the meta device without reading the tensors."""
    try:
        with _LOADING, torch.serialization.safe_globals(pairs):
            return torch.load(path, map_location=device, weights_only=True)
    finally:
        # torch keeps sparse tensors for a check at the end of the load; those of a refused file would fail the next one.
        torch._utils._sparse_tensors_to_validate.clear()


def _not_a_checkpoint(path: Path, error: Exception) -> str:
    """What a file that torch cannot read as a checkpoint most likely is."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the model itself: run `git lfs pull`"
    if head.startswith(b"\x80"):
        return (
            f"{path} is a bare pickle, or was saved by torch before 1.6. If you made it, load and save it again with "
            "torch.save of today"
        )
    if not head.startswith(b"PK"):
        return f"{path} is no file of torch.save nor a .safetensors"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return f"{path} is truncated or damaged: its table of contents cannot be read"
    tails = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in tails:
        return f"{path} is a TorchScript archive; its code is fixed. Load the Python model it was made from"
    if "archive_format" in tails or "serialized_exported_program.json" in tails:
        return f"{path} is an ExportedProgram; its code is fixed. Load the Python model it was made from"
    if "data.pkl" not in tails:
        return f"{path} is a zip archive, but no file of torch.save"
    if isinstance(error, SourceError):
        return f"{path} is refused: {error}"
    return f"{path} is damaged, or uses a pickle form that is never loaded: {type(error).__name__}: {_cause(error)}"


def not_a_model(path: Path, found: Any) -> str:
    """What to say of a file that holds `found`."""
    if isinstance(found, Mapping) and is_state_dict(found.get("state_dict", found)):
        tensors = found.get("state_dict", found)
        first = next(iter(tensors), "")
        return (
            f"{path} is a state dict ({len(tensors)} tensors, the first is {first!r}): weights without a model. Name "
            f"its architecture: upswap convert smp:unet?encoder_name=resnet34 --weights {path}; in Python, build the "
            "model, load_state_dict and upswap.patch(model)"
        )
    if isinstance(found, Mapping):
        models = [str(key) for key, value in found.items() if isinstance(value, nn.Module)]
        if models:
            return f"{path} is a training checkpoint with models under {', '.join(models)}; save one of them by itself"
        return f"{path} is a dict of {', '.join(map(repr, list(found)[:6]))}, not a model"
    return f"{path} holds a {type(found).__name__}, not a model"


def _cause(error: BaseException) -> str:
    """The first line of a message; torch wraps that of its unpickler in advice that does not apply here."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return one_line(lines[0], 300) if lines else type(error).__name__
