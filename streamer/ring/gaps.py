"""From gaps in the sequence to losses: pure bookkeeping, no I/O, time is handed in.

A missing number is not a loss at once: a program that was interrupted between taking its number
and reserving its record arrives a little late, behind the program that interrupted it. So a gap
waits for `grace_ns`, and then until the reader has seen all that was in the ring by that time (it
may have been paused); it gives back what arrives meanwhile, and only then counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

GRACE_NS = 500_000_000
"""How long a record may be late. An interrupt takes microseconds; a preempted task up to this."""

MOST_GAPS = 64
"""Gaps of one CPU that wait, before they are joined."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Sequence numbers of one CPU that will not come.

    `count` of those from `first` to `last`: it excludes numbers never used, and where many gaps
    were joined, what came between them.
    """

    cpu: int
    first: int
    last: int
    count: int


@dataclass(slots=True)
class _Gap:
    first: int
    last: int
    missing: int  # fewer than from first to last where gaps were joined
    due_ns: int
    tail: bool
    mark: int | None = None  # position of the ring when it was due

    @property
    def exact(self) -> bool:
        return self.missing == self.last - self.first + 1


class GapTracker:
    """Gaps of one ring, on every CPU.

    Where a CPU has very many that wait, the newest are joined: an overload can make one for each
    record that is read.
    """

    def __init__(self, grace_ns: int = GRACE_NS, most: int = MOST_GAPS) -> None:
        """`grace_ns`: how long to wait for a record that is late; `most` gaps of each CPU wait."""
        self._grace_ns = grace_ns
        self._most = most
        self._gaps: dict[int, list[_Gap]] = {}
        self._unused: dict[int, int] = {}
        self._told: dict[int, int] = {}

    def feed(self, gaps: Iterable[tuple[str, int, int, int]], now_ns: int) -> None:
        """Take the anomalies of a drain: `(what, cpu, first, last)` as `Ring.drain` gives them."""
        for what, cpu, first, last in gaps:
            if what == "missing":
                self._open(cpu, max(first, self._told.get(cpu, 0) + 1), last, now_ns)
            elif what == "late":
                self._fill(cpu, first)
            else:
                self._unused[cpu] = self._unused.get(cpu, 0) + first

    def tail(self, cpu: int, first: int, last: int, now_ns: int) -> None:
        """Numbers taken in the kernel, of which an empty ring showed no record."""
        # What an earlier look found keeps its time to come; only what is behind it is new.
        known = max((gap.last for gap in self._gaps.get(cpu, ()) if gap.tail), default=0)
        first = max(first, self._told.get(cpu, 0) + 1, known + 1)
        self._open(cpu, first, last, now_ns, tail=True)

    def expire(
        self,
        now_ns: int,
        next_seq: Callable[[int], int],
        produced: Callable[[int], int],
        consumed: Callable[[int], int],
    ) -> Iterator[Loss]:
        """The losses that are certain now.

        `next_seq(cpu)` is the number that the ring expects; `produced(cpu)` and `consumed(cpu)`
        are the positions up to which it has been written and read, in bytes.
        """
        for cpu, gaps in self._gaps.items():
            waiting = []
            for gap in gaps:
                if gap.mark is None and gap.due_ns <= now_ns:
                    gap.mark = produced(cpu)
                if gap.mark is None or gap.mark > consumed(cpu):
                    waiting.append(gap)
                    continue
                loss = self._settle(cpu, gap, next_seq)
                if loss is not None:
                    yield loss
            gaps[:] = waiting

    def complete(self, cpu: int, passed: int) -> int:
        """The last number before which none is still waited for.

        `passed` is the last that the ring has passed; behind it may be some that were told as lost.
        """
        firsts = (gap.first - 1 for gap in self._gaps.get(cpu, ()))
        return min((max(passed, self._told.get(cpu, 0)), *firsts))

    def _open(self, cpu: int, first: int, last: int, now_ns: int, tail: bool = False) -> None:
        if first > last:
            return
        gaps = self._gaps.setdefault(cpu, [])
        due_ns = now_ns + self._grace_ns
        newest = gaps[-1] if len(gaps) >= self._most else None
        if newest is None or tail or newest.tail or newest.mark is not None:
            gaps.append(_Gap(first, last, last - first + 1, due_ns, tail))
            return
        newest.last = last
        newest.missing += last - first + 1
        newest.due_ns = due_ns

    def _fill(self, cpu: int, seq: int) -> None:
        gaps = self._gaps.get(cpu, [])
        for i, gap in enumerate(gaps):
            if not gap.tail and gap.first <= seq <= gap.last:
                gaps[i : i + 1] = _without(gap, seq)
                return

    def _settle(self, cpu: int, gap: _Gap, next_seq: Callable[[int], int]) -> Loss | None:
        first, missing = gap.first, gap.missing
        if gap.tail:
            # What the ring has passed since then has come, or is a gap of its own.
            first = max(first, next_seq(cpu))
            if first > gap.last:
                return None
            missing = gap.last - first + 1
            self._told[cpu] = gap.last
        unused = min(missing, self._unused.get(cpu, 0))
        if unused:
            self._unused[cpu] -= unused
        return Loss(cpu, first, gap.last, missing - unused) if missing > unused else None


def _without(gap: _Gap, seq: int) -> list[_Gap]:
    """What is left of a gap when one of its numbers came after all."""
    if not gap.exact:
        gap.missing -= 1
        return [gap] if gap.missing else []
    parts = (gap.first, seq - 1), (seq + 1, gap.last)
    return [
        _Gap(first, last, last - first + 1, gap.due_ns, gap.tail, gap.mark)
        for first, last in parts
        if first <= last
    ]
