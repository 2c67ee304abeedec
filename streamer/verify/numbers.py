"""A set of numbers that come mostly in order: as ranges, so that it takes memory for gaps only."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
"""First and last of a range of numbers, both included."""

MOST = (1 << 63) - 1
"""The largest number."""


class Numbers:
    """Numbers from 0 to `MOST`, 16 bytes for each range of them."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        """The numbers of `spans`, in any order."""
        self._starts = array("Q")
        self._ends = array("Q")  # behind the last
        for first, last in spans:
            self.add_span(first, last)

    def __len__(self) -> int:
        """How many ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Span]:
        """The ranges, ascending; no two of them touch."""
        for first, end in zip(self._starts, self._ends, strict=True):
            yield first, end - 1

    def __contains__(self, number: int) -> bool:
        """Whether it is one of them."""
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._ends[at]

    @property
    def total(self) -> int:
        """How many numbers."""
        return sum(self._ends) - sum(self._starts)

    @property
    def first(self) -> int:
        """The lowest; 0 if there is none."""
        return self._starts[0] if self._starts else 0

    @property
    def last(self) -> int:
        """The highest; 0 if there is none."""
        return self._ends[-1] - 1 if self._ends else 0

    def extend_to(self, end: int) -> None:
        """Let the last range go up to the one before `end`: those between have come in order."""
        self._ends[-1] = end

    def add(self, number: int) -> bool:
        """Add a number. False: it was there."""
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, number)
        if at and number < ends[at - 1]:
            return False
        touches_last = at > 0 and ends[at - 1] == number
        touches_next = at < len(starts) and starts[at] == number + 1
        if touches_last and touches_next:
            ends[at - 1] = ends[at]
            del starts[at], ends[at]
        elif touches_last:
            ends[at - 1] = number + 1
        elif touches_next:
            starts[at] = number
        else:
            starts.insert(at, number)
            ends.insert(at, number + 1)
        return True

    def add_span(self, first: int, last: int) -> None:
        """Add the numbers from `first` to `last`."""
        starts, ends = self._starts, self._ends
        low = bisect_right(starts, first)
        if low and ends[low - 1] >= first:  # it reaches into, or touches, the one before
            low -= 1
        high = bisect_right(starts, last + 1)
        if low < high:
            first, last = min(first, starts[low]), max(last, ends[high - 1] - 1)
        starts[low:high] = array("Q", (first,))
        ends[low:high] = array("Q", (last + 1,))

    def missing(self, first: int, last: int) -> Iterator[Span]:
        """The ranges from `first` to `last` that are not in it."""
        at = max(bisect_right(self._starts, first) - 1, 0)
        for i in range(at, len(self._starts)):
            start, end = self._starts[i], self._ends[i]
            if start > last:
                break
            if start > first:
                yield first, start - 1
            first = max(first, end)
        if first <= last:
            yield first, last

    def common(self, first: int, last: int) -> Iterator[Span]:
        """The ranges from `first` to `last` that are in it."""
        at = max(bisect_right(self._starts, first) - 1, 0)
        for i in range(at, len(self._starts)):
            start, end = self._starts[i], self._ends[i]
            if start > last:
                return
            if end > first:
                yield max(start, first), min(end - 1, last)
