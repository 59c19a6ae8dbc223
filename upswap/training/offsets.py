"""How far the upsamplers of a model move their points: `offsets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import arguments
from ..nn.dysample import DySample
from ..probe.inputs.inputs import as_inputs
from ..probe.preserve import leaving_no_trace
from ..surgery.wrappers import patched_models
from .groups import upsamplers
from .row import Moved


@dataclasses.dataclass(frozen=True)
class Offsets:
    """What `offsets` found, a row for each DySample that ran. As text, a table."""

    rows: tuple[Moved, ...]

    def __str__(self) -> str:
        from .table import of_offsets

        return of_offsets(self.rows)


def offsets(model: nn.Module, example_inputs: Any) -> Offsets:
    """How far each DySample of a patched model moves its points, in pixels of the map that it reads, in one run in eval mode.

    The model is left as it was. Upsamplers of other kinds, and those that the run does not reach, have no row.

    Args:
        model: a patched model, or one that holds patched ones. One that `torch.compile` made shows nothing: give the original.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `(args, kwargs)`.

    Raises:
        PlanError: the model is not patched.
        InputError: `example_inputs` is none of these.
    """
    patched_models(model)
    found: dict[str, list[Tensor]] = {}
    given = as_inputs(example_inputs)
    with leaving_no_trace(model), torch.no_grad():
        for path, upsampler in upsamplers(model).items():
            for inner, module in upsampler.named_modules():
                if isinstance(module, DySample):
                    at = found.setdefault(f"{path}.{inner}" if inner else path, [])
                    module.register_forward_pre_hook(_keep(at), with_kwargs=True)
        model(*given.args, **given.kwargs)
    return Offsets(tuple(_moved(path, calls) for path, calls in found.items() if calls))


def _keep(found: list[Tensor]) -> Callable[..., None]:
    """A hook that adds the offsets of a call: (groups * sub-pixels, 2, everything else)."""

    def hook(module: DySample, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x, *given = args
        size, scale_factor = (*given, None, None)[:2]
        size, scale_factor = kwargs.get("size", size), kwargs.get("scale_factor", scale_factor)
        if not arguments.target(x, size, scale_factor, module.scale).smaller:
            found.append(_by_cell(torch.stack(module.offsets(x, size, scale_factor), dim=2), x))

    return hook


def _by_cell(moves: Tensor, x: Tensor) -> Tensor:
    """(B, groups, 2, h, w) -> (groups * sub-pixels, 2, N); where the ratio is no whole number, all are one sub-pixel."""
    batch, groups, _, *size = moves.shape
    cells = [target // source for target, source in zip(size, x.shape[2:], strict=True)]
    if any(cell * source != target for cell, source, target in zip(cells, x.shape[2:], size, strict=True)):
        cells = [1, 1]
    split = moves.reshape(batch, groups, 2, size[0] // cells[0], cells[0], size[1] // cells[1], cells[1])
    return split.permute(1, 4, 6, 2, 0, 3, 5).reshape(groups * cells[0] * cells[1], 2, -1)


def _moved(path: str, calls: list[Tensor]) -> Moved:
    lengths = torch.cat([moves.norm(dim=1).flatten() for moves in calls])
    content = torch.cat([(moves - moves.mean(dim=2, keepdim=True)).norm(dim=1).flatten() for moves in calls])
    rank = max(1, round(0.95 * lengths.numel()))
    return Moved(path, float(lengths.mean()), float(lengths.kthvalue(rank).values), float(content.mean()))
