"""Files that are either whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from .errors import SaveError


def write(path: Path, fill: Callable[[Path], None], *, force: bool = False) -> None:
    """Write the file `path` by calling `fill` with the path of a new, empty file to write to.

    That is a temporary file in the same folder; it reaches the disk, then takes the name `path` in one step. If
    anything fails on the way, what stood at `path` before still does and the temporary file is gone. A symbolic link is
    followed.

    Raises:
        SaveError: the folder is missing or read-only, the disk is full, or `path` exists and `force` is not set.
    """
    check(path, force=force)
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not `tempfile`: that makes files only their owner can read, and the target keeps the mode it was made with.
        with open(temporary, "xb"):
            pass
        fill(temporary)
        _sync(temporary, os.O_RDWR)
        check(path, force=force)
        os.replace(temporary, path)
    except OSError as error:
        raise SaveError(_reason(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    # The new name itself is durable after this; some file systems cannot do it, and the file is whole all the same.
    with contextlib.suppress(OSError):
        _sync(path.parent, os.O_RDONLY)


def check(path: Path, *, force: bool = False) -> None:
    """`SaveError` where `write` would fail for a reason that shows before the work is done."""
    folder = path.parent
    if path.is_dir():
        raise SaveError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise SaveError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(f"{path} cannot be written: the folder {folder} is read-only. Name another place with -o")
    if path.exists() and not force:
        raise SaveError(f"{path} exists already; --force (in Python: force=True) replaces it")


def _reason(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: the disk is full. Nothing was left behind"
    return f"{path} cannot be written: {error.strerror or error}"


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
