"""Whole models as `.pt` files: pickled by torch, read back without running anything from the file.

Where a file is something else, the message says what.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shlex
import tempfile
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from ...errors import PlanError, SaveError, SourceError, UntrustedFileError, UpswapError, UpswapWarning
from ...shown import brief, listed, one_line
from ...surgery import apply as rewrite
from ..atomic import state_of
from ..parts import Kinds, parts
from ..safety import allowed_names as trusting
from ..safety import pickle_scan as screen
from ..safety.instance_rules import LONGEST_NAME
from ..safety.judgement import judged, made_real
from ..safety.pickle_walks import check_tree
from ..safety.stand_ins import Blank, Foreign, ForeignError, SafeGlobal
from ..safety.time_limit import loading_within_bounds
from .attributes import held_by
from .envelope import enveloped

if TYPE_CHECKING:
    from typing_extensions import Buffer


# What torch may load is a list of the whole process, from which a load that ends takes its names.
_LOADING = threading.Lock()


def write(model: nn.Module | dict[str, torch.Tensor], path: Path) -> None:
    """Write a model or weights; `SaveError` for a model that cannot be pickled."""
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


def _pickle(model: nn.Module | dict[str, torch.Tensor], writer: _Writer) -> None:
    try:
        torch.save(enveloped(model) if isinstance(model, nn.Module) else model, writer)
    except Exception as error:  # pickling runs the __reduce__ of any object the model holds
        if writer.error is not None:
            raise writer.error from None
        held = held_by(model) if isinstance(model, nn.Module) else ()
        unpicklable = [place for place, value in held if not (isinstance(value, nn.Module) or _is_picklable(value))]
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
    with open(path, "rb") as file:
        error = _why_refused(file, path)
        if error is None:
            return
        own = trusting.own_packages(getattr(error, "names", ()))
        still = _why_refused(file, path, tuple(own)) if own else error
    lines = _places_of(model, error if still is None else still)
    if still is None:
        without, advice = " without trust", f"{_OTHER_FORM}. That needs no trust"
        lines += trusting.trust_advice(getattr(error, "names", ()))
    else:
        error, without, advice = still, "", f"No trust opens it. {_OTHER_FORM}"
        lines += [] if getattr(still, "names", ()) else _refused_alone(model, path, tuple(own))
    told = f"the file is written, and upswap.load will refuse it{without}: {error.args[0]}"
    warnings.warn(UpswapWarning(told, *lines, advice), stacklevel=3)


def _why_refused(file: BinaryIO, path: Path, trust: tuple[str, ...] = ()) -> SourceError | None:
    """What `upswap.load` has against a file, but for what it finds in reading the tensors."""
    try:
        pickled, names = _looked_through(file)
        pairs = trusting.safe_globals(names, str(path), trust)
        screen.instructions(pickled, names, trusting.restoring(pairs))
        # torch checks the indices of sparse tensors, which have to be read for it.
        judged(_unpickled(file, pairs, "cpu" if b"_rebuild_sparse_tensor" in pickled else "meta"), trust)
    except SourceError as error:
        return error
    return None


def _refused_alone(model: nn.Module, path: Path, trust: tuple[str, ...]) -> list[str]:
    """A line that names the attribute whose value is refused for itself; none where that is none, or the rest with it."""

    def is_refused(value: Any) -> bool:
        with tempfile.TemporaryFile() as alone:
            torch.save(value, alone)
            return _why_refused(alone, path, trust) is not None

    values = ((place, value) for place, value in held_by(model) if not isinstance(value, (nn.Module, *_PLAIN)))
    places = [place for place, value in values if is_refused(value)]
    return [f"  at {max(places, key=len)}"] if places else []  # a container is refused with what is in it


_PLAIN = (bool, int, float, str, type(None))


def _places_of(model: nn.Module, error: SourceError) -> list[str]:
    """Lines that name the attributes with what an error refuses."""
    if not isinstance(error, UntrustedFileError) or not error.names:
        return [str(line) for line in error.args[1:]]
    places: dict[str, str] = {}
    for place, value in held_by(model):
        for name in _names_of(value):
            places.setdefault(name, place)
    lines = [
        f"  {name}{f' at {places[name]}' if name in places else ''}: {reason}" for name, reason in error.names.items()
    ]
    return lines[:_MOST_SHOWN] + ([f"  and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else [])


_MOST_SHOWN = 20


def _names_of(value: Any) -> list[str]:
    """The names that a pickle of a value asks for: its own, of a function or class, or that of its class."""
    return [
        f"{found.__module__}.{found.__qualname__}"
        for found in (value, type(value))
        if hasattr(found, "__qualname__") and hasattr(found, "__module__")
    ]


class Contents:
    """What a `.pt` holds: a model, weights, or a dict of a training loop with some of either under its keys.

    All in it are stand-ins until a part is taken: that is judged and made real, and the rest is let go.
    """

    def __init__(self, path: Path, found: Any, foreign: Foreign, length: int, trust: tuple[str, ...]) -> None:
        self.found = found
        self.path, self._foreign, self._length, self._trust = path, foreign, length, trust
        self._parts = dict(parts(found, _STAND_INS))

    @property
    def models(self) -> dict[str, int]:
        """The keys of the models in it, `""` where it is one, each with the number of its tensors."""
        return {key: len(self.tensors(key)) for key in self._parts if self.is_model(key)}

    @property
    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of its state dicts and models, by their keys and names. They are not judged: shapes alone may be read."""
        return {key: tensors for key in self._parts if (tensors := self.tensors(key))}

    def is_model(self, key: str) -> bool:
        """Whether a model is under this key."""
        return _is_model(self._parts.get(key))

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one part by their names, not judged."""
        part = self._parts[key]
        if _is_model(part):
            return dict(_named_tensors(part, 20_000 + 2 * self._length))
        # The methods of the type: a file can give an OrderedDict attributes in their place.
        return {name: value for name, value in type(part).items(part) if _is_tensor(value)}

    def names(self, key: str) -> list[str]:
        """Those of all that stands in a state dict, or of the tensors of a model."""
        part = self._parts[key]
        return [*self.tensors(key)] if _is_model(part) else [*type(part).keys(part)]

    def bounded(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what is done with the contents may take no longer than the size of the file explains."""
        return contextlib.nullcontext() if self._trust else loading_within_bounds(self.path)

    def odd_names(self) -> list[str]:
        """In a line, the classes in the file that are not admitted; nothing where all are."""
        names = ", ".join(self._foreign.names[:3])
        return [f"What it has of {names} was not opened; if that is the model, --trust its package"] if names else []

    def nothing(self) -> SourceError:
        """The error for a file in which nothing is to be taken; raised here where the whole of it would be refused."""
        trusting.safe_globals(self._foreign.names, str(self.path), self._trust)
        with _refused(self.path, self._trust):
            judged(self.found, self._trust)
        return SourceError(_not_a_model(self.path, self.found))

    def model(self, key: str) -> nn.Module:
        """The model under this key, made real."""
        with _refused(self.path, self._trust):
            found, blanks = judged(self._parts[key], self._trust, self._foreign.made)
            made_real(blanks)
            check_tree(found, self._length)
            if rewrite.is_patched(found):
                rewrite.plan_of(found)  # of a schema that this version reads
            model: nn.Module = found
            return model

    def state_dict(self, key: str) -> dict[str, torch.Tensor]:
        """The weights under this key, or those of the model there."""
        if self.is_model(key):
            return dict(self.model(key).state_dict())
        with _refused(self.path, self._trust):
            found: dict[str, torch.Tensor] = judged(self.tensors(key), self._trust, self._foreign.made)[0]
            return found


