"""Memory that whoever uses it waits for, the kernel in the middle of a system call, too."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import struct

from tests.kernel.pace import seconds
from tests.kernel.system import system_call

USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]
# UFFDIO_* and what goes with them, of <linux/userfaultfd.h>.
_API, _REGISTER, _ZERO_PAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
_VERSION, _IF_MISSING = 0xAA, 1
_MESSAGE = 32


class HeldPage:
    """A page that is not there until it is let go, by userfaultfd(2)."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._fd, error, _ = system_call(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        assert self._fd >= 0, os.strerror(error)
        fcntl.ioctl(self._fd, _API, struct.pack("=3Q", _VERSION, 0, 0))
        page = struct.pack("=4Q", self.address, mmap.PAGESIZE, _IF_MISSING, 0)
        fcntl.ioctl(self._fd, _REGISTER, page)

    def wait(self) -> None:
        """Until somebody waits for it."""
        ready, _, _ = select.select([self._fd], [], [], seconds(20))
        assert ready, "nobody has used the page"
        assert len(os.read(self._fd, _MESSAGE)) == _MESSAGE

    def let_go(self) -> None:
        """It is there from now on, and is all zeroes."""
        page = struct.pack("=3Qq", self.address, mmap.PAGESIZE, 0, 0)
        fcntl.ioctl(self._fd, _ZERO_PAGE, page)
