"""Text made fit for where it is shown, one function for each place: a terminal, a single line, a spreadsheet, a page.

Names of layers, reasons, settings and others' error messages may come from a stranger's file. Nothing that upswap shows goes
around these functions: `errors.py`, `console.py` and the commands' `tables.py` call them for whatever passes through.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

#: What makes a cell a formula, also in the wide form that spreadsheets read alike.
_FORMULA = tuple("=+-@＝＋－＠")  # noqa: RUF001 - meant


def shown(text: object) -> str:
    r"""Text for a terminal: what a terminal would act on, or not show, stands there as its escape. Lines stay lines.

    >>> shown("a\x1b[31mb\u202ec\r\nd")
    'a\\x1b[31mb\\u202ec\nd'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text.replace("\r\n", "\n"))


def one_line(text: object, most: int | None = None) -> str:
    r"""The same for a name or message that has to stay in its line, cut off after `most` characters.

    >>> one_line("a\nnote: all is well")
    'a\\nnote: all is well'
    """
    text = str(text)
    cut = shown(text if most is None or len(text) <= most else f"{text[:most]}...")
    return "".join(_escape(c) if c in "\n\t" else c for c in cut)


def brief(value: object, most: int = 60) -> str:
    """The `repr` of a value, cut off after `most` characters, of which no more is made than that.

    A file can have one long text in a value a thousand times.

    >>> brief([["a" * 100] * 1000, {"b": 1}, 2**40])
    "[['aaaaaaaaaaaa...aaaaaaaaaaaaa', 'aaaaaaaaaaaa...aaaaaaa..."
    >>> brief(Html("<b>"))
    'a Html'
    """
    text = _BRIEF.repr(value)
    return one_line(text if len(text) <= most else f"{text[: most - 3]}...")


class _Brief(reprlib.Repr):
    """Of values of other types than Python's own the type alone: what their `repr` makes of what is in them is not known."""

    def repr1(self, x: Any, level: int) -> str:
        return super().repr1(x, level) if type(x).__module__ == "builtins" else f"a {type(x).__qualname__}"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long ones in digits.
        return repr(x) if x.bit_length() < 128 else f"an int of {x.bit_length()} bits"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxother])

    repr_bytearray = repr_bytes


_BRIEF = _Brief()


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, in a line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Inside, the text of errors is made fit for a terminal, that of other libraries' errors behind them too.

    Python prints an error that nobody catches with all that it was raised from.
    """
    try:
        yield
    except Exception as error:
        queue: list[BaseException | None] = [error]
        seen: set[int] = set()
        while queue:
            behind = queue.pop()
            if behind is None or id(behind) in seen:
                continue
            seen.add(id(behind))
            behind.args = tuple(shown(part) if isinstance(part, str) else part for part in behind.args)
            queue += [behind.__cause__, behind.__context__]
        raise


# -- spreadsheets ---------------------------------------------------------------------------------------------------------


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute begins with an apostrophe; numbers stay numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    text = shown(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


# -- pages ----------------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup that upswap wrote. Any other text is escaped where it becomes part of one."""

    __slots__ = ()


def tag(name: str, *parts: object, **attributes: object) -> Html:
    """An element. `class_` stands for the attribute `class`, `data_v` for `data-v`.

    >>> tag("td", "<b>", tag("i", 1), class_="n")
    '<td class="n">&lt;b&gt;<i>1</i></td>'
    """
    named = (f' {key.strip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{''.join(named)}>{''.join(map(_escaped, parts))}</{name}>")


def _escaped(part: object) -> str:
    return part if isinstance(part, Html) else html.escape(shown(part))
