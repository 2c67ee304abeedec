"""The account of each ring, CPU and kind, all of one CPU of a moment at which it closes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from streamer.agent.counters import CpuCounts, KernelCounters
from streamer.events.kinds import KINDS
from streamer.events.stream import CellCounts, CpuMark, KindCounts
from streamer.kernel.tags import RINGS

Cells = Mapping[int, Mapping[str, int]]
"""Events by CPU and kind, which has one ring."""


class CpuAccount(NamedTuple):
    """What the kernel counted on one CPU, and what was read of it by then."""

    counts: CpuCounts
    read: Mapping[str, int]

    def cells(self, ring: str | None = None) -> Iterator[tuple[str, CellCounts]]:
        """The kinds of a ring, or of all."""
        for kind, row in self.counts.kinds.items():
            if ring is None or KINDS[kind].ring == ring:
                yield kind, (*row, self.read.get(kind, 0))


class CpuAccounts:
    """Looks at the account of every CPU."""

    def __init__(self, counters: KernelCounters, read: Callable[[int], Mapping[str, int]]) -> None:
        """`read` says how many events of a CPU were read so far, per kind."""
        self._counters = counters
        self._read = read
        self._last: dict[int, CpuAccount] = {}

    def look(self, *, final: bool = False) -> Mapping[int, CpuAccount]:
        """By CPU.

        Programs count while one looks. Of a CPU whose account did not close in many looks it is
        that of the time before; unless it is `final`, when nothing is counted any more.
        """
        for cpu in range(self._counters.cpus):
            counts = self._counters.of_cpu(cpu)
            if counts.closes or final or cpu not in self._last:
                self._last[cpu] = CpuAccount(counts, self._read(cpu))
        return dict(self._last)


def by_kind(accounts: Iterable[CpuAccount]) -> dict[str, KindCounts]:
    """The sums over all CPUs, in the order of the kinds."""
    found: dict[str, KindCounts] = {}
    for account in accounts:
        for kind, cell in account.cells():
            before = found.get(kind)
            sums = cell if before is None else map(sum, zip(_row(before), cell, strict=True))
            found[kind] = KindCounts(*sums)
    return {kind: found[kind] for kind in KINDS if kind in found}


def unread(accounts: Mapping[int, CpuAccount], ring: str) -> dict[int, Counter[str]]:
    """What nobody has read of a ring, and did not get lost, by the account."""
    found = {}
    for cpu, account in accounts.items():
        left: Counter[str] = Counter()
        for kind, (produced, filtered, shed, lost, read) in account.cells(ring):
            left[kind] = produced - filtered - shed - lost - read
        found[cpu] = +left
    return found


def marks(
    accounts: Mapping[int, CpuAccount],
    passed: Mapping[tuple[str, int], int],
    watermark: Callable[[str, int], int],
) -> list[CpuMark]:
    """Of each ring and CPU that was used; `passed` is the reader's.

    `watermark` gives the time that nothing older follows of a ring and CPU, or 0.
    """
    found = []
    for cpu, account in accounts.items():
        for ring, seq, skipped in zip(RINGS, *account.counts[1:], strict=True):
            kinds = dict(account.cells(ring))
            if seq or kinds:
                read = min(passed.get((ring, cpu), 0), seq)
                found.append(CpuMark(ring, cpu, seq, read, skipped, watermark(ring, cpu), kinds))
    return found


def _row(counts: KindCounts) -> CellCounts:
    return counts.produced, counts.filtered, counts.shed, counts.lost, counts.read
