"""What the rows say: paired differences to the control, their intervals, and Holm's correction over the arms. See PLAN.md."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scipy import stats

#: What is compared: its heading, and whether more is better.
FIGURES = {
    "miou": ("mIoU", True),
    "accuracy": ("accuracy", True),
    "cross_entropy": ("cross-entropy", False),
    "boundary_iou_1": ("boundary IoU, 1 px", True),
    "boundary_iou_2": ("2 px", True),
    "boundary_f_1": ("boundary F, 1 px", True),
    "boundary_f_2": ("2 px", True),
}

#: What rows of one table have in common.
_TABLE = ("data", "host", "steps", "optimizer", "side", "host_steps", "host_lr")
_Row = dict[str, Any]


class Difference(NamedTuple):
    """An arm's figure less the control's, in pairs of a seed: mean, half of its 95% interval, p, and p by Holm over the arms."""

    mean: float
    half: float
    p: float
    corrected: float


def tables(rows: Sequence[_Row], control: str) -> str:
    """A table of Markdown for each data set, host and length of training."""
    groups: dict[tuple[Any, ...], list[_Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in _TABLE)].append(row)
    return "\n\n".join(_table(key, group, control) for key, group in sorted(groups.items(), key=str))


def _table(key: tuple[Any, ...], rows: Sequence[_Row], control: str) -> str:
    chosen = {arm: best(group) for arm, group in _by(rows, "arm").items()}
    lines = [", ".join(f"{name} {value}" for name, value in zip(_TABLE, key, strict=True)) + ":", ""]
    lines += [f"| arm | seeds | rate | {' | '.join(heading for heading, _ in FIGURES.values())} |"]
    lines += ["|---|---:|---:|" + "---:|" * len(FIGURES)]
    compared = {figure: differences(chosen, control, figure) for figure in FIGURES}
    for arm, group in chosen.items():
        first = group[0]
        mult = "" if first["upsampler_lr_mult"] is None else f" x {first['upsampler_lr_mult']:g}"
        cells = []
        for figure in FIGURES:
            difference = compared[figure].get(arm)
            mean = statistics.fmean(row["test"][figure] for row in group)
            cells.append(f"{mean:.3f}" if difference is None else _told(difference))
        lines.append(f"| {arm} | {len(group)} | {first['lr']:g}{mult} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(difference: Difference) -> str:
    star = "**" if difference.corrected < 0.05 else ""
    return f"{star}{difference.mean:+.3f}{star} ± {difference.half:.3f} (p {difference.corrected:.2g})"


def best(rows: Iterable[_Row]) -> list[_Row]:
    """The rows of the rates whose cross-entropy on the validation split is least, over the seeds that all rates have."""
    rates = _by(rows, "lr", "upsampler_lr_mult")
    common = set.intersection(*({row["seed"] for row in group} for group in rates.values()))
    means = {
        rate: statistics.fmean(row["val"]["cross_entropy"] for row in group if row["seed"] in common)
        for rate, group in rates.items()
        if common
    }
    rate = min(means, key=lambda each: means[each]) if means else max(rates, key=lambda each: len(rates[each]))
    return sorted(rates[rate], key=lambda row: row["seed"])


def differences(chosen: dict[str, list[_Row]], control: str, figure: str) -> dict[str, Difference]:
    """Each arm against the control on the test split, in pairs of a seed; none where there are fewer than two pairs."""
    of_control = {row["seed"]: row["test"][figure] for row in chosen.get(control, ())}
    found: dict[str, tuple[float, float, float]] = {}
    for arm, rows in chosen.items():
        pairs = [row["test"][figure] - of_control[row["seed"]] for row in rows if row["seed"] in of_control]
        if arm != control and len(pairs) > 1:
            test = stats.ttest_1samp(pairs, 0.0)
            interval = test.confidence_interval(0.95)
            found[arm] = statistics.fmean(pairs), float(interval.high - interval.low) / 2, float(test.pvalue)
    corrected = holm({arm: p for arm, (_, _, p) in found.items()})
    return {arm: Difference(*values, corrected[arm]) for arm, values in found.items()}


def holm(values: dict[str, float]) -> dict[str, float]:
    """P values corrected for how many there are (Holm, Scandinavian Journal of Statistics, 1979)."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for done, name in enumerate(sorted(values, key=lambda each: values[each])):
        largest = max(largest, min(1.0, (len(values) - done) * values[name]))
        corrected[name] = largest
    return corrected


def _by(rows: Iterable[_Row], *names: str) -> dict[Any, list[_Row]]:
    groups: dict[Any, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)].append(row)
    return dict(groups)
