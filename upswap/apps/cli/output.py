"""The one way from a command to the terminal: lines, errors, JSON and tables, and what is shown while something takes time.

Commands hand over texts as they are; here they are made fit for where they go.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ...shown import one_line, shown

if TYPE_CHECKING:
    from rich.console import Console

#: Width for pipes and files, where there is no terminal to measure.
_PIPE_WIDTH = 200


def say(text: str, *, err: bool = False) -> None:
    """Lines as they stand, neither wrapped nor styled."""
    click.echo(shown(text), err=err)


def note(text: str) -> None:
    """Something to know, in a line on stderr."""
    say(f"note: {one_line(text)}", err=True)


def tell_error(text: str) -> None:
    """What went wrong, on stderr."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    say(text, err=True)


def say_json(data: Any, *, indent: int | None = 2, sort_keys: bool = True) -> None:
    """Data for a program, on stdout. All but ASCII is escaped in it, and the one control character that is ASCII to JSON."""
    click.echo(json.dumps(data, indent=indent, sort_keys=sort_keys).replace("\x7f", "\\u007f"))


def stdout() -> Console:
    """The console for results."""
    from ...console import console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return console(width=width)


def stderr() -> Console:
    """The console for progress."""
    from ...console import console

    return console(stderr=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes time; nothing where stderr is no terminal."""
    from ...console import words

    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(words(text)):
        yield
