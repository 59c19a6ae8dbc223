"""Files as torch.save writes them, with any pickle inside: what `pickle` would not write, written by hand."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Raw(bytes):
    """Instructions as they are."""


class Global:
    """A GLOBAL instruction of any name, for names that pickle would not write."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """A function, its arguments, REDUCE; with `state`, BUILD too."""

    instruction = pickle.REDUCE

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.function, self.args, self.state = function, args, state


class New(Call):
    """The same with NEWOBJ: `cls.__new__(cls, *args)`."""

    instruction = pickle.NEWOBJ


def module(cls: str, **state: Any) -> New:
    """A module of `torch.nn.modules`, with what every module has, and more."""
    empty = {name: value for name, value in vars(nn.Identity()).items() if name != "training"}
    place, _, name = f"torch.nn.modules.{cls}".rpartition(".")
    return New(Global(place, name), state={**empty, "training": False, **state})


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    dispatch = copy.copy(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_raw(self, obj: Raw) -> None:
        self.write(bytes(obj))

    def save_global_of(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, call: Call) -> None:
        self.save(call.function)
        self.save(call.args)
        self.write(call.instruction)
        if call.state is not None:
            self.save(call.state)
            self.write(pickle.BUILD)

    dispatch[Raw] = save_raw
    dispatch[Global] = save_global_of
    dispatch[Call] = dispatch[New] = save_call


def pickled(value: Any) -> bytes:
    """`value` in protocol 2, with what is of the classes above as it says."""
    if isinstance(value, Raw):
        return bytes(value)
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_pt(path: Path, data: bytes) -> Path:
    """A file of torch.save with the pickle `data` inside."""
    torch.save({"x": torch.zeros(1)}, path)
    return repacked(path, data)


def records(path: Path) -> dict[str, bytes]:
    """What is in a file of torch.save, by name."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def repacked(path: Path, data: bytes) -> Path:
    """The file with another pickle."""
    contents = records(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path
