"""Memory that is not given back to the system between calls, so that calls are timed and not the system's page faults."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# From glibc's malloc.h, with its defaults.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65536}

# Freed memory is never trimmed, and grown by 64 MiB at a time. M_MMAP_THRESHOLD alone would not do: it is capped below
# the size of a large map, and half of the page faults stay (measured with glibc 2.36). Without mmap there are none.
_KEEPING = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20, _MMAP_MAX: 0}


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Keep freed memory for the next call; False where the C library is not glibc, and nothing is changed.

    With its default settings the allocator maps large blocks anew each time, and the system makes their pages at first
    touch: 25 to 78 ms for an output of 60 MB, of every contender alike, which would make ratios look better than they are.
    A few calls to warm up have to come first all the same: blocks come to lie in different places. Afterwards the
    defaults are set again and the memory is given back.
    """
    libc = _glibc()
    if libc is None:
        yield False
        return
    taken = [libc.mallopt(option, value) for option, value in _KEEPING.items()]
    try:
        yield all(taken)
    finally:
        for option, value in _DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    # Others, musl among them, have no such function, or one that does nothing.
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
