"""Landlock: keeps the worker from writing to files and from other processes of the same user.

The system-call filter sees no paths. Without this, a process that may open files could write to
/proc/PID/mem of whatever else runs as the same user, and to whatever everybody may write to.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from streamer.errors import PrivilegeError
from streamer.privilege.syscalls import number_of

_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1
_WRITE_FILE = 1 << 1
# EXECUTE, WRITE_FILE, REMOVE_DIR, REMOVE_FILE, and MAKE_ everything; not READ_FILE and READ_DIR.
_HANDLED = 0x1FFF & ~(1 << 2 | 1 << 3)
# REFER, to move a file to another directory, is refused unless it is allowed.
_TRUNCATE = 1 << 14  # from the third version on
_SCOPES = 1 << 0 | 1 << 1  # abstract sockets and signals, from the sixth on


def restrict() -> None:
    """Keep this thread, and those that it starts, from writing to any file but /dev/null.

    Processes outside cannot be traced from then on, nor their memory be opened; from Linux 6.12
    on, no signals can be sent to them. `no_new_privs` must be set. Nothing on kernels without it.

    Raises:
        PrivilegeError: the kernel refused.
    """
    version = _call("landlock_create_ruleset", None, 0, _VERSION)
    if version < 0:
        return
    handled = _HANDLED | (_TRUNCATE if version >= 3 else 0)
    # struct landlock_ruleset_attr: files, TCP ports, scopes; older kernels know its beginning.
    attributes = struct.pack("<QQQ", handled, 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 8
    ruleset = _checked("landlock_create_ruleset", attributes, size, 0)
    try:
        _allow_null(ruleset)
        _checked("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow_null(ruleset: int) -> None:
    fd = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    try:
        # struct landlock_path_beneath_attr, which is packed.
        rule = struct.pack("<Qi", _WRITE_FILE, fd)
        _checked("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _checked(name: str, *arguments: int | bytes | None) -> int:
    result = _call(name, *arguments)
    if result < 0:
        raise PrivilegeError(f"{name}: {os.strerror(-result)}")
    return result


def _call(name: str, *arguments: int | bytes | None) -> int:
    """The result, or the negative error number."""
    number = number_of(name, os.uname().machine)
    libc = ctypes.CDLL(None, use_errno=True)
    words = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    if number is None:
        return -errno.ENOSYS
    result: int = libc.syscall(ctypes.c_long(number), *words)
    return -ctypes.get_errno() if result < 0 else result
