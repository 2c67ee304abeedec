"""Whether this host's processes are in cgroups of version 2, of which events have the id."""

from __future__ import annotations

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


def cgroup_root(mounts: str | None = None) -> str:
    """Where the hierarchy of version 2 is mounted; empty where it is not.

    `mounts` is the text of /proc/self/mounts, in which a space is written in octal.
    """
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    for line in text.splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return place.encode().decode("unicode_escape")
    return ""
