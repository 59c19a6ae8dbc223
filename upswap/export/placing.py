"""The files of an export take their places together, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from ..errors import SaveError
from ..files import atomic
from .metadata import metadata_of

#: A folder, with files of Core ML's in it.
_FOLDER = ".mlpackage"

#: What always has its weights in a file beside it; an ONNX graph has, where they are too many for one file.
_WITH_WEIGHTS = (".xml", ".param")

#: What has its metadata in a file beside it.
_WITH_METADATA = (".tflite", ".pte", ".param")


def check_place(path: Path, *, force: bool = False) -> None:
    """`SaveError` where `place` would fail for a reason that shows before the work is done."""
    if path.suffix != _FOLDER:
        for file in (*_always_beside(path), path):
            atomic.check(file, force=force)
    elif path.exists() and not force:
        raise SaveError(f"{path} exists; --force, or force=True, replaces it")
    elif not path.parent.is_dir():
        raise SaveError(f"there is no folder {path.parent}")


def _always_beside(path: Path) -> Iterator[Path]:
    if path.suffix in _WITH_WEIGHTS:
        yield weights_of(path)
    if path.suffix in _WITH_METADATA:
        yield metadata_of(path)


def place(made: Path, path: Path, beside: Mapping[Path, Path], *, force: bool = False) -> None:
    """Copy the file of an export to `path`, and others from `beside`, by where they go.

    The weights of a graph that is replaced go with it, also where the new one has none beside it.
    """
    if path.suffix == _FOLDER:
        _place_folder(made, path)
        return
    former = _weights_of_graph(path)
    fills = {to.name: partial(_copy, file) for to, file in {**beside, path: made}.items()}
    if beside:
        atomic.write_together(path.parent, fills, path.name, force=force)
    else:
        atomic.write(path, fills[path.name], force=force)
    if former is not None and former not in beside:
        former.unlink(missing_ok=True)


def _weights_of_graph(path: Path) -> Path | None:
    """The file beside an ONNX graph that its weights are in, where that has the name that is given here."""
    beside = weights_of(path)
    if path.suffix != ".onnx" or not beside.is_file() or not path.is_file():
        return None
    import onnx
    from onnx.external_data_helper import uses_external_data

    with contextlib.suppress(Exception):  # whatever was there before: it may be no graph
        there = onnx.load(path, load_external_data=False).graph.initializer
        places = {entry.value for each in there if uses_external_data(each) for entry in each.external_data}
        return beside if beside.name in places else None
    return None


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
