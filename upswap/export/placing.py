"""The files of an export take their places together, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..errors import SaveError
from ..files import atomic

#: A folder, with files of Core ML's in it.
_FOLDER = ".mlpackage"

#: What always has its weights in a file beside it; an ONNX graph has, where they are too many for one file.
_WITH_WEIGHTS = (".xml", ".param")


def check_place(path: Path, *, force: bool = False) -> None:
    """`SaveError` where `place` would fail for a reason that shows before the work is done."""
    if path.suffix != _FOLDER:
        for file in (weights_of(path), path) if path.suffix in _WITH_WEIGHTS else (path,):
            atomic.check(file, force=force)
    elif path.exists() and not force:
        raise SaveError(f"{path} exists; --force, or force=True, replaces it")
    elif not path.parent.is_dir():
        raise SaveError(f"there is no folder {path.parent}")


def place(files: Sequence[Path], path: Path, *, force: bool = False) -> None:
    """Copy the files of an export, the one that `path` names last among them, to their places."""
    if path.suffix == _FOLDER:
        _place_folder(files[-1], path)
        return
    *weights, made = files
    fills = {
        to.name: partial(_copy, file) for file, to in (*((file, weights_of(path)) for file in weights), (made, path))
    }
    if weights:
        atomic.write_together(path.parent, fills, path.name, force=force)
    else:
        atomic.write(path, fills[path.name], force=force)


def weights_of(path: Path) -> Path:
    """Where the weights of a file are that has them beside it."""
    return path.with_suffix(".bin") if path.suffix in _WITH_WEIGHTS else path.with_name(f"{path.name}.data")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _place_folder(made: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as waiting:
        shutil.copytree(made, Path(waiting, "new"))
        if path.exists():
            os.replace(path, Path(waiting, "old"))
        os.replace(Path(waiting, "new"), path)
