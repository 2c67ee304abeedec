"""Reads tables of counters, and finds what has changed in them since the last time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import size_of

Change = tuple[int, tuple[int, ...], tuple[int, ...]]
"""An entry: its index, and its words before and now."""

_PAGE = 4096


class CounterTable:
    """An array of counters that only grow, shared with programs: entries of a few 64-bit words.

    Most of it never changes: what is equal is found out a page at a time. Programs count while it
    is read, so the words of an entry can be of different moments, a few packets apart; that is in
    the next difference.
    """

    def __init__(self, memory: mmap.mmap, size: int, words: int) -> None:
        """`memory` holds `size` bytes of entries of so many `words`."""
        if _PAGE % (8 * words) or size % _PAGE:
            raise ValueError(f"entries of {words} words do not fill the pages of {size} bytes")
        self._memory = memory
        self._words = words
        self._before = bytearray(size)

    def changes(self) -> Iterator[Change]:
        """The entries that have changed since the last time, in order."""
        for at in range(0, len(self._before), _PAGE):
            page = self._memory[at : at + _PAGE]
            if page != self._before[at : at + _PAGE]:
                yield from self._changes_of(at, page)
                self._before[at : at + _PAGE] = page

    def _changes_of(self, at: int, page: bytes) -> Iterator[Change]:
        before = memoryview(self._before)[at : at + _PAGE].cast("Q").tolist()
        now = memoryview(page).cast("Q").tolist()
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
