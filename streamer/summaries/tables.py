"""Reads tables of counters, and finds what has changed in them since the last time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import size_of

Change = tuple[int, tuple[int, ...], tuple[int, ...]]
"""An entry: its index, and its words before and now."""

_PAGE = 4096
_ZEROS = bytes(_PAGE)


class CounterTable:
    """An array of counters that only grow, shared with programs: entries of a few 64-bit words.

    Most of it stays zero: what is equal is found out a page at a time, and only pages that are not
    zero are kept, for at many CPUs the whole is more than all else the agent has. Programs count
    while it is read, so the words of an entry can be of different moments, a few packets apart;
    that is in the next difference.
    """

    def __init__(self, memory: mmap.mmap, size: int, words: int) -> None:
        """`memory` holds `size` bytes of entries of so many `words`."""
        if _PAGE % (8 * words) or size % _PAGE:
            raise ValueError(f"entries of {words} words do not fill the pages of {size} bytes")
        self._memory = memory
        self._words = words
        self._size = size
        self._before: dict[int, bytes] = {}  # pages, by where they are

    def changes(self) -> Iterator[Change]:
        """The entries that have changed since the last time, in order."""
        for at in range(0, self._size, _PAGE):
            page, before = self._memory[at : at + _PAGE], self._before.get(at, _ZEROS)
            if page != before:
                yield from self._changes_of(at, before, page)
                self._before[at] = page

    def _changes_of(self, at: int, old_page: bytes, new_page: bytes) -> Iterator[Change]:
        before, now = (memoryview(page).cast("Q").tolist() for page in (old_page, new_page))
        first, step = at // (8 * self._words), self._words
        for start in range(0, len(now), step):
            old, new = tuple(before[start : start + step]), tuple(now[start : start + step])
            if old != new:
                yield first + start // step, old, new


def names_of(enum: str) -> dict[int, str]:
    """Name of each number of a `packet_…` enum, as published: in lower case, without its prefix."""
    return {
        number: name.partition("_")[2].lower()
        for name, number, _ in CONTRACT[f"enum {enum}"]
        if not name.endswith("_END")
    }


def entries_of(struct: str) -> int:
    """Words of 64 bits of a struct of the contract."""
    return size_of(struct) // 8
