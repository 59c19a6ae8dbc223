"""The record of a run: a file of JSON lines, the settings first and then a row a model.

Every worker appends to it, also from other machines of a cluster that share the folder. A line is whole or, after a kill,
the last one and without its end: it is then left out when the file is read, and cut off before the next is written.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..._version import __version__
from ...errors import OptionError, SourceError
from ...files import atomic
from .rows import Row, Settings

FILE = "journal.jsonl"
SCHEMA = 1

_END = b"\n"


class Journal:
    """The journal in the folder of a run. What was read of it is kept, so that only what is new is read again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._header: dict[str, Any] | None = None
        self._rows: dict[str, Row] = {}

    def start(self, settings: Settings) -> None:
        """Begin a journal, or go on with one.

        Raises:
            OptionError: the folder has the journal of a run with other settings; those that differ are named.
            SourceError: its journal is not one that this version reads.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = json.loads(json.dumps(settings.identity()))
        with self._open() as file:
            if self._header is None:
                started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                _write(file, {"schema": SCHEMA, "upswap": __version__, "started": started, "settings": own})
                return
            found = self._header["settings"]
        before, now = _flat(found), _flat(own)
        other = [key for key in now if before.get(key) != now[key]]
        if other:
            was = "; ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in other)
            raise OptionError(f"{self.path.parent} has a run with other settings ({was}); name another folder with -o")

    def append(self, row: Row) -> bool:
        """Write a row to the disk; False, and nothing is written, where there is one of that source."""
        with self._open() as file:
            if row.source in self._rows:
                return False
            _write(file, row.to_dict())
            return True

    def rows(self) -> dict[str, Row]:
        """The rows there are, by source; none where there is no journal."""
        if self.path.exists():
            with self._open():
                pass
        return dict(self._rows)

    def header(self) -> dict[str, Any]:
        """What the journal says of its run: when it began, with what version and settings."""
        self.rows()
        return dict(self._header or {})

    def forget(self, sources: Iterable[str]) -> None:
        """Take the rows of these sources out, to do them again."""
        gone = set(sources)
        with self._open() as file:
            file.seek(0)
            lines = file.read().split(_END)[:-1]
            kept = [line for line in lines[1:] if json.loads(line).get("source") not in gone]
            atomic.write(self.path, lambda path: _write_lines(path, [*lines[:1], *kept]), force=True)

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, with no other worker at it, and all of its rows read."""
        with open(self.path, "a+b") as file:
            _lock(file)
            self._catch_up(file)
            yield file

    def _catch_up(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) != self._identity or status.st_size < self._offset:  # another file: read anew
            self._identity, self._offset = (status.st_dev, status.st_ino), 0
            self._header, self._rows = None, {}
        file.seek(self._offset)
        data = file.read()
        end = data.rfind(_END) + 1
        if end != len(data):  # a kill in the middle of a line
            file.truncate(self._offset + end)
        for line in data[:end].split(_END)[:-1]:
            if self._header is None:
                self._header = self._checked(line)
            else:
                row = Row.from_dict(json.loads(line))
                self._rows[row.source] = row
        self._offset += end

    def _checked(self, line: bytes) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads(line)
            if header["schema"] == SCHEMA:
                return header
        except (ValueError, KeyError, TypeError):
            header = {}
        raise SourceError(
            f"{self.path} is not a journal that this upswap ({__version__}) reads (written by {header.get('upswap')}); "
            "name another folder with -o"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings.get("options", {}), **{key: value for key, value in settings.items() if key != "options"}}


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where runs have one writer at a time only by luck; a line is still one write
        return
    fcntl.lockf(file, fcntl.LOCK_EX)  # given up when the file is closed, or its process dies


def _write(file: BinaryIO, data: dict[str, Any]) -> None:
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(data, sort_keys=True).encode() + _END)
    file.flush()
    os.fsync(file.fileno())


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    path.write_bytes(b"".join(line + _END for line in lines))
