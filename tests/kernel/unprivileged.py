"""What any user can do: become one that nobody else is, and have namespaces of one's own."""

from __future__ import annotations

import ctypes
import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernel.roles import bring_up_loopback

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_DUMPABLE = 4

# Of this run alone, its actors included: another on the same machine must not be taken for it.
UID = int(os.environ.setdefault("STREAMER_TEST_UID", str(1_000_000 + os.getpid())))

_libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a function of the C library. Raises OSError if it is negative."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def become(uid: int) -> None:
    """Be that user and group, without any privilege, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # The files in /proc/self are root's until this is said.
    checked(_libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")


def unshare(flags: int) -> None:
    checked(_libc.unshare(flags), "unshare")


def own_namespaces(flags: int) -> None:
    """As any user can: a user namespace in which one is root, and others that belong to it."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | flags)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if flags & CLONE_NEWNET:
        bring_up_loopback()


def mount(source: str, target: str, kind: str = "", flags: int = 0) -> None:
    words = (source.encode(), target.encode(), kind.encode() or None)
    checked(_libc.mount(*words, ctypes.c_ulong(flags), None), f"mount {target}")


def bind_mount(source: str, target: str) -> None:
    mount(source, target, flags=MS_BIND)


def unmount(target: str, flags: int = 0) -> None:
    checked(_libc.umount2(target.encode(), flags), f"umount {target}")


def in_child(function: Callable[..., Any], *arguments: Any) -> int:
    """Call the function in a forked process that keeps its name. Its pid, when it has ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"a child failed: {status}"
    return pid


def mount_namespace() -> int:
    """Inode number of the calling process's."""
    return os.stat("/proc/self/ns/mnt").st_ino


def more_descriptors(count: int) -> None:
    """Raise the limit of descriptors to `count`, for this process and its children."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, most)))
