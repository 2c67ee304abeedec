"""Whether this host's processes are in cgroups of version 2, of which events have the id."""

from __future__ import annotations

import os
from pathlib import Path

IN_ROOT = (
    "cgroups: this host's controllers are of version 1, and where nothing puts processes into "
    "version 2 groups, cgroup_id is 1 for all"
)


def what_is_unseen(own: str | None = None) -> str:
    """What cannot be told of cgroups on this host; empty where it can.

    `own` is the text of /proc/self/cgroup: a line `ID:CONTROLLERS:PATH` for each hierarchy. That
    of version 2 has number 0 and no controllers, and is missing as long as nobody mounted it.
    """
    text = Path("/proc/self/cgroup").read_text() if own is None else own
    lines = [line.split(":", 2) for line in text.splitlines()]
    version_1 = any(names and not names.startswith("name=") for _, names, _ in lines)
    path = next((path for number, _, path in lines if number == "0"), "/")
    return IN_ROOT if version_1 and path == "/" else ""


_INITIAL = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO: the inode of the host's cgroup namespace


def cgroup_root(mounts: str | None = None, namespace: int | None = None) -> str:
    """Where all of the hierarchy of version 2 is mounted; empty where it is not.

    A container has a namespace of cgroups, and in it the hierarchy begins with its own: programs
    that are attached there see nothing of others. Where all of it is mounted besides, its root
    is shown as a path that leads out of that, `/../..`.

    `mounts` is the text of /proc/self/mountinfo, in which a space is written in octal.
    """
    text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    if namespace is None:
        namespace = os.stat("/proc/self/ns/cgroup").st_ino
    for line in text.splitlines():
        before, _, behind = line.partition(" - ")
        _, _, _, root, place, *_ = before.split(" ")
        whole = root == "/" if namespace == _INITIAL else not root.replace("/..", "")
        if behind.startswith("cgroup2 ") and whole:
            return place.encode().decode("unicode_escape")
    return ""
