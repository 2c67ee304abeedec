"""System calls made without Python's own doings around them, and what the kernel has."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from streamer.kernel.perf_event import CLOCK, CYCLES, open_sampling

AT_FDCWD = -100
OPEN = {"x86_64": 2}.get(platform.machine())  # newer architectures do without
OPENAT = {"x86_64": 257, "aarch64": 56}[platform.machine()]
OPENAT2 = 437
EXECVEAT = {"x86_64": 322, "aarch64": 281}[platform.machine()]

BTF = Path(os.environ.get("STREAMER_TEST_BTF", "/sys/kernel/btf/vmlinux"))
"""The kernel's type information, also where the agent is to find none."""

WITHOUT_BTF = not Path("/sys/kernel/btf/vmlinux").exists()
"""Whether the agent finds none, unless one is named."""

IN_GUEST = os.path.exists("/.out/.guest/settings")
"""Whether this is a virtual machine of tools/kernels.sh, where nobody else is."""

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(number: int, *arguments: Any) -> tuple[int, int, int]:
    """Result, error number and the nanoseconds that it took at most."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    before = time.monotonic_ns()
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    most_ns = time.monotonic_ns() - before
    return result, ctypes.get_errno() if result < 0 else 0, most_ns


@cache
def kernel_knows(name: str) -> bool:
    """Whether the kernel's type information has that name, such as that of a helper."""
    return b"\0%b\0" % name.encode() in BTF.read_bytes()


def kernel_is(major: int, minor: int) -> bool:
    """Whether the kernel is that version, or newer."""
    found = os.uname().release.split("-")[0].split("+")[0].split(".")[:2]
    return tuple(map(int, found)) >= (major, minor)


def preempts_tracepoints() -> bool:
    """Whether programs at raw tracepoints can be preempted here: from 7.0 on."""
    return kernel_knows("tracepoint_srcu_srcu_data") and not kernel_knows("srcu_free_old_probes")


def sampled_by() -> str:
    """The way at which a sampling program is attached: cycles, on a machine that has them."""
    try:
        os.close(open_sampling(min(os.sched_getaffinity(0)), 1, CYCLES))
    except OSError:
        return f"perf_event {CLOCK}"
    return f"perf_event {CYCLES}"


@contextmanager
def many_descriptors() -> Iterator[None]:
    """As many as may be, for this process."""
    had, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (had, most))


def open_missing(prefix: str, count: int, digits: int = 0) -> None:
    """Try to open `count` files that are not there: `prefix` and a number each, of so many digits
    at least.
    """
    for i in range(count):
        system_call(OPENAT, AT_FDCWD, f"{prefix}{i:0{digits}}".encode(), 0, 0)
