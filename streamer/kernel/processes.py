"""Where the code of other processes comes from: looked up in /proc, with privileges.

Whoever is looked at chooses what is there, and may change it meanwhile. So a file is opened by its
mapping, which no name can lead elsewhere, and only where it is on a file system that answers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_MAPS_BYTES = 8 << 20
"""The most that is read of a process's list of mappings: a process can have 65,530 of them."""
MOST_NAME = 64
"""Characters of a file's name."""

_START, _ARGUMENTS = 22, 48  # which fields of stat they are, from 1
_EXECUTABLE = 2  # place of the `x` in the permissions of a mapping
_TICK_NS = 10_000_000  # USER_HZ is 100 on every architecture that we know
_DELETED = b" (deleted)"

# Whoever may mount a file system of his own could let whoever opens its files wait for ever.
_ANSWERING = frozenset(
    [
        *("bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay"),
        *("ramfs", "rootfs", "squashfs", "tmpfs", "ubifs", "vfat", "xfs", "zfs"),
    ]
)


class Module(NamedTuple):
    """A mapping of a process: of a file, or, without device and inode, of none.

    `name` is the last part of the file's path, or `[heap]` and the like, or empty. `first` and
    `last` are the addresses that name it below /proc/PID/map_files.
    """

    name: str
    device: int
    inode: int
    first: int
    last: int


class Located(NamedTuple):
    """Per address its place in `modules`, or -1, and the offset within the file (or mapping)."""

    modules: list[Module]
    places: list[tuple[int, int]]


def locate(pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
    """Where these addresses are in the process that started at `start`, ns since boot.

    `image` is the address of its arguments when the addresses were taken, which is another one
    after an exec.

    Raises:
        OSError: the process is gone (ESRCH), or may not be looked at.
    """
    _check(pid, start, image)
    modules: list[Module] = []
    found: dict[int, tuple[int, int]] = {}
    wanted = sorted(set(addresses), reverse=True)
    for first, last, offset, module in _mappings(pid):
        while wanted and wanted[-1] < first:
            wanted.pop()
        if not wanted:
            break
        if wanted[-1] < last:
            modules.append(module)
        while wanted and wanted[-1] < last:
            address = wanted.pop()
            found[address] = len(modules) - 1, address - first + offset
    _check(pid, start, image)  # all of it was that process's
    return Located(modules, [found.get(address, (-1, 0)) for address in addresses])


def _check(pid: int, start: int, image: int) -> None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    fields = line[line.rfind(b")") + 2 :].split()  # from the third on
    same = int(fields[_START - 3]) == start // _TICK_NS and int(fields[_ARGUMENTS - 3]) == image
    if not same:
        raise ProcessLookupError(errno.ESRCH, "another program runs there now")


def _mappings(pid: int) -> Iterator[tuple[int, int, int, Module]]:
    """First and last address, offset and module of each executable mapping, in order."""
    size = 0
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            size += len(line)
            if size > MOST_MAPS_BYTES:
                return
            span, mode, offset, device, inode, *path = line.rstrip(b"\n").split(maxsplit=5)
            if mode[_EXECUTABLE] != ord("x"):
                continue
            first, last = (int(one, 16) for one in span.split(b"-"))
            major, minor = (int(one, 16) for one in device.split(b":"))
            name = _name_of(path[0] if path else b"")
            number = int(inode)
            at = int(offset, 16) if number else 0
            yield first, last, at, Module(name, os.makedev(major, minor), number, first, last)


def _name_of(path: bytes) -> str:
    name = path.removesuffix(_DELETED).rpartition(b"/")[2]
    return name.decode("utf-8", "replace")[:MOST_NAME]


def open_module(pid: int, start: int, image: int, first: int, last: int) -> int:
    """A descriptor to read the file of which code is mapped there, in the process that `locate`
    was asked about: another may have its pid meanwhile, or its place in memory after an exec.

    Raises:
        OSError: there is none any more, or it is a device's, or on a file system that may not
            answer; or the process is gone (ESRCH).
    """
    fd = _open_mapping(pid, first, last)
    try:
        _check(pid, start, image)  # then it was that process's
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_mapping(pid: int, first: int, last: int) -> int:
    if not any((one.first, one.last) == (first, last) for *_, one in _mappings(pid)):
        raise OSError(errno.ENOENT, "no code is mapped there")  # but perhaps data, which is secret
    link = f"/proc/{pid}/map_files/{first:x}-{last:x}"
    handle = os.open(link, os.O_PATH | os.O_CLOEXEC)  # asks no file system for anything
    try:
        kind = _file_system_of(handle, pid)
        # An overlay answers as well as what it is made of, which whoever mounted it has chosen.
        if kind not in _ANSWERING or (kind == "overlay" and not _is_initial_user_namespace(pid)):
            raise OSError(errno.EOPNOTSUPP, f"not opened on {kind or 'an unknown file system'}")
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EOPNOTSUPP, "not a regular file")  # to open a device does things
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{handle}", flags)
    finally:
        os.close(handle)


def _is_initial_user_namespace(pid: int) -> bool:
    """Whether mounts that the process sees are an administrator's, as of this one."""
    theirs, ours = (os.stat(f"/proc/{one}/ns/user") for one in (pid, "self"))
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _file_system_of(handle: int, pid: int) -> str:
    """The type of the file system; empty if its mount is in no mount namespace that we see."""
    with open(f"/proc/self/fdinfo/{handle}") as file:
        info = dict(line.split(":", 1) for line in file)
    mount = info["mnt_id"].strip()
    for place in (f"/proc/{pid}/mountinfo", "/proc/self/mountinfo"):
        with open(place, "rb") as lines:
            for line in lines:
                number, *_ = line.split(maxsplit=1)
                if number.decode() == mount:
                    _, _, behind = line.partition(b" - ")
                    return behind.split()[0].decode("utf-8", "replace")
    return ""
