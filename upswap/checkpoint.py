"""Models to files and back.

`.pt` holds the whole model, pickled, and is loaded without running anything from the file (see `trust.py`).
`.safetensors` holds the weights, and in its header the Plan and how to build the original: nothing in it is code.
The form of a file is told by its content when it is read and by its suffix when it is written.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import atomic
from . import trust as trusting
from ._version import __version__
from .errors import OptionError, PlanError, SaveError, SourceError, UntrustedFileError, UpswapWarning
from .sites import Plan
from .sources import parse, rebuild, spec_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The one key of ours in a safetensors header. One, because the writer puts several in random order.
HEADER_KEY = "upswap"
HEADER_SCHEMA = 1

SUFFIXES = (".pt", ".pth", ".safetensors")


def save(model: nn.Module, path: str | Path, *, source: str | Path | None = None, force: bool = False) -> Path:
    """Write a model, patched or not, and return the path.

    `path` ends in `.pt` or `.pth` (the whole model) or `.safetensors` (weights, Plan and the spec of the original).
    `source` is where the model came from: a file, which is then never written over, or a spec, which a `.safetensors`
    keeps so that `load` needs no model. Models of segmentation_models_pytorch know their own spec.

    Raises:
        SaveError: the file exists and `force` is not set, or it cannot be written; nothing is left behind.
    """
    path = Path(path)
    check_target(path, source=source, force=force)
    if path.suffix == ".safetensors":
        spec = str(source) if source is not None and _is_spec(source) else spec_of(model)
        tensors, header = _portable(model, spec)
        atomic.write(path, lambda file: _write_safetensors(tensors, header, file), force=force)
    else:
        atomic.write(path, lambda file: _write_pickle(model, file), force=force)
        _warn_where_not_loadable(path)
    return path


def check_target(path: str | Path, *, source: str | Path | None = None, force: bool = False) -> None:
    """`SaveError` where `save` with these arguments would fail whatever the model; cheap, so ask before the work."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise SaveError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    if (
        source is not None
        and not _is_spec(source)
        and path.exists()
        and Path(source).exists()
        and os.path.samefile(path, source)
    ):
        raise SaveError(f"{path} is the source itself, which is never written over; name another file")
    atomic.check(path, force=force)


def load(path: str | Path, model: nn.Module | None = None, *, trust: Iterable[str] = ()) -> nn.Module:
    """The model in a file, on the CPU, without running code from the file.

    A `.safetensors` is rebuilt from the spec in its header, or from `model`, the original architecture, which is then
    patched in place and given the file's weights. `trust` names packages of your own whose classes a `.pt` may use.

    Raises:
        SourceError: no such file, or not one that holds a model; the message says what it is instead.
        UntrustedFileError: the file needs code outside the allow-list.
        PlanError: the file's Plan does not fit the model.
    """
    path = Path(path)
    trust = (trust,) if isinstance(trust, str) else tuple(trust)
    if _looks_like_safetensors(path):
        return _load_safetensors(path, model)
    if model is not None:
        raise OptionError(f"{path} holds a whole model; model= is for .safetensors files")
    found = _unpickle(path, trust)
    if isinstance(found, nn.Module):
        return trusting.unseal(found)
    raise SourceError(_not_a_model(path, found))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state-dict file (`.pt` of tensors, or any `.safetensors`) into `model`, strictly.

    Raises:
        SourceError: the file holds no weights, or they are not those of this model; the keys that differ are named.
    """
    path = Path(path)
    if _looks_like_safetensors(path):
        tensors, header = _read_safetensors(path)
        tensors.update({alias: tensors[name] for alias, name in header.get("shared", {}).items()})
    else:
        found = _unpickle(path, ())
        found = found.get("state_dict", found) if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping) or not _is_state_dict(found):
            raise SourceError(f"{path} holds no state dict, but a {type(found).__name__}")
        tensors = dict(found)
    _assign(model, tensors, path)


def read_header(path: str | Path) -> dict[str, Any]:
    """What upswap wrote in the header of a `.safetensors` (source spec, Plan, its own version); {} if nothing."""
    return _read_safetensors(Path(path))[1]


# ---- .pt


def _write_pickle(model: nn.Module, path: Path) -> None:
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
        raise SaveError(
            f"{type(model).__name__} cannot be pickled: {error}. A .safetensors holds the weights and the plan alone"
        ) from error


def _warn_where_not_loadable(path: Path) -> None:
    """Tell now, not on loading, that a file needs more than the allow-list has."""
    try:
        trusting.safe_globals(torch.serialization.get_unsafe_globals_in_checkpoint(path), str(path))
    except UntrustedFileError as error:
        warnings.warn(
            f"the file is written, and upswap.load will refuse it without trust: {error}", UpswapWarning, stacklevel=3
        )


def _unpickle(path: Path, trust: tuple[str, ...]) -> Any:
    _check_readable(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a file can be broken in any way; the message says which it looks like
        raise SourceError(_not_a_checkpoint(path, error)) from error
    pairs = trusting.safe_globals(names, str(path), trust)
    try:
        with torch.serialization.safe_globals(pairs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(f"{path} is refused: {_cause(error)}") from error
    except PlanError:
        raise
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path} is refused: {error}") from error
    except Exception as error:  # as above: truncated records, impossible shapes, missing storages
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {_cause(error)}") from error


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise SourceError(f"{path} is a folder; name a file in it")
    if not path.exists():
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
    return f"{path} is damaged, or uses a pickle form that is never loaded: {type(error).__name__}: {_cause(error)}"


def _not_a_model(path: Path, found: Any) -> str:
    if isinstance(found, Mapping) and _is_state_dict(found.get("state_dict", found)):
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


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


# ---- .safetensors


def _portable(model: nn.Module, spec: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict as tensors that share no memory, and the header that says which names did."""
    from .api import plan_of

    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise SaveError(
                f"the state dict has a {type(tensor).__name__} under {name!r}, which .safetensors cannot hold; use .pt"
            )
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr()
        view = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            shared[name] = first[view]
            continue
        first[view] = name
        # Another view of a storage already taken: the format has no views, so it becomes a tensor of its own.
        tensors[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if place in storages else tensor.contiguous()
        )
        storages.add(place)
    try:
        plan: dict[str, Any] | None = plan_of(model).to_dict()
    except PlanError:
        plan = None
    header = {
        "schema": HEADER_SCHEMA,
        "upswap_version": __version__,
        "source": spec,
        "training": model.training,
        "shared": shared,
        "plan": plan,
    }
    return tensors, header


