"""Which capabilities the process has, and giving them up."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from streamer.errors import PrivilegeError

_BITS = {
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_NEEDED = ("CAP_BPF", "CAP_PERFMON")
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_NO_NEW_PRIVS = 38


def held() -> dict[str, bool]:
    """The capabilities that matter here, and whether they are effective in this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    return {name: bool(effective >> bit & 1) for name, bit in _BITS.items()}


def missing(have: dict[str, bool]) -> tuple[str, ...]:
    """The capabilities that are needed and not there. CAP_SYS_ADMIN stands for each of them."""
    if have["CAP_SYS_ADMIN"]:
        return ()
    return tuple(name for name in _NEEDED if not have[name])


def require() -> None:
    """Make sure that programs can be loaded and attached.

    Raises:
        PrivilegeError: names what is missing and the command to use.
    """
    lacking = missing(held())
    if lacking:
        raise PrivilegeError(
            f"missing {', '.join(lacking)}: run it as root, as in `sudo streamer run`"
        )


def drop_all() -> None:
    """Give up every capability for good, and the chance to gain any by an exec.

    Applies to the calling thread, and to those that it starts from then on.

    Raises:
        PrivilegeError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise PrivilegeError(f"cannot set no_new_privs: {os.strerror(ctypes.get_errno())}")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing):
        raise PrivilegeError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")
