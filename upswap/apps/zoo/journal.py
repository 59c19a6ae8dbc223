"""The record of a run: a file of JSON lines, the settings first, then the files that are the run's, and a row a model.

Every worker appends to it, also from other machines of a cluster that share the folder. A line is whole or, after a kill,
the last one and no JSON: it is then left out when the file is read, and cut off before the next is written. Reading
changes nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..._version import __version__
from ...errors import OptionError, SaveError, SourceError
from ...files import atomic
from .rows import FORMATS, Row, Settings

FILE = "journal.jsonl"
SCHEMA = 1

#: Beside the models, the files that belong to a run, and so to a folder with its journal.
REPORTS = ("report.csv", "report.html")

_FOREIGN = "this is no journal of upswap, and stays as it is; name another folder"
_NO_ROW = "this is no row of a journal ({}). Mend the line, or remove it and run the command again"

_END = b"\n"


class Journal:
    """The journal in the folder of a run. What was read of it is kept, so that only what is new is read again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._forget_all()

    def start(
        self, settings: Settings, targets: Callable[[Mapping[str, str]], Mapping[str, Path]], *, force: bool = False
    ) -> dict[str, Path]:
        """Begin a journal, or go on with one; the file of each source, which is the run's from now on.

        `targets` gives the files, which lie in the folder, from the names that sources of earlier runs have.

        Raises:
            OptionError: the folder has the journal of a run with other settings; those that differ are named.
            SourceError: its journal is not one that this version reads, or of something else.
            SaveError: a file of the run is there already and of no run, and `force` is not set; or one is a symbolic link.
        """
        own = json.loads(json.dumps(settings.identity()))
        with self._reported():
            if not os.path.lexists(self.path):
                self._begin(own, [*REPORTS, *(path.name for path in targets({}).values())], force=force)
            with self._open() as file:
                self._check_settings(own)
                found = dict(targets(self._targets))
                check_no_links(self.path.parent, [FILE, *REPORTS, *(path.name for path in found.values())])
                new = {source: path.name for source, path in found.items() if source not in self._targets}
                self._check_free(new.values(), force=force)
                if new:
                    self._write(file, {"targets": new})
        return found

    def append(self, row: Row) -> bool:
        """Write a row to the disk; False, and nothing is written, where there is one of that source."""
        with self._reported(), self._open() as file:
            if row.source in self._rows:
                return False
            self._write(file, row.to_dict())
            return True

    def rows(self) -> dict[str, Row]:
        """The rows there are, by source; none where there is no journal."""
        self._read()
        return dict(self._rows)

    def header(self) -> dict[str, Any]:
        """What the journal says of its run: when it began, with what version and settings."""
        self._read()
        return dict(self._header or {})

    def targets(self) -> dict[str, str]:
        """The names of the files that are the run's, by source."""
        self._read()
        return dict(self._targets)

    def forget(self, sources: Iterable[str]) -> None:
        """Take the rows of these sources out, to do them again."""
        gone = set(sources)
        with self._reported(), self._open() as file:
            file.seek(0)
            lines = [line for line in file.read().split(_END) if line.strip()]
            kept = [line for line in lines[1:] if json.loads(line).get("source") not in gone]
            atomic.write(self.path, lambda path: _write_lines(path, [*lines[:1], *kept]), force=True)

    # -- writing

    def _begin(self, settings: dict[str, Any], names: Iterable[str], *, force: bool) -> None:
        self._check_free(names, force=force)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        header = {"schema": SCHEMA, "upswap": __version__, "started": started, "settings": settings}
        try:
            atomic.write(self.path, lambda path: _write_lines(path, [_line(header)]))
        except SaveError:
            if not self.path.exists():  # else another process was first
                raise

    def _check_settings(self, own: dict[str, Any]) -> None:
        before, now = _flat((self._header or {})["settings"]), _flat(own)
        other = [key for key in now if before.get(key) != now[key]]
        if other:
            was = "; ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in other)
            raise OptionError(f"{self.path.parent} has a run with other settings ({was}); name another folder with -o")

    def _check_free(self, names: Iterable[str], *, force: bool) -> None:
        folder = self.path.parent
        there = [] if force else [str(folder / name) for name in names if os.path.lexists(folder / name)]
        if there:
            more = f" and {len(there) - 3} more" if len(there) > 3 else ""
            raise SaveError(
                f"{', '.join(there[:3])}{more}: there already, and not of a run in {folder}. Name another folder with -o, "
                "or replace with --force"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, with no other worker at it, all of its rows read, and without a line that a kill cut off."""
        while True:
            with open(self.path, "a+b", opener=lambda path, flags: os.open(path, flags & ~os.O_CREAT)) as file:
                _lock(file)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):  # `forget` came between
                    continue
                self._catch_up(file)
                file.truncate(self._offset)
                yield file
                return

    def _write(self, file: BinaryIO, data: dict[str, Any]) -> None:
        file.seek(-1, os.SEEK_END)
        begin = b"" if file.read() == _END else _END
        file.write(begin + _line(data) + _END)
        file.flush()
        os.fsync(file.fileno())

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error.strerror or error}") from error

    # -- reading

    def _read(self) -> None:
        if os.path.lexists(self.path):
            try:
                with open(self.path, "rb") as file:
                    self._catch_up(file)
            except OSError as error:
                raise SourceError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def _forget_all(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._offset = self._lines = 0
        self._last = b""
        self._header: dict[str, Any] | None = None
        self._targets: dict[str, str] = {}
        self._rows: dict[str, Row] = {}

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what is new up to a last line that is no JSON and has no end: a kill, or a worker in the middle of it."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        file.seek(self._offset - len(self._last))
        if identity != self._identity or file.read(len(self._last)) != self._last:  # another file, or edited: read anew
            self._forget_all()
            self._identity = identity
        file.seek(self._offset)
        *lines, last = file.read().split(_END)
        for line in lines:
            self._take(line)
            self._pass(line + _END)
            self._lines += 1
        if self._header is None or _is_json(last):
            self._take(last)
            self._pass(last)
        if self._header is None:  # there are no lines but empty ones
            raise self._wrong(_FOREIGN)

    def _pass(self, data: bytes) -> None:
        self._offset += len(data)
        self._last = data

    def _take(self, line: bytes) -> None:
        """Add what a line says."""
        if not line.strip():
            return
        try:
            data = json.loads(line)
            if not isinstance(data, dict):
                raise ValueError("it is no object of JSON")
        except (ValueError, RecursionError) as error:
            raise self._wrong(_FOREIGN if self._header is None else _NO_ROW.format(error)) from error
        if self._header is None:
            self._header = self._checked(data)
            return
        try:
            if "targets" in data:
                self._targets |= {str(source): _name(name) for source, name in data["targets"].items()}
                return
            row = Row.from_dict(data)
            if row.output is not None:
                self._targets.setdefault(row.source, _name(row.output))
        except (ValueError, AttributeError) as error:
            raise self._wrong(_NO_ROW.format(error)) from error
        self._rows[row.source] = row

    def _checked(self, header: dict[str, Any]) -> dict[str, Any]:
        settings = header.get("settings")
        if header.get("schema") == SCHEMA and isinstance(settings, dict) and isinstance(settings.get("options"), dict):
            return header
        if "schema" not in header or "upswap" not in header:
            raise self._wrong(_FOREIGN)
        raise self._wrong(
            f"a journal that this upswap ({__version__}) does not read (written by {header['upswap']}); "
            "name another folder with -o"
        )

    def _wrong(self, what: str) -> SourceError:
        return SourceError(f"{self.path}, line {self._lines + 1}: {what}")


def check_no_links(folder: Path, names: Iterable[str]) -> None:
    """`SaveError` where a file of a run is a link: a folder may be somebody else's, and its links lead to any file."""
    link = next((folder / name for name in names if (folder / name).is_symlink()), None)
    if link is not None:
        raise SaveError(f"{link} is a symbolic link, which a run does not write through. Remove it")


def _name(name: Any) -> str:
    """The name of a file in the folder of a run, as a journal has it: a journal may not make a run write anywhere else."""
    if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(tuple(FORMATS.values())):
        raise ValueError(f"{name!r:.60} is no name of a file of a run")
    return name


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings.get("options", {}), **{key: value for key, value in settings.items() if key != "options"}}


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where runs have one writer at a time only by luck; a line is still one write
        return
    fcntl.lockf(file, fcntl.LOCK_EX)  # given up when the file is closed, or its process dies


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    path.write_bytes(b"".join(line + _END for line in lines))
