"""Names of containers and services by the id of their cgroup, for people who look at a host."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

_ID = re.compile(r"(?:^|[-/_])([0-9a-f]{64})(?:\.scope)?(?:/|$)")
_UNIT = re.compile(r"([^/]+\.(?:service|scope|slice))(?:/|$)")
LOOK_SECONDS = 5.0
"""How often at most the hierarchy is gone through for an id that is not known."""
MOST_DIRECTORIES = 100_000


def name_of(path: str) -> str:
    """What a cgroup is called, by its path below the root of the hierarchy."""
    found = _ID.findall(path)
    if found:
        return f"container {found[-1][:12]}"
    units = _UNIT.findall(path)
    return units[-1] if units else path or "/"


class Containers:
    """Knows the cgroups of a hierarchy: an id is the inode number of a directory."""

    def __init__(self, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`root` is where the hierarchy is mounted; empty: nowhere."""
        self._root = root
        self._clock = clock
        self._known: dict[int, str] = {}
        self._looked = float("-inf")

    def name(self, cgroup: int) -> str:
        """The name; `cgroup ID` of one that is not there any more."""
        if cgroup not in self._known and self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            self._look()
        return self._known.get(cgroup, f"cgroup {cgroup}")

    def _look(self) -> None:
        if not self._root:
            return
        for number, (place, _, _) in enumerate(os.walk(self._root)):
            if number >= MOST_DIRECTORIES:
                return
            try:
                inode = os.stat(place).st_ino
            except OSError:  # it went while we looked
                continue
            self._known[inode] = name_of(os.path.relpath(place, self._root).removeprefix("."))
