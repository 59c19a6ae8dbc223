"""Files that are either whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import SaveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Fills a new, empty file, given its path.
Fill = Callable[[Path], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write(path: Path, fill: Fill, *, force: bool = False) -> None:
    """Write the file `path` by calling `fill` with the path of a new, empty file to write to.

    That is a temporary file, in a folder beside `path`; it reaches the disk, then takes the name `path` in one step. If
    anything fails on the way, what stood at `path` before still does and the temporary file is gone; one that a killed
    process left is removed by the next `write` of that path. A symbolic link is followed, and an existing file's mode
    kept.

    Raises:
        SaveError: the folder is missing or read-only, the disk is full, or `path` exists and `force` is not set.
    """
    check(path, force=force)
    target = Path(os.path.realpath(path))
    with _reported(path), _temporary(target) as temporary:
        _fill(temporary, fill, target)
        _place(temporary, target, path, force=force)
        _sync_folder(target.parent)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """`write`, of a text."""

    def fill(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write(path, fill, force=force)


def write_together(folder: Path, fills: Mapping[str, Fill], marker: str, *, force: bool = False) -> None:
    """Write files of one folder, each by its entry in `fills`, so that a folder with the file `marker` is always whole.

    `marker`, one of them, says by being there that the others belong together. All are written as temporary files first
    and reach the disk. Then the old marker goes, the others take their names, and the new marker is the last to. The
    folder is made if it is missing. If anything fails on the way, the files that were there before are there again.

    Raises:
        SaveError: as for `write`; without `force`, where one of the files exists.
    """
    check_together(folder, fills, force=force)
    home = Path(os.path.realpath(folder))
    with _reported(folder), contextlib.ExitStack() as stack:
        if not home.exists():
            home.mkdir()
            stack.callback(_remove_if_empty, home)
        temporaries: dict[str, Path] = {}
        for name, fill in fills.items():
            temporaries[name] = stack.enter_context(_temporary(home / name))
            _fill(temporaries[name], fill, home / name)
        with _alone(home):
            check_together(folder, fills, force=force)
            _exchange(home, temporaries, marker)


def check(path: Path, *, force: bool = False) -> None:
    """`SaveError` where `write` would fail for a reason that shows before the work is done."""
    with _reported(path):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise SaveError(f"{path} is a folder; name a file in it")
        _check_folder(target.parent, path)
        if target.exists():
            if not target.is_file():
                raise SaveError(f"{path} is not a regular file; name another one")
            if not force:
                raise _exists(path)


def check_together(folder: Path, names: Iterable[str], *, force: bool = False) -> None:
    """`SaveError` where `write_together` would fail for a reason that shows before the work is done."""
    with _reported(folder):
        home = Path(os.path.realpath(folder))
        if not home.exists():
            _check_folder(home.parent, folder)
            return
        if not home.is_dir():
            raise SaveError(f"{folder} is a file; name a folder")
        _check_folder(home, folder)
        for name in names:
            if (home / name).is_dir():
                raise SaveError(f"{folder} holds a folder {name}, where a file is to go; name another folder")
            if os.path.lexists(home / name) and not force:
                raise _exists(folder / name)


def _check_folder(folder: Path, path: Path) -> None:
    if not folder.is_dir():
        raise SaveError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(f"{path} cannot be written: the folder {folder} is read-only. Name another place with -o")


def _exists(path: Path) -> SaveError:
    return SaveError(f"{path} exists already; --force (in Python: force=True) replaces it")


# -- temporary files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """The path of a file to be made, in a folder of its own beside `target` that is removed at the end.

    In a folder, because what fills it may make more files: safetensors writes one beside and renames it.
    """
    if fcntl is not None:
        for stale in _beside(target, "tmp"):
            _remove_if_dead(stale)
    folder, handle = _locked_folder(target)
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _fill(temporary: Path, fill: Fill, target: Path) -> None:
    """Make the temporary file, fill it, and see it on the disk, with the mode of `target`, or of any new file."""
    with open(temporary, "xb"):
        pass
    mode = (target if target.exists() else temporary).stat().st_mode
    fill(temporary)
    _sync(temporary, os.O_RDWR)
    with contextlib.suppress(OSError):  # safetensors makes files that only their owner can read
        os.chmod(temporary, stat.S_IMODE(mode))


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside `target`, and the handle that locks it: a lock ends with its process, and tells it is alive."""
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        os.mkdir(folder, 0o700)
        if fcntl is None:
            return folder, None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            os.rmdir(folder)
            raise
        # Between its making and its locking another process may have taken it for a dead one's.
        if _lock(handle) is not False and folder.exists():
            return folder, handle
        os.close(handle)


def _remove_if_dead(folder: Path) -> None:
    """Remove a temporary folder unless a living process holds it, or it cannot be told."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if _lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _beside(target: Path, suffix: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{suffix}")
    return [target.with_name(found) for found in os.listdir(target.parent) if name.fullmatch(found)]


def _lock(handle: int) -> bool | None:
    """Lock an open folder; False where another process has it, None where folders cannot be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# -- into place -----------------------------------------------------------------------------------------------------------


def _place(temporary: Path, target: Path, path: Path, *, force: bool) -> None:
    """Give a finished file its name."""
    if not force:
        try:
            # Unlike a renaming this fails where someone has made a file of that name since it was looked for.
            os.link(temporary, target)
            return
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError:  # a file system without links
            check(path)
    os.replace(temporary, target)


def _exchange(home: Path, temporaries: Mapping[str, Path], marker: str) -> None:
    """Put finished files in the places of old ones; what fails is undone."""
    token = secrets.token_hex(4)
    others = [home / name for name in temporaries if name != marker]
    with contextlib.ExitStack() as undo:

        def step_aside(path: Path) -> None:
            if os.path.lexists(path):
                old = path.with_name(f".{path.name}.{token}.old")
                undo.callback(_rename_if_there, old, path)
                os.rename(path, old)

        def take_place(path: Path) -> None:
            undo.callback(path.unlink, missing_ok=True)
            os.rename(temporaries[path.name], path)

        # The folder is synced between the steps, for they must not reach the disk in another order.
        step_aside(home / marker)
        _sync_folder(home)
        for path in others:
            step_aside(path)
            take_place(path)
        _sync_folder(home)
        take_place(home / marker)
        _sync_folder(home)
        undo.pop_all()
    for path in (*others, home / marker):
        for old in _beside(path, "old"):  # an earlier process may have been killed just now
            with contextlib.suppress(OSError):
                old.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is, where the file system can lock a folder."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _rename_if_there(path: Path, name: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, name)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # A new name is durable after this; some file systems cannot do it, and the files are whole all the same.
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Inside, what the system refuses is a `SaveError` about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise SaveError(f"{path} cannot be written: the disk is full. Nothing was left behind") from error
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error
