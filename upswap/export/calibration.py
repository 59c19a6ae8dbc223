"""Inputs that stand for what a model will see: from a file of arrays, or as its owner gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..probe.inputs.inputs import as_inputs
from .flat import Flat


def batches(given: Any, flat: Flat, examples: list[Tensor]) -> list[list[Tensor]]:
    """Calibration data as lists of the model's input tensors; `OptionError` for what does not fit the example inputs.

    A path is that of a `.npy` of images (N, C, H, W), or of an `.npz` with an array for each input, by its name; the first
    axis counts the samples, and each is run as a batch of one.
    """
    if isinstance(given, str | Path):
        found = list(_from_file(Path(given), flat.input_names))
    elif isinstance(given, Iterable) and not isinstance(given, Tensor):
        found = [as_inputs(inputs).tensors() for inputs in given]
    else:
        raise OptionError(f"calibration data is a path or a list of inputs, not a {type(given).__name__}")
    if not found:
        raise OptionError(f"there is nothing in the calibration data{_where(given)}")
    for tensors in found:
        problem = _misfit(tensors, flat.input_names, examples)
        if problem:
            raise OptionError(f"the calibration data{_where(given)} does not fit the model: {problem}")
    return found


def _where(given: Any) -> str:
    return f" in {given}" if isinstance(given, str | Path) else ""


def _from_file(path: Path, names: list[str]) -> Iterator[list[Tensor]]:
    import numpy as np

    if not path.is_file():
        raise OptionError(f"there is no calibration file {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise OptionError(f"{path} is no .npy or .npz of arrays: {error}") from None
    if isinstance(loaded, np.ndarray):
        arrays = [loaded]
    else:
        missing = [name for name in names if name not in loaded.files]
        if missing:
            raise OptionError(f"{path} has no {', '.join(missing)}; it has {', '.join(loaded.files)}")
        arrays = [loaded[name] for name in names]
    if len({len(array) if array.ndim else 0 for array in arrays}) != 1:
        raise OptionError(f"{path} has arrays of different lengths")
    for sample in range(len(arrays[0]) if arrays[0].ndim else 0):
        yield [torch.from_numpy(np.ascontiguousarray(array[sample : sample + 1])) for array in arrays]


def _misfit(tensors: list[Tensor], names: list[str], examples: list[Tensor]) -> str:
    if len(tensors) != len(examples):
        return f"it has {len(tensors)} arrays for the inputs {', '.join(names)}"
    for name, given, example in zip(names, tensors, examples, strict=True):
        same = given.dim() == example.dim() and given.shape[1:2] == example.shape[1:2]
        if not same or given.dtype != example.dtype:
            return (
                f"{name} is {tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}, and the model takes "
                f"{tuple(example.shape)} {str(example.dtype).removeprefix('torch.')}"
            )
    return ""
