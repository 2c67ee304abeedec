"""Looks into /proc/PID for the worker, which may see its own only."""

from __future__ import annotations

import os
from typing import NamedTuple

from streamer.privilege.requests import PROC_LINKS

MOST_BYTES = 1 << 16
"""The most that is read of a file; the command line of a process can have megabytes."""
_RSS = 24  # which field of stat it is, from 1


class Found(NamedTuple):
    """The content of a file, or what a link points to. `cut`: there is more."""

    data: bytes
    cut: bool


def look_up(pid: int, name: str) -> Found:
    """A file or link below /proc/PID, which has to be one of those in `requests.py`.

    Raises:
        OSError: the process is gone, or has no such thing.
    """
    path = f"/proc/{pid}/{name}"
    if name in PROC_LINKS:
        return Found(os.fsencode(os.readlink(path)), False)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _read(fd)
    finally:
        os.close(fd)
    return Found(_without_addresses(found.data), found.cut) if name == "stat" else found


def _without_addresses(stat: bytes) -> bytes:
    """A `stat` up to its field `rss`: behind it are addresses, which attacks need.

    The kernel keeps them from whoever may not trace the process; the helper may, for its other
    look-ups.
    """
    name_end = stat.rfind(b")") + 1  # a process may have parentheses and spaces in its name
    fields = stat[name_end:].split()[: _RSS - 2]
    return stat[:name_end] + b" " + b" ".join(fields) + b"\n"


def _read(fd: int) -> Found:
    data = b""
    while len(data) <= MOST_BYTES:
        part = os.read(fd, MOST_BYTES + 1 - len(data))
        if not part:
            return Found(data, False)
        data += part
    return Found(data[:MOST_BYTES], True)
