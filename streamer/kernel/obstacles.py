"""What keeps this process from loading or attaching a program, in words that say what would help.

The kernel answers EPERM or EACCES to all of it. What is missing is found out by looking, and
decided here: nothing in this file has an effect.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from streamer.kernel.capabilities import (
    CAP_DAC_READ_SEARCH,
    CAP_NET_ADMIN,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    effective,
)

_DENIED = (errno.EPERM, errno.EACCES)
_OF_NETWORKS = ("xdp", "tc", "tcx", "classifier", "action", "cgroup", "cgroup_skb", "sockops")
_BY_PERF_EVENTS = ("kprobe", "kretprobe", "tp", "tracepoint", "perf_event")
_PARANOID = "/proc/sys/kernel/perf_event_paranoid"
_MOST_PARANOID = 2
"""The highest level that the kernel's own documentation knows; Debian adds one."""
LOCKDOWN = "/sys/kernel/security/lockdown"
_NO_READING = "confidentiality"
"""The mode of lockdown in which no program may read the kernel's memory."""
_LOCKED = f"the kernel is locked down (lockdown: {_NO_READING})"


class Rights(NamedTuple):
    """What decides about a program, as this process has it.

    `paranoid` is kernel.perf_event_paranoid, `memlock` the bytes that may be locked (None: any),
    `lockdown` the mode, where it can be told.
    """

    capabilities: Collection[int]
    paranoid: int
    memlock: int | None
    lockdown: str


def rights() -> Rights:
    """As they are now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memlock = None if soft == resource.RLIM_INFINITY else soft
    paranoid, mode = "", ""
    with suppress(OSError), open(_PARANOID) as file:
        paranoid = file.read()
    with suppress(OSError):
        mode = lockdown()
    return Rights(effective(), int(paranoid or 0), memlock, mode)


def lockdown() -> str:
    """The mode of it. Raises OSError: there is none, or it cannot be read."""
    with open(LOCKDOWN) as file:
        return file.read().partition("[")[2].partition("]")[0]  # none [integrity] confidentiality


def why_denied(section: str, error: OSError, have: Rights) -> str:
    """What a program of that section lacks here; empty where the error says all there is.

    An empty section stands for the core, which has maps, and programs that read the kernel's
    memory: in lockdown those call a function that there is not (EINVAL).
    """
    if have.lockdown == _NO_READING and error.errno == errno.EINVAL and not section:
        return _LOCKED
    if error.errno not in _DENIED:
        return ""
    kind = section.partition("/")[0].partition(".")[0]
    if kind in _OF_NETWORKS and not {CAP_NET_ADMIN, CAP_SYS_ADMIN} & set(have.capabilities):
        return "CAP_NET_ADMIN is missing"
    paranoid = have.paranoid > _MOST_PARANOID and CAP_SYS_ADMIN not in have.capabilities
    if kind in _BY_PERF_EVENTS and paranoid:
        return f"kernel.perf_event_paranoid is {have.paranoid}, which asks for CAP_SYS_ADMIN"
    if have.lockdown == _NO_READING:
        return _LOCKED
    if have.memlock is not None:
        return (
            f"lockdown, or RLIMIT_MEMLOCK, which is {have.memlock:,} bytes: before Linux 5.11 maps "
            "and programs have to fit into it"
        )
    return ""


def why_no_tracefs(mounted: bool, error: int, have: Collection[int]) -> str:
    """Why tracefs cannot be read, where it is `mounted`, or mounting it ended with `error`."""
    if mounted and CAP_DAC_READ_SEARCH not in have:
        return "tracefs is root's alone: reading it takes root's user id or CAP_DAC_READ_SEARCH"
    return f"tracefs is not mounted and cannot be: {os.strerror(error)}"


def what_is_unnamed(section: str, have: Collection[int]) -> str:
    """What samples of code cannot be given names for want of a capability."""
    if section != "perf_event" or CAP_SYS_PTRACE in have:
        return ""
    return (
        "CAP_SYS_PTRACE is missing, so functions of processes with other rights than the agent's "
        "are not named"
    )


def hides_addresses(kallsyms: int) -> bool:
    """Whether the list of the kernel's functions behind a descriptor has none of their addresses.

    Raises OSError: it cannot be read.
    """
    lines = os.pread(kallsyms, 1 << 18, 0).splitlines()
    return not any(line.partition(b" ")[0].strip(b"0") for line in lines)


KERNEL_UNNAMED = (
    "CAP_SYSLOG is missing, or kernel.kptr_restrict is 2, so functions of the kernel are not named"
)