def read(path: Path, trust: tuple[str, ...]) -> Contents:
    """What the file holds, read without running anything from it, in no more time than its size explains.

    What is in packages of the user's own may take its time.
    """
    # Opened once: what takes its name meanwhile was not looked through.
    bound = contextlib.nullcontext() if trust else loading_within_bounds(path)
    with bound, open(path, "rb") as file, _left_alone(file, path):
        return _read(file, path, trust)


@contextlib.contextmanager
def _left_alone(file: BinaryIO, path: Path) -> Iterator[None]:
    """`SourceError` where the file is written to meanwhile: what was read is then not what was looked through."""
    before, error = state_of(file.fileno()), None
    try:
        yield
    except UpswapError as raised:
        error = raised
    if state_of(file.fileno()) != before:
        raise SourceError(f"{path} was written to while it was read; load it again when that is done") from error
    if error is not None:
        raise error


def _read(file: BinaryIO, path: Path, trust: tuple[str, ...]) -> Contents:
    try:
        pickled, names = _looked_through(file)
    except Exception as error:  # a file can be broken in any way; the message says which it looks like
        raise SourceError(_not_a_checkpoint(path, error)) from error
    foreign = Foreign()
    pairs = trusting.safe_globals(names, str(path), trust, foreign)
    with _refused(path, trust):
        try:
            filled = screen.instructions(pickled, names, trusting.restoring(pairs))
            foreign.filled_by_keys, foreign.filled_at_end = filled
            found = _unpickled(file, pairs, "cpu")
        except (SourceError, pickle.UnpicklingError) as error:
            raise (ForeignError(foreign.names) if foreign.names else error) from error
    return Contents(path, found, foreign, len(pickled), trust)


