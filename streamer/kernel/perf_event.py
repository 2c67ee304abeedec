"""Opens perf events by the system call: libbpf attaches to one, and does not open it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_TYPE_SOFTWARE, _CPU_CLOCK = 1, 0
_ATTR_BYTES = 64  # PERF_ATTR_SIZE_VER0
_BY_FREQUENCY = 1 << 10  # of the flag bits: the period is a rate
_CLOSE_ON_EXEC = 8


def open_sampling(cpu: int, rate: int) -> int:
    """A descriptor of the software clock's samples on `cpu`, `rate` times a second.

    Raises:
        OSError: the kernel refused.
    """
    # struct perf_event_attr: type, size, config, rate, what is sampled, read format, flags, …
    attributes = struct.pack(
        "<IIQQQQQIIQ",
        _TYPE_SOFTWARE,
        _ATTR_BYTES,
        _CPU_CLOCK,
        rate,
        0,
        0,
        _BY_FREQUENCY,
        0,
        0,
        0,
    )
    libc = ctypes.CDLL(None, use_errno=True)
    number = _PERF_EVENT_OPEN[platform.machine()]
    every_process, no_group = ctypes.c_long(-1), ctypes.c_long(-1)
    fd: int = libc.syscall(
        ctypes.c_long(number),
        attributes,
        every_process,
        ctypes.c_long(cpu),
        no_group,
        ctypes.c_long(_CLOSE_ON_EXEC),
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd
