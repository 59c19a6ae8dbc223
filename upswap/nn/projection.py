"""The weights from which an upsampler predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import OptionError

# How often an initialisation writes to a parameter at most, with room: torch's own do so up to five times.
_MOST_WRITES = 16

# Beside the modules, not in them: no file has it.
_noted: WeakKeyDictionary[nn.Module, list[tuple[int, int]]] = WeakKeyDictionary()


class KnownValues(nn.Module):
    """A module that knows whether the values of its own parameters are those that it, or a load, put there."""

    def note_values(self) -> None:
        """Take the values as they are for known: the upsampler's own, or loaded."""
        _noted[self] = self._versions()

    def was_changed(self) -> bool:
        """Whether the parameters were written to, or replaced, since their values were known. A step of an optimiser does."""
        return _noted.get(self) != self._versions()

    def may_be_trained(self) -> bool:
        """Whether the parameters were written to more often than an initialisation does, or are given gradients."""
        if any(parameter.is_leaf and parameter.grad is not None for parameter in self.parameters(recurse=False)):
            return True
        pairs = zip(_noted.get(self, []), self._versions(), strict=False)
        return any(old[0] == new[0] and new[1] - old[1] > _MOST_WRITES for old, new in pairs)

    def _versions(self) -> list[tuple[int, int]]:
        own = self.parameters(recurse=False)
        return [(id(parameter), parameter._version) for parameter in own if not parameter.is_inference()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast or move the parameters, which changes no value that was known."""
        known = not self.was_changed()
        super()._apply(fn, recurse)
        if known:
            self.note_values()
        return self

    def __setstate__(self, state: Any) -> None:
        """Copies and files give known values."""
        super().__setstate__(state)
        self.note_values()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(f"{prefix}{name}" in state_dict for name in self._parameters):
            self.note_values()


class Affine(KnownValues):
    """Weight and bias that an upsampler applies itself; not to be called.

    It is no layer of torch's, whose keys it has: code that initialises, quantises or adapts all convolutions of a model would
    change the weights, or take them away, without the upsampler hearing of it.
    """

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    _is_hf_initialized = True  # transformers passes it by; see `host_init.py`

    if TYPE_CHECKING:  # TorchScript cannot read this annotation
        bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Memory without values: the upsampler's `reset_parameters` gives them, and draws no random number for it."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        values = torch.empty(shape[0], device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    def extra_repr(self) -> str:
        """The shape, for `print(model)`."""
        return f"{', '.join(map(str, self.weight.shape))}{'' if self.bias is not None else ', bias=False'}"


class Projection(Affine):
    """Weight (out, in / groups, k, k) and bias (out) of a convolution that an upsampler computes itself; not to be called."""

    __module__ = "upswap.nn"  # the address in files, which outlive the file it stands in

    groups = 1  # in files of before, which do not say it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        kernel_size: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__((out_channels, in_channels // groups, kernel_size, kernel_size), bias, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        if groups != 1:
            self.groups = groups

    def extra_repr(self) -> str:
        """The channels, for `print(model)`."""
        side = self.weight.shape[-1]
        kernel = "" if side == 1 else f", kernel_size={side}"
        groups = "" if self.groups == 1 else f", groups={self.groups}"
        return (
            f"{self.in_channels}, {self.out_channels}{kernel}{groups}{'' if self.bias is not None else ', bias=False'}"
        )


def weights_of(upsampler: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Weight and bias that an upsampler has at a path, zeros for a bias it does not have.

    Raises `OptionError` where something else was put in its place. Files of upswap 0.1 have an `nn.Conv2d` there.
    """
    module = upsampler
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]  # the upsampler made it
    if not isinstance(module, Affine | nn.Conv2d):
        kind = type(upsampler).__name__
        raise OptionError(
            f"{kind}.{path} was replaced by a {type(module).__name__}, which would be ignored: a {kind} reads the "
            "weights of its projections and does not call them. Leave it out of what wraps or replaces layers"
        )
    weight, bias = module.weight, module.bias
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
