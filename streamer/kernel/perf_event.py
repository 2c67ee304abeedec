"""Opens perf events by the system call: libbpf attaches to one, and does not open it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Mapping

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_ATTR_BYTES = 64  # PERF_ATTR_SIZE_VER0
_BY_FREQUENCY = 1 << 10  # of the flag bits: the period is a rate
_CLOSE_ON_EXEC = 8
_TYPE_SOFTWARE, _BPF_OUTPUT, _SAMPLE_RAW = 1, 10, 1 << 10
_TIME_RUNNING = 2  # of the read format: behind the count
_BY_WATERMARK = 1 << 14  # of the flag bits: bytes, and not records, wake the reader
_SET_OUTPUT = 0x2405  # PERF_EVENT_IOC_SET_OUTPUT

CYCLES, CLOCK = "cpu-cycles", "cpu-clock"
SOURCES: Mapping[str, tuple[int, int]] = {CYCLES: (0, 0), CLOCK: (1, 0)}
"""What samples can be taken by, best first: type and config of the event.

Cycles interrupt code that holds interrupts off as well; virtual machines seldom have them."""


def open_sampling(cpu: int, rate: int, source: str = CLOCK) -> int:
    """A descriptor of samples on `cpu`, `rate` times a second by that of `SOURCES`.

    Raises:
        OSError: the kernel refused.
    """
    kind, config = SOURCES[source]
    # struct perf_event_attr: type, size, config, rate, what is sampled, read format, flags, …
    return _open(
        cpu,
        struct.pack("<IIQQQQQIIQ", kind, _ATTR_BYTES, config, rate, 0, 0, _BY_FREQUENCY, 0, 0, 0),
    )


def open_output(cpu: int, wakeup_bytes: int = 0) -> int:
    """A descriptor of what programs write on `cpu`, by `bpf_perf_event_output()`.

    The reader is woken when so many further bytes are there; 0: by each record.

    Raises:
        OSError: the kernel refused; ENODEV: the CPU is not up.
    """
    flags, wakeup = (_BY_WATERMARK, wakeup_bytes) if wakeup_bytes else (0, 1)
    return _open(
        cpu,
        struct.pack(
            "<IIQQQQQIIQ",
            _TYPE_SOFTWARE,
            _ATTR_BYTES,
            _BPF_OUTPUT,
            1,
            _SAMPLE_RAW,
            _TIME_RUNNING,
            flags,
            wakeup,
            0,
            0,
        ),
    )


def time_running(event: int) -> int:
    """For how long its CPU has had it in force, in ns: once that was down, it stands still.

    Of what `open_output` opened. Raises OSError.
    """
    _, running = struct.unpack("<QQ", os.read(event, 16))
    return int(running)


def write_where(event: int, other: int) -> None:
    """Let what comes by `event` go to the buffer of `other`, which is mapped. Raises OSError."""
    fcntl.ioctl(event, _SET_OUTPUT, other)


def _open(cpu: int, attributes: bytes) -> int:
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
