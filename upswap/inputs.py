"""Example inputs: what the user gave, what can be inferred, and both as plain data.

A model is run on example inputs to find its resize calls. The user may pass them as a tensor, a tuple of positional
arguments, a dict of keyword arguments or `(args, kwargs)`; left out, image batches are inferred from the first convolution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import InputError

#: Sides tried, in pixels, until the model runs. Small first: cost grows with the area. Multiples of 32 suit every stride up to
#: 32; 224, 256, 384, 448, 512 and 518 are the sides that fixed-size transformers are built for.
SIDES = (64, 128, 224, 256, 384, 448, 512, 518)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one forward: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, in order."""
        found: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map(keep)
        return found

    def map(self, function: Callable[[torch.Tensor], Any]) -> Inputs:
        """The same structure with every tensor replaced by `function(tensor)`."""
        args, kwargs = map_tensors((self.args, self.kwargs), function)
        return Inputs(args, kwargs)


def as_inputs(example_inputs: Any) -> Inputs:
    """What the user passed as `example_inputs`, in one form.

    Accepts a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or `(args, kwargs)` with a tuple or
    list and a dict. A model whose one argument is a list or a dict takes it in a tuple: `([image],)`.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, torch.Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], tuple | list)
            and isinstance(example_inputs[1], dict)
        ):
            return Inputs(tuple(example_inputs[0]), dict(example_inputs[1]))
        return Inputs(tuple(example_inputs), {})
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of positional arguments, a dict of keyword "
        "arguments, or (args, kwargs)"
    )


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with every tensor in its tuples, lists and dicts replaced by `function(tensor)`."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def example_inputs_for(model: nn.Module, size: int | tuple[int, int] | None = None) -> Inputs:
    """A batch of one random image the model is likely to take.

    `size` is the height and width in pixels (an int means a square), 64 by default. The number of channels, the dtype and the
    device are those of the model's first 2-D convolution. The values are random and the same each time; no global random state
    is used.

    Raises `InputError` where the model has no 2-D convolution to read the channels from.
    """
    height, width = (size, size) if isinstance(size, int) else size or (SIDES[0], SIDES[0])
    if height < 1 or width < 1:
        raise InputError(f"an image of {height}x{width} pixels has no area; pass a positive size")
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        raise InputError(
            f"{type(model).__name__} has no nn.Conv2d to read the number of input channels from; pass example_inputs: a tensor, "
            "a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs)"
        )
    shape = (1, convolution.in_channels, height, width)
    weight = convolution.weight
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=generator)
    return Inputs((image.to(device=weight.device, dtype=weight.dtype),), {})


def candidates(model: nn.Module, size: int | tuple[int, int] | None = None) -> Iterator[Inputs]:
    """Inferred inputs to try in order: the size given, or each of `SIDES`."""
    for side in SIDES if size is None else (size,):
        yield example_inputs_for(model, side)


def enlarged(inputs: Inputs, *, height: bool = True) -> Inputs:
    """The same inputs with every image-like tensor (N, C, H, W) larger, and random; wider only, where `height` is not set.

    Sides grow by half where that keeps multiples of 32, else by 32, and become twice as long where they were no multiples.
    """

    def grown(side: int) -> int:
        if side % 32:
            return side * 2
        return side * 3 // 2 if side % 64 == 0 else side + 32

    def larger(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() != 4 or not tensor.is_floating_point():
            return tensor
        old_height, old_width = tensor.shape[-2:]
        shape = (*tensor.shape[:2], grown(old_height) if height else old_height, grown(old_width))
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return image.to(device=tensor.device, dtype=tensor.dtype)

    return inputs.map(larger)


def describe(value: Any) -> Any:
    """`value` as plain data that JSON can hold: shapes and dtypes for tensors, the values of numbers and strings.

    Raises `InputError` for anything else, which cannot be made again from a description.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [describe(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    if isinstance(value, Inputs):
        return {"args": describe(value.args), "kwargs": describe(value.kwargs)}
    raise InputError(f"a {type(value).__name__} cannot be described as plain data")


def build(description: Any, make: Callable[[list[int], torch.dtype], torch.Tensor]) -> Any:
    """The value that `describe` described, its tensors made by `make(shape, dtype)`."""
    if "tensor" in description:
        return make(list(description["tensor"]), getattr(torch, description["dtype"]))
    if "args" in description:
        return Inputs(build(description["args"], make), build(description["kwargs"], make))
    ((form, content),) = description.items()
    if form == "size":
        return torch.Size(content)
    if form == "value":
        return content
    if form in ("tuple", "list"):
        items = [build(item, make) for item in content]
        return tuple(items) if form == "tuple" else items
    if form == "dict":
        return {key: build(item, make) for key, item in content.items()}
    raise InputError(f"{form!r} is not a description of a value")
