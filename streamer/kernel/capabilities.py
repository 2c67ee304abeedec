"""Which capabilities the process has, and giving them up."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamer.errors import PrivilegeError

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 6, 7, 8
CAP_NET_ADMIN = 12
CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21
CAP_SYS_RESOURCE = 24
CAP_PERFMON, CAP_BPF = 38, 39
CAP_CHECKPOINT_RESTORE = 40

NAMES = {
    CAP_BPF: "CAP_BPF",
    CAP_PERFMON: "CAP_PERFMON",
    CAP_NET_ADMIN: "CAP_NET_ADMIN",
    CAP_SYS_ADMIN: "CAP_SYS_ADMIN",
    CAP_SYS_PTRACE: "CAP_SYS_PTRACE",
    CAP_SYS_RESOURCE: "CAP_SYS_RESOURCE",
    CAP_DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH",
    CAP_SETUID: "CAP_SETUID",
    CAP_SETGID: "CAP_SETGID",
}
"""Those that make a difference to the agent."""

_BITS = {"CAP_SYS_ADMIN": CAP_SYS_ADMIN, "CAP_PERFMON": CAP_PERFMON, "CAP_BPF": CAP_BPF}
_NEEDED = ("CAP_BPF", "CAP_PERFMON")
_VERSION_3 = 0x20080522
_LAST = Path("/proc/sys/kernel/cap_last_cap")
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4


def effective() -> frozenset[int]:
    """The numbers of the capabilities in force in this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    mask = int(line.split()[1], 16)
    return frozenset(bit for bit in range(64) if mask >> bit & 1)


def of_host() -> frozenset[int]:
    """The capabilities in force that are the host's: in a user namespace they are not."""
    return effective() if _maps_every_user(Path("/proc/self/uid_map").read_text()) else frozenset()


def _maps_every_user(uid_map: str) -> bool:
    return uid_map.split() == ["0", "0", "4294967295"]


def name_of(capability: int) -> str:
    """Its name, such as CAP_BPF."""
    return NAMES.get(capability, f"capability {capability}")


def held() -> dict[str, bool]:
    """The capabilities that loading takes, and whether they are in force in this process."""
    have = effective()
    return {name: bit in have for name, bit in _BITS.items()}


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


def needed_by_helper(
    have: Collection[int], *, writes: bool, filters_packets: bool, profiles: bool = False
) -> frozenset[int]:
    """What the helper keeps of the capabilities `have`.

    BPF and perf events; the /proc of processes of any user, which CAP_SYS_PTRACE opens; and
    files of any user, to be written only where something `writes`. Programs at interfaces and
    cgroups could stop packets: CAP_NET_ADMIN is kept only where there are such. Where something
    `profiles`, CAP_CHECKPOINT_RESTORE opens the files that processes have mapped.
    """
    wanted = {CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH}
    if writes:
        wanted.add(CAP_DAC_OVERRIDE)
    if filters_packets:
        wanted.add(CAP_NET_ADMIN)
    if profiles:
        wanted.add(CAP_CHECKPOINT_RESTORE)
    if not {CAP_BPF, CAP_PERFMON} <= set(have):  # before Linux 5.8, and where it is not granted
        wanted.add(CAP_SYS_ADMIN)
    return frozenset(wanted & set(have))


def limit_to(kept: Collection[int]) -> None:
    """Have only these capabilities from now on, and no exec that could bring others.

    For a process with one thread: capabilities belong to threads.

    Raises:
        PrivilegeError: the kernel refused.
    """
    empty_bounding_set()
    _prctl("clear ambient capabilities", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _capset(kept, kept)


@contextmanager
def only(some: Collection[int]) -> Iterator[None]:
    """Of the capabilities in force leave these, while the context lasts.

    Raises:
        PrivilegeError: the kernel refused.
    """
    have = effective()
    _capset(some, have)
    try:
        yield
    finally:
        _capset(have, have)


def _capset(in_force: Collection[int], permitted: Collection[int]) -> None:
    force, permit = (sum(1 << bit for bit in bits) for bits in (in_force, permitted))
    low = 0xFFFFFFFF
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # Effective, permitted and inheritable; the upper halves come after the lower ones.
    sets = (ctypes.c_uint32 * 6)(force & low, permit & low, 0, force >> 32, permit >> 32, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, sets):
        raise PrivilegeError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")


def empty_bounding_set() -> None:
    """Let no exec bring any capability, where that is possible: it takes CAP_SETPCAP.

    Raises:
        PrivilegeError: the kernel refused.
    """
    if CAP_SETPCAP in effective():
        for bit in range(int(_LAST.read_text()) + 1):
            _prctl("empty the bounding set", _PR_CAPBSET_DROP, bit)


def forgo_gains() -> None:
    """Set `no_new_privs`: no exec can gain anything. Seccomp filters need it, too.

    Raises:
        PrivilegeError: the kernel refused.
    """
    _prctl("set no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)


def hide_memory() -> None:
    """Let no process without CAP_SYS_PTRACE trace this one, or read its memory or descriptors.

    Raises:
        PrivilegeError: the kernel refused.
    """
    _prctl("become undumpable", _PR_SET_DUMPABLE, 0)


def _prctl(what: str, option: int, argument: int) -> None:
    words = (ctypes.c_ulong(one) for one in (argument, 0, 0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(ctypes.c_int(option), *words):
        raise PrivilegeError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")
