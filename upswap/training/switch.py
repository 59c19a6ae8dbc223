"""The original resizes again, for a while: the patched model against itself."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..errors import SaveError
from ..nn.sampling.positions import Mapping, Mode
from ..plan.site import Site
from ..surgery.apply import original_layer, plan_of
from ..surgery.wrappers import patched_models

M = TypeVar("M", bound=nn.Module)


@contextlib.contextmanager
def disabled(model: M) -> Iterator[M]:
    """Inside, a patched model runs its original resizes: `with upswap.disabled(model): before = model(x)`.

    It computes then what `unpatch` would give, with the host's weights as they are. Nothing else of the model changes; training
    inside reaches the host alone. A model is disabled for the whole process, not for one thread, until the last of several uses
    ends. A copy made inside, as a predictor makes one, is disabled for as long. Pickling inside is an error. A backward pass that
    runs forwards again, as activation checkpointing does, belongs inside too.

    Args:
        model: a patched model, or one that holds patched ones: wrapped, compiled, a LightningModule.

    Raises:
        PlanError: the model is not patched.
    """
    entered: list[_Original] = []
    try:
        for patched in patched_models(model).values():
            for site in plan_of(patched).swapped:
                original = _Original.put(site, patched.get_submodule(cast(str, site.module)))
                entered.append(original)
        yield model
    finally:
        for original in reversed(entered):
            original.take_out()


class _Original:
    """In the place of an upsampler's `forward` while it is disabled: the resize that the upsampler stands for."""

    def __init__(self, site: Site, upsampler: nn.Module, layer: nn.Module | None, before: Any) -> None:
        self._site, self._upsampler = site, upsampler
        self._layer, self._before = layer, before
        self._uses = 0
        self._copies: list[weakref.ref[nn.Module]] = []

    @classmethod
    def put(cls, site: Site, upsampler: nn.Module) -> _Original:
        """Disable an upsampler, once more where it is disabled already."""
        there = upsampler.__dict__.get("forward")
        original = there if isinstance(there, cls) else cls(site, upsampler, original_layer(upsampler), there)
        upsampler.__dict__["forward"] = original
        original._uses += 1
        return original

    def take_out(self) -> None:
        """Undo one `put`; the last one gives the upsampler and its copies their own forward back."""
        self._uses -= 1
        if self._uses:
            return
        self._upsampler.__dict__.pop("forward", None)
        if self._before is not None:
            self._upsampler.__dict__["forward"] = self._before
        for ref in self._copies:
            twin = copied.__dict__.get("forward") if (copied := ref()) is not None else None
            if isinstance(twin, _Original):
                twin.take_out()

    def __call__(
        self, x: torch.Tensor, size: Any = None, scale_factor: Any = None, guide: Any = None, both: bool = False
    ) -> Any:
        """(N, C, H, W) to `size`, by `scale_factor`, or as the resize before the patch has it where neither is given.

        A guide stays what it is: with `both` it comes first.
        """
        out = self._resized(x, size, scale_factor)
        return (guide, out) if both else out

    def _resized(self, x: torch.Tensor, size: Any, scale_factor: Any) -> torch.Tensor:
        if size is None and scale_factor is None:
            if self._layer is not None:
                return cast(torch.Tensor, self._layer.forward(x))  # its hooks run for the upsampler
            scale_factor = self._site.scale  # which a call on the graph route leaves to the upsampler
        return Mapping(cast(Mode, self._site.mode), self._site.align_corners).resize(x, size, scale_factor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of the copied upsampler, until this one is taken out."""
        twin = _Original(self._site, memo[id(self._upsampler)], *copy.deepcopy((self._layer, self._before), memo))
        twin._uses = 1
        self._copies.append(weakref.ref(twin._upsampler))
        return twin

    def __reduce__(self) -> Any:
        raise SaveError(
            "the model is disabled, and would be so in the file for ever: save it outside of upswap.disabled"
        )
