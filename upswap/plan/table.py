"""Sites as a table for people: everything in one line where there is room, two lines a site where there is not."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..console import console, words
from ..shown import Html, one_line, tag
from .site import Site

#: Columns needed for a table with a row a site.
WIDE = 150


def sites_table(sites: Sequence[Site], width: int) -> RenderableType:
    """The sites for a terminal of `width` columns."""
    return _wide(sites) if width >= WIDE else _narrow(sites, width)


def _wide(sites: Sequence[Site]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("site", overflow="fold", ratio=3)
    for name in ("kind", "mode", "ratio"):
        table.add_column(name, no_wrap=True)
    table.add_column("ch", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    table.add_column("reason", ratio=4)
    table.add_column("route", no_wrap=True)
    table.add_column("source", overflow="fold", ratio=2)
    for site in sites:
        table.add_row(
            words(site.name),
            site.kind,
            words(_mode(site)),
            _ratio(site),
            _channels(site),
            _shape(site),
            _decision(site),
            words(site.why),
            site.route or "",
            words(_place(site)),
        )
    return Group(table, *_legend(sites))


def _narrow(sites: Sequence[Site], width: int) -> RenderableType:
    """Two lines a site: what it is, and below it, indented, why. Nothing is left out; what is too long folds."""
    columns = [
        [_decision(s).plain, one_line(s.name), s.kind, one_line(_mode(s)), _ratio(s), _channels(s)] for s in sites
    ]
    titles = ["", "site", "kind", "mode", "ratio", "ch"]
    widths = [max(len(row[i]) for row in [titles, *columns]) for i in range(len(titles))]
    # The name gives way to the others, and then folds.
    widths[1] = max(12, min(widths[1], width - sum(widths) + widths[1] - 2 * (len(widths) - 1)))

    def line(*cells: Text) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for title, column_width in zip(titles, widths, strict=True):
            grid.add_column(width=column_width, justify="right" if title == "ch" else "left", overflow="fold")
        grid.add_row(*cells)
        return grid

    lines: list[RenderableType] = [line(*(words((title, "bold")) for title in titles))]
    indent = " " * (widths[0] + 4)
    for site, (_, *cells) in zip(sites, columns, strict=True):
        what = [_shape(site), site.route, _place(site).rpartition("/")[2]]
        about = one_line(f"{', '.join(filter(None, what))}: {site.why}")
        why = textwrap.wrap(about, max(20, width - len(indent)))
        lines += [line(_decision(site), *map(words, cells)), *(words((indent + part, "dim")) for part in why)]
    return Group(*lines, *_legend(sites))


def _legend(sites: Sequence[Site]) -> list[Text]:
    """What the abbreviations in the table stand for, where it uses any."""
    return [words(("ac: align_corners=True", "dim"))] if any(_mode(s).endswith(" ac") for s in sites) else []


def _decision(site: Site) -> Text:
    return words(("swap", "green")) if site.swap else words(("keep", "dim"))


def _mode(site: Site) -> str:
    if site.mode in ("bilinear", "bicubic", "linear", "trilinear") and site.align_corners:
        return f"{site.mode} ac"
    return site.mode


def _ratio(site: Site) -> str:
    height, width = (f"x{value:.3g}" for value in site.scale)
    return height if height == width else f"{height},{width}"


def _channels(site: Site) -> str:
    return str(site.channels) if site.channels >= 0 else "varies"


def _shape(site: Site) -> str:
    return f"{_size(site.in_shape)} -> {_size(site.out_shape)}"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:] or shape))


def _place(site: Site) -> str:
    if site.location is None or site.op == "module":  # the line is that of nn.Upsample itself
        return ""
    file = Path(site.location.file)
    return f"{file.parent.name}/{file.name}:{site.location.line}"


def as_text(sites: Sequence[Site], width: int) -> str:
    """The table as plain text, with no blanks at the ends of lines."""
    plain = console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with plain.capture() as printed:
        plain.print(sites_table(sites, width))
    return "\n".join(line.rstrip() for line in printed.get().rstrip().splitlines())


def as_html(sites: Sequence[Site]) -> Html:
    """The table as an HTML `<table>`, every text escaped."""
    rows = [
        [
            _decision(s).plain,
            s.name,
            s.kind,
            _mode(s),
            _ratio(s),
            _channels(s),
            _shape(s),
            s.why,
            s.route or "",
            _place(s),
        ]
        for s in sites
    ]
    titles = ("decision", "site", "kind", "mode", "ratio", "ch", "shape", "reason", "route", "source")
    head = tag("tr", *(tag("th", title) for title in titles))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("table", tag("thead", head), tag("tbody", *body))
