"""Functions of the kernel and its modules, out of /proc/kallsyms."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable

MOST_BYTES = 64 << 20
MOST_AWAY = 1 << 20
"""Bytes from a function's start behind which an address is not taken for its: no size is known."""

_CHUNK = 1 << 18
_TEXT = b"tTwW"
KERNEL = "[kernel]"


class KernelFunctions:
    """The functions that a list names, by address."""

    def __init__(self, fd: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Read the list behind `fd`, which was opened with privileges, anew from its beginning.

        Where kptr_restrict hides the addresses, there are none; nor when there is to be a `stop`
        before the end of the list. Raises OSError.
        """
        self._starts = array("Q")
        self._names: list[str] = []
        found = sorted(self._listed(fd, stop))
        self._starts.extend(address for address, _ in found)
        self._names = [name for _, name in found]

    def __bool__(self) -> bool:
        """Whether any are known."""
        return bool(self._names)

    def name_at(self, address: int) -> str | None:
        """The function at an address: [kernel]`NAME or [MODULE]`NAME; None if it is not known."""
        i = bisect_right(self._starts, address) - 1
        if i < 0 or address - self._starts[i] > MOST_AWAY:
            return None
        return self._names[i]

    def _listed(self, fd: int, stop: Callable[[], bool]) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        rest, at = b"", 0
        while at < MOST_BYTES:
            if stop():
                return []
            data = os.pread(fd, _CHUNK, at)
            if not data:
                break
            at += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                words = line.split(maxsplit=3)
                if len(words) >= 3 and words[1] in _TEXT and (address := int(words[0], 16)):
                    module = words[3].decode() if len(words) > 3 else KERNEL
                    found.append((address, f"{module}`{words[2].decode()}"))
        return found
