"""What a path stands for: a file or a folder, whether it may be written to, and whether it can be read."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ..architectures.spec import path_of
from ..errors import OptionError, SaveError, SourceError
from . import atomic
from .formats import folder

SUFFIXES = (".pt", ".pth", ".safetensors")

#: What hosts, and `load`, read of a folder.
_READ = (".safetensors", ".bin", ".json")


def check_target(path: str | Path, *, source: str | Path | None = None, force: bool = False) -> None:
    """`SaveError` where `save` with these arguments would fail whatever the model; cheap, so ask before the work."""
    path = Path(path)
    if not is_folder(path) and path.suffix not in SUFFIXES:
        raise SaveError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, or in none, for a folder")
    origin = None if source is None else path_of(source)
    if origin is not None and os.path.exists(origin) and _is_of(path, origin):
        raise SaveError(f"{path} is the source itself, which is never written over; name another file")
    if is_folder(path):
        folder.check(path, force=force)
    else:
        atomic.check(path, force=force)


def is_folder(path: Path) -> bool:
    """Whether `save` to this path writes a folder."""
    return path.suffix not in SUFFIXES and (os.path.isdir(path) or not path.suffix)


def _is_of(path: Path, origin: Path) -> bool:
    """Whether writing the file or folder `path` would change what is read of `origin`, whatever they are called."""
    written = [path, *(path / name for name in folder.FILES)] if is_folder(path) else [path]
    read = [origin, *(file for file in origin.iterdir() if file.suffix in _READ)] if origin.is_dir() else [origin]
    there = [[file for file in files if os.path.exists(file)] for files in (written, read)]
    return any(os.path.samefile(*pair) for pair in itertools.product(*there))


def check_readable(path: Path) -> None:
    """`SourceError` unless there is a file at the path, with something in it."""
    if not os.path.exists(path):
        raise SourceError(f"there is no file {path}{_of_a_library(path)}")
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise SourceError(f"{path} is empty")


def _of_a_library(path: Path) -> str:
    """What to say where a name that is no file may be that of a library's model."""
    if path.suffix or len(path.parts) != 1:
        return ""
    return f". A model of a library has the library before its name: smp:{path}, timm:{path}, torchvision:{path}"


def check_no_key(path: Path, key: str | None) -> None:
    """`OptionError` where a key is given for what is one model."""
    if key is not None:
        raise OptionError(f"{path} is one model, in which there is nothing to choose; leave out --key (key=)")
