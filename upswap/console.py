"""The one kind of rich console, and the one way to styled text. Here alone rich's classes that take text are used.

Neither reads markup or emoji codes in a text, because a name from a file may hold any: `[red]`, `[/]`, `:warning:`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from .shown import one_line, shown


class _Console(Console):
    """Makes every string that is printed, a cell of a table as well, fit for a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def console(**settings: Any) -> Console:
    """A console; `settings` are rich's."""
    return _Console(markup=False, emoji=False, highlight=False, **settings)


def words(*parts: str | tuple[str, str]) -> Text:
    """Text in a line, of plain parts and of pairs (text, style)."""
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((one_line(text), style) for text, style in pairs))
