"""Files that are either whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import SaveError, UpswapWarning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Fills a new, empty file, given its path.
Fill = Callable[[Path], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)

#: Seconds after which files that wait to take their places are a dead process's, where folders cannot be locked.
_ABANDONED = 60.0

#: Ends the name that a file is kept under while a new one takes its place.
_OLD = ".old"


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
    with _reported(path), _temporary(target) as folder:
        temporary = folder / "new"  # a name as long as the target's might make the path too long
        _fill(temporary, fill, target)
        _place(temporary, target, path, force=force)
        _sync_folder(target.parent)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """`write`, of a text."""

    def fill(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write(path, fill, force=force)


def write_together(
    folder: Path, fills: Mapping[str, Fill], marker: str, names: Collection[str] = (), *, force: bool = False
) -> None:
    """Write files of one folder, each by its entry in `fills`, so that a folder with the file `marker` is always whole.

    `marker`, one of them, says by being there that the others belong together. All are written as temporary files first
    and reach the disk. Then the old marker goes, the others take their names, and the new marker is the last to. The
    folder is made if it is missing. If anything fails on the way, the files that were there before are there again. If
    the process is killed on the way, `recover` and the next `write_together` put the rest of the new files in place. `names` are
    those that others of this folder may write.

    Raises:
        SaveError: as for `write`; without `force`, where one of the files exists.
    """
    check_together(folder, fills, force=force)
    home = Path(os.path.realpath(folder))
    with _reported(folder), contextlib.ExitStack() as stack:
        if not home.exists():
            home.mkdir(exist_ok=True)  # another process may have made it just now
            stack.callback(_remove_if_empty, home)
        staged = stack.enter_context(_temporary(home / marker))
        for name, fill in fills.items():
            _fill(staged / name, fill, home / name)
        _sync_folder(staged)
        with _alone(home) as alone:
            _finish(folder, home, marker, {*fills, *names}, alone)
            check_together(folder, fills, force=force)
            _exchange(home, staged, fills, marker)


def recover(folder: Path, marker: str, names: Collection[str]) -> None:
    """Finish a `write_together` that a kill cut off while its files took their places, and warn that this was done.

    All of the new files are on the disk by then, and so it can always go on. Where a living process is at it, wait. Files of
    other names than `names` are not put in place: what looks like a cut-off save may come from a stranger.

    Raises:
        SaveError: the files cannot be moved, in a folder that is read-only for example.
    """
    with _reported(folder):
        home = Path(os.path.realpath(folder))
        if home.is_dir() and any(_is_complete(staged, home, marker) for staged in _beside(home / marker, "new")):
            with _alone(home) as alone:
                _finish(folder, home, marker, names, alone)


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


def state_of(file: Path | int) -> tuple[int, int, int] | None:
    """What tells that a file, or an open one by its descriptor, has been written to; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


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
    """The path of a new folder beside `target`, for what is to go there, that is removed at the end.

    A folder, because what fills a file may make more: safetensors writes one beside and renames it.
    """
    if fcntl is not None:
        for stale in _beside(target, "tmp"):
            _remove_if_dead(stale)
    folder, handle = _locked_folder(target)
    try:
        yield folder
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
        folder = target.with_name(f".upswap-{_digest(target)}-{secrets.token_hex(4)}.tmp")
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
    """The temporary folders of `target`, a dead process's among them."""
    name = re.compile(rf"\.upswap-{_digest(target)}-[0-9a-f]{{8}}\.{suffix}")
    return [target.with_name(found) for found in os.listdir(target.parent) if name.fullmatch(found)]


def _digest(target: Path) -> str:
    """The name of `target` in few letters: with the name itself, that of a temporary folder might be too long."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]


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


def _exchange(home: Path, staged: Path, names: Iterable[str], marker: str) -> None:
    """Put the finished files in `staged` in the places of old ones; what fails is undone.

    Once `staged` is called `.new`, a kill leaves all that `_finish` needs.
    """
    waiting = staged.with_suffix(".new")
    done: list[tuple[Path, Path]] = []

    def move(path: Path, to: Path) -> None:
        done.append((path, to))
        os.rename(path, to)

    def step_aside(name: str) -> None:
        if os.path.lexists(home / name):
            move(home / name, waiting / f"{name}{_OLD}")

    try:
        # The folder is synced between the steps, for they must not reach the disk in another order.
        move(staged, waiting)
        _sync_folder(home)
        step_aside(marker)
        _sync_folder(home)
        for name in names:
            if name != marker:
                step_aside(name)
                move(waiting / name, home / name)
        _sync_folder(home)
        move(waiting / marker, home / marker)
        _sync_folder(home)
    except BaseException:
        for path, to in reversed(done):
            with contextlib.suppress(FileNotFoundError):
                os.replace(to, path)
        raise
    shutil.rmtree(waiting, ignore_errors=True)


def _finish(folder: Path, home: Path, marker: str, names: Collection[str], alone: bool) -> None:
    """Do the rest of each `_exchange` whose process is dead, and remove what it left behind."""
    for waiting in _beside(home / marker, "new"):
        if waiting.is_symlink() or not (alone or time.time() - waiting.stat().st_mtime > _ABANDONED):
            continue
        if _is_complete(waiting, home, marker):
            for name in os.listdir(waiting):
                if name != marker and name in names:
                    os.replace(waiting / name, home / name)
            _sync_folder(home)
            os.replace(waiting / marker, home / marker)
            _sync_folder(home)
            text = f"{folder}: a save that was cut off has been finished. The folder holds the model of that save"
            warnings.warn(text, UpswapWarning, stacklevel=4)
        shutil.rmtree(waiting, ignore_errors=True)


def _is_complete(waiting: Path, home: Path, marker: str) -> bool:
    """Whether the rest of an exchange is in `waiting`: with a marker in `home`, what is there is whole already."""
    return not os.path.lexists(home / marker) and (waiting / marker).is_file() and not waiting.is_symlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Inside, no other process is; False where the file system cannot lock a folder, and so nothing is sure."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


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
