"""A bound on the processor time that one load may take, for what no other check foresaw.

Libraries build models in plain Python, and some of that is slow for settings that are each harmless: a table of the distances
between all pixels of an image, in four loops. Nobody can list them. So a load that is still busy long after any other would have
been done is ended from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ...errors import SourceError

# The slowest load in the tests takes 8 s, most of it the import of a library.
_SECONDS, _SECONDS_EACH_MEBIBYTE = 60.0, 2.0
# Plain Python objects are counted by nothing else. They are looked at only in a load that is slow already: other threads of
# the process take memory too.
_BYTES, _BYTES_EACH, _SLOW = 4 * 2**30, 8, 5.0

#: Seconds between looks, and between one error and the next.
_EVERY, _AGAIN = 0.2, 2.0


class _TooLong(BaseException):
    """Raised in the loading thread. No `Exception`, because libraries catch those."""


@contextlib.contextmanager
def loading_within_bounds(path: Path) -> Iterator[None]:
    """Inside, a load of `path` that this thread spends too much processor time on ends in a `SourceError`."""
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
    watch = _Watch(size)
    try:
        with watch.over_this_thread():
            yield
    except _TooLong as error:
        if not watch.exceeded:  # of another load, which this one is part of
            raise
        raise SourceError(
            f"{path} is refused: it takes more than {watch.exceeded} to load, far more than a file of its size does. "
            "Where that is meant, build the model yourself and pass it as model="
        ) from error


class _Watch:
    """A thread that looks at another from time to time, and ends what it does."""

    def __init__(self, size: int) -> None:
        self._seconds = _SECONDS + _SECONDS_EACH_MEBIBYTE * size / 2**20
        self._bytes = _BYTES + _BYTES_EACH * size
        self.exceeded = ""

    @contextlib.contextmanager
    def over_this_thread(self) -> Iterator[None]:
        """Inside, `_TooLong` may come at any time; afterwards, never."""
        done, thread = threading.Event(), threading.get_ident()
        watching = threading.Thread(target=self._look, args=(thread, _clock(thread), done), daemon=True)
        try:
            watching.start()
            yield
        finally:
            try:
                done.set()
                watching.join()
                for _ in range(10):  # one that is on its way comes here at the latest
                    pass
            except _TooLong:
                done.set()
                watching.join()
                raise

    def _look(self, thread: int, clock: Callable[[], float], done: threading.Event) -> None:
        begin, held, again = clock(), _resident(), 0.0
        while not done.wait(_EVERY):
            taken = clock() - begin
            if taken > self._seconds:
                self.exceeded = f"{self._seconds:.0f} s"
            elif taken > _SLOW and _resident() - held > self._bytes:
                self.exceeded = f"{self._bytes / 2**30:.0f} GiB of memory"
            # Again, because an error in a `__del__` is lost; but not while the last one cleans up.
            if self.exceeded and taken > again and not _imports(sys._current_frames().get(thread)):
                again = taken + _AGAIN
                _raise_in(thread, _TooLong)


def _clock(thread: int) -> Callable[[], float]:
    """The processor time of a thread, or of the process where the system does not tell."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    if clock_of is None:
        return time.process_time
    number = clock_of(thread)
    return lambda: time.clock_gettime(number)


def _resident() -> int:
    """The memory that the process holds, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported: it would stay half there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Have a thread raise an error at its next instruction.

    It cannot be taken back: Python 3.11 would look for it at every instruction from then on, and hang in a profiler.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
