"""A grace period of the kernel: what every BPF program that runs now has done is there after it."""

from __future__ import annotations

import ctypes
import os
import platform

# Of linux/membarrier.h, and the call's number, for which the C library has no function.
_GLOBAL = 1
_NUMBERS = {"x86_64": 324, "aarch64": 283}


def wait_for_programs() -> None:
    """Wait until every BPF program that is running has ended. Takes tens of milliseconds.

    Programs run as readers of RCU (those that may sleep, of which this agent has none, do not), and
    this call returns when all of them that were there have ended. It needs no privilege. With a
    single CPU online it returns at once: programs have ended then only where the kernel does not
    preempt them (`kernel/sched/membarrier.c`).

    Raises:
        OSError: the kernel cannot: it was built without, or it leaves some CPUs alone
            (`nohz_full`).
    """
    number = _NUMBERS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    words = (ctypes.c_long(one) for one in (number, _GLOBAL, 0, 0))
    if libc.syscall(*words):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
