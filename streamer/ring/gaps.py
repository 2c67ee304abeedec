"""From gaps in the sequence to losses: pure bookkeeping, no I/O, time is handed in.

A missing number is not a loss at once: a program that was interrupted between taking its number
and reserving its record arrives a little late, behind the program that interrupted it. So a gap
waits for `grace_ns`, and then until the reader has seen all that was in the ring by that time (it
may have been paused); it gives back what arrives meanwhile, and only then counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

GRACE_NS = 500_000_000
"""How long a record may be late. An interrupt takes microseconds; a preempted task up to this."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Sequence numbers of one CPU that will not come. `count` excludes numbers never used."""

    cpu: int
    first: int
    last: int
    count: int


@dataclass(frozen=True, slots=True)
class _Gap:
    cpu: int
    first: int
    last: int
    due_ns: int
    tail: bool
    mark: int | None = None  # position of the ring when it was due


class GapTracker:
    """Gaps of one ring, on every CPU."""

    def __init__(self, grace_ns: int = GRACE_NS) -> None:
        """`grace_ns`: how long to wait for a record that is late."""
        self._grace_ns = grace_ns
        self._gaps: list[_Gap] = []
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
        first = max(first, self._told.get(cpu, 0) + 1)
        if not any(gap.tail and gap.cpu == cpu for gap in self._gaps):
            self._open(cpu, first, last, now_ns, tail=True)

    def expire(
        self, now_ns: int, next_seq: Callable[[int], int], *, produced: int = 0, consumed: int = 0
    ) -> Iterator[Loss]:
        """The losses that are certain now.

        `next_seq(cpu)` is the number that the ring expects; `produced` and `consumed` are the
        positions up to which it has been written and read, in bytes.
        """
        gaps, self._gaps = self._gaps, []
        for gap in gaps:
            if gap.mark is None and gap.due_ns <= now_ns:
                gap = replace(gap, mark=produced)
            if gap.mark is None or gap.mark > consumed:
                self._gaps.append(gap)
                continue
            loss = self._settle(gap, next_seq)
            if loss is not None:
                yield loss

    def _open(self, cpu: int, first: int, last: int, now_ns: int, tail: bool = False) -> None:
        if first <= last:
            self._gaps.append(_Gap(cpu, first, last, now_ns + self._grace_ns, tail))

    def _fill(self, cpu: int, seq: int) -> None:
        for i, gap in enumerate(self._gaps):
            if gap.cpu == cpu and not gap.tail and gap.first <= seq <= gap.last:
                parts = (replace(gap, last=seq - 1), replace(gap, first=seq + 1))
                self._gaps[i : i + 1] = [part for part in parts if part.first <= part.last]
                return

    def _settle(self, gap: _Gap, next_seq: Callable[[int], int]) -> Loss | None:
        first = gap.first
        if gap.tail:
            # What the ring has passed since then has come, or is a gap of its own.
            first = max(first, next_seq(gap.cpu))
            if first > gap.last:
                return None
            self._told[gap.cpu] = gap.last
        missing = gap.last - first + 1
        unused = min(missing, self._unused.get(gap.cpu, 0))
        if unused:
            self._unused[gap.cpu] -= unused
        return Loss(gap.cpu, first, gap.last, missing - unused) if missing > unused else None