@contextlib.contextmanager
def _refused(path: Path, trust: tuple[str, ...]) -> Iterator[None]:
    """Inside, an error says that the file is refused, or damaged."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(f"{path} is refused: {_cause(error)}") from error
    except PlanError:
        raise
    except ForeignError as error:
        trusting.safe_globals(error.names, str(path), trust)  # which says why each is not admitted
        raise
    except UntrustedFileError as error:
        raise UntrustedFileError(f"{path} is refused: {error}") from error
    except SourceError as error:
        raise SourceError(f"{path} is refused: {error}") from error
    except Exception as error:  # as above: truncated records, impossible shapes, missing storages
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {_cause(error)}") from error


_LONGEST_PATH = 2_000


def _is_model(value: Any) -> bool:
    cls = vars(value)["original"] if isinstance(value, Blank) else type(value)
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _is_tensor(value: Any) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter)


def _pairs(value: Any) -> Collection[tuple[Any, Any]] | None:
    """What is in a dict, by the methods of its type."""
    return type(value).items(value) if type(value) in (dict, OrderedDict) else None


#: Before anything is judged.
_STAND_INS = Kinds(_is_model, _is_tensor, _pairs)


def _named_tensors(model: Any, most: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What the state dict of a model will have, read off a stand-in that is not judged.

    No more than `most` modules are looked at: one may be in so many others, or in itself, that it is refused when it is taken.
    So it is for its names, of which none is longer than `_LONGEST_PATH`.
    """
    queue, visited = [("", model)], 0
    while queue and visited < most:
        prefix, module = queue.pop()
        own = vars(module) if isinstance(module, nn.Module) else vars(module).get("state")
        visited += 1
        groups = [_entries(own, place) for place in ("_parameters", "_buffers", "_modules")]
        unsaved = own.get("_non_persistent_buffers_set", ()) if type(own) is dict else ()
        groups = [{name: value for name, value in group.items() if _is_short(prefix, name)} for group in groups]
        for name, value in (*groups[0].items(), *groups[1].items()):
            if _is_tensor(value) and not (type(unsaved) is set and name in unsaved):
                yield f"{prefix}{name}", value
        queue += [(f"{prefix}{name}.", child) for name, child in reversed(groups[2].items()) if _is_model(child)]


def _entries(state: Any, place: str) -> dict[Any, Any]:
    found: Any = state.get(place) if type(state) is dict else None
    return dict(type(found).items(found)) if type(found) in (dict, OrderedDict) else {}


def _is_short(prefix: str, name: Any) -> bool:
    return type(name) is str and len(name) <= LONGEST_NAME and len(prefix) <= _LONGEST_PATH


def _looked_through(file: BinaryIO) -> tuple[bytes, list[str]]:
    """The pickle in a file, and the names that it asks for."""
    pickled = screen.archive(file)
    file.seek(0)
    return pickled, torch.serialization.get_unsafe_globals_in_checkpoint(file)


def _unpickled(file: BinaryIO, pairs: list[SafeGlobal], device: str) -> Any:
    """What torch makes of the file with these stand-ins; on the meta device without reading the tensors."""
    try:
        with _LOADING, torch.serialization.safe_globals(pairs):
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True, mmap=False)
    finally:
        # torch keeps sparse tensors for a check at the end of the load; those of a refused file would fail the next one.
        torch._utils._sparse_tensors_to_validate.clear()


#: Files that people have beside their models, and what to give in their place.
_OTHERS = {
    ".onnx": "an ONNX graph, in which there is no module to patch. Give the PyTorch model that it was exported from",
    ".tflite": "a LiteRT model, in which there is no module to patch. Give the PyTorch model that it was made from",
    ".ipynb": "a notebook. Give the model that it makes: upswap.patch(model) in it, or a file of torch.save",
    ".py": "Python code. A model that it makes is named python:MODULE:FUNCTION, with the module's name and not its file's",
    ".yaml": "a YAML file. Of ultralytics' models it is ultralytics:NAME.yaml",
} | dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "an image, no model")


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
    other = _OTHERS.get(path.suffix.lower())
    if other is not None:
        return f"{path} is {other}"
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


def _not_a_model(path: Path, found: Any) -> str:
    """What to say of a file that holds `found`, which is neither a model nor weights, nor has any."""
    if isinstance(found, Mapping):
        return f"{path} is a dict of {', '.join(map(brief, list(found)[:6]))}, with neither a model nor weights in it"
    return f"{path} holds a {type(found).__name__}, not a model"


def weights_alone(path: Path, weights: Mapping[str, Collection[str]], upsamplers: Collection[str]) -> str:
    """What to say of a file that holds weights, by their keys, where a model is wanted. `upsamplers` are paths in them."""
    key, names = max(weights.items(), key=lambda item: len(item[1]))
    of = f" under {key!r}" if key else ""
    said = f"{path} is a state dict{of} ({len(names)} tensors, the first is {next(iter(names))!r}): weights without a model."
    if upsamplers:
        said += f" The model was patched by upswap, with upsamplers at {listed(list(upsamplers), 2)}."
    command = f"upswap convert SOURCE --weights {shlex.quote(str(path))}"
    options = ", with the options it was patched with" if upsamplers else ""
    revert = f". The host's weights alone: upswap revert {shlex.quote(str(path))}" if upsamplers else ""
    return (
        f"{said} Say as SOURCE what builds its model, such as smp:unet?classes=2 or python:package.module:factory{options}: "
        f"{command}{revert}. In Python: upswap.load({str(path)!r}, model)"
    )


def _cause(error: BaseException) -> str:
    """The first line of a message; torch wraps that of its unpickler in advice that does not apply here."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return one_line(lines[0], 300) if lines else type(error).__name__
