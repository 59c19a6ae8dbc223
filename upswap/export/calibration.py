"""Inputs that stand for what a model will see: from a file of arrays, or as its owner gives them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..probe.inputs.inputs import as_inputs
from .flat import Flat

if TYPE_CHECKING:
    import numpy as np


def batches(given: Any, flat: Flat, examples: list[Tensor], *, fixed: bool = False) -> list[list[Tensor]]:
    """Calibration data as lists of the model's input tensors; `OptionError` for what does not fit the example inputs.

    A path is that of a `.npy` of images (N, C, H, W), or of an `.npz` with an array for each input, by its name; the first
    axis counts the samples. Each is run as a batch of one; where sizes are `fixed`, so many as the examples have.
    """
    if isinstance(given, str | Path):
        size = len(examples[0]) if fixed and examples[0].dim() else 1
        found = list(_from_file(Path(given), flat.input_names, size))
    elif isinstance(given, Iterable) and not isinstance(given, Tensor):
        found = [as_inputs(inputs).tensors() for inputs in given]
    else:
        raise OptionError(f"calibration data is a path or a list of inputs, not a {type(given).__name__}")
    if not found:
        raise OptionError(f"there is nothing in the calibration data{_where(given)}")
    for tensors in found:
        problem = _misfit(tensors, flat.input_names, examples, fixed=fixed)
        if problem:
            raise OptionError(f"the calibration data{_where(given)} does not fit the model: {problem}")
    return found


def _where(given: Any) -> str:
    return f" in {given}" if isinstance(given, str | Path) else ""


def _from_file(path: Path, names: list[str], size: int) -> Iterator[list[Tensor]]:
    import numpy as np

    if not path.is_file():
        raise OptionError(f"there is no calibration file {path}")
    try:
        arrays = [torch.from_numpy(np.ascontiguousarray(array)) for array in _arrays(path, names)]
    except OptionError:
        raise
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile):
        # NumPy's own message on any other file says how to have it run code.
        raise OptionError(f"{path} is no .npy or .npz of arrays of numbers: numpy.save writes one") from None
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise OptionError(f"{path} has arrays of different lengths")
    for first in range(0, lengths.pop() - size + 1, size):
        yield [array[first : first + size] for array in arrays]


def _arrays(path: Path, names: list[str]) -> list[np.ndarray[Any, Any]]:
    import numpy as np

    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return [loaded]
        missing = [name for name in names if name not in loaded.files]
        if missing:
            raise OptionError(f"{path} has no {', '.join(missing)}; it has {', '.join(loaded.files)}")
        return [loaded[name] for name in names]


def _misfit(tensors: list[Tensor], names: list[str], examples: list[Tensor], *, fixed: bool) -> str:
    if len(tensors) != len(examples):
        return f"it has {len(tensors)} arrays for the inputs {', '.join(names)}"
    for name, given, example in zip(names, tensors, examples, strict=True):
        compared = slice(None) if fixed else slice(1, 2)
        same = given.dim() == example.dim() and given.shape[compared] == example.shape[compared]
        if not same or given.dtype != example.dtype:
            taker = "a file of fixed sizes" if fixed else "the model"
            return f"{name} is {_described(given)}, and {taker} takes {_described(example, sizes=fixed)}"
    return ""


def _described(tensor: Tensor, *, sizes: bool = True) -> str:
    shape = [str(side) if sizes or axis == 1 else "any" for axis, side in enumerate(tensor.shape)]
    return f"({', '.join(shape)}) {str(tensor.dtype).removeprefix('torch.')}"
