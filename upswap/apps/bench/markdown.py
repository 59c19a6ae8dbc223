"""Upsamplers side by side as tables of Markdown, a row for what each costs forward and in training."""

from __future__ import annotations

from collections.abc import Sequence

from .setting import FORWARD, TRAINING
from .upsampling import Row

_HEADINGS = ("upsampler", "parameters", "MFLOPs", "forward", "training", "peak MB, forward", "training", "saved MB")


def tables(rows: Sequence[Row]) -> str:
    """A table for each shape, scale, dtype and number of threads. Times are over bilinear's: the medians of `Row.ratio`."""
    groups: dict[tuple[object, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        group = groups.setdefault((row.shape, row.scale, row.groups, row.dtype, row.threads), {})
        name = row.contender + (" channels_last" if row.layout == "channels_last" else "")
        group.setdefault(name + (" compiled" if row.compiled else ""), {})[row.what] = row
    return "\n\n".join(_table(group) for group in groups.values())


def _table(group: dict[str, dict[str, Row]]) -> str:
    first = next(row for found in group.values() for row in found.values())
    shape = "x".join(map(str, first.shape))
    groups = "" if first.groups is None else f", groups {first.groups}"
    lines = [f"{shape}, scale {first.scale}{groups}, {first.dtype}, threads {first.threads}:", ""]
    lines += [f"| {' | '.join(_HEADINGS)} |", f"|---|{'---:|' * (len(_HEADINGS) - 1)}"]
    for name, found in group.items():
        forward, training = found.get(FORWARD), found.get(TRAINING)
        either = forward or training
        problem = next((row.problem for row in found.values() if row.problem), "")
        if either is None or problem:
            lines.append(f"| `{name}` | cannot be run: {problem} |" + " |" * (len(_HEADINGS) - 2))
            continue
        cells = [
            f"{either.parameters:,d}" if either.parameters is not None else "",
            _number(None if forward is None else forward.flops, ".1f", 1e6),
            *(_number(None if row is None else row.ratio, ".2f") for row in (forward, training)),
            *(_number(None if row is None else row.peak_memory, ".1f", 1e6) for row in (forward, training)),
            _number(None if training is None else training.saved, ".1f", 1e6),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:{form}}"
