"""Pictures of a run, in the manner of the paper's complexity figure: what an upsampler costs in time against its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import OptionError
from .upsampling import Row

_FAMILIES = {"dysample": "#c0392b", "reference": "#7f8c8d", "carafe": "#8e44ad", "conv": "#2471a3"}
_OTHERS = "#1e8449"
_TITLES = {"flops": "FLOPs", "parameters": "parameters"}
_LABEL_STEP = 0.055  # of a panel's height


class _Setting(NamedTuple):
    """What the points of a panel have in common."""

    shape: tuple[int, ...]
    scale: int
    groups: int | None
    dtype: str
    what: str
    threads: int

    def title(self) -> str:
        size = "x".join(map(str, self.shape))
        groups = "" if self.groups is None else f", {self.groups} groups"
        return f"{size}, x{self.scale}{groups}, {self.dtype}\n{self.what}, threads {self.threads}"


def require_matplotlib() -> None:
    """`OptionError` where matplotlib is not installed, before anything is measured for it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--plot draws with matplotlib, which is not installed: pip install 'upswap[bench]'"
        ) from error


def plot(rows: Sequence[Row], file: Path, against: str = "flops") -> None:
    """Write a picture of `rows`, PNG or SVG as the suffix says: a panel a setting, a point a contender, latency upwards."""
    figure, axes_of = _figure(list(dict.fromkeys(map(_setting, rows))))
    for setting, axes in axes_of.items():
        points = [row for row in rows if _setting(row) == setting and row.ms is not None]
        _panel(axes, points, against)
        axes.set_title(setting.title(), fontsize=9)
    figure.savefig(file, dpi=150)


def plot_sweep(rows: Sequence[Row], file: Path, along: str) -> None:
    """Write a picture of a sweep: a panel a setting, a line a contender, the ratio to bilinear over what is varied."""
    panels: dict[_Setting, list[Row]] = {}
    for row in rows:
        panels.setdefault(_setting(row)._replace(shape=(), scale=0, groups=None), []).append(row)
    figure, axes_of = _figure(list(panels))
    for setting, axes in axes_of.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in panels[setting]:
            if row.ratio is not None:
                lines.setdefault(_name(row), []).append((_varied(row, along), row.ratio))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=name)
        axes.set(xscale="log", yscale="log", xlabel=along, ylabel="time / bilinear")
        axes.grid(True, linewidth=0.3)
        # At what was measured: of powers of ten a scale of 3 would be "3 x 10^0".
        axes.set_xticks(sorted({_varied(row, along) for row in panels[setting]}), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        _plain_heights(axes)
        axes.set_title(f"{setting.dtype}, {setting.what}, threads {setting.threads}", fontsize=9)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(file, dpi=150)


def _figure(settings: Sequence[_Setting]) -> tuple[Any, dict[_Setting, Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(settings) :]:
        axes.set_visible(False)
    return figure, dict(zip(settings, grid.flat, strict=False))


def _panel(axes: Any, rows: Sequence[Row], against: str) -> None:
    """One point a contender; names in a column at the right, in the order of latency, each tied to its point."""
    sizes = {id(row): getattr(row, against) or 0 for row in rows}
    smallest = min(filter(None, sizes.values()), default=1)
    # Logarithmic, and yet with a place for 0: bilinear has no parameters, nearest no FLOPs.
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.8)
    axes.set(yscale="log", xlabel=_TITLES[against], ylabel="ms")
    _plain_heights(axes)
    axes.grid(True, linewidth=0.3)
    ordered = sorted(rows, key=lambda row: row.ms or 0.0)
    for row in ordered:
        axes.plot(sizes[id(row)], row.ms, "s" if row.compiled else "o", color=_colour(row), markersize=5)
    axes.margins(0.08)
    low, high = map(math.log, axes.get_ylim())
    heights = _spread([(math.log(row.ms or 1.0) - low) / (high - low) for row in ordered])
    for row, height in zip(ordered, heights, strict=True):
        axes.annotate(
            f"{_name(row)}  {row.ratio:.2f}" if row.ratio is not None else _name(row),
            xy=(sizes[id(row)], row.ms),
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=_colour(row),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": _colour(row), "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _plain_heights(axes: Any) -> None:
    """Numbers at a logarithmic y axis as they are written, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _spread(wanted: Sequence[float]) -> list[float]:
    """Heights in a panel near the wanted ones, which ascend, with room for a line of text between neighbours."""
    step = min(_LABEL_STEP, 1 / max(1, len(wanted)))
    heights: list[float] = []
    for index, height in enumerate(wanted):
        ceiling = 1 - step * (len(wanted) - 1 - index)  # room for those above
        heights.append(min(max(height, heights[-1] + step if heights else 0.0), ceiling))
    return heights


def _name(row: Row) -> str:
    layout = " channels_last" if row.layout == "channels_last" else ""
    return f"{row.contender}{layout}{' compiled' if row.compiled else ''}"


def _colour(row: Row) -> str:
    return next((colour for prefix, colour in _FAMILIES.items() if row.contender.startswith(prefix)), _OTHERS)


def _varied(row: Row, along: str) -> float:
    _batch, channels, height, width = row.shape
    values = {"hw": height * width, "channels": channels, "scale": row.scale, "groups": row.groups or 0}
    return values[along]


def _setting(row: Row) -> _Setting:
    return _Setting(row.shape, row.scale, row.groups, row.dtype, row.what, row.threads)
