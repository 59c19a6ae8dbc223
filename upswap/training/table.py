"""The rows of a `Status`, and of `Offsets`, for people."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from ..console import console, words
from ..shown import Html, tag

if TYPE_CHECKING:
    from .row import Moved, Row

_TITLES = ("upsampler", "state", "trainable", "optimiser", "EMA")


def as_text(rows: Iterable[Row]) -> str:
    """A table, and below it what is wrong and what to do."""
    rows = tuple(rows)
    text, table = io.StringIO(), _table(_TITLES)
    for row in rows:
        table.add_row(*map(words, _cells(row)))
    printer = console(file=text, width=100)
    printer.print(table)
    for problem in dict.fromkeys(problem for row in rows for problem in row.problems):
        paths = [row.path for row in rows if problem in row.problems]
        more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        # What is pasted stays in its line.
        printer.print(words(f"{', '.join(paths[:2])}{more}: {problem}"), soft_wrap=True)
    return _lines(text)


def of_offsets(rows: Iterable[Moved]) -> str:
    """A table of lengths in pixels."""
    text, table = io.StringIO(), _table(("upsampler", "mean", "95 %", "by content"))
    for row in rows:
        table.add_row(words(row.path), *(f"{length:.3g}" for length in (row.mean, row.p95, row.by_content)))
    console(file=text, width=100).print(table)
    return _lines(text)


def _table(titles: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title)
    return table


def _lines(text: io.StringIO) -> str:
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def as_html(rows: Iterable[Row]) -> Html:
    """The same as an HTML table."""
    head = tag("tr", *(tag("th", title) for title in (*_TITLES, "problems")))
    lines = (tag("tr", *(tag("td", cell) for cell in (*_cells(row), "; ".join(row.problems)))) for row in rows)
    return tag("table", head, *lines)


def _cells(row: Row) -> tuple[str, ...]:
    said = {
        True: "yes",
        False: "no" if row.ok else "NO",
        None: "-",
    }  # a model that is loaded to be run is frozen as a whole
    return row.path, row.state, said[row.trainable], said[row.in_optimizer], said[row.in_ema]
