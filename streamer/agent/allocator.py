"""Tells the C library's allocator what kind of program this is."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
KEPT_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Let glibc keep up to 32 MiB of freed memory instead of giving it back at once.

    Every drained batch is encoded into a buffer of some hundred KiB, which glibc would map anew
    and return to the kernel each time: the page faults are an eighth of the CPU time of a run to
    a file. Other C libraries are left alone. Call it before there are threads.
    """
    # An environment variable of glibc's would not reach a process that has started.
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
