"""How far the upsamplers of a model move their points: `offsets`."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..console import console, words
from ..nn import arguments
from ..nn.dysample import DySample
from ..probe.inputs.inputs import as_inputs
from ..probe.preserve import leaving_no_trace
from ..surgery.wrappers import patched_models
from .groups import upsamplers


@dataclasses.dataclass(frozen=True)
class Moved:
    """How far one upsampler moves its points, in pixels of the map that it reads: lengths of offsets."""

    path: str
    mean: float
    p95: float
    """The 95th percentile."""
    by_content: float
    """The mean length of what depends on the map: what is left after the mean offset of each sub-pixel of each group."""


@dataclasses.dataclass(frozen=True)
class Offsets:
    """What `offsets` found, a row for each DySample that ran. As text, a table."""

    rows: tuple[Moved, ...]

    def __str__(self) -> str:
        text = io.StringIO()
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("upsampler")
        for title in ("mean", "95 %", "by content"):
            table.add_column(title, justify="right")
        for row in self.rows:
            table.add_row(words(row.path), *(f"{value:.3g}" for value in (row.mean, row.p95, row.by_content)))
        console(file=text, width=100).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


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