def _write_safetensors(tensors: dict[str, torch.Tensor], header: Mapping[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})
    except SafetensorError as error:
        raise SaveError(f"{path} cannot be written: {error}") from error


def _looks_like_safetensors(path: Path) -> bool:
    """The format has no magic number: eight bytes of length, then the brace of a JSON header."""
    _check_readable(path)
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and not head.startswith(b"PK"))


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
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
    if not isinstance(header, dict) or (header and header.get("schema") != HEADER_SCHEMA):
        version = header.get("upswap_version") if isinstance(header, dict) else None
        raise SourceError(
            f"{path} was written by upswap {version}, in a form this upswap ({__version__}) does not know"
        )
    shared = header.get("shared", {})
    if not isinstance(shared, dict) or not all(isinstance(n, str) and n in tensors for n in shared.values()):
        raise SourceError(f"{path} has a damaged upswap header: it shares tensors that it does not hold")
    return tensors, header


def _load_safetensors(path: Path, model: nn.Module | None) -> nn.Module:
    from .api import patch

    tensors, header = _read_safetensors(path)
    if not header:
        raise SourceError(
            f"{path} holds weights that upswap did not write, without a plan. Name the architecture: upswap convert "
            f"smp:unet?encoder_name=resnet34 --weights {path}"
        )
    if model is None:
        if not isinstance(header.get("source"), str):
            raise SourceError(f"{path} does not say how its model is built; pass it: upswap.load({str(path)!r}, model)")
        model = rebuild(header["source"], str(path)).train(bool(header.get("training")))
    if header.get("plan") is not None:
        plan = Plan.from_dict(header["plan"])
        try:
            trusting.check_names(site.__dict__ for site in plan.sites)
        except UntrustedFileError as error:
            raise UntrustedFileError(f"{path} is refused: {error}") from error
        model = patch(model, plan=plan)
    tensors.update({alias: tensors[name] for alias, name in header["shared"].items()})
    _assign(model, tensors, path, keep_dtype=True)
    return model


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path, *, keep_dtype: bool = False) -> None:
    """`load_state_dict`, strict, with one message; `keep_dtype` makes the model take the dtypes of the file."""
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SourceError(
            f"{path} does not hold the weights of this {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        )
    if keep_dtype:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in tensors and tensors[name].dtype != tensor.dtype:
                tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=True)


def _is_spec(source: str | Path) -> bool:
    return isinstance(source, str) and parse(source) is not None


def _cause(error: BaseException) -> str:
    """The first line of a message; torch wraps that of its unpickler in advice that does not apply here."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return lines[0] if lines else type(error).__name__
